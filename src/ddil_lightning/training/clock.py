"""The one clock of a run, student updates: what happens when it moves, and the running means that are written by it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from ddil_lightning.records import SOURCES


class Means:
    """Running means on the device: adding never waits for it, only `flush` reads."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | int]] = {}

    def add(self, name: str, total: Tensor | float, n: Tensor | int = 1) -> None:
        """Add a sum of `n` values."""
        before, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (before + total, count + n)

    def by_source(self, loss: Tensor, source: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Add per-sample losses [B] under loss/<source>; sums and counts of this batch, by source."""
        sums = {name: ((loss * (source == tag)).sum(), (source == tag).sum()) for tag, name in enumerate(SOURCES)}
        for name, (total, n) in sums.items():
            self.add(f"loss/{name}", total, n)
        return sums

    def flush(self) -> dict[str, float]:
        """The means since the last flush; a name without values is left out."""
        sums, self._sums = self._sums, {}
        return {name: float(total) / int(n) for name, (total, n) in sums.items() if int(n)}


class Clock(Callback):
    """After every batch: commit the data position, write the running means, stop at `updates`.

    A callback and not a module hook, because checkpoint callbacks run before the module's own hook and would save a stale counter.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Nothing is left to do in a run that resumes from its end."""
        self._logged = pl_module.student_updates
        if pl_module.student_updates >= pl_module.updates:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Commit, log, stop."""
        pl_module.feed.commit()
        clock = pl_module.student_updates
        if clock != self._logged and (clock % pl_module.log_every == 0 or clock >= pl_module.updates):
            self._logged = clock
            values = {"student_updates": clock, "lr": pl_module.lr * pl_module.lr_factor(), **pl_module.means.flush()}
            values |= pl_module.feed.statistics()
            for logger in trainer.loggers:
                logger.log_metrics(values, step=clock)
        if clock >= pl_module.updates:
            trainer.should_stop = True
