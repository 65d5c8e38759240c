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
    """How a batch is shared out: among how many processes, and how many rows each of them has."""

    world: int
    batch: int

    @property
    def rows(self) -> int:
        """Of all processes together."""
        return self.world * self.batch

    def __str__(self) -> str:
        return f"{self.world} process{'es' if self.world > 1 else ''} with batches of {self.batch}"


def carried(done: int, groups: Sequence[Tensor], was: Parting, now: Parting) -> int:
    """How many batches of `now` stand where `done` batches of `was` do, rounded down: in the same epoch, after as many of its rows.

    Of one group it is the same place in the same permutation, and rows of less than one batch come twice. Of several groups the order of
    an epoch's batches hangs on their number: the epoch and how far it has come are kept, but in what is left of it some rows come a second
    time and as many not at all. Every later epoch is whole again.
    """
    before, after = (max(1, sum(len(rows) // parting.rows for rows in groups)) for parting in (was, now))
    epoch, start = divmod(done, before)
    return epoch * after + min(start * was.rows // now.rows, after)


def say_carried(was: Parting, now: Parting, several: bool, rolled: bool) -> None:
    """Tell, in one line, that a run goes on with batches that are shared out otherwise, and what of it is exact. `several`: the data have
    groups; `rolled`: there were roll-outs."""
    about = "in the same epoch, as far into it" if several else "at the same row, rounded down to a whole batch"
    place = "at the same row" if was.rows == now.rows else about
    kept = "all begin with an empty buffer, for a new process has no roll-outs" if now.world > was.world else "each has its own roll-outs"
    logging.getLogger(__name__).warning(
        f"the run goes on with {now} in place of {was}, {now.rows} rows a step in place of {was.rows}: weights, averages, optimisers and "
        f"clocks are exactly as they were; the data go on {place}; {kept + '; ' if rolled else ''}noise is not that of an uninterrupted run"
    )
