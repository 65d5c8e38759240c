"""Measures: the named numbers of a run with their clock, published in one place, where loggers, schedules and alerts listen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.records import SOURCES, widest

Hear = Callable[[int, Mapping[str, float]], None]
"""Called with student updates and the numbers that were published at that time, on every process."""


class Measures:
    """Running means on the device, which adding never waits for, and the listeners of what is published.

    `listen(hear)`: everything that callbacks publish, such as the means of a logging interval. `listen(hear, every_update=True)`: the mean
    losses by source of every single update and the sources' shares of its latents, which are computed for such listeners alone, because
    reading them waits for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | int]] = {}
        self._by_source: dict[str, tuple[Tensor, Tensor]] = {}
        self._listeners: list[Hear] = []
        self._close: list[Hear] = []

    # Listening -----------------------------------------------------------------------------------------------------------------------

    def listen(self, hear: Hear, every_update: bool = False) -> None:
        """Have `hear` called from now on; twice is once."""
        listeners = self._close if every_update else self._listeners
        if hear not in listeners:
            listeners.append(hear)

    def forget(self, hear: Hear) -> None:
        """Have `hear` called no more; one that was never called is no fault."""
        for listeners in (self._close, self._listeners):
            if hear in listeners:
                listeners.remove(hear)

    def publish(self, clock: int, values: Mapping[str, float]) -> None:
        """Tell all listeners the named numbers of this clock."""
        for hear in self._listeners:
            hear(clock, values)

    def updated(self, clock: int) -> None:
        """The student was updated: those who listen to every update hear `source_losses`, and the share of each source as
        `drawn/share_<source>`. All processes together."""
        if self._close:
            sums = self._of_sources()
            drawn = sum(n for _, n in sums.values())
            values = self._means(sums) | {f"drawn/share_{name}": n / drawn for name, (_, n) in sums.items() if drawn}
            for hear in self._close:
                hear(clock, values)

    # Running means -------------------------------------------------------------------------------------------------------------------

    def add(self, name: str, total: Tensor | float, n: Tensor | int = 1) -> None:
        """Add a sum of `n` values."""
        before, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (before + total, count + n)

    def record(self, **values: Tensor | float) -> None:
        """Add values; of a tensor its mean."""
        for name, value in values.items():
            self.add(name, value.detach().float().mean() if isinstance(value, Tensor) else value)

    def losses(self, loss: Tensor, source: Tensor, going_on: bool) -> None:
        """Add the per-sample losses [B] of a batch by their `source` [B]. `going_on`: it belongs to the same update as the last one."""
        which = source[:, None] == torch.arange(len(SOURCES), device=source.device)
        totals, numbers = (loss[:, None] * which).sum(0), which.sum(0)
        sums = {name: (totals[tag], numbers[tag]) for tag, name in enumerate(SOURCES)}
        for name, (total, n) in sums.items():
            self.add(f"loss/{name}", total, n)
        for name, (_, n) in sums.items():
            self.add(f"drawn/share_{name}", n, len(loss))
        if self._by_source and going_on:
            sums = {name: (total + self._by_source[name][0], n + self._by_source[name][1]) for name, (total, n) in sums.items()}
        self._by_source = sums

    def flush(self) -> dict[str, float]:
        """The means since the last flush; a name without values is left out."""
        sums, self._sums = self._sums, {}
        return {name: total / int(n) for name, (total, n) in zip(sums, read(sums.values()), strict=True) if n}

    @property
    def source_losses(self) -> dict[str, float]:
        """The mean loss by the source of the latents, over all processes and the micro-batches of the last update or of the one under way.

        All processes must ask together.
        """
        return self._means(self._of_sources())

    def _of_sources(self) -> dict[str, tuple[float, float]]:
        """(sum of losses, number of latents) by source, over all processes."""
        if not self._by_source:
            return {}
        sums = torch.stack([torch.stack([total.float(), n.float()]) for total, n in self._by_source.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)  # a schedule that hears them must come to the same prior on every process
        return {name: (total, n) for name, (total, n) in zip(self._by_source, sums.tolist(), strict=True)}

    @staticmethod
    def _means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        return {name: total / n for name, (total, n) in sums.items() if n}


def read(pairs: Iterable[tuple[Tensor | float, Tensor | int]]) -> list[tuple[float, float]]:
    """Pairs of numbers, those of each device by one copy: reading one of them after the other would wait as often."""
    flat: list[Any] = [x for pair in pairs for x in pair]
    for device in {x.device for x in flat if isinstance(x, Tensor)}:
        there = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.device == device]
        for i, value in zip(there, torch.stack([flat[i].to(widest(device)) for i in there]).tolist(), strict=True):
            flat[i] = value
    return list(zip(flat[::2], flat[1::2], strict=True))
