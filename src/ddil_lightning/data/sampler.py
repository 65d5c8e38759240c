"""Which rows make a batch: a function of seed and counter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ddil_lightning.data.visits import Visit


class CounterSampler(DistributedSampler):
    """Lists of rows by a counter: batch i is a slice of the permutation of (seed, epoch), so "batches done" is all there is to resume.

    `done` is asked at the start of every epoch, so that one cut short (limit_train_batches) goes on where it stopped.
    `groups`: the rows by the shape of their pictures, where these are of several. A batch is then of one group, on all processes of the
    same one, and an epoch has the batches of all groups in an order of its own. `left_out` are the groups that have no whole batch.
    `varied`: of several captions of a row each epoch takes one by chance, else all take the first.
    A DistributedSampler, because Lightning then leaves it alone under DDP and FSDP.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int,
        world: int,
        rank: int,
        done: Callable[[], int],
        groups: Sequence[Tensor] = (),
        varied: bool = True,
    ) -> None:
        self.groups = groups if len(groups) > 1 else [torch.arange(size)]
        self.counts = [len(group) // (batch * world) for group in self.groups]
        self.left_out = [i for i, count in enumerate(self.counts) if count == 0]
        self.batches = sum(self.counts)
        if self.batches == 0:
            few = f", in {len(self.groups)} shapes of pictures none of which has a whole batch" if len(self.groups) > 1 else ""
            raise ValueError(
                f"the data set has {size} captions, fewer than one batch of {batch} on {world} process(es){few}: lower data.batch_size"
            )
        self.size, self.batch, self.seed, self.world, self.rank, self.done = size, batch, seed, world, rank, done
        self.varied = varied

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Visit]:
        epoch, start = divmod(self.done(), self.batches)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        orders = [group[torch.randperm(len(group), generator=generator)] for group in self.groups]
        turns = torch.arange(len(self.groups)).repeat_interleave(torch.tensor(self.counts))
        if len(self.groups) > 1:
            turns = turns[torch.randperm(len(turns), generator=generator)]
        past = turns[:start].bincount(minlength=len(self.groups)).tolist()
        for group in turns[start:].tolist():
            first = (past[group] * self.world + self.rank) * self.batch
            past[group] += 1
            yield Visit(orders[group][first : first + self.batch].tolist(), self.seed, epoch if self.varied else None)

    def say_left_out(self, names: Sequence[str]) -> None:
        """Warn of the groups that are left out, by the `names` of all groups."""
        if self.left_out:
            few = ", ".join(f"{len(self.groups[i])} of {names[i]}" for i in self.left_out)
            said = f"pictures are left out, too few of a size for a batch of {self.batch * self.world}: {few}"
            logging.getLogger(__name__).warning(said)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the counter says the epoch."""


class Parting(NamedTuple):
    """How an epoch is shared out: among how many processes, how many rows of a batch each of them has, and how many rows there are of each
    shape."""

    world: int
    batch: int
    groups: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Of all processes together, a step."""
        return self.world * self.batch

    @property
    def batches(self) -> int:
        """Of an epoch, as CounterSampler counts them."""
        return max(1, sum(rows // self.rows for rows in self.groups))

    def shares(self, shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """How much of an epoch's batches are of each of the `shapes` of the groups."""
        found = dict.fromkeys(shapes, 0.0)
        for shape, rows in zip(shapes, self.groups, strict=True):
            found[shape] += rows // self.rows / self.batches
        return found

    def __str__(self) -> str:
        return f"{self.world} process{'es' if self.world > 1 else ''} with batches of {self.batch}"


def carried(done: int, was: Parting, now: Parting) -> int:
    """How many batches of `now` stand where `done` batches of `was` do, rounded down: in the same epoch, after as many of its rows, or of
    data that have become more or fewer after the same share of them.

    Of the same rows in one group it is the same place in the same permutation, and rows of less than one batch come twice. Of several
    groups the order of an epoch's batches hangs on their number, and of other rows so does the permutation: the epoch and how far it has
    come are kept, but in what is left of it some rows come a second time and as many not at all. Every later epoch is whole again.
    """
    epoch, start = divmod(done, was.batches)
    rows = start * was.rows * sum(now.groups) // sum(was.groups)
    return epoch * now.batches + min(rows // now.rows, now.batches)


def say_carried(was: Parting, now: Parting, rolled: bool) -> None:
    """Tell, in a line each, that a run goes on with other data, and with batches that are shared out otherwise, and what of it is exact.
    `rolled`: there were roll-outs."""
    log = logging.getLogger(__name__)
    if was.groups != now.groups:
        log.warning(
            f"the data have {_told(now.groups)}, where the checkpoint had {_told(was.groups)}: the run goes on in the same epoch, as far "
            "into it; in what is left of it some rows come a second time and others not at all, and every later epoch is whole"
        )
    if was[:2] == now[:2]:
        return
    about = "in the same epoch, as far into it" if len(now.groups) > 1 else "at the same row, rounded down to a whole batch"
    place = "at the same row" if was.rows == now.rows else about
    kept = "all begin with an empty buffer, for a new process has no roll-outs" if now.world > was.world else "each has its own roll-outs"
    log.warning(
        f"the run goes on with {now} in place of {was}, {now.rows} rows a step in place of {was.rows}: weights, averages, optimisers and "
        f"clocks are exactly as they were; the data go on {place if was.groups == now.groups else 'as said'}; "
        f"{kept + '; ' if rolled else ''}noise is not that of an uninterrupted run"
    )


def _told(groups: Sequence[int]) -> str:
    each = f" in sizes of {', '.join(map(str, groups))}" if len(groups) > 1 else ""
    return f"{sum(groups)} rows{each}"
