"""Imagine Flash (Kohler et al. 2024, arXiv 2405.05224; METHODS 5.2): backward distillation, shifted reconstruction, noise correction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.bounds import lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.policy import Policies, Policy, solve
from ddil_lightning.diffusion.transitions import Transition, ddim, noise_corrected
from ddil_lightning.feed import Wants
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.randomness import numbers_of


@dataclass(frozen=True)
class Shift:
    """The time t' = a T + (b - a) t at which the teacher looks at what the student made at t, and never above t itself.

    A large t is sent to a large t', where the teacher changes the layout, a small one to a small t', where it adds detail.

    Args:
        low: a, as a share of T.
        high: b, as a share of T.
    """

    low: float = 0.02
    high: float = 0.6

    def __post_init__(self) -> None:
        within(0, 1, **{"shift.low": self.low, "shift.high": self.high})
        if self.low > self.high:
            raise ValueError(f"shift.low = {self.low} is above shift.high = {self.high}: give shares of T that rise")

    def __call__(self, t: Tensor, total: int) -> Tensor:
        """t' [B] of times t [B], of `total` in all: integers that do not fall as t rises, at most t."""
        return torch.minimum((self.low * total + (self.high - self.low) * t).round().long(), t)


class ImagineFlash(Distillation):
    """The student's x0 on its own trajectory should be what the guided teacher makes of it, once it is noised to a shifted time.

    L = |xS - xT|^2 with xS = x0 of the student at x_t and xT the guided teacher's x0 at y = alpha_t' xS + sigma_t' eps, y and xT without a
    gradient. The target asks for no x0 of the data, so every source is legal: the student's own roll-outs are the paper's backward
    distillation, which needs no images; forward latents are the diversity that DDIL adds, teacher and mixed roll-outs its expert's states.
    Reflection acts on the teacher's x0, never on the student's.

    Args:
        steps: nodes of the trailing grid (the paper samples in 3, 2 and 1).
        rollouts: the step counts that backward distillation walks, whose nodes must be among those of `steps`.
        teacher_steps: of the teacher's roll-outs on the whole grid; a multiple of `steps`.
        solver_steps: the teacher's DDIM steps from t' to the clean end, one for a single estimate of x0.
        shift: the map from t to t'.
        noise_correction: the first step takes the noise itself for eps, x_s = alpha_s x0 + sigma_s x_T, in roll-outs and at inference. No
            scheduler of diffusers does, so the exported pipeline takes DDIM's first step, and its card says so; here it samples so by the
            name `ddim-nc`. Where the process ends in noise alone, as a flow does, DDIM's own first step is that one.
        w_conditioned: the student is told w (a zero-initialised embedding); without it one guidance is baked in.
    """

    wants = Wants(pure_noise=True, real=False)
    loss_is_distance = True

    def __init__(
        self,
        *,
        steps: int = 4,
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        solver_steps: int = 1,
        shift: Shift = Shift(),
        noise_correction: bool = True,
        w_conditioned: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        total = self.backbone.schedule.steps
        self.check_guidance(w_conditioned, "w_conditioned")
        lengths(rollouts=rollouts)
        within(1, total, steps=steps, teacher_steps=teacher_steps, rollouts=rollouts, solver_steps=solver_steps)
        if teacher_steps % steps:
            raise ValueError(
                f"teacher_steps = {teacher_steps} is no multiple of steps = {steps}: the teacher must stop at the student's nodes"
            )
        self.shift, self.solver_steps = shift, solver_steps
        self.transition: Transition = noise_corrected(self.backbone.schedule) if noise_correction else ddim
        nodes = Grid.named("trailing", steps, total)
        self.grid = Grid(nodes.times.tolist(), [Grid.named("trailing", n, total) for n in rollouts], rule="trailing")
        self.cast(
            student=self.role("student", w_conditioned=w_conditioned),
            teacher=self.role("teacher", reflection=self.reflection),
        )
        fine = Grid.named("trailing", teacher_steps, total)
        self.policies = Policies(Policy(self.student, self.transition), Policy(self.teacher, ddim, fine=fine))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update: the student's x0 at (x_t, t) against the teacher's reconstruction of it."""
        x = self.student(b.x_t, b.t, b.c).x0
        with torch.no_grad():
            target = self.reconstruction(x.detach(), b, self._noise(x))
        if self.descend(self.optimizers(), self.feedback(b, mse(x, target))):
            self.advance()

    def reconstruction(self, x: Tensor, b: LatentBatch, eps: Tensor) -> Tensor:
        """xT [B, C, H, W]: what the guided teacher makes of the student's x, noised by `eps` to the shifted time t'."""
        schedule = self.teacher.schedule
        t = self.shift(b.t, schedule.steps)
        made = solve(self.teacher, schedule.add_noise(x, eps, t), t, b.c, self.solver_steps)
        self.record_saturation(made)
        return made

    def _noise(self, like: Tensor) -> Tensor:
        """eps, a function of the feed's seed and of the clocks, so that a resumed run repeats it."""
        generator = numbers_of(self).local("reconstruction", like.device)
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def deploy(self, student: Denoiser) -> Deployment:
        """DDIM on trailing nodes, in the trained step count or fewer, whose first step is corrected; the pipeline's is DDIM's own."""
        n, total = len(self.grid), self.student.schedule.steps
        counts = tuple(sorted({n, *(k for k in (4, 2, 1) if n % k == 0 and k < n)}, reverse=True))
        scheduler = partial(self.backbone.scheduler, ddim, student.predicts, "trailing", n)
        grid = partial(Grid.named, "trailing", total=total)
        return Deployment(Policy(student, self.transition), grid, counts, self.eval_guidance, scheduler).by_ddim()
