"""Moment matching (Salimans et al. 2024, arXiv 2406.04103, Alg. 2; METHODS 5.6) as a feedback loss of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import at_least
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.transitions import Posterior
from ddil_lightning.feed import Wants
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.adversarial import Adversarial
from ddil_lightning.training.adversary import CLEAN, Adversary, Critic, Heard, Span
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.gan import Gan
from ddil_lightning.training.scores import Reflects


class Auxiliary(Adversary):
    """The auxiliary denoiser's turns: it learns the mean of student and teacher, E[x | z_s] and E_T[x | z_s], on the student's own z_s."""

    def following(
        self, x: Tensor, b: LatentBatch, real: Tensor | None = None, span: Span = CLEAN, heard: Heard | None = None
    ) -> Tensor:
        """w(s) (|x - h_phi(z_s)|^2 + |h_T(z_s) - h_phi(z_s)|^2) of the student's samples x."""
        method = self.method
        z, s = method.earlier(x, b, "critic")
        with torch.no_grad():
            target = method.teacher(z, s, b.c).x0
        h = method.critic(z, s, b.c).x0
        loss = method.weight(s, x) * (mse(x, h) + mse(target, h))
        method.measures.record(denoising=loss)
        return (b.weight * loss).mean()


class MomentMatching(Adversarial):
    """A step of the student, x = x0 at z_t and then z_s ~ q(z_s | z_t, x), should leave the mean E[x | z_s] that the teacher has there.

    That conditional mean is known through an auxiliary denoiser, which starts as the teacher and takes turns with the student. The
    student's gradient in x is w(s) (h_phi(z_s) - h_T(z_s)), z_s without gradient, w(s) = min(SNR_s + 1, `cap`), and s anywhere between the
    node t and the next one. h_phi learns the mean of both, so the difference is half of the gap between student and teacher, and nothing
    where they agree. No x0 of data is asked for, so every source is legal, and both turns must see the same mixture: data are the paper's
    source, and with the student's own roll-outs the fixed point holds along its trajectories. The guided teacher's x0 is reflected, the
    student's straight-through, and the auxiliary's, of which nothing pulls back what has left a common box, where `reflects` says so.

    Args:
        steps: nodes of the grid, k (4: 999, 749, 499, 249), a divisor of the schedule's times.
        rollouts: the step counts that the student's roll-outs walk.
        teacher_steps: of the teacher's DDIM roll-outs, on the whole grid; a multiple of `steps`.
        critic: the auxiliary's time scale, 1:1 in the paper.
        cap: the largest weight w(s); 1 weighs errors of x0 alike at all times.
        reflects: which estimates are thresholded where `reflect` is not off; `real` is the teacher's, `critic` the auxiliary's.
    """

    wants = Wants(real=False)
    critic: Role

    def __init__(
        self,
        *,
        steps: int = 4,
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        critic: Critic = Critic(1),
        cap: float = 5.0,
        reflects: Reflects = Reflects(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        fine = self.nodes(steps, rollouts, teacher_steps)
        at_least(1, cap=cap)
        self.cap, self.reflects = cap, reflects
        student, teacher = self.role("student"), self.role("teacher", reflection=self.reflection if reflects.real else None)
        critic.check_pull(student, None)  # the auxiliary learns the mean of two networks, and is nobody's denoiser
        self.cast(student=student, critic=self.role("critic"), teacher=teacher)
        self.against(Auxiliary(self, self.critic, None, critic.steps, Gan()), critic, fine)
        self.policies = Policies(Policy(self.student, Posterior()), self.policies.teacher)

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of the auxiliary; every `critic.steps`-th time one of the student before it, on the same samples."""
        optimizers: Any = self.optimizers()
        student, critic = optimizers
        with torch.set_grad_enabled(self.adversary.student_turn):
            x = self.student(b.x_t, b.t, b.c).x0
            x = self.reflection.through(x) if self.reflects.student else x

        if self.adversary.student_turn and self.descend(student, self.feedback(b, self.matching(x, b))):
            self.advance()

        self.adversary.descend(critic, x.detach(), b)

    def matching(self, x: Tensor, b: LatentBatch) -> Tensor:
        """[B] pseudo-loss whose gradient in x is that of w(s) <x, h_phi(z_s) - h_T(z_s)>; its value is the squared gap of the moments."""
        z, s = self.earlier(x, b, "matching")
        with torch.no_grad():
            h, real = self.critic(z, s, b.c).x0, self.teacher(z, s, b.c).x0
            gap = (self.reflection(h) if self.reflects.critic else h) - real
        self.record_saturation(real)
        return 0.5 * self.weight(s, x) * mse(x, (x - gap).detach())

    def earlier(self, x: Tensor, b: LatentBatch, purpose: str) -> tuple[Tensor, Tensor]:
        """z_s ~ q(z_s | z_t, x) without gradient, and s [B], uniform from the next node (or 0) to below t."""
        schedule, x = self.student.schedule, x.detach()
        generator = self.adversary.generator(purpose, x.device)
        low = b.s.clamp(min=0)
        u = torch.rand(len(x), generator=generator, device=x.device)
        s = low + (u * (b.t - low)).long()
        return Posterior()(schedule, b.x_t, schedule.from_x0(b.x_t, b.t, x), b.t, s, generator), s

    def weight(self, s: Tensor, like: Tensor) -> Tensor:
        """[B] w(s), of squared errors in x0: SNR_s + 1 makes them errors in v, of which small s would be nearly all."""
        return (self.student.schedule.snr(s, like).flatten() + 1).clamp(max=self.cap)

    def deploy(self, student: Denoiser) -> Deployment:
        """Ancestral sampling on trailing nodes, x_s ~ q(x_s | x_t, x0), in the trained step count or fewer."""
        n, total = len(self.grid), self.student.schedule.steps
        steps = tuple(sorted({n, *(k for k in (4, 2, 1) if n % k == 0 and k < n)}, reverse=True))
        scheduler = partial(self.backbone.scheduler, Posterior(), student.predicts, "trailing", n)
        grid = partial(Grid.named, "trailing", total=total)
        return Deployment(Policy(student, Posterior()), grid, steps, self.eval_guidance, scheduler)
