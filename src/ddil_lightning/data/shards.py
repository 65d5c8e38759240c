"""Files of a cache folder: safetensors that are whole or not there, and columns that go over several of them and are mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.files import replacing
from ddil_lightning.texts import from_json, reason

ABOUT = "about"  # the one name in the metadata of a file: safetensors writes several in an order that changes from process to process


MAPS, OTHERS = Path("/proc/sys/vm/max_map_count"), 4096
"""Where Linux says how many pieces of memory a process may have, of which each mapped file is one; and how many are of something else."""


def too_many(files: int) -> str:
    """Why a process cannot map so many files on this machine, and the remedy; empty where it can."""
    try:
        most = int(MAPS.read_text())
    except (OSError, ValueError):  # another system
        return ""
    if files + OTHERS <= most:
        return ""
    return (
        f"a process of this machine maps {most} pieces of memory (vm.max_map_count): have it raised to {2 * files + OTHERS}, or give "
        "ddil-cache more --shard_rows and a new folder"
    )


def write_shard(path: Path, columns: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A file of `columns`, and what is to be known `about` them; the same bytes for the same values. Raises OSError as `replacing` does."""
    from safetensors.torch import save_file

    with replacing(path, durable=True) as temporary:
        save_file({name: value.contiguous() for name, value in columns.items()}, temporary, {ABOUT: json.dumps(about)})


def read_shard(path: Path) -> dict[str, Tensor]:
    """The columns of a file, mapped. Raises ValueError, naming it, for a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)})") from error


def about_shard(path: Path) -> dict[str, Any]:
    """What `write_shard` was told about its columns. Raises ValueError, naming the file, for a damaged one or none of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return from_json((file.metadata() or {})[ABOUT])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or none of ours ({reason(error)})") from error


def checksum(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file, as a manifest has them."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
            size += len(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


def packed(texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts as columns: their UTF-8 in one row, and where each ends."""
    parts = [text.encode() for text in texts]
    joined = b"".join(parts)
    return {"bytes": torch.frombuffer(bytearray(joined) or bytearray(1), dtype=torch.uint8)[: len(joined)].clone(), "ends": _ends(parts)}


def unpacked(columns: Mapping[str, Tensor], index: Sequence[int] | None = None) -> list[str]:
    """The texts of `packed`, all of them or those of `index`."""
    ends, found = columns["ends"], columns["bytes"]
    rows = range(len(ends)) if index is None else index
    return [found[int(ends[i - 1]) if i else 0 : int(ends[i])].numpy().tobytes().decode() for i in rows]


def _ends(parts: Sequence[bytes]) -> Tensor:
    return torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)


class Column:
    """Rows of one shape in several tensors, one after the other: those that are taken are read, and no others."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)
        self._ends = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)

    @property
    def shape(self) -> tuple[int, ...]:
        """As a tensor's."""
        return (len(self), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Tensor:
        """The rows `index`, in memory."""
        rows = torch.arange(*index.indices(len(self))) if isinstance(index, slice) else torch.as_tensor(index, dtype=torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"row {int(rows.max())} of {len(self)}")
        made = torch.empty(len(rows), *self.shape[1:], dtype=self._parts[0].dtype)
        numbers = torch.searchsorted(self._ends, rows, right=True) - 1
        for number in numbers.unique().tolist():
            mine = numbers == number
            made[mine] = self._parts[number][rows[mine] - self._ends[number]]
        return made
