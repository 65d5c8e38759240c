"""Which rows a batch visits, which of several captions of a row is taken, and which rows stand for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddil_lightning.streams import Streams


class Visit(list[int]):
    """Rows of a batch, as a sampler hands them to a data set: with the seed of the run and the number of the epoch.

    Without an epoch, as for an ordinary list of rows, the first caption of a row counts: what a probe or a preview sees stays the same.
    `every`: all captions of each row are asked for, by who encodes them once. `asked`: the row that was asked for, where the one here is
    read in its place: it says which caption is taken, as it does of a cache, which does not know of the other.
    """

    def __init__(self, rows: Iterable[int], seed: int = 0, epoch: int | None = None, every: bool = False, asked: int | None = None) -> None:
        super().__init__(int(row) for row in rows)
        self.seed, self.epoch, self.every, self.asked = seed, epoch, every, asked

    @classmethod
    def of(cls, index: Sequence[int]) -> Visit:
        """`index` as it is, or a list of rows without an epoch."""
        return index if isinstance(index, Visit) else cls(index)

    def at(self, rows: Iterable[int]) -> Visit:
        """Other rows, asked for in the same way."""
        return Visit(rows, self.seed, self.epoch, self.every)

    def instead(self, row: int) -> Visit:
        """`row` in the place of the one row of this visit."""
        return Visit([row], self.seed, self.epoch, self.every, self[0])

    def choice(self, row: int, n: int) -> int:
        """Which of the `n` captions of a row is taken, the same whenever it is asked for: nothing to save, nothing to restore."""
        if self.epoch is None or n < 2:
            return 0
        return Streams(self.seed, self.epoch, rank=row if self.asked is None else self.asked).number("caption") % n


def spread(n: int, k: int) -> Tensor:
    """Some `k` of the numbers below `n`, ascending, for what is found from a part of a data set: of each of `k` equal parts one by chance,
    always the same. The first ones would be of one source where sources were joined, and those at equal distances where sources take turns.
    """
    if k >= n:
        return torch.arange(n)
    ends = torch.arange(k + 1) * n // k
    within = torch.rand(k, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (ends[1:] - ends[:-1])
    return ends[:-1] + within.long()


class Wording(NamedTuple):
    """Which rows of a table of captions are those of the places of a table of images."""

    starts: Tensor  # [n] the first caption of each place
    counts: Tensor  # [n] how many it has
    which: Tensor | None = None  # [T] the row of the table that a caption is; None: each its own

    @classmethod
    def of(cls, counts: Tensor, which: Tensor | None = None, begin: int = 0) -> Wording:
        """Of places with so many captions each, one place's after the other's."""
        return cls(counts.cumsum(0) - counts + begin, counts, which)

    def chosen(self, places: Tensor, visit: Visit) -> Tensor:
        """[B] the row of the caption that each of `places`, which holds the row of a visit, is visited with."""
        counts = self.counts[places].tolist()
        at = self.starts[places] + torch.tensor([visit.choice(row, n) for row, n in zip(visit, counts, strict=True)], dtype=torch.int64)
        return at if self.which is None else self.which[at].long()
