"""What a method asks of its latents: the ends of trajectories (reflow, DMD's regression) and noise without data (one-step generators)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.feed import Wants
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.records import TEACHER, LatentBatch
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.method import Distillation
from suite import Entry, build, captions, equal, fit, pictures, state


class Regression(Distillation):
    """One step from the noise of the teacher's trajectory to its end: the regression of DMD (Yin et al. 2024, Eq. 9) by itself."""

    wants = Wants(ends=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grid = Grid.named("trailing", 4)
        self.cast(student=self.backbone.role("student"), teacher=self.backbone.role("teacher"))
        self.policies = Policies(Policy(self.student), Policy(self.teacher))
        self.seen: list[LatentBatch] = []

    def training_step(self, b: LatentBatch, i: int) -> None:
        assert b.noise is not None and b.end is not None
        self.seen.append(b)
        top = torch.full_like(b.t, self.student.schedule.steps - 1)
        x = self.student(b.noise, top, b.c).x0
        if self.descend(self.optimizers(), self.feedback(b, mse(x, b.end))):
            self.advance()

    def deploy(self, student: Any) -> Deployment:
        return Deployment(Policy(student), lambda n: Grid.named("trailing", n), (1,), self.eval_guidance)


class OneStep(Regression):
    """A generator of one node that asks for noise, by captions alone."""

    wants = Wants(pure_noise=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grid = Grid.named("trailing", 1)

    def training_step(self, b: LatentBatch, i: int) -> None:
        self.seen.append(b)
        if self.descend(self.optimizers(), self.feedback(b, self.student(b.x_t, b.t, b.c).x0.square().flatten(1).mean(1))):
            self.advance()


ENTRY = Entry("regression", Regression, {"guidance": 2.0, "reflect": "off"})
TEACHERS = SamplingPrior(0.25, 0.0, 0.75)


def test_a_method_gets_the_pairs_that_it_asks_for_and_resumes_with_them(tiny: Path, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"buffer": {"capacity": 32}}
    run = fit(build(ENTRY, tiny, updates=6), captions(tiny, TEACHERS, **kwargs), Checkpoints(every=3, keep=9, folder=str(tmp_path)))
    ended = state(run)
    for b in run.method.seen:
        ours = b.source == TEACHER
        assert ours.tolist() == [False] + [True] * 3 and b.real is not None
        alpha, sigma = run.method.student.schedule.at(b.t[~ours], b.x_t)
        assert torch.allclose(b.x_t[~ours], alpha * b.end[~ours] + sigma * b.noise[~ours], atol=1e-6)
        c = b.c._replace(text=b.c.text[ours], w=b.c.w[ours], mask=None if b.c.mask is None else b.c.mask[ours])
        made = run.method.policies.teacher.sample(b.noise[ours], run.method.grid, c)
        assert torch.allclose(made, b.end[ours], atol=1e-4)
    again = fit(build(ENTRY, tiny, updates=6), captions(tiny, TEACHERS, **kwargs), ckpt=tmp_path / "updates=3.ckpt")
    assert equal(ended, state(again)) and again.rows == run.rows[3:]
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(run.method.seen[3:], again.method.seen, strict=True))


def test_a_generator_of_one_node_trains_on_captions_alone(tiny: Path) -> None:
    data = captions(tiny, SamplingPrior())
    data.captions = Encoded(None, pictures(tiny).c)
    run = fit(build(Entry("one", OneStep, {"guidance": 2.0, "reflect": "off"}), tiny, updates=3), data)
    for b in run.method.seen:
        assert b.real is None and b.t.unique().tolist() == [999] and abs(float(b.x_t.std()) - 1) < 0.2


def test_dmd2_asks_for_noise_at_its_first_node(tiny: Path) -> None:
    from ddil_lightning.methods import DMD2, LCM, PD

    assert DMD2.wants == Wants(pure_noise=True) and LCM.wants == PD.wants == Wants(real=False)
