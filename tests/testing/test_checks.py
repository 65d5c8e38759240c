"""What a method promises: a sound one keeps all of it, and each way in which authors break one is found by its check, in one line."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning import LCM, Deployment, Distillation, Grid, Policies, Policy, SamplingPrior, ddim, mse
from ddil_lightning.records import LatentBatch
from ddil_lightning.testing import (
    Broken,
    Subject,
    check_method,
    exports,
    fits,
    follows_its_seed,
    is_itself_without_rollouts,
    resumes,
)
from ddil_lightning.testing.subject import mixed
from ddil_lightning.training.optimisation import Optimizer


class Sound(Distillation):
    """The student's x0 on four nodes is to be its teacher's, a little nearer to 0 with every update."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grid = Grid.named("trailing", 4, self.backbone.schedule.steps)
        self.cast(student=self.role("student"), teacher=self.role("teacher"))
        self.policies = Policies(Policy(self.student, ddim), Policy(self.teacher, ddim))

    def shrink(self, b: LatentBatch) -> float:
        return 1 - 0.01 * self.student_updates

    def training_step(self, b: LatentBatch, i: int) -> None:
        with torch.no_grad():
            target = self.teacher(b.x_t, b.t, b.c).x0
        loss = mse(self.student(b.x_t, b.t, b.c).x0, self.shrink(b) * target)
        if self.descend(self.optimizers(), self.feedback(b, loss)):
            self.advance()

    def deploy(self, student: Any) -> Deployment:
        grid = partial(Grid.named, "trailing", total=self.student.schedule.steps)
        return Deployment(
            Policy(student, ddim), grid, (4,), self.eval_guidance, partial(self.backbone.scheduler, ddim, student.predicts, "trailing", 4)
        )


class Counts(Sound):
    """A counter of its own, which no checkpoint has."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.steps = 0

    def shrink(self, b: LatentBatch) -> float:
        self.steps += 1
        return 1 - 0.01 * self.steps


class Draws(Sound):
    """Its own noise, from Python's generator."""

    def shrink(self, b: LatentBatch) -> float:
        return 1 - 0.01 * random.random()


class DrawsByTorch(Sound):
    """Its own noise, from torch's global generator, which every step finds set."""

    def shrink(self, b: LatentBatch) -> Any:
        return 1 - 0.01 * torch.rand(len(b.t), 1, 1, 1)


class MovesTheTeacher(Sound):
    """An average that is kept in the teacher's place."""

    def advance(self) -> None:
        super().advance()
        with torch.no_grad():
            for mine, frozen in zip(self.student.network.parameters(), self.teacher.network.parameters(), strict=False):
                frozen.lerp_(mine, 0.1)


class LooksAtTheData(Sound):
    """A step that hangs on who feeds it."""

    def shrink(self, b: LatentBatch) -> float:
        return 0.5 if self.feed.prior is not None else 1.0


class Elsewhere(Sound):
    """Deployed on other nodes than it was trained on."""

    def deploy(self, student: Any) -> Deployment:
        grid = partial(Grid.named, "linspace", total=self.student.schedule.steps)
        return Deployment(
            Policy(student, ddim), grid, (4,), self.eval_guidance, partial(self.backbone.scheduler, ddim, student.predicts, "linspace", 4)
        )


class Otherwise(Sound):
    """Exported with a scheduler of other nodes than its deployment's."""

    def deploy(self, student: Any) -> Deployment:
        made = super().deploy(student)
        return Deployment(
            made.policy, made.grid, (4,), self.eval_guidance, partial(self.backbone.scheduler, ddim, student.predicts, "linspace", 4)
        )


class StandsStill(Sound):
    """Descends a loss that its student has no part in."""

    def training_step(self, b: LatentBatch, i: int) -> None:
        loss = mse(0 * self.student(b.x_t, b.t, b.c).x0, b.x_t)
        if self.descend(self.optimizers(), self.feedback(b, loss)):
            self.advance()


@pytest.fixture
def tiny(light: Path) -> Path:
    return light


@pytest.mark.parametrize("method", [Sound, DrawsByTorch])
def test_a_sound_method_keeps_all(method: Any, tiny: Path) -> None:
    check_method(method, tiny, guidance=2.0)


BROKEN = [
    (Counts, resumes, "goes on otherwise than one in one piece, in weights.student."),
    (Draws, follows_its_seed, "two runs of one seed differ in weights.student."),
    (MovesTheTeacher, fits, "the frozen pipeline has moved"),
    (LooksAtTheData, is_itself_without_rollouts, "not the same with DDIL's data as without them, in weights.student."),
    (Elsewhere, exports, "has other times than self.grid"),
    (Otherwise, exports, "names a scheduler that steps otherwise than its policy"),
    (StandsStill, fits, "no weight of the student has moved"),
]


@pytest.mark.parametrize(("method", "check", "said"), BROKEN, ids=[method.__name__ for method, *_ in BROKEN])
def test_what_is_broken_is_found_by_name(method: Any, check: Any, said: str, tmp_path: Path) -> None:
    """On a pipeline of their own, for one of them writes into it."""
    with pytest.raises(Broken) as error:
        check(Subject(method, tmp_path, guidance=2.0, optimizer=Optimizer(lr=1e-3, weight_decay=0.0)))
    told = str(error.value)
    assert told.startswith(f"{check.__name__}: ") and said in told and "\n" not in told


def test_roll_outs_are_of_whom_a_method_has_a_target_for(tiny: Path) -> None:
    method = Subject(LCM, tiny, guidance=2.0, w_conditioned=False).build()
    assert mixed(method) == SamplingPrior(0.5, 0.25, 0.25)
    method.sources = ("forward", "student")
    assert mixed(method) == SamplingPrior(0.5, 0.5, 0.0)
    method.sources = ("teacher",)
    assert mixed(method) == SamplingPrior(0.0, 0.0, 1.0)
    method.sources = ("forward",)
    assert mixed(method) == SamplingPrior(1.0, 0.0, 0.0)
