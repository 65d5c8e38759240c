"""Latent consistency distillation (Luo et al. 2023, Alg. 1; METHODS 3) as a feedback loss of DDIL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import at_least, fraction, lengths
from ddil_lightning.diffusion.denoiser import Boundary, Consistency, Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import Distance
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.feed import Wants
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.identity import identity_but
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
        boundary: the boundary conditions of the consistency function; a flow has none, whose x0 at sigma = 0 is x already.
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
        boundary: Boundary = Boundary(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.check_guidance(w_conditioned, "w_conditioned")
        fraction(target_decay=target_decay)
        lengths(rollouts=rollouts)
        at_least(1, rollouts=rollouts)
        self.distance, self.target_decay = distance, target_decay
        backbone, flow = self.backbone, self.backbone.predicts == "flow"
        if flow:
            _check_even(solver_steps, rollouts)
        self.boundary = None if flow else boundary
        self.rule = "trailing" if flow else "lcm"  # a flow's schedulers walk even nodes, LCMScheduler those of the training grid
        self.grid = Grid.consistency(solver_steps, backbone.schedule.steps, rollouts, self.rule)
        student = self.role("student", w_conditioned=w_conditioned)
        self.cast(student=student, target=student.copied("target"), teacher=self.role("teacher", reflection=self.reflection))
        self.policies = Policies(self._policy(self.student), Policy(self.teacher, ddim, fine=self.grid))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update: the student at (x_t, t) answers as the target at the point to which the teacher steps, (x_s, s)."""
        with torch.no_grad():
            x_s = self.feed.answered(b, self.answer)
            target = identity_but(self.inside(b), x_s, b, self.f_target, self.shards.split)

        # The student comes last: its activations do not lie in memory, and out of the cache, while the other two work.
        y = self.f(self.student, b.x_t, b.t, b)
        loss = self.distance(y, target)
        if self.descend(self.optimizers(), self.feedback(b, loss)):
            self.advance()
            self.target.follow(self.student, self.target_decay)

    def answer(self, b: LatentBatch) -> Tensor:
        """x_s [B, C, H, W]: the guided teacher's one step from x_t, which the buffer keeps beside it."""
        p = self.teacher(b.x_t, b.t, b.c)  # CFG, then reflection
        return ddim(self.teacher.schedule, b.x_t, p, b.t, b.s)  # t -> s along the guided flow

    def f_target(self, x_s: Tensor, b: LatentBatch) -> Tensor:
        """The target's value [B, C, H, W] at (x_s, s)."""
        return self.f(self.target, x_s, b.s, b, reflect=True)

    def inside(self, b: LatentBatch) -> list[int]:
        """The rows whose step does not end at s = 0, where the boundary conditions leave x_s, whatever a network answers."""
        last = len(self.grid) - (0 if self.boundary is None else 1)
        return [row for row, node in enumerate(self.feed.origin(b).node) if node < last]

    def f(self, denoiser: Denoiser, x: Tensor, t: Tensor, b: LatentBatch, reflect: bool = False) -> Tensor:
        """The consistency function's value [B, C, H, W]: c_skip x + c_out x0, with x0 reflected on the target's side."""
        p = denoiser(x, t, b.c)
        if reflect:
            self.record_saturation(p.x0)
            p = denoiser.reflected(x, t, p, self.reflection)
        return p.x0 if self.boundary is None else Consistency(denoiser, self.boundary).bounded(x, t, p).x0

    def deploy(self, student: Denoiser) -> Deployment:
        """Multistep consistency sampling on the nodes of LCMScheduler, or even ones of a flow."""
        n, total = len(self.grid), self.student.schedule.steps
        scaling = None if self.boundary is None else self.boundary.timestep_scaling
        scheduler = partial(self.backbone.scheduler, renoise, student.predicts, self.rule, n, scaling)
        grid = partial(Grid.named, self.rule, total=total, solver_steps=n)
        steps = {k for k in (4, 2, 1) if self.rule == "lcm" or n % k == 0}
        if steps == {1}:  # an odd training grid: what few steps it can be walked in, its roll-outs say
            steps |= {len(walk) for walk in self.grid.rollouts}
        return Deployment(self._policy(student), grid, tuple(sorted(steps, reverse=True)), self.eval_guidance, scheduler)

    def _policy(self, denoiser: Denoiser) -> Policy:
        return Policy(denoiser if self.boundary is None else Consistency(denoiser, self.boundary), renoise)


def _check_even(solver_steps: int, rollouts: Sequence[int]) -> None:
    """Raises ValueError for roll-outs of a flow whose even nodes are not on the training grid."""
    for n in rollouts:
        if solver_steps % n:
            raise ValueError(
                f"rollouts has {n}, which does not divide solver_steps = {solver_steps}: the nodes of a flow are even, so give divisors, "
                "such as model.solver_steps=40 model.rollouts=[2,4,5]"
            )
