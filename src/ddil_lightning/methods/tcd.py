"""Trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159, Alg. 1 and 4; METHODS 5.4) as a feedback loss of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import at_least, fraction, lengths
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import Distance
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.transitions import TCD as Strategic
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.feed import Wants
from ddil_lightning.records import LatentBatch, widest
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.identity import identity_but
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.randomness import numbers_of


class TCD(Distillation):
    """A jump from x_t to any lower s should end where the jump ends that begins after one guided teacher step, at (x_u, u).

    The jump is f(x, t -> s) = alpha_s x0 + sigma_s eps, the semi-linear trajectory consistency function in its first order: the identity at
    s = t, so that no boundary scalings are needed, and for s = u the teacher's own step. The network is not told s. A latent needs no x0,
    so all sources are legal; with gamma = 0 the student's steps are DDIM's as the teacher's are, and mixed roll-outs one transport.
    Reflection acts on the guided teacher's x0 and on the target's, never on the student's.

    Args:
        w_conditioned: the student is told w (a zero-initialised embedding); without it one guidance is baked in, and the teacher
            alone sees w.
        solver_steps: nodes of the training grid, between which the teacher takes one step.
        rollouts: the step counts of student roll-outs, one of which is drawn for each.
        target_decay: decay of the average of the student that gives targets; 0: the online student, without gradient.
        distance: of the ends of the two jumps.
        gamma: of strategic stochastic sampling, in roll-outs and as the student is deployed: 0 is DDIM, 1 re-noises from time 0. A pipeline
            that is exported is called with it as `eta`.
    """

    target: Role
    wants = Wants(real=False)
    loss_is_distance = True

    def __init__(
        self,
        *,
        w_conditioned: bool = True,
        solver_steps: int = 50,
        rollouts: tuple[int, ...] = (3, 4, 5),
        target_decay: float = 0.95,
        distance: Distance = Distance(),
        gamma: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.check_guidance(w_conditioned, "w_conditioned")
        fraction(target_decay=target_decay)
        lengths(rollouts=rollouts)
        at_least(1, rollouts=rollouts)
        self.distance, self.target_decay, self.transition = distance, target_decay, Strategic(gamma)
        self.grid = Grid.consistency(solver_steps, self.backbone.schedule.steps, rollouts, rule="tcd")
        student = self.role("student", w_conditioned=w_conditioned)
        self.cast(student=student, target=student.copied("target"), teacher=self.role("teacher", reflection=self.reflection))
        self.policies = Policies(Policy(self.student, self.transition), Policy(self.teacher, ddim, fine=self.grid))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update: both jumps end in one point of s ~ U{0..u}."""
        y, target = self.ends(b, self.below(b.s))
        loss = self.distance(y, target)
        if self.descend(self.optimizers(), self.feedback(b, loss)):
            self.advance()
            self.target.follow(self.student, self.target_decay)

    def ends(self, b: LatentBatch, s: Tensor) -> tuple[Tensor, Tensor]:
        """Where the student's jump t -> s ends, and the target's u -> s from the point to which the teacher steps: [B, C, H, W] each."""
        t, u = b.t, b.s
        with torch.no_grad():
            x_u = self.feed.answered(b, self.answer)
            target = identity_but(self.inside(b), x_u, b._replace(t=u, s=s), self.f_target, self.shards.split)
        # The student comes last: its activations do not lie in memory, and out of the cache, while the other two work.
        return self.f(self.student, b.x_t, t, s, b), target

    def answer(self, b: LatentBatch) -> Tensor:
        """x_u [B, C, H, W]: the guided teacher's one step from x_t, which the buffer keeps beside it."""
        p = self.teacher(b.x_t, b.t, b.c)  # CFG, then reflection
        return ddim(self.teacher.schedule, b.x_t, p, b.t, b.s)  # t -> u along the guided flow

    def f_target(self, x_u: Tensor, jump: LatentBatch) -> Tensor:
        """The value of the target's function [B, C, H, W], of jumps from t to s."""
        return self.f(self.target, x_u, jump.t, jump.s, jump, reflect=True)

    def inside(self, b: LatentBatch) -> list[int]:
        """The rows whose step does not end at time 0, from which the one jump is none, whatever a network answers."""
        return [row for row, node in enumerate(self.feed.origin(b).node) if node < len(self.grid) - 1]

    def f(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, b: LatentBatch, reflect: bool = False) -> Tensor:
        """The trajectory consistency function's value [B, C, H, W] at times t >= s, with x0 reflected on the target's side."""
        p = denoiser(x, t, b.c)
        if reflect:
            self.record_saturation(p.x0)
            p = denoiser.reflected(x, t, p, self.reflection)
        return ddim(denoiser.schedule, x, p, t, s)

    def below(self, u: Tensor) -> Tensor:
        """[B] times s ~ U{0..u}, whole: sampling ends its jumps between the nodes, at floor((1 - gamma) s)."""
        share = torch.rand(u.shape, generator=numbers_of(self).local("s", u.device), device=u.device, dtype=widest(u.device))
        return (share * (u + 1)).long()

    def deploy(self, student: Denoiser) -> Deployment:
        """Strategic stochastic sampling on the nodes of TCDScheduler, to time 0."""
        n, total = len(self.grid), self.student.schedule.steps
        scheduler = partial(self.backbone.scheduler, self.transition, student.predicts, "tcd", n)
        grid = partial(Grid.named, "tcd", total=total, solver_steps=n)
        steps = tuple(k for k in (4, 2, 1) if k <= n)
        return Deployment(Policy(student, self.transition), grid, steps, self.eval_guidance, scheduler)
