"""Alerts: a line, and a message of W&B, when what a run publishes says that its student collapses."""

from __future__ import annotations

import logging
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback

from ddil_lightning.bounds import at_least, within
from ddil_lightning.imitation.prior import mean_of_own
from ddil_lightning.runs.boards import alert

COVERAGE = re.compile(r"coverage(_\d+)?$")
"""The names of numbers that are a coverage: shift/coverage of a ShiftProbe, validation/mode_coverage_4 of a Validation in four steps."""
WINDOW = 3
"""Published values, of a logging interval each, whose mean is compared with a bound: one batch is noise."""
SATURATED, GAP, RATIO = "reflect/saturated", "the loss on the student's roll-outs over loss/forward", "shift/loss_ratio"
SAYS = {
    SATURATED: "more and more of the estimates are held at the edge of the box",
    GAP: "the student goes wrong on latents of its own making",
    RATIO: "the student goes wrong on latents of its own making",
}


class Alerts(Callback):
    """Warns once when a run begins to collapse, and again when it has recovered and does so anew. Nothing is stopped or changed.

    Listens to what callbacks publish. Every warning is a line of the log; W&B, where it is on, sends it as an alert, and TensorBoard has it
    as a text. A number that is not finite is always told, and so is the end of a run that a loss or weights which are not finite break off.

    Args:
        saturation: the share of the teacher's estimates (the target's, if there is one; the student's samples in LADD and UFOGen) on the
            edge of the box, `reflect/saturated`, above which there is a warning, if it has also doubled since the run began. A healthy run
            on images is below 0.01. null for none.
        gap: how many times as large the loss on latents that the student has had a part in may be (`loss/student` and `loss/mixed`, by
            how many were drawn) as that on noised data (`loss/forward`), of methods whose loss is a distance (`loss_is_distance`); or the
            loss on the student's own as that on the teacher's latents (`shift/loss_ratio`, of a ShiftProbe with `losses`). Healthy runs
            are below 2, but for PD's `shift/loss_ratio`, which is 2.4 to 2.6 in two steps. null for none.
        coverage: how far a published coverage may fall below its best value so far: that of a ShiftProbe, and those of a Validation in each
            step count. That of a ShiftProbe sees whole regions that are left out, and no student that draws one image for each prompt:
            look at `shift/teacher` for that. No config has these callbacks by itself. null for none.
        after: student updates at the beginning of a run that are not judged.
    """

    def __init__(self, saturation: float | None = 0.05, gap: float | None = 4.0, coverage: float | None = 0.2, after: int = 50) -> None:
        within(0, 1, **{"alerts.saturation": saturation, "alerts.coverage": coverage})
        within(1, 10**6, **{"alerts.gap": gap})
        at_least(0, **{"alerts.after": after})
        self.saturation, self.gap, self.coverage, self.after = saturation, gap, coverage, after
        self._loggers: list[Any] = []
        self._distance = False
        self._recent: dict[str, deque[float]] = {}
        self._first: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._told: set[str] = set()
        self._strange: set[str] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Know nothing of an earlier run; what a checkpoint remembers of this one is loaded after this."""
        self._recent, self._first, self._best, self._told, self._strange = {}, {}, {}, set(), set()

    def state_dict(self) -> dict[str, Any]:
        """What values are held against and what has been told, so that a resumed run warns of what the whole one does."""
        recent = {name: list(values) for name, values in self._recent.items()}
        told, strange = sorted(self._told), sorted(self._strange)
        return {"recent": recent, "first": dict(self._first), "best": dict(self._best), "told": told, "strange": strange}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what was remembered when the checkpoint was written; one from before alerts remembered anything has nothing."""
        self._recent = {name: deque(values, maxlen=WINDOW) for name, values in state_dict.get("recent", {}).items()}
        self._first, self._best = dict(state_dict.get("first", {})), dict(state_dict.get("best", {}))
        self._told, self._strange = set(state_dict.get("told", ())), set(state_dict.get("strange", ()))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen, on the one process that writes."""
        self._loggers, self._distance = list(trainer.loggers), pl_module.loss_is_distance
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
        strange = {name for name, value in values.items() if not math.isfinite(value)}
        fresh, self._strange = sorted(strange - self._strange), (self._strange - set(values)) | strange
        if fresh:
            said = f"{', '.join(fresh[:5])}{' and more' if len(fresh) > 5 else ''} {'is' if len(fresh) == 1 else 'are'} not finite"
            yield f"not finite: {', '.join(fresh[:5])} at {clock}", said
        fine = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for name, value in fine.items():
            if COVERAGE.search(name) and self.coverage is not None:
                best = self._best[name] = max(value, self._best.get(name, value))
                fell = f"{name} has fallen from {best:.3f} to {value:.3f}: the student leaves modes out"
                yield f"coverage falls ({name})", fell if best - value > self.coverage and clock >= self.after else ""
        own = mean_of_own(fine, "loss/")
        if self._distance and own is not None and fine.get("loss/forward", 0) > 0:
            fine[GAP] = own / fine["loss/forward"]
        for name, bound in ((SATURATED, self.saturation), (GAP, self.gap), (RATIO, self.gap)):
            if name in fine and bound is not None:
                yield f"{'saturation rises' if name == SATURATED else 'loss gap'} ({name})", self._above(name, fine[name], bound, clock)

    def _above(self, name: str, value: float, bound: float, clock: int) -> str:
        """A sentence where the mean of the last values is above the bound, for a saturation also above twice its first mean."""
        recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
        recent.append(value)
        if len(recent) < WINDOW:
            return ""
        mean = sum(recent) / WINDOW
        first = self._first.setdefault(name, mean)  # data that lie on the edge of their box are there from the first update on
        if clock < self.after or mean <= bound or (name == SATURATED and mean <= 2 * first):
            return ""
        return f"{name} is {mean:.3g}, above {bound:g}: {SAYS[name]}"
