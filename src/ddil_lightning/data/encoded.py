"""Captions and images after the frozen encoders: what training reads, in memory or mapped from a cache file."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.data.captions import Captions, RawBatch
from ddil_lightning.files import replacing
from ddil_lightning.messages import counted
from ddil_lightning.processes import Processes
from ddil_lightning.records import CaptionBatch, Context, cat, take, to

CHUNK, LOADED = 256, 2**24
"""Rows that are encoded at a time, and how many pixels of theirs may be in memory: 64 images of 512 x 512."""
DAMAGED = "delete it, or give another data.cache"
UNKNOWN = "?" * 10  # the number of skipped rows until all are encoded; a file that still says so is not whole


class Encoded(Captions):
    """Latents [N, C, h, w] (None without images) and a context of N captions. Rows are float32 when they are taken."""

    file: Path | None = None
    """The cache that the rows are mapped from."""

    def __init__(self, latents: Tensor | None, c: Context) -> None:
        self.latents, self.c = latents, c

    def __len__(self) -> int:
        return len(self.c.text)

    def __getitem__(self, index: Sequence[int]) -> CaptionBatch:  # type: ignore[override]
        rows = torch.as_tensor(index)
        return to(CaptionBatch(None if self.latents is None else self.latents[rows], take(self.c, rows), rows), torch.float32)

    @classmethod
    def load(cls, path: Path) -> Encoded:
        """Map what `write` wrote: rows come from the disk when they are taken. Raises ValueError for a damaged file or none of ours."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            parts = load_file(path)
            made = cls(parts.pop("latents", None), Context(**parts))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"the cache {path} is damaged or none of ours ({error}): {DAMAGED}") from error
        made.file = path.resolve()
        return made


class Notices:
    """Rows of a data set that were skipped and pictures that were enlarged: the first of each is told at once, and how many at the end."""

    def __init__(self) -> None:
        self.skipped: dict[str, None] = {}
        self.enlarged, self._read = 0, 0

    def hear(self, raw: RawBatch, rows: int) -> None:
        """Note a batch of a set of `rows` rows. Pictures are counted in the first pass alone."""
        log = logging.getLogger(__name__)
        if raw.skipped and not self.skipped:
            log.warning(f"{raw.skipped[0]}; it is skipped, the next row takes its place, and data/skipped counts such rows")
        self.skipped |= dict.fromkeys(raw.skipped)
        if self._read < rows:
            if raw.enlarged and not self.enlarged:
                log.warning("some pictures are smaller than data.captions.size and are enlarged, which blurs them")
            self.enlarged += raw.enlarged
            self._read += len(raw.rows)

    def recall(self, path: Path, count: int) -> None:
        """Note the rows that were skipped when the cache `path` was made: whoever trains on it reads no row that says so."""
        self.skipped |= dict.fromkeys(f"skipped row {i} of the cache {path}" for i in range(count))

    def close(self) -> None:
        """Say, at the end of a run, how many rows were skipped and pictures enlarged."""
        log = logging.getLogger(__name__)
        if self.skipped:
            log.warning(f"{len(self.skipped)} rows of the data could not be read and were skipped")
        if self.enlarged:
            log.warning(f"{self.enlarged} of {self._read} pictures were smaller than data.captions.size and were enlarged")


def encode_batch(raw: RawBatch, backbone: Backbone, truncate: bool = False) -> CaptionBatch:
    """One raw batch on the backbone's device."""
    latent = None if raw.pixels is None else backbone.encode_images(raw.pixels)
    return CaptionBatch(latent, backbone.encode_text(raw.prompts, truncate), raw.rows.to(backbone.device))


@torch.no_grad()
def encode(
    captions: Captions, backbone: Backbone, truncate: bool = False, workers: int = 0, notices: Notices | None = None, show: bool = False
) -> Encoded:
    """Every caption and image through the frozen encoders once: an image's VAE costs more than a training step's U-Net forward."""
    made = list(_encoded(captions, range(len(captions)), backbone, truncate, workers, notices or Notices(), show))
    latents = [batch.latent for batch in made if batch.latent is not None]
    return Encoded(torch.cat(latents) if latents else None, cat([batch.c for batch in made]))


