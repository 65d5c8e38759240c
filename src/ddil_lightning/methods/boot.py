"""Data-free distillation by bootstrapping, BOOT (Gu et al. 2023, Eq. 6 to 9; METHODS 5.7), as a feedback loss of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.bounds import fraction, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import Distance
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.feed import Wants
from ddil_lightning.records import END, FORWARD, Context, LatentBatch, sent
from ddil_lightning.streams import Generators
from ddil_lightning.training.deployment import Deployment, one_step
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.randomness import numbers_of


class BOOT(Distillation):
    """The student answers noise z, at every time t, with the signal y_t = (x_t - sigma_t z) / alpha_t of the teacher's trajectory from z.

    Of a trajectory the signal obeys an ODE of its own, and one call of the teacher takes it from t to s: y_s = (DDIM(x_t; t -> s) -
    sigma_s z) / alpha_s is the target for the student's answer at s. At the first time it is the teacher's x0 of the noise. The student's
    answer at the end is the sample: one step, no data.

    Forward latents are noise alone, and x_t = alpha_t y_t + sigma_t z is made of the student's present answer, as in the paper. A state of
    a roll-out, whoever made it, is such an x_t already, with the noise that its trajectory began in: the teacher's own states are the
    expert's. The student reads z at every time, so that it is told how far it has come, T - 2 - t, and not t: the answer that is deployed
    is then the one at the time of pure noise, which the teacher was trained for and every pipeline calls first.

    Args:
        steps: nodes of the grid, between which the teacher takes one step.
        boundary: the share of samples that are trained at the first time.
        distance: of the student's answer and its target.
    """

    wants = Wants(noise=True, real=False)
    loss_is_distance = True

    def __init__(self, *, steps: int = 16, boundary: float = 0.1, distance: Distance = Distance("mse"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check_guidance(told=False)
        total = self.backbone.schedule.steps
        within(1, total, steps=steps)
        fraction(boundary=boundary)
        self.boundary, self.distance = boundary, distance
        self.grid = Grid.named("trailing", steps, total)
        self.cast(student=self.role("student"), teacher=self.role("teacher", reflection=self.reflection))
        self.policies = Policies(Bootstrapped(self.student), Policy(self.teacher, ddim, fine=self.grid))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update: the student's answer at s, or for some at the first time, against where one call of the teacher puts it."""
        assert b.noise is not None  # `wants` asks for it
        with torch.no_grad():
            time, target = self.target(b, self.at_first(b))
        y = signal(self.student, b.noise, time, b.c)
        if self.descend(self.optimizers(), self.feedback(b, self.distance(y, target))):
            self.advance()

    def target(self, b: LatentBatch, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(times [B], signals [B, C, H, W]): those at s of the flow from x_t, or the boundary's of the samples `chosen` [B] on the CPU."""
        schedule, z, last = self.teacher.schedule, b.noise, self.teacher.schedule.steps - 1
        assert z is not None  # `wants` asks for it
        first, wide = sent(chosen, z.device), (-1, *(1,) * (z.ndim - 1))
        own = schedule.add_noise(signal(self.student, z, b.t, b.c), z, b.t)  # alpha_t y_t + sigma_t z
        x = torch.where((b.source == FORWARD).view(wide), own, b.x_t)
        x, t = torch.where(first.view(wide), z, x), torch.where(first, last, b.t)
        s = torch.where(first, END, b.s)  # where the signal is the x0 of the call itself
        # Of a state of the buffer the boundary asks something else, which is not kept as its answer.
        slot = [-1 if other else state for other, state in zip(chosen.tolist(), self.feed.origin(b).slot, strict=True)]
        y = self.feed.answered(b._replace(x_t=x, t=t, s=s), self.answer, slot)
        return torch.where(first, last, b.s), y

    def answer(self, b: LatentBatch) -> Tensor:
        """y_s [B, C, H, W] by one call at x_t: where the guided teacher takes the signal, which the buffer keeps beside the state."""
        schedule, z = self.teacher.schedule, b.noise
        assert z is not None
        alpha, sigma = schedule.at(b.s, z)
        p = self.teacher(b.x_t, b.t, b.c)  # CFG, then reflection
        self.record_saturation(p.x0)  # of answers that the buffer keeps, when they are asked for
        x_s = ddim(schedule, b.x_t, p, b.t, b.s)
        return (x_s - sigma * z) / alpha

    def at_first(self, b: LatentBatch) -> Tensor:
        """[B] on the CPU, which samples are trained at the first time: by seed and clock, so that a resumed run repeats it."""
        return torch.rand(len(b.t), generator=numbers_of(self).local("boundary")) < self.boundary

    def deploy(self, student: Denoiser) -> Deployment:
        """One step from noise: there the student is told the last time, and its answer is that of the end."""
        total = self.student.schedule.steps
        scheduler = partial(self.backbone.scheduler, ddim, student.predicts, "trailing", 1)
        return Deployment(Policy(student, ddim), partial(one_step, total=total), (1,), self.eval_guidance, scheduler)


def signal(student: Denoiser, z: Tensor, t: Tensor, c: Context) -> Tensor:
    """y_t [B, C, H, W] as the student answers noise z at times t [B], END included: its output is read as that of pure noise."""
    schedule, last = student.schedule, student.schedule.steps - 1
    told = (last - 1 - t).clamp(min=0)
    out = student.output(student(z, told, c))
    return schedule.prediction(student.predicts, z, torch.full_like(t, last), out).x0


class Bootstrapped(Policy):
    """The student in a roll-out: x_s = alpha_s y_s + sigma_s z, by its answer to the noise z in which the trajectory began."""

    _z: Tensor

    def begin(self, x_T: Tensor) -> None:
        """Keep the noise."""
        self._z = x_T

    def step(self, x_t: Tensor, t: int, s: int, c: Context, generator: Generators | None = None) -> Tensor:
        """One call, at s."""
        then = torch.full((len(x_t),), s, device=x_t.device)
        return self.schedule.add_noise(signal(self.denoiser, self._z, then, c), self._z, then)  # type: ignore[arg-type]
