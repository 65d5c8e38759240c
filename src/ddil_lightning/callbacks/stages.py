"""Stages: carries out the plan of a method that trains in stages (progressive distillation)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from ddil_lightning.callbacks.annealing import AnnealPrior, OnClock, check_images
from ddil_lightning.diffusion.denoiser import evaluating
from ddil_lightning.files import read_table
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.training.plan import Stage


class Stages(Callback):
    """At a stage's end: its pipeline is written, the student becomes the teacher, the grid is halved, roll-outs are forgotten.

    All of that comes after the other callbacks: the end of a stage is in a checkpoint before anything is done with it. A pipeline that is
    missing when a run goes on is made then.

    Every stage and every part of it gets its prior: that of the part, else the DataModule's own for halvings and forward latents for
    preliminary stages. The run's last update ends its stage too, but begins no other: a run that is made longer begins it then.
    Does nothing for a method without stages.

    Args:
        pipelines: write `NN-K-steps/` at the end of a stage, exported and verified, for students that can be exported.
        folder: where these are written, by default `stages/` below the trainer's root.
    """

    def __init__(self, pipelines: bool = True, folder: str | None = None) -> None:
        self.pipelines, self.folder = pipelines, folder
        self._clock = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check every prior of the plan now: one that comes after days of training must not be the one that stops it."""
        if stage != "fit" or not staged(pl_module):
            return
        parts = [part for s in pl_module.stages for part in s.parts]
        if parts and any(isinstance(c, AnnealPrior) for c in trainer.callbacks):
            raise ValueError("the plan's parts and AnnealPrior both set the prior: give the priors in one place")
        for part in parts:
            pl_module.check_prior(self._of(part, pl_module))
        forward = [s for s in pl_module.stages if any(part.forward > 0 for part in s.parts) or (s.preliminary and not s.parts)]
        if forward:
            check_images(pl_module, f"the plan's stage {forward[0]}", remedy="give it parts without one")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises ValueError where `folder` holds pipelines of another run, which are not ours to replace."""
        there = sorted(Path(self.folder).glob("*-steps")) if self.folder and staged(pl_module) and self.pipelines else []
        if there and not trainer.ckpt_path:
            raise ValueError(f"stages.folder {self.folder} holds {there[0].name} of another run, which would be replaced: give another")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the first stage, or go on from a checkpoint: at a stage's end its pipeline may be missing, and the next has not begun."""
        if staged(pl_module):
            self._clock = pl_module.student_updates
            if trainer.strategy.broadcast(self.owed(pl_module, trainer.default_root_dir) is not None):
                self._deliver(trainer, pl_module)
            self._go_on(trainer, pl_module)

    def after_checkpoints(self, trainer: Any, pl_module: Any) -> None:
        """Carry out the end of a stage, once, and set the prior of the next batch.

        Called by the method when a batch is over for all callbacks.
        """
        if not staged(pl_module):
            return
        moved, self._clock = pl_module.student_updates != self._clock, pl_module.student_updates
        if moved and pl_module.stage_is_over and self.pipelines:
            self._deliver(trainer, pl_module)
        self._go_on(trainer, pl_module)

    def _deliver(self, trainer: Any, method: Any) -> None:
        with method.gathered():
            if trainer.is_global_zero:
                self.deliver(method, trainer.default_root_dir, method.feed.examples(4))

    def _go_on(self, trainer: Any, method: Any) -> None:
        if self._moves_on(method):
            self.next_stage(trainer, method)
        method.feed.steer("plan", self.prior(method))

    @staticmethod
    def _moves_on(method: Any) -> bool:
        """Whether the present stage has had its updates, or more where a run goes on with fewer of them, and another one begins."""
        more = method.stage + 1 < len(method.stages) and method.student_updates < method.updates
        return bool(more and method.stage_updates >= method.stage_length)

    def next_stage(self, trainer: Any, method: Any) -> None:
        """Have the method begin its next stage, and empty the buffer; every callback on the clock of the stage is told that it is 0."""
        method.next_stage()
        method.feed.flush()
        for callback in trainer.callbacks:
            if isinstance(callback, OnClock):
                callback.begin_stage(trainer, method)

    def prior(self, method: Any) -> SamplingPrior | None:
        """The prior of the present stage and part; None where the plan has none, and the schedule's or the DataModule's own holds."""
        part = method.now.part(method.stage_updates)
        if part is not None:
            return self._of(part, method)
        return SamplingPrior() if method.now.preliminary else None

    def place(self, method: Any, root: str | Path) -> Path:
        """The folder of the present stage's pipeline."""
        name = method.now.kind if method.now.preliminary else f"{method.deployment.steps[0]}-steps"
        return Path(self.folder or Path(root) / "stages") / f"{method.stage + 1:02d}-{name}"

    def owed(self, method: Any, root: str | Path) -> Path | None:
        """The folder that the end of the present stage asks for and that is not there, or is that of another update."""
        if not (self.pipelines and staged(method) and method.backbone.holds_students):
            return None
        if not (method.stage_is_over or self._moves_on(method)):
            return None
        place = self.place(method, root)
        return None if read_table(place / "ddil.json").get("student_updates") == method.student_updates else place

    def deliver(self, method: Any, root: str | Path, examples: Sequence[str]) -> Path | None:
        """Write the stage's student as a pipeline folder and answer it; None for a student that cannot be exported.

        A pipeline that does not sample as the trainer does is reported in the log and kept as `-unverified`; the run goes on.
        """
        from ddil_lightning.runs import export

        if not method.backbone.holds_students:
            return None
        place = self.place(method, root)
        try:
            with evaluating(method.deployment.network):
                export.deliver(method, place, export.check_prompts(method, examples), method.deployment.steps[0])
        except export.NotAsTrained as error:
            # Days of training may lie ahead, and the checkpoint has this student.
            logging.getLogger(__name__).warning(f"the pipeline of {method.now}: {error}")
        return place

    @staticmethod
    def _of(part: Any, method: Any) -> SamplingPrior:
        mix = (method.feed.own_prior or SamplingPrior()).mix
        return SamplingPrior(part.forward, part.student, part.teacher, mix)


def staged(method: Any) -> bool:
    """Whether a method has a plan of stages; an option of this name that is none, such as a number, is the method's own business."""
    plan = getattr(method, "stages", None)
    return isinstance(plan, list | tuple) and bool(plan) and all(isinstance(stage, Stage) for stage in plan)
