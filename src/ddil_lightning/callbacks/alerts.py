"""Alerts: a line, and a message of W&B, when what a run publishes says that its student collapses."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback

from ddil_lightning.bounds import at_least, within
from ddil_lightning.runs.boards import alert

WINDOW = 3
"""Published values, of a logging interval each, whose mean is compared with a bound: one batch is noise."""
SATURATED, RATIO = "reflect/saturated", "shift/loss_ratio"


class Alerts(Callback):
    """Warns once when a run begins to collapse, and again when it has recovered and does so anew. Nothing is stopped or changed.

    Listens to what callbacks publish. Every warning is a line of the log; W&B, where it is on, sends it as an alert, and TensorBoard has it
    as a text. A number that is not finite is always told, and so is the end of a run that a loss or weights which are not finite break off.

    Args:
        saturation: the share of the teacher's estimates on the edge of the box, `reflect/saturated`, above which there is a warning. A
            healthy run is below 0.01. null for none.
        gap: how many times as large the loss on the student's own latents may be as that on noised data (`loss/student` over
            `loss/forward`), or on the teacher's latents (`shift/loss_ratio`, of a ShiftProbe with `losses`). A healthy run is below 2. null
            for none.
        coverage: how far a published coverage, every name that ends in `coverage`, may fall below its best value so far. null for none.
        after: student updates at the beginning of a run that are not judged.
    """

    def __init__(self, saturation: float | None = 0.05, gap: float | None = 4.0, coverage: float | None = 0.2, after: int = 50) -> None:
        within(0, 1, **{"alerts.saturation": saturation, "alerts.coverage": coverage})
        within(1, 10**6, **{"alerts.gap": gap})
        at_least(0, **{"alerts.after": after})
        self.saturation, self.gap, self.coverage, self.after = saturation, gap, coverage, after
        self._loggers: list[Any] = []
        self._recent: dict[str, deque[float]] = {}
        self._best: dict[str, float] = {}
        self._told: set[str] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen, on the one process that writes."""
        self._recent, self._best, self._told = {}, {}, set()
        self._loggers = list(trainer.loggers)
        if trainer.is_global_zero:
            pl_module.measures.listen(self.hear)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Listen no more."""
        pl_module.measures.forget(self.hear)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Listen no more, and say where numbers have ended the run."""
        pl_module.measures.forget(self.hear)
        if isinstance(exception, FloatingPointError) and trainer.is_global_zero:
            alert(self._loggers, "the run has broken off", str(exception), pl_module.student_updates)  # the command says it itself

    def hear(self, clock: int, values: Mapping[str, float]) -> None:
        """Judge what is published at `clock`, and warn of what has newly gone wrong."""
        wrong, well = {}, set()
        for what, fault in self._judged(clock, values):
            if fault:
                wrong[what] = fault
            else:
                well.add(what)
        for what, fault in wrong.items():
            if what not in self._told:
                logging.getLogger(__name__).warning(f"at student update {clock}: {fault}")
                alert(self._loggers, what, f"at student update {clock}: {fault}", clock)
        self._told = (self._told | set(wrong)) - well

    def _judged(self, clock: int, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """(what, a sentence) of everything that is judged, the sentence empty where all is well."""
        strange = [name for name, value in values.items() if not math.isfinite(value)]
        yield "values are not finite", f"{', '.join(strange[:5])} {'is' if len(strange) == 1 else 'are'} not finite" if strange else ""
        fine = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for name, value in fine.items():
            if name.endswith("coverage") and self.coverage is not None:
                best = self._best[name] = max(value, self._best.get(name, value))
                fell = f"{name} has fallen from {best:.3f} to {value:.3f}: the student leaves modes out"
                yield "coverage falls", fell if best - value > self.coverage and clock >= self.after else ""
        ratio = fine["loss/student"] / fine["loss/forward"] if fine.get("loss/forward", 0) > 0 and "loss/student" in fine else None
        for name, seen, bound, says in (
            (SATURATED, fine.get(SATURATED), self.saturation, "of the teacher's estimates lie on the edge of the box: reflection hides it"),
            ("loss/student over loss/forward", ratio, self.gap, "the student goes wrong on latents of its own making"),
            (RATIO, fine.get(RATIO), self.gap, "the student goes wrong on latents of its own making"),
        ):
            if seen is None or bound is None or clock < self.after:
                continue
            recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
            recent.append(seen)
            mean = sum(recent) / len(recent)
            what = "saturation rises" if name == SATURATED else "loss gap"
            yield f"{what} ({name})", f"{name} is {mean:.3g}, above {bound:g}: {says}" if mean > bound and len(recent) == WINDOW else ""
