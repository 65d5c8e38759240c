"""A row's images in a folder: what is there is read, what is missing is drawn, and each picture is written whole or not at all.

So a row that was killed goes on where it stopped, with the numbers of one that was not: images are scored as 8-bit files hold them in
any case, and an image depends on its own seed alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.data.pictures import read_picture
from ddil_lightning.evaluation.batches import as_saved
from ddil_lightning.evaluation.drawing import Cost, Pass, Timed, runs
from ddil_lightning.evaluation.known import machine
from ddil_lightning.evaluation.layouts import grid, laid_out, ungrid
from ddil_lightning.files import PART, read_table, replacing, sweep, write_text
from ddil_lightning.processes import Processes
from ddil_lightning.texts import json_digest

if TYPE_CHECKING:
    from ddil_lightning.evaluation.suite import Suite

STAMP = "generation.json"
"""By what the images of a folder were drawn, and what it took."""
COMPRESSION = 1
"""zlib's level for PNG: the default takes three times as long for files that are a tenth smaller."""


@dataclass(frozen=True)
class Keep:
    """Where images are kept: in `folder`, a folder of its own for every row, laid out by one of `layouts.LAYOUTS`."""

    folder: Path
    layout: str = "folder"

    def of(self, name: str) -> Path:
        """The folder of the row `name`."""
        return self.folder / re.sub(r"[^\w@.+-]+", "-", name)


class Kept:
    """A sampler that keeps its images. Raises ValueError for a folder that holds anything but images of this sampler and suite.

    `about`: what decides on the images besides the suite. Every process reads and writes its own share.
    """

    def __init__(self, keep: Keep, name: str, suite: Suite, about: Mapping[str, Any], sample: Timed, processes: Processes) -> None:
        self.folder, self.sample, self.processes = keep.of(name), sample, processes
        self.passes = {part.name: (part, laid_out(keep.layout, part, suite.notes)) for part in suite.passes()}
        probes = suite.probes
        asked = json_digest([list(suite.prompts), list(probes.prompts)])
        counts = {"prompts": [len(suite.prompts), suite.samples], "probes": [len(probes.prompts), probes.seeds]}
        sampler = {key: value for key, value in about.items() if key != "name"}  # whose folder this is, and no part of the images
        stamp = {"sampler": sampler, "layout": keep.layout, "seed": suite.seed, "images": counts, "prompts": asked}
        self.stamp: dict[str, Any] = json.loads(json.dumps(stamp))
        self.before = Cost(**processes.by_first(self._open))

    def __call__(self, prompts: list[str], seed: int) -> Tensor:
        """The images [N, 3, H, W] in [-1, 1], as their files hold them. Raises ValueError for those that cannot be files."""
        part, layout = next(found for found in self.passes.values() if 0 <= seed - found[0].seed < len(found[0].asked))
        first, k = seed - part.seed, layout.per_file
        files = [self.folder / part.name / layout.file(n) for n in range(first // k, (first + len(prompts)) // k)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(lambda file: read(file, k), files))
            for missing in runs([i for i, images in enumerate(found) if images is None], self.at_once(k)):
                some = slice(missing.start * k, missing.stop * k)
                made = checked(self.sample(prompts[some], seed + some.start), part, first + some.start, len(prompts[some]))
                found[missing.start : missing.stop] = made.split(k)
                list(pool.map(write, files[missing.start : missing.stop], found[missing.start : missing.stop]))
                self._note(self.before + self.sample.cost)
        if len({images.shape for images in found if images is not None}) > 1:
            raise ValueError(f"{self.folder} holds pictures of different sizes: delete those of another size")
        every = torch.cat([images for images in found if images is not None])
        # In the memory layout of a decoder's images: sums are rounded by it, and what was read must give the numbers of what was drawn.
        return every.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1

    def at_once(self, k: int) -> int:
        """How many files of `k` images are drawn before they are written: a kill costs no more than these."""
        return max(1, (self.sample.chunk or 128) // k)

    def close(self, now: Cost) -> Cost:
        """What the images took, with that of earlier runs: `now` is that of this one. Writes what lies beside the pictures."""
        cost = self.before + now

        def write_all() -> None:
            for _, layout in self.passes.values():
                for name, text in layout.texts():
                    write_text(self.folder / name, text)
            self._note(cost)

        self.processes.by_first(write_all)
        return cost

    def _open(self) -> dict[str, Any]:
        """Begin the folder, or look whose it is: the cost of what it holds, without the seconds of another machine."""
        found = read_table(self.folder / STAMP)
        cost, here = found.pop("cost", {}), found.pop("machine", None) == machine()
        if not found and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no {STAMP}: give another folder for the images")
        if found:
            found["sampler"] = {key: value for key, value in dict(found.get("sampler") or {}).items() if key != "name"}
            other = next(differences(found, self.stamp), None)
            if other is not None:
                raise ValueError(f"{self.folder} holds images of another {other}: give another folder, or delete it")
            for leftover in {leftover.parent for leftover in self.folder.rglob(f".*.{PART}")}:
                sweep(leftover, inside=False)
        else:
            write_text(self.folder / STAMP, json.dumps(self.stamp, indent=2) + "\n")
        return cost if here else {key: cost[key] for key in ("images", "evaluations") if key in cost}

    def _note(self, cost: Cost) -> None:
        if self.processes.first:
            write_text(self.folder / STAMP, json.dumps({**self.stamp, "cost": asdict(cost), "machine": machine()}, indent=2) + "\n")


def checked(images: Tensor, part: Pass, first: int, n: int) -> Tensor:
    """A sampler's images of a pass from number `first` on, uint8. Raises ValueError for another count than `n`, and as `as_saved`."""
    if len(images) != n:
        raise ValueError(f"sampler: {len(images)} images for {n} prompts")
    return to_uint8(as_saved(images, partial(part.named, first)))


def differences(found: Mapping[str, Any], asked: Mapping[str, Any], over: str = "") -> Iterator[str]:
    """In which keys two stamps differ, in words."""
    for key in dict.fromkeys([*asked, *found]):
        one, other = found.get(key), asked.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other, f"{over}{key} ")
        elif one != other:
            told = f" ({one}, not {other})" if len(f"{one}{other}") < 80 else ""
            yield f"{over}{key}{told}"


def read(file: Path, k: int) -> Tensor | None:
    """The `k` images [K, 3, H, W], uint8, of a picture; None for one that is missing or not whole."""
    try:
        return ungrid(np.array(read_picture(file)), k)
    except ValueError:
        return None


def write(file: Path, images: Tensor) -> None:
    """Write the images [K, 3, H, W], uint8, as one picture, whole or not at all."""
    from PIL import Image

    with replacing(file) as temporary:
        picture = Image.fromarray(grid(images).permute(1, 2, 0).contiguous().numpy())
        picture.save(temporary, format="PNG", compress_level=COMPRESSION)
