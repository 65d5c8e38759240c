"""The captions of a cache folder: each is kept once, and rows have the numbers of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from ddil_lightning.data.shards import packed, read_shard, unpacked, write_shard


def number_captions(folder: Path, rows: Sequence[str], each: int) -> tuple[int, int]:
    """Every caption of the files `rows` once, in files of `each`, and which of them each row has -> how many there are, and in how many
    files."""
    known: dict[bytes, int] = {}
    which: list[Tensor] = []
    fresh: list[str] = []
    files = 0

    def write() -> None:
        nonlocal files, fresh
        _keep(folder / f"captions-{files:05d}.safetensors", packed(fresh))
        files, fresh = files + 1, []

    for name in rows:
        numbers = []
        for text in unpacked(read_shard(folder / name)):
            key = blake2b(text.encode(), digest_size=16).digest()
            if key not in known:
                known[key] = len(known)
                fresh.append(text)
                if len(fresh) == each:
                    write()
            numbers.append(known[key])
        which.append(torch.tensor(numbers, dtype=torch.int32))
    if fresh:
        write()
    _keep(folder / "index.safetensors", {"which": torch.cat(which)})
    return len(known), files


def _keep(file: Path, columns: dict[str, Tensor]) -> None:
    """Write a file, unless it is there as it is to be: a run may read it by now, if another process is through."""
    try:
        there = read_shard(file)
    except ValueError:  # not there, or cut short
        there = {}
    if there.keys() != columns.keys() or any(not torch.equal(there[name], columns[name]) for name in columns):
        write_shard(file, columns, {})
