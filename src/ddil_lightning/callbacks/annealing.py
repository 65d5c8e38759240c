"""DAgger scheduling: the prior, the cadence and the buffer as functions of the clock.

They act in `on_train_start` and `on_train_batch_end`: the DataModule draws a batch before `on_train_batch_start`, so any later hook would
be one batch late.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args, get_type_hints

from lightning.pytorch import Callback, LightningModule, Trainer

from ddil_lightning.bounds import at_least
from ddil_lightning.feed import without_images
from ddil_lightning.imitation.prior import Gated, SamplingPrior, Schedule

PATIENCE = 1000
"""Student updates after which a run is told that its schedule has heard nothing of what it waits for."""


class OnClock(Callback):
    """Calls `apply(trainer, method, clock)` before the first batch and after every one.

    The clock counts the student updates of the present stage.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the clock that a new run or a resumed one begins with."""
        self.apply(trainer, pl_module, int(pl_module.stage_updates))  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Apply the clock that the step has left."""
        self.apply(trainer, pl_module, int(pl_module.stage_updates))  # type: ignore[arg-type]

    def begin_stage(self, trainer: Any, method: Any) -> None:
        """A stage begins: apply its clock, which is 0."""
        self.apply(trainer, method, 0)

    def apply(self, trainer: Any, method: Any, clock: int) -> None:
        """Do what is due at `clock`; called again for a clock that has not moved."""


def check_images(method: Any, what: str, **remedy: str) -> None:
    """Raises ValueError for `what`, which has a forward share, on data without the images that `method` then needs."""
    if method.feed.needs_images(method) and not method.feed.has_images():
        raise without_images(what, **remedy)


def blind(method: Any) -> str:
    """Why the losses on the student's own latents and on forward ones say nothing in this training, as Gated compares them; empty where
    they do. No refusal, for a run of days that was begun so goes on."""
    if not method.loss_is_distance:
        name = type(method).__name__
        return f"that of {name} on a latent is no distance to what the student should say there: take GatedBy with a measure"
    rollouts = getattr(method.feed, "rollouts", None)
    if rollouts is not None and rollouts.granularity == "step" and method.descent.accumulate == 1:
        return (
            "with data.rollouts.granularity=step an update has one source, so that it never moves: take sample, "
            "model.optimizer.accumulate of 2 or more, or GatedBy with a measure"
        )
    return ""


