"""Pictures during training: the same prompts and the same noise, teacher and student side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.bounds import at_least, lengths, seeds, within
from ddil_lightning.diffusion.denoiser import evaluating
from ddil_lightning.feed import Feed
from ddil_lightning.files import replacing
from ddil_lightning.runs.boards import show
from ddil_lightning.runs.sheets import labelled
from ddil_lightning.training.deployment import Deployment


class Previews(Callback):
    """Sheets of samples, `samples/NNNNNN.png`: a row for every step count of the teacher and of the student, a column for every prompt.

    The teacher is sampled once, after the first update, which need not wait for it. A sheet says in its PNG what its rows and columns are.
    W&B and TensorBoard get it too, and the student's pictures at its first step count one by one, each with its prompt.

    Args:
        every: student updates between two sheets, besides those at the start and at the end; 0 for none at all.
        first: student updates before one more, early in a run; 0 for none. Where the first sheet of a trained student lies is printed.
        count: how many prompts.
        prompts: what to draw, by default the first captions of the data. One that is too long is refused, or cut where `data.truncate` cuts
            the captions.
        teacher_steps: the teacher's step counts.
        student_steps: the student's step counts, by default those it is made for.
        seed: of the noise, the same for all rows; that of column i is `seed` + i.
    """

    def __init__(
        self,
        every: int = 100,
        first: int = 20,
        count: int = 8,
        prompts: list[str] | None = None,
        teacher_steps: Sequence[int] = (32, 4, 2),
        student_steps: Sequence[int] | None = None,
        seed: int = 20_000,
    ) -> None:
        at_least(0, **{"previews.every": every, "previews.first": first})
        within(1, 1000, **{"previews.count": count})
        at_least(1, **{"previews.teacher_steps": teacher_steps, "previews.student_steps": student_steps})
        lengths(**{"previews.prompts": prompts, "previews.student_steps": student_steps})
        seeds(**{"previews.seed": seed})
        self.every, self.first, self.count, self.prompts, self.seed = every, first, count, prompts, seed
        self.teacher_steps, self.student_steps = list(teacher_steps), student_steps
        self._teacher: list[Tensor] = []
        self._drawn: int | None = None
        self._waiting: tuple[int, dict[int, Tensor]] | None = None  # of a sheet that lacks the teacher's rows: its update, the student's
        self._told = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the prompts, for runs that are not started by ddil-fit, which does so earlier."""
        if self.every:
            self.check_prompts(pl_module.backbone, pl_module.feed)

    def check_prompts(self, backbone: Any, feed: Feed) -> None:
        """Raises ValueError for a prompt that would be cut, unless `feed` cuts its captions too."""
        if self.prompts and not feed.truncate:
            try:
                backbone.check_length(self.prompts[: self.count])
            except ValueError as error:
                raise ValueError(f"previews.prompts: {error}".replace("or allow truncation", "or set data.truncate to true")) from error

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw the student's rows of the first sheet, of a student that equals its teacher.

        A run that goes on draws as well, so that a fault shows now, but keeps the sheet only where its clock asks for one.
        """
        if self.every:
            clock, student = pl_module.student_updates, self._students(trainer, pl_module)
            self._waiting, self._told = None if clock % self.every else (clock, student), clock > 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Finish the first sheet after the first update; draw one after `first`, after every `every` and after the last."""
        clock = pl_module.student_updates
        if not self.every or clock == self._drawn:
            return
        if self._waiting is not None:
            self._write(trainer, pl_module, *self._waiting)
            self._waiting = None
        if clock % self.every == 0 or clock == self.first or clock >= pl_module.updates:
            self.draw(trainer, pl_module)

    def draw(self, trainer: Any, method: Any) -> None:
        """Sample teacher and student, write the PNG and hand it to the loggers.

        All processes sample, because a sharded student answers only then; rank 0 writes.
        """
        self._write(trainer, method, method.student_updates, self._students(trainer, method))

    def _students(self, trainer: Any, method: Any) -> dict[int, Tensor]:
        """The student's rows at the present clock, by their steps."""
        self._drawn = method.student_updates
        with trainer.precision_plugin.forward_context(), evaluating(method.deployment.network):
            return {n: self._row(method.backbone, method.deployment, n, self._prompts(method)) for n in self._steps(method)}

    def _write(self, trainer: Any, method: Any, clock: int, student: dict[int, Tensor]) -> None:
        """The sheet of the update `clock`: the teacher's rows, and those of the student as it was then, maybe of another stage."""
        prompts, steps, rows = self._prompts(method), list(student), list(student.values())
        if not self._teacher:
            with trainer.precision_plugin.forward_context(), evaluating(method.deployment.network):
                self._teacher = [self._row(method.backbone, method.baseline, n, prompts) for n in self.teacher_steps]
        if not trainer.is_global_zero:
            return
        labels = [f"teacher@{n}" for n in self.teacher_steps] + [f"student@{n}" for n in steps]
        scale = max(1, 96 // rows[0].shape[-1])
        picture = sampling.sheet([*self._teacher, *rows], labels, prompts, scale=scale)
        path = Path(trainer.default_root_dir) / "samples" / f"{clock:06d}.png"
        with replacing(path) as temporary:
            picture.save(temporary, format="PNG", pnginfo=labelled(labels, prompts))
        if clock and not self._told:
            self._told = True
            print(f"pictures of the student after {clock} updates: {path}", flush=True)
        said = f"rows: {', '.join(labels)}; columns: {'; '.join(prompts)}"
        show(trainer.loggers, "previews/sheet", [picture], [said], clock)
        single = [sampling.tiles(image[None], scale, 1) for image in rows[0]]
        show(trainer.loggers, f"previews/student_{steps[0]}", single, prompts, clock)

    def _prompts(self, method: Any) -> list[str]:
        prompts = self.prompts or method.backbone.about.get("previews") or method.feed.examples(self.count)
        return list(prompts)[: self.count]

    def _steps(self, method: Any) -> list[int]:
        return list(self.student_steps or method.deployment.steps)

    def _row(self, backbone: Any, deployment: Deployment, steps: int, prompts: list[str]) -> Tensor:
        return sampling.images(backbone, *deployment.sampler(steps), prompts, deployment.guidance, self.seed)
