"""Rows of a cache folder, mapped: what training reads where ddil-cache has encoded the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.data import manifest
from ddil_lightning.data.base import Captions
from ddil_lightning.data.buckets import Group
from ddil_lightning.data.encoded import Encoded, Table
from ddil_lightning.data.raw import RawBatch
from ddil_lightning.data.shards import Column, read_shard, too_many, unpacked
from ddil_lightning.data.visits import Visit, Wording
from ddil_lightning.processes import Processes
from ddil_lightning.records import Context


class CacheFolder(Encoded):
    """The rows of a cache folder; a batch is encoded, or without text states a RawBatch of latents and captions.

    What it holds in memory is an index: the captions of the rows by number, and where rows lie. Raises ValueError for a folder that is
    none or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.file, self.manifest = folder.resolve(), manifest.read(folder)
        manifest.check_files(folder, self.manifest)
        if said := too_many(len(self.manifest["files"])):
            raise ValueError(f"the cache {folder} has {len(self.manifest['files'])} files, and {said}")
        self.whole = self.manifest["text"]
        names = self.manifest["files"]
        self._words = [read_shard(folder / name) for name in names if name.startswith("captions-")]
        self._ends = torch.tensor([len(words["ends"]) for words in self._words]).cumsum(0)
        states = [read_shard(folder / name) for name in names if name.startswith("text-")]
        self._which = read_shard(folder / "index.safetensors")["which"]
        self._places = None
        self._sizes: list[Tensor | None] = []
        self.tables = []
        c = _context(states)
        for group in self.manifest["groups"]:
            self._add([read_shard(folder / name) for name in group["files"]], c)

    def _add(self, parts: Sequence[dict[str, Tensor]], c: Context) -> None:
        """The table of the rows of one shape."""
        begin = sum(int(table.wording.counts.sum()) for table in self.tables if table.wording is not None)
        wording = Wording.of(torch.cat([part["counts"] for part in parts]).long(), self._which, begin)
        latents, ids, sizes = (_column(parts, name) for name in ("latents", "ids", "sizes"))
        self.tables.append(Table(latents, c, torch.cat([part["rows"] for part in parts]), wording, ids))
        self._sizes.append(sizes)

    def groups(self) -> list[Group]:
        """The rows of every table, by the name that they had in the data."""
        return [Group(table.rows, group["name"]) for table, group in zip(self.tables, self.manifest["groups"], strict=True)]

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`, of several the first."""
        return [texts[0] for texts in self.texts(index)]

    def texts(self, index: Sequence[int]) -> list[list[str]]:
        """All captions of the rows `index`."""
        found = []
        for row in index:
            table, places = self._find(torch.tensor([row]))
            wording = cast(Wording, table.wording)
            start, count = int(wording.starts[places]), int(wording.counts[places])
            found.append(self._worded(self._which[start : start + count]))
        return found

    def __getitem__(self, index: Sequence[int]) -> Any:
        """A batch of rows of one shape, with the caption of each in the epoch of the visit."""
        if self.whole:
            return super().__getitem__(index)
        visit = Visit.of(index)
        rows = torch.tensor(visit, dtype=torch.int64)
        table, places = self._find(rows)
        sizes = self._sizes[next(i for i, one in enumerate(self.tables) if one is table)]
        prompts = self._worded(cast(Wording, table.wording).chosen(places, visit))
        return RawBatch(
            None,
            prompts,
            rows,
            sizes=None if sizes is None else sizes[places].long(),
            latent=None if table.latents is None else table.latents[places].float(),
        )

    def _worded(self, numbers: Tensor) -> list[str]:
        """The captions of these numbers."""
        files = torch.searchsorted(self._ends, numbers.long(), right=True)
        begins = self._ends - torch.tensor([len(words["ends"]) for words in self._words])
        return [unpacked(self._words[i], [int(n - begins[i])])[0] for i, n in zip(files.tolist(), numbers.long(), strict=True)]


def open_folder(
    folder: Path, captions: Captions | None, backbone: Backbone, truncate: bool, skip: bool, processes: Processes
) -> CacheFolder:
    """The cache of a folder. Raises ValueError for one that was made by or from something else than the run has, or in another way.

    `captions`: the data that the run names besides, None where the cache is all that it has; `skip`: whether rows may have been skipped.
    """
    ours = captions if isinstance(captions, CacheFolder) and captions.file == folder.resolve() else None  # a second fit
    if isinstance(captions, Encoded) and ours is None:
        raise ValueError(f"the data are encoded already, and the cache {folder} would take their place: leave data.cache at true")
    # By one for all: it reads the encoders' weights.
    data = captions if ours is None else None
    processes.by_first(lambda: manifest.check_use(folder, manifest.read(folder), data, backbone, truncate, skip))
    return CacheFolder(folder) if ours is None else ours


def _context(states: Sequence[dict[str, Tensor]]) -> Context:
    """The text states of every caption; without any an empty one."""
    if not states:
        return Context(torch.zeros(0))
    return Context(**{name: cast(Tensor, Column([part[name] for part in states])) for name in states[0]})


def _column(parts: Sequence[dict[str, Tensor]], name: str) -> Any:
    return Column([part[name] for part in parts]) if name in parts[0] else None