class AnnealPrior(OnClock):
    """Steers the DataModule's prior by a schedule. Every prior is checked against the method's sources before it is used.

    Args:
        schedule: clock -> prior, the clock being the student updates of the present stage.

    Raises ValueError for a schedule that would never be told what it follows.
    """

    def __init__(self, schedule: Schedule) -> None:
        hears, named = schedule.hears, type(schedule).__name__
        if hears not in get_args(get_type_hints(Schedule)["hears"]):
            raise ValueError(f"{named}.hears is {hears!r}: give 'updates', 'measures', or 'nothing' for a function of the clock alone")
        own = getattr(schedule, "hear", None)
        own = None if getattr(own, "__func__", None) is Schedule.hear else own
        if own is not None and hears == "nothing" and not _says(schedule):
            raise ValueError(f"{named} is told nothing, because it does not say hears: set hears = 'updates' or 'measures' beside its hear")
        if own is None and hears != "nothing":
            raise ValueError(f"{named} hears {hears} and has no hear(clock, values) to do so: write it")
        self.schedule = schedule
        self._since, self._warned = 0, False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the whole schedule now: a prior that comes after days of training must not be the one that stops it."""
        if stage != "fit":
            return
        priors = self.schedule.ahead(pl_module.updates)
        for prior in priors:
            pl_module.check_prior(prior)
        if max(prior.forward for prior in priors) > 1e-6:  # an interpolation rounds
            check_images(pl_module, "the schedule of AnnealPrior")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Let a schedule that follows the training hear what is published of it, and apply the first clock."""
        self._since, self._warned = pl_module.student_updates, False
        self._broadcast, self._anew = trainer.strategy.broadcast, partial(super().on_train_start, trainer, pl_module)
        why = blind(pl_module) if isinstance(self.schedule, Gated) and trainer.is_global_zero else ""
        if why:
            logging.getLogger(__name__).warning(f"the schedule Gated compares losses on the student's own latents and on data, and {why}")
        if self.schedule.hears != "nothing":
            pl_module.measures.listen(self._hear, every_update=self.schedule.hears == "updates")
        super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the schedule's hearing, so that it follows no later run of the same method."""
        pl_module.measures.forget(self._hear)
        self._warn(trainer, pl_module.student_updates)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Apply the clock that the step has left; a run of days is told early that its schedule waits in vain."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if pl_module.student_updates - self._since >= PATIENCE:
            self._warn(trainer, pl_module.student_updates)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the schedule's hearing after a run that was broken off, too."""
        pl_module.measures.forget(self._hear)

    def _hear(self, clock: int, values: Mapping[str, float]) -> None:
        self.schedule.hear(clock, values)
        if self.schedule.hears == "measures":  # which every process computes, to other last digits: one prior for all of them
            self.schedule.state = self._broadcast(self.schedule.state)
            self._anew()  # who publishes may come after this callback, and the next batch is drawn before it is called again

    def _warn(self, trainer: Any, clock: int) -> None:
        """Say once that nobody has published what the schedule waits for."""
        missing = self.schedule.unheard
        if missing and not self._warned and clock > self._since and trainer.is_global_zero:
            logging.getLogger(__name__).warning(
                f"{missing}, which the schedule of AnnealPrior waits for, was not published up to student update {clock}, so that the "
                f"prior has stayed where it began: add a callback that publishes it (ShiftProbe) or look at the name"
            )
        self._warned = True

    def begin_stage(self, trainer: Any, method: Any) -> None:
        """A stage begins: the schedule starts anew."""
        self.schedule.begin()
        super().begin_stage(trainer, method)

    def apply(self, trainer: Any, method: Any, clock: int) -> None:
        """Check the schedule's prior of this clock and give it to the data."""
        prior: SamplingPrior = self.schedule(clock)
        method.check_prior(prior)
        method.feed.steer("schedule", prior)

    def state_dict(self) -> dict[str, Any]:
        """What the schedule remembers of the measures that it has heard."""
        return dict(self.schedule.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the schedule back what it remembered when the checkpoint was written."""
        if state_dict:
            self.schedule.state = state_dict


def _says(schedule: Any) -> bool:
    """Whether what a schedule hears is said for its own `hear`: by itself, or by the class that has it or one derived from that."""
    kinds = type(schedule).__mro__
    writes = next((i for i, kind in enumerate(kinds) if "hear" in vars(kind)), len(kinds))
    return "hears" in vars(schedule) or any("hears" in vars(kind) for kind in kinds[: writes + 1])


class Cadence(OnClock):
    """Changes `data.rollouts.every` while a run goes on.

    Args:
        every: student updates between two roll-outs, one after the other.
        starts: the clocks from which they hold, rising from 0, as many.
    """

    def __init__(self, every: Sequence[int], starts: Sequence[int]) -> None:
        if len(every) != len(starts) or not starts or starts[0] != 0 or list(starts) != sorted(set(starts)) or min(every) < 1:
            raise ValueError(
                f"a cadence needs as many starts as values >= 1, starts rising from 0; got every={list(every)}, starts={list(starts)}"
            )
        self.every, self.starts = list(every), list(starts)

    def apply(self, trainer: Any, method: Any, clock: int) -> None:
        """Set the number of updates between two roll-outs to that of this clock."""
        method.feed.collect_every = next(e for e, s in zip(reversed(self.every), reversed(self.starts), strict=True) if clock >= s)


class FlushBuffer(OnClock):
    """Forgets all roll-outs at given clocks (by the Stages callback they are forgotten at every stage as well).

    Args:
        at: student updates of a stage after which they are forgotten.
    """

    def __init__(self, at: Sequence[int]) -> None:
        at_least(0, at=at)
        self.at = sorted(at)
        self._last: int | None = None

    def apply(self, trainer: Any, method: Any, clock: int) -> None:
        """Empty the buffer once whenever the clock passes one of `at`."""
        if self._last is not None and any(self._last < a <= clock for a in self.at):
            method.feed.flush()
        self._last = clock
