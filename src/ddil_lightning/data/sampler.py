"""Which rows make a batch: a function of seed and counter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

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
