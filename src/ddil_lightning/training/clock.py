"""The one clock of a run, student updates: what happens when it moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback

from ddil_lightning.training.completeness import check_moves, check_reached, unasked
from ddil_lightning.training.sharding import in_step


class Clock(Callback):
    """After every batch: commit the data position, publish the running means, stop at `updates`.

    A callback and not a module hook, because checkpoint callbacks run before the module's own hook and would save a stale counter.
    """

    _open = False  # whether a batch has begun whose place in the data is not committed

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises ValueError for a hook of a method that replaces that of the base, as all that follow here do (`check_reached`)."""
        check_reached(pl_module, "setup", "configure_model")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Nothing is left to do in a run that resumes from its end. A checkpoint's optimisers have been restored by now."""
        check_reached(pl_module, "on_fit_start", *(["on_load_checkpoint"] if trainer.ckpt_path else []))
        pl_module.restate()
        self._began = self._logged = pl_module.student_updates
        self._loggers = list(trainer.loggers)
        self._in_step, self._stood = False, 0  # micro-batches before the first update of the student
        pl_module.measures.listen(self.write)
        if pl_module.student_updates >= pl_module.updates:
            trainer.should_stop = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step on one more batch begins."""
        self._open = True
        check_reached(pl_module, *(["on_train_batch_end"] if self._in_step else []))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Commit, log, stop. Raises ValueError for a method whose clock does not move: such a run would not end (`check_moves`)."""
        clock = pl_module.student_updates
        check_reached(pl_module, "on_train_batch_start", *(["advance"] if clock != self._began else []))
        self._commit(pl_module)
        if not self._in_step:  # until the first batch is done one process may have more to prepare than others
            self._in_step = True
            in_step(trainer.strategy, True)
        if clock == self._began:
            self._stood += 1
            check_moves(pl_module, self._stood, isinstance(outputs, Mapping) and "loss" in outputs)
        if clock != self._logged and (clock % pl_module.log_every == 0 or clock >= pl_module.updates):
            self._logged = clock
            factor = pl_module.descent.factor(pl_module.stage_updates, pl_module.stage_length)
            values = {"lr": pl_module.lr * factor, **pl_module.measures.flush()}
            pl_module.measures.publish(clock, values | pl_module.feed.statistics())
        if clock >= pl_module.updates:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """This trainer's loggers hear no other run of the method."""
        in_step(trainer.strategy, False)
        pl_module.measures.forget(self.write)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The last checkpoint is written: a hook that was called after it is judged, too."""
        check_reached(pl_module, "on_train_end", *(["on_train_batch_end"] if self._in_step else []))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same for a run that was broken off. An error for want of latents that the method did not ask for says so.

        Where a callback has failed after the step, that step is committed, so that a checkpoint of its update is whole.
        """
        batches = batches_of(trainer)
        if batches.processed > batches.completed:
            self._commit(pl_module)
        for said in dict.fromkeys(unasked(exception)):
            vars(exception).setdefault("__notes__", []).append(said)  # add_note, which Python 3.10 has not
        pl_module.measures.forget(self.write)

    def _commit(self, method: Any) -> None:
        if self._open:
            method.feed.commit()
        self._open = False

    def write(self, clock: int, values: Mapping[str, float]) -> None:
        """What is published, to the loggers."""
        for logger in self._loggers:
            logger.log_metrics({"student_updates": clock, **values}, step=clock)


def batches_of(trainer: Any) -> Any:
    """How many batches of the epoch have begun their step (`started`), ended it (`processed`), been through all callbacks (`completed`)."""
    return trainer.fit_loop.epoch_loop.batch_progress.current


class Clocks:
    """How far a method is: `student_updates` of `updates` in all, the number of its `stage`, and the update at which that began."""

    updates: int
    student_updates: int = 0
    stage: int = 0
    stage_start: int = 0

    @property
    def stage_updates(self) -> int:
        """Student updates of the present stage, of which it has `stage_length`."""
        return self.student_updates - self.stage_start

    @property
    def stage_length(self) -> int:
        """Student updates that the present stage has; a method without stages has one."""
        return self.updates

    @property
    def stage_is_over(self) -> bool:
        """Whether the present stage has had all the updates that its plan gives it."""
        return self.stage_updates == self.stage_length

    @property
    def progress(self) -> float:
        """The share of the present stage that is done, 0 to 1."""
        return min(self.stage_updates / self.stage_length, 1.0)
