"""The cache file: one safetensors file of everything encoded, written by all processes together and mapped afterwards."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.encoded import DAMAGED, Encoded, encode_batch, raw_batches
from ddil_lightning.data.notices import Notices
from ddil_lightning.files import replacing
from ddil_lightning.processes import Processes
from ddil_lightning.records import CaptionBatch
from ddil_lightning.texts import from_json

UNKNOWN = "?" * 10  # the number of skipped rows until all are encoded; a file that still says so is not whole


def cached(
    path: Path, captions: Captions, backbone: Backbone, truncate: bool, workers: int, notices: Notices, processes: Processes
) -> Encoded:
    """The encoded captions from the file `path`, which is written first if it is not there: every process encodes its share of the rows.

    Half precision, a safetensors file that is mapped and never read whole. Raises ValueError for a file of other captions, other pictures
    or other encoders, whichever row it is, for one whose prompts may be cut or whose rows were skipped where that is not allowed, and where
    several machines would write it.
    """
    if isinstance(captions, Encoded):
        if path.is_file() and captions.file != path.resolve():
            raise ValueError(f"the data are encoded already, and the cache {path} would take their place: leave data.cache at true")
        return captions
    if not processes.by_first(path.is_file):
        if processes.nodes > 1:  # one machine's pages of a file that both have mapped overwrite the other's
            raise ValueError(f"the cache {path} is not there, and several machines cannot write one file: encode by ddil-cache first")
        fresh = {"truncate": str(truncate), "skipped": UNKNOWN, "sizes": "own"}
        if processes.by_first(lambda: _has_several(captions)) and processes.first:
            logging.getLogger(__name__).warning(f"the cache {path} holds the first of several captions of a picture: ddil-cache keeps all")
        origin = processes.by_first(lambda: {**_origin(captions, backbone), **fresh, "content": captions.content()})
        _write(path, captions, backbone, truncate, workers, notices, processes, origin)
    else:
        skipped = processes.by_first(lambda: _check_origin(path, captions, backbone, truncate))
        if processes.first:
            notices.recall(skipped)
    found = Encoded.load(path)
    if len(found) != len(captions):
        raise ValueError(f"the cache {path} holds {len(found)} rows and the data set {len(captions)}: {DAMAGED}")
    return found


def _has_several(captions: Captions) -> bool:
    """Whether one of the first rows has several captions; what is wrong with a row is said when it is encoded."""
    try:
        return any(len(texts) > 1 for texts in captions.texts(range(min(64, len(captions)))))
    except (OSError, ValueError):
        return False


def _origin(captions: Captions, backbone: Backbone) -> dict[str, str]:
    """What a cache depends on and can be told without reading a picture."""
    stamp = captions.stamp()
    return {"rows": str(len(captions)), "encoders": backbone.encoders(), **({} if stamp is None else {"stamp": stamp})}


def _check_origin(path: Path, captions: Captions, backbone: Backbone, truncate: bool) -> int:
    """How many rows were skipped when a cache was made. Raises ValueError for one that was made from or by something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            known, told = file.metadata() or {}, any(name.rpartition("/")[2] == "ids" for name in file.keys())  # noqa: SIM118 (no mapping)
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
    if told and "sizes" not in known:
        raise ValueError(f"the cache {path} was made when no picture's own size was kept, which the pipeline is told: {DAMAGED}")
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
    groups = [group.rows.tolist() for group in captions.groups()]
    names = ["" if len(groups) == 1 else f"{i}/" for i in range(len(groups))]
    starts = [len(rows) * processes.rank // processes.world for rows in groups]
    ends = [len(rows) * (processes.rank + 1) // processes.world for rows in groups]
    mine = [rows[start:end] for rows, start, end in zip(groups, starts, ends, strict=True)]

    def share(temporary: Path) -> None:
        columns = _mapped(temporary)
        for group, done, raw in processes.watching(raw_batches(captions, mine, workers, notices, processes.first)):
            first = starts[group] + done
            for name, value in columns_of(encode_batch(raw, backbone, truncate)).items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    where = f"rows {groups[group][first]} to {groups[group][first + len(value) - 1]}"
                    raise ValueError(f"the {name} of {where} are too large for half precision: set data.cache to true")
                columns[names[group] + name][first : first + len(value)] = value.numpy()
        for column in columns.values():
            column.flush()

    def shapes() -> dict[str, tuple[Tensor, int]]:
        found: dict[str, tuple[Tensor, int]] = {}
        for name, rows in zip(names, groups, strict=True):
            probe = columns_of(encode_batch(captions[rows[:1]], backbone, truncate))
            found |= {name + column: (value, len(rows)) for column, value in probe.items()}
        return found

    def begun(temporary: Path) -> Path:
        _empty(temporary, probes, origin)
        columns = _mapped(temporary)
        for name, rows in zip(names, groups, strict=True):
            if name:
                columns[f"{name}rows"][:] = rows
        return temporary

    probes = processes.by_all(shapes)
    probes |= {f"{name}rows": (torch.zeros(1, dtype=torch.long), len(rows)) for name, rows in zip(names, groups, strict=True) if name}
    with ExitStack() as beside:  # of the first alone: what the system refuses there is told to the others, who would wait for days
        place = Path(processes.by_first(lambda: str(begun(beside.enter_context(replacing(path, durable=True))))))
        processes.by_all(lambda: share(place))
        notices.join(processes)
        processes.by_first(lambda: _say_skipped(place, len(notices.skipped)))
        processes.by_first(beside.close)  # which gives the file its name


def columns_of(batch: CaptionBatch) -> dict[str, Tensor]:
    """The tensors of a batch as the file holds them: half precision, but for SDXL's sizes, which are whole numbers."""
    parts = {"latents": batch.latent, **batch.c._asdict()}
    held = {name: value.detach().cpu() for name, value in parts.items() if value is not None}
    return {name: value.half() if value.is_floating_point() and name != "ids" else value for name, value in held.items()}


KINDS = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}


def _empty(path: Path, probes: Mapping[str, tuple[Tensor, int]], origin: Mapping[str, str]) -> Path:
    """A safetensors file of columns, each of so many rows like its probe, with all its room on the disk.

    Raises OSError where that is missing.
    """
    table: dict[str, Any] = {"__metadata__": dict(origin)}
    end = 0
    for name, (value, count) in probes.items():
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
    return size, from_json(file.read(size))


def _say_skipped(path: Path, count: int) -> None:
    """Put the number of skipped rows, which nobody knows before all are encoded, into the room that the head has kept for it."""
    with path.open("r+b") as file:
        size, table = _table(file)
        table["__metadata__"]["skipped"] = f"{count:0{len(UNKNOWN)}}"
        file.seek(8)
        file.write(json.dumps(table).encode().ljust(size))


def _mapped(path: Path) -> dict[str, Any]:
    """The columns of such a file, for writing."""
    with path.open("rb") as file:
        size, table = _table(file)
    kinds = {text: torch.empty(0, dtype=kind).numpy().dtype for kind, text in KINDS.items()}
    return {
        name: np.memmap(path, kinds[column["dtype"]], "r+", 8 + size + column["data_offsets"][0], tuple(column["shape"]))
        for name, column in table.items()
        if name != "__metadata__"
    }
