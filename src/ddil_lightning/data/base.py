"""What a data set of captioned images is to the rest of the library: `Captions`, of which every one is a subclass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddil_lightning.data.buckets import Group, Size
from ddil_lightning.data.raw import RawBatch, digest, joined
from ddil_lightning.data.visits import Visit
from ddil_lightning.processes import Processes


class Captions(Dataset[Any]):
    """A map-style set of captioned images. A new one overrides `__len__`, `prompts` and `pixels` (None: a set without images), and one
    with several captions of an image `texts`: training takes one of them by the seed, the epoch and the row.

    `on_error`: what happens to a row whose caption or picture raises ValueError or OSError: `stop` lets it, `skip` takes the next row that
    can be read in its place, so that a batch keeps its size, and says so in `RawBatch.skipped` and `gone`.
    `sizes`: those that its pictures are made to, height and width; None where they come as they are.
    """

    on_error: Literal["stop", "skip"] = "stop"
    sizes: tuple[Size, ...] | None = None
    stream: bool = False
    """Whether its rows are meant to be asked for in order, once: another order would begin again and again."""

    def __len__(self) -> int:
        """How many captions there are."""
        raise TypeError(f"{type(self).__name__} does not say its length")

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`."""
        raise TypeError(f"{type(self).__name__} has no captions")

    def texts(self, index: Sequence[int]) -> list[list[str]]:
        """All captions of the rows `index`, of which `prompts` gives the first."""
        return [[prompt] for prompt in self.prompts(index)]

    def pixels(self, index: Sequence[int]) -> Tensor | None:
        """The images of the rows `index`, [B, 3, H, W] in [-1, 1]."""
        return None

    def __getitem__(self, index: Sequence[int]) -> RawBatch:
        """A batch: the samplers of this library yield lists of rows, with the epoch that they are visited in."""
        visit = Visit.of(index)
        try:
            return self._raw_batch(visit)
        except (OSError, ValueError):
            if self.on_error == "stop":
                raise
        return joined([self._next_readable(visit.at([row])) for row in visit])

    def groups(self) -> list[Group]:
        """The rows by the shape of their pictures, for a batch is of one shape: all of them, where there is one."""
        return [Group(torch.arange(len(self)), "all")]

    def check_files(self, processes: Processes) -> None:
        """Find out, one process for all and before the long work, what is missing or damaged. Raises ValueError for it where `on_error` is
        stop, and else tells it."""

    def group_by(self, groups: list[Group]) -> None:
        """Hear what `groups` has found in another process."""

    def some(self, n: int) -> list[str]:
        """The first `n` captions, or so many as can be read."""
        rows = range(min(n, len(self)))
        try:
            return self.prompts(rows)  # no picture is opened for them
        except (OSError, ValueError):
            if self.on_error == "stop":
                raise
        return self[rows].prompts

    def content(self) -> str:
        """A digest of every caption and every picture, in order: a cache of another digest was made from other data."""
        return digest(self._content_parts())

    def stamp(self) -> str | None:
        """A digest that is as good as `content` while nothing changes, from what is known without reading pictures; None without such."""
        return None

    def likeness(self) -> str | None:
        """A digest that data have in common with their copies, for where `stamp` knows places or times; None without such."""
        return None

    def _raw_batch(self, rows: Visit) -> RawBatch:
        prompts, counts = self._told(rows)
        return RawBatch(self.pixels(rows), prompts, torch.tensor(rows), counts=counts)

    def _told(self, rows: Visit) -> tuple[list[str], Tensor | None]:
        """A caption of each row; or all of them, one row's after the other's, and how many each has."""
        if rows.epoch is None and not rows.every:
            return self.prompts(rows), None
        texts = self.texts(rows)
        if rows.every:
            return [text for several in texts for text in several], torch.tensor([len(several) for several in texts])
        return [several[rows.choice(row, len(several))] for row, several in zip(rows, texts, strict=True)], None

    def _others(self, row: int) -> Iterator[int]:
        """The rows whose pictures are of the shape of that of `row`: those after it, then from the first."""
        return chain(range(row + 1, len(self)), range(row))

    def _next_readable(self, row: Visit) -> RawBatch:
        """The batch of one row, or of the first of the others that can be read, and why the rows before that cannot."""
        skipped: dict[int, str] = {}
        for other in chain(row, self._others(row[0])):  # one by one: there may be millions, and the first is mostly good
            try:
                return self._raw_batch(row.instead(other))._replace(skipped=tuple(skipped.values()), gone=tuple(skipped))
            except (OSError, ValueError) as error:
                skipped[other] = str(error)
        return self._raw_batch(row)  # none can be: with the error of the row that was asked for

    def _content_parts(self) -> Iterator[Any]:
        for group in self.groups():  # a batch is of one shape
            for rows in group.rows.split(64):
                raw = self[Visit(rows.tolist(), every=True)]
                yield from raw.prompts
                if raw.counts is not None and bool((raw.counts != 1).any()):
                    yield raw.counts.tolist()
                images = raw.images()
                if images is not None:
                    yield tuple(images.shape)
                    yield images.detach().float().cpu().contiguous().numpy().tobytes()