def _encoded(
    captions: Captions, rows: range, backbone: Backbone, truncate: bool, workers: int, notices: Notices, show: bool
) -> Iterator[CaptionBatch]:
    """The rows in order, on the CPU; pictures are loaded by as many workers, a bounded number of pixels at a time."""
    chunk = CHUNK
    pixels = captions[rows[:1]].pixels if len(rows) else None
    if pixels is not None:
        chunk = max(1, min(CHUNK, LOADED // math.prod(pixels.shape[2:])))
    parts = [list(rows[i : i + chunk]) for i in range(0, len(rows), chunk)]
    loader = DataLoader(captions, batch_size=None, sampler=parts, num_workers=workers)  # type: ignore[arg-type]
    for raw in counted(loader, len(parts), "encoding the data", show):
        notices.hear(raw, len(captions))
        batch = encode_batch(raw, backbone, truncate)
        yield CaptionBatch(None if batch.latent is None else batch.latent.cpu(), to(batch.c, "cpu"), batch.rows.cpu())


# The cache file ------------------------------------------------------------------------------------------------------------------


def cached(
    path: Path, captions: Captions, backbone: Backbone, truncate: bool, workers: int, notices: Notices, processes: Processes
) -> Encoded:
    """The encoded captions from the file `path`, which is written first if it is not there: every process encodes its share of the rows.

    Half precision, a safetensors file that is mapped and never read whole. Raises ValueError for a file of other captions, other pictures
    or other encoders, whichever row it is, and for one whose prompts may be cut or whose rows were skipped where that is not allowed.
    """
    if isinstance(captions, Encoded):
        if path.is_file() and captions.file != path.resolve():
            raise ValueError(f"the data are encoded already, and the cache {path} would take their place: leave data.cache at true")
        return captions
    if not processes.by_first(path.is_file):
        fresh = {"truncate": str(truncate), "skipped": UNKNOWN}
        origin = processes.by_first(lambda: {**_origin(captions, backbone), **fresh, "content": captions.content()})
        _write(path, captions, backbone, truncate, workers, notices, processes, origin)
    else:
        skipped = processes.by_first(lambda: _check_origin(path, captions, backbone, truncate))
        if processes.first:
            notices.recall(path, skipped)
    found = Encoded.load(path)
    if len(found) != len(captions):
        raise ValueError(f"the cache {path} holds {len(found)} rows and the data set {len(captions)}: {DAMAGED}")
    return found


def _origin(captions: Captions, backbone: Backbone) -> dict[str, str]:
    """What a cache depends on and can be told without reading a picture."""
    stamp = captions.stamp()
    return {"rows": str(len(captions)), "encoders": backbone.encoders(), **({} if stamp is None else {"stamp": stamp})}


def _check_origin(path: Path, captions: Captions, backbone: Backbone, truncate: bool) -> int:
    """How many rows were skipped when a cache was made. Raises ValueError for one that was made from or by something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"the cache {path} is damaged or none of ours ({error}): {DAMAGED}") from error
    mine = _origin(captions, backbone)
    if not {"content", "truncate", "skipped"} <= known.keys() or not known["skipped"].isdigit():
        raise ValueError(f"the cache {path} does not say what it was made from: {DAMAGED}")
    if known.get("encoders") != mine["encoders"]:
        raise ValueError(f"the cache {path} was made by another pipeline's encoders, or in another precision of theirs: {DAMAGED}")
    # The files may have been copied; then their contents decide.
    same = "stamp" in mine and known.get("stamp") == mine["stamp"]
    if known.get("rows") != mine["rows"] or not (same or known["content"] == captions.content()):
        raise ValueError(f"the cache {path} was made from other captions or other pictures: {DAMAGED}")
    if known["truncate"] != "False" and not truncate:
        raise ValueError(f"the cache {path} was made with data.truncate, so that prompts in it may be cut: set data.truncate, or {DAMAGED}")
    skipped = int(known["skipped"])
    if skipped and captions.on_error == "stop":
        raise ValueError(f"the cache {path} was made with {skipped} rows skipped: set data.on_error to skip, or {DAMAGED}")
    return skipped


def _write(
    path: Path,
    captions: Captions,
    backbone: Backbone,
    truncate: bool,
    workers: int,
    notices: Notices,
    processes: Processes,
    origin: Mapping[str, str],
) -> None:
    """Every process encodes rows of its own into one file, whose whole size is taken from the disk first."""
    count, (rank, world) = len(captions), (processes.rank, processes.world)
    mine = range(count * rank // world, count * (rank + 1) // world)

    def share(temporary: Path) -> None:
        columns: dict[str, Any] = {}
        done = mine.start
        for batch in _encoded(captions, mine, backbone, truncate, workers, notices, processes.first):
            values = _columns(batch)
            columns = columns or _mapped(temporary, values, count)
            for name, value in values.items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    where = f"rows {done} to {done + len(value) - 1}"
                    raise ValueError(f"the {name} of {where} are too large for half precision: set data.cache to true")
                columns[name][done : done + len(value)] = value.numpy()
            done += len(batch.rows)
        for column in columns.values():
            column.flush()

    probe = processes.by_all(lambda: _columns(encode_batch(captions[[0]], backbone, truncate)))
    with replacing(path, durable=True) if processes.first else nullcontext(Path()) as temporary:
        place = Path(processes.by_first(lambda: str(_empty(temporary, probe, count, origin))))
        processes.by_all(lambda: share(place))
        skipped = _of_all(notices.skipped)
        processes.by_first(lambda: _say_skipped(place, len(skipped)))
    processes.wait()


def _columns(batch: CaptionBatch) -> dict[str, Tensor]:
    """The tensors of a batch as the file holds them: half precision, but for SDXL's sizes, which are whole numbers."""
    parts = {"latents": batch.latent, **batch.c._asdict()}
    held = {name: value.detach().cpu() for name, value in parts.items() if value is not None}
    return {name: value.half() if value.is_floating_point() and name != "ids" else value for name, value in held.items()}


def _of_all(skipped: Mapping[str, None]) -> set[str]:
    """What all processes have skipped: a row that two of them came by is one row."""
    every: list[Any] = [list(skipped)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        every = every * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, list(skipped))
    return {row for rows in every for row in rows}


KINDS = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}


def _empty(path: Path, probe: Mapping[str, Tensor], count: int, origin: Mapping[str, str]) -> Path:
    """A safetensors file of `count` rows like those of `probe`, with all its room on the disk. Raises OSError where that is missing."""
    table: dict[str, Any] = {"__metadata__": dict(origin)}
    end = 0
    for name, value in probe.items():
        begin, end = end, end + count * value[0].numel() * value.element_size()
        table[name] = {"dtype": KINDS[value.dtype], "shape": [count, *value.shape[1:]], "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of their size
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        file.flush()
        if end and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 8 + len(text), end)
    return path


def _table(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """How long the head of such a file is, and what it says."""
    size = struct.unpack("<Q", file.read(8))[0]
    return size, json.loads(file.read(size))


def _say_skipped(path: Path, count: int) -> None:
    """Put the number of skipped rows, which nobody knows before all are encoded, into the room that the head has kept for it."""
    with path.open("r+b") as file:
        size, table = _table(file)
        table["__metadata__"]["skipped"] = f"{count:0{len(UNKNOWN)}}"
        file.seek(8)
        file.write(json.dumps(table).encode().ljust(size))


def _mapped(path: Path, values: Mapping[str, Tensor], count: int) -> dict[str, Any]:
    """The columns of such a file, for writing."""
    with path.open("rb") as file:
        size, table = _table(file)
    return {
        name: np.memmap(path, value.numpy().dtype, "r+", 8 + size + table[name]["data_offsets"][0], (count, *value.shape[1:]))
        for name, value in values.items()
    }
