"""Which rows make a batch: a function of seed and counter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DistributedSampler


class CounterSampler(DistributedSampler):
    """Lists of rows by a counter: batch i is a slice of the permutation of (seed, epoch), so "batches done" is all there is to resume.

    `done` is asked at the start of every epoch, so that one cut short (limit_train_batches) goes on where it stopped.
    A DistributedSampler, because Lightning then leaves it alone under DDP and FSDP.
    """

    def __init__(self, size: int, batch: int, seed: int, world: int, rank: int, done: Callable[[], int]) -> None:
        self.batches = size // (batch * world)
        if self.batches == 0:
            raise ValueError(
                f"the data set has {size} captions, fewer than one batch of {batch} on {world} process(es): lower data.batch_size"
            )
        self.size, self.batch, self.seed, self.world, self.rank, self.done = size, batch, seed, world, rank, done

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = divmod(self.done(), self.batches)
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        for i in range(start, self.batches):
            first = (i * self.world + self.rank) * self.batch
            yield order[first : first + self.batch].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the counter says the epoch."""
