"""Where kept images lie, and what is written beside them: a plain folder, and what the scripts of GenEval and of DPG-Bench read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_lightning.evaluation.drawing import Pass

IDS = ("item_id", "id")
JUDGED = ("tag", "include")
"""What GenEval's script reads of a prompt's line in any case."""
ACROSS = 2
"""Samples beside each other in a picture of DPG-Bench, whose script cuts it at `--resolution` from the left and from the top."""

Notes = Sequence[Mapping[str, Any]]
"""What the file of the prompts says of them besides: the row of each prompt, in their order; nothing where it has no rows."""


class Folder:
    """`00000.png`, `00001.png`, ... and `metadata.jsonl`, which `datasets.load_dataset("imagefolder", ...)` reads."""

    def __init__(self, part: Pass, notes: Notes) -> None:
        self.part, self.per_file = part, 1
        self.notes = notes or [{"prompt": prompt} for prompt in part.asked[:: part.seeds]]

    def file(self, number: int) -> str:
        """The picture `number` below the folder of the pass."""
        return f"{number:05d}.png"

    def texts(self) -> Iterator[tuple[str, str]]:
        """The other files below the folder of the row, by name, once all pictures are there."""
        part, lines = self.part, []
        for i, prompt in enumerate(part.asked):
            lines.append({"file_name": self.file(i), "text": prompt, "prompt": i // part.seeds, "seed": part.seed + i})
        yield f"{part.name}/metadata.jsonl", _lines(lines)


class GenEval(Folder):
    """A folder a prompt, `00000/samples/0000.png` and its `metadata.jsonl`, the line of GenEval's `evaluation_metadata.jsonl`."""

    def __init__(self, part: Pass, notes: Notes) -> None:
        super().__init__(part, notes)
        k, key = next(((k, key) for k, note in enumerate(self.notes) for key in JUDGED if key not in note), (0, None))
        if key is not None:
            raise ValueError(
                f"GenEval judges an image by the line of its prompt, and that of prompt {k} (from 0), {self.notes[k]['prompt']!r}, has no "
                f"{key}: give its evaluation_metadata.jsonl as the captions, or another --layout"
            )

    def file(self, number: int) -> str:
        """The picture `number` below the folder of the pass."""
        return f"{number // self.part.seeds:05d}/samples/{number % self.part.seeds:04d}.png"

    def texts(self) -> Iterator[tuple[str, str]]:
        """The line of each prompt in its folder."""
        for k, note in enumerate(self.notes):
            yield f"{self.part.name}/{k:05d}/metadata.jsonl", _lines([note])


class DPGBench(Folder):
    """A picture a prompt, `ID.png`, with its samples in a grid two across; the ids are those of DPG-Bench's prompts."""

    def __init__(self, part: Pass, notes: Notes) -> None:
        super().__init__(part, notes)
        self.per_file = part.seeds
        if part.seeds > ACROSS**2:
            raise ValueError(f"{part.seeds} images of a prompt: a picture of DPG-Bench holds at most {ACROSS**2}, give fewer by --samples")
        self.ids = [str(next((note[key] for key in IDS if key in note), "")) for note in self.notes]
        lacking = next((k for k, name in enumerate(self.ids) if not name), None)
        if lacking is not None:
            raise ValueError(
                f"DPG-Bench knows a picture by the id of its prompt, and prompt {lacking} (from 0), {self.notes[lacking]['prompt']!r}, has "
                f"none: give its folder of ID.txt as the captions, or a file with {IDS[0]}; or another --layout"
            )
        wrong = next((name for name in self.ids if not re.fullmatch(r"\w[\w-]*", name)), None)  # its script cuts names at their first dot
        twice = len(set(self.ids)) < len(self.ids)
        if wrong is not None or twice:
            what = "two prompts have the same id" if wrong is None else f"the id {wrong!r} is no name of a file"
            raise ValueError(f"{what}, and DPG-Bench knows a picture by it: give every prompt an id of letters and digits")

    def file(self, number: int) -> str:
        """The picture `number` below the folder of the pass."""
        return f"{self.ids[number]}.png"

    def texts(self) -> Iterator[tuple[str, str]]:
        """Nothing but pictures may lie beside these: what they are of stands one folder higher."""
        part = self.part
        lines = [
            {"file_name": f"{part.name}/{self.file(k)}", "text": prompt, "seed": part.seed + k * part.seeds, "samples": part.seeds}
            for k, prompt in enumerate(part.asked[:: part.seeds])
        ]
        yield "metadata.jsonl", _lines(lines)


LAYOUTS: dict[str, type[Folder]] = {"folder": Folder, "geneval": GenEval, "dpg": DPGBench}
"""By the names that the command line takes."""


def laid_out(name: str, part: Pass, notes: Notes) -> Folder:
    """The layout `name` of the images of a pass. The foreign ones are of prompts: probes lie in a plain folder beside them."""
    return LAYOUTS[name](part, notes) if part.name == "prompts" else Folder(part, ())


def grid(images: Tensor) -> Tensor:
    """A picture [3, R H, C W] of up to four images [K, 3, H, W], row by row, black where there is none."""
    k, channels, height, width = images.shape
    across = min(ACROSS, k)
    down = -(-k // across)
    whole = torch.cat([images, images.new_zeros(down * across - k, channels, height, width)])
    return whole.reshape(down, across, channels, height, width).permute(2, 0, 3, 1, 4).reshape(channels, down * height, across * width)


def ungrid(picture: np.ndarray, k: int) -> Tensor:
    """The `k` images [K, 3, H, W], uint8, of a picture [R H, C W, 3] that `grid` has made."""
    across = min(ACROSS, k)
    down = -(-k // across)
    height, width = picture.shape[0] // down, picture.shape[1] // across
    tiles = torch.from_numpy(picture).reshape(down, height, across, width, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(down * across, 3, height, width)[:k]


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    try:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise ValueError(f"what is said of a prompt cannot be written as JSON: {error}") from error
