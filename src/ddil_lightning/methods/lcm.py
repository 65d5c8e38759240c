"""Latent consistency distillation (Luo et al. 2023, Alg. 1; METHODS 3) as a feedback loss of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import at_least, fraction, lengths
from ddil_lightning.diffusion.denoiser import Boundary, Consistency, Denoiser
from ddil_lightning.diffusion.losses import Distance
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import Grid
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.method import Distillation


class LCM(Distillation):
    """f(x_t, t, c, w) should equal f of the point that one guided teacher step reaches: d(f_theta(x_t, t), R f_target(x_s, s)).

    A latent needs no x0, so forward and student roll-outs are both legal; the teacher is no consistency model, so mixed roll-outs are not
    the paper's (they are possible: its DDIM steps down the training grid). Reflection acts on the guided teacher's x0 and on the target's,
    never on the student's.

    Args:
        w_conditioned: the student is told w (a zero-initialised embedding); without it one guidance is baked in, and the teacher
            alone sees w.
        solver_steps: nodes of the training grid, between which the teacher takes one step.
        rollouts: the step counts of student roll-outs, one of which is drawn for each.
        target_decay: decay of the average of the student that gives targets; 0: the online student, without gradient.
        distance: of the consistency function's values at both ends of a step.
        boundary: the boundary conditions of the consistency function.
    """

    target: Role

    def __init__(
        self,
        *,
        w_conditioned: bool = True,
        solver_steps: int = 50,
        rollouts: tuple[int, ...] = (3, 4, 5),
        target_decay: float = 0.95,
        distance: Distance = Distance(),
        boundary: Boundary = Boundary(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.check_guidance(w_conditioned, "w_conditioned")
        fraction(target_decay=target_decay)
        lengths(rollouts=rollouts)
        at_least(1, rollouts=rollouts)
        self.distance, self.boundary, self.target_decay = distance, boundary, target_decay
        backbone = self.backbone
        self.grid = Grid.consistency(solver_steps, backbone.schedule.steps, rollouts)
        student = self.role("student", w_conditioned=w_conditioned)
        self.cast(student=student, target=student.copied("target"), teacher=self.role("teacher", reflection=self.reflection))
        self.policies = Policies(self._policy(self.student), Policy(self.teacher, ddim, fine=self.grid))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update: the student at (x_t, t) answers as the target at the point to which the teacher steps, (x_s, s)."""
        with torch.no_grad():
            p = self.teacher(b.x_t, b.t, b.c)                                   # CFG, then reflection
            x_s = ddim(self.teacher.schedule, b.x_t, p, b.t, b.s)               # t -> s along the guided flow
            target = self.f(self.target, x_s, b.s, b, reflect=True)

        # The student comes last: its activations do not lie in memory, and out of the cache, while the other two work.
        y = self.f(self.student, b.x_t, b.t, b)
        loss = self.distance(y, target)
        if self.descend(self.optimizers(), self.feedback(b, loss)):
            self.advance()
            self.target.follow(self.student, self.target_decay)

    def f(self, denoiser: Denoiser, x: Tensor, t: Tensor, b: LatentBatch, reflect: bool = False) -> Tensor:
        """The consistency function's value [B, C, H, W]: c_skip x + c_out x0, with x0 reflected on the target's side."""
        p = denoiser(x, t, b.c)
        if reflect:
            self.measures.record(**{"reflect/saturated": self.reflection.saturation(p.x0)})
            p = denoiser.reflected(x, t, p, self.reflection)
        return Consistency(denoiser, self.boundary).bounded(x, t, p).x0

    def deploy(self, student: Denoiser) -> Deployment:
        """Multistep consistency sampling on the nodes of LCMScheduler."""
        n, total = len(self.grid), self.student.schedule.steps
        scheduler = partial(self.backbone.scheduler, renoise, student.predicts, "lcm", n, self.boundary.scaling)
        grid = partial(Grid.named, "lcm", total=total, solver_steps=n)
        return Deployment(self._policy(student), grid, (4, 2, 1), self.eval_guidance, scheduler)

    def _policy(self, denoiser: Denoiser) -> Policy:
        return Policy(Consistency(denoiser, self.boundary), renoise)
