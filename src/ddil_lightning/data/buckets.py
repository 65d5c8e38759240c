"""Sizes of several shapes, and which of them a picture gets (aspect buckets)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ddil_lightning.bounds import at_least, lengths, within
from ddil_lightning.counting import in_threads
from ddil_lightning.data.pictures import MAX_SIZE, check_size
from ddil_lightning.texts import by

Size = tuple[int, int]
"""Height and width in pixels."""
Pictures = Callable[[Sequence[int]], list[Size | None]]
PART = 64
"""Rows whose pictures are asked for at a time."""
UNREAD = -1
"""In the place of the number of a size: of a picture that could not be read."""
SEARCHED = 4096
"""Rows among which one of a size is looked for at a time."""


@dataclass(frozen=True)
class Buckets:
    """Sizes of about one area and several aspects, as SDXL was trained (Podell et al. 2023, section 2.3 and appendix I).

    For every side that is a multiple of `step`, the longest other side that keeps to the area, in both orientations.

    Args:
        side: of the square whose area no size exceeds, in pixels.
        step: what the sides are multiples of.
        aspect: the longer side over the shorter one, at most.
    """

    side: int = 1024
    step: int = 64
    aspect: float = 2.0

    def __post_init__(self) -> None:
        within(1, MAX_SIZE, **{"size.side": self.side, "size.step": self.step})
        at_least(1, **{"size.aspect": self.aspect})
        if self.step > self.side:
            raise ValueError(f"size.step {self.step} is more than size.side {self.side}: give a divisor of the side")

    def sizes(self) -> tuple[Size, ...]:
        """All of them, from the widest to the highest."""
        found: set[Size] = set()
        for short in range(self.step, MAX_SIZE + 1, self.step):
            long = self.side**2 // short // self.step * self.step
            if long and max(short, long) <= self.aspect * min(short, long):
                found |= {(short, long), (long, short)}
        return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))


def sizes_of(size: int | Size | Sequence[Size] | Buckets) -> tuple[Size, ...]:
    """The sizes of one side, of [height, width], of a list of them, or of buckets. Raises ValueError for what no picture can be given."""
    if isinstance(size, Buckets):
        return size.sizes()
    if isinstance(size, int):
        sizes: list[Size] = [(size, size)]
    else:
        lengths(size=size)
        pairs: Any = size if isinstance(size[0], Sequence) else [size]
        for pair in pairs:
            lengths(2, size=pair)
        sizes = [(pair[0], pair[1]) for pair in pairs]
    for pair in sizes:
        for side in pair:
            check_size(side)
    return tuple(dict.fromkeys(sizes))


def nearest(picture: Size, sizes: Sequence[Size]) -> int:
    """Which of `sizes` a picture gets: that of the nearest logarithm of the aspect, of several the largest, of these the first."""
    aspect = math.log(picture[0] / picture[1])
    return min(range(len(sizes)), key=lambda i: (round(abs(math.log(sizes[i][0] / sizes[i][1]) - aspect), 9), -sizes[i][0] * sizes[i][1]))


class Group(NamedTuple):
    """Rows of a data set whose pictures are of one shape."""

    rows: Tensor  # ascending
    name: str  # of the shape, for messages


class Sorting:
    """Which of several `sizes` every row of a data set gets, found when it is first asked for, by several threads."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.sizes = sizes
        self._found: Tensor | None = None  # [N] numbers of `sizes`

    def groups(self, pictures: Pictures, rows: int) -> list[Group]:
        """The groups of so many `rows`, empty ones left out; `pictures` says height and width of some rows, None for what is not read."""
        if len(self.sizes) == 1:
            return [Group(torch.arange(rows), by(self.sizes[0]))]
        self.find(pictures, rows)
        members = [(cast(Tensor, self._found) == i).nonzero()[:, 0] for i in range(len(self.sizes))]
        return [Group(group, by(size)) for group, size in zip(members, self.sizes, strict=True) if len(group)]

    def find(self, pictures: Pictures, rows: int) -> None:
        """Read which of several sizes each of so many `rows` gets, if that is not known yet."""
        if self._found is None and len(self.sizes) > 1:
            self.know(self.read(pictures, range(rows)))

    def know(self, numbers: Tensor) -> None:
        """Take over what `read` has found of all rows. A picture that cannot be read goes with the next one that can, which takes its place
        in a batch; one after the last of these goes with the first."""
        places = torch.where(numbers == UNREAD, len(numbers), torch.arange(len(numbers))).flip(0).cummin(0).values.flip(0)
        self._found = torch.cat([numbers, numbers[numbers != UNREAD][:1], numbers.new_zeros(1)])[places]  # 0 where none can be read

    def others(self, row: int, rows: int) -> Iterator[int]:
        """The other rows of the size of `row`: those after it, then from the first; looked for a part at a time."""
        for begin, end in ((row + 1, rows), (0, row)):
            if self._found is None:
                yield from range(begin, end)
                continue
            for part in self._found[begin:end].split(SEARCHED):
                yield from ((part == self._found[row]).nonzero()[:, 0] + begin).tolist()
                begin += len(part)

    def size(self, rows: Sequence[int]) -> Size:
        """The one size of `rows`. Raises ValueError where they have several."""
        if self._found is None:
            return self.sizes[0]
        numbers = self._found[list(rows)].unique().tolist()
        if len(numbers) != 1:
            raise ValueError(
                f"rows {rows[0]} to {rows[-1]} are of {len(numbers)} sizes, and a batch is of one: take rows of one of `groups`"
            )
        return self.sizes[numbers[0]]

    def read(self, pictures: Pictures, rows: Sequence[int], show: bool = True) -> Tensor:
        """[n] the number of the size of each of `rows`, by several threads; UNREAD of one that cannot be read and may be skipped."""
        parts = [rows[start : start + PART] for start in range(0, len(rows), PART)]
        found: list[int] = []
        for read in in_threads(pictures, parts, "the sizes of the pictures", show):
            found += [UNREAD if size is None else nearest(size, self.sizes) for size in read]
        return torch.tensor(found, dtype=torch.int16)
