"""Latent consistency distillation (Luo et al. 2023, Alg. 1; METHODS 3) as a feedback loss of DDIL."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.bounds import above, at_least, fraction, lengths
from ddil_lightning.diffusion.denoiser import Consistency, Denoiser
from ddil_lightning.diffusion.schedule import Grid
from ddil_lightning.diffusion.solver import Policies, Policy, ddim
from ddil_lightning.methods.losses import Distance, check_distance, distance
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.averaging import lerp_
from ddil_lightning.training.method import Distillation


class LCM(Distillation):
    """f(x_t, t, c, w) should equal f of the point that one guided teacher step reaches: d(f_theta(x_t, t), R f_target(x_s, s)).

    A latent needs no x0, so forward and student roll-outs are both legal; the teacher is no consistency model, so mixed roll-outs are not
    the paper's (they are possible: its DDIM steps down the training grid). Reflection acts on the guided teacher's x0 and on the target's,
    never on the student's.

    `w_conditioned`: the student is told w (zero-initialised embedding); without it, one guidance is baked in; only the teacher sees w.
    `solver_steps`: nodes of the training grid. `rollouts`: the step counts of student roll-outs. `target_decay`: EMA of the target (0: the
    online student without gradient). `loss`, `huber`: the distance and its width. `scaling`, `sigma_data`: of the boundary conditions.
    """

    def __init__(
        self,
        *,
        w_conditioned: bool = True,
        solver_steps: int = 50,
        rollouts: tuple[int, ...] = (3, 4, 5),
        target_decay: float = 0.95,
        loss: Distance = "huber",
        huber: float = 1e-3,
        scaling: float = 10.0,
        sigma_data: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.check_guidance(w_conditioned, "w_conditioned")
        check_distance(loss, huber)
        fraction(target_decay=target_decay)
        above(0, scaling=scaling, sigma_data=sigma_data)
        lengths(rollouts=rollouts)
        at_least(1, rollouts=rollouts)
        self.distance, self.huber, self.target_decay = loss, huber, target_decay
        self.boundary = {"scaling": scaling, "sigma_data": sigma_data}
        backbone, schedule, predicts = self.backbone, self.backbone.schedule, self.backbone.predicts
        self.grid = Grid.consistency(solver_steps, schedule.steps, rollouts)
        self.student = Denoiser(backbone.student(w_conditioned, self.gradient_checkpointing), schedule, predicts)
        self.target = Denoiser(copy.deepcopy(self.student.network), schedule, predicts).requires_grad_(False).eval()
        self.__dict__["teacher"] = Denoiser(backbone.teacher(), schedule, predicts, null=backbone.null(), reflection=self.reflection)
        self.__dict__["policies"] = Policies(self._policy(self.student), Policy(self.teacher, "ddim", fine=self.grid))
        self.with_average()

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One consistency update."""
        with torch.no_grad():
            p = self.teacher(b.x_t, b.t, b.c)                                   # CFG, then reflection
            x_s = ddim(self.teacher.schedule, b.x_t, p, b.t, b.s)               # t -> s along the guided flow
            target = self.f(self.target, x_s, b.s, b, reflect=True)

        # The student comes last: its activations do not lie in memory, and out of the cache, while the other two work.
        y = self.f(self.student, b.x_t, b.t, b)
        loss = distance(self.distance, y, target, self.huber)
        if self.descend(self.optimizers(), self.feedback(b, loss)):
            self.advance()
            lerp_(self.target, self.student, self.target_decay)

    def f(self, denoiser: Denoiser, x: Tensor, t: Tensor, b: LatentBatch, reflect: bool = False) -> Tensor:
        """The consistency function's value [B, C, H, W]: c_skip x + c_out x0, with x0 reflected on the target's side."""
        p = denoiser(x, t, b.c)
        if reflect:
            self.record(**{"reflect/saturated": self.reflection.saturation(p.x0)})
            p = denoiser.reflected(x, t, p, self.reflection)
        return Consistency(denoiser, **self.boundary).bounded(x, t, p).x0

    def denoisers(self) -> dict[str, Denoiser]:
        """Student, teacher and target."""
        return {"student": self.student, "teacher": self.teacher, "target": self.target}

    def sampler(self, steps: int) -> tuple[Policy, Grid]:
        """Multistep consistency sampling on the nodes of LCMScheduler."""
        deployed = Denoiser(self.deployed(), self.student.schedule, self.student.predicts)
        return self._policy(deployed), Grid.named("lcm", steps, self.student.schedule.steps, solver_steps=len(self.grid))

    def scheduler(self) -> Any:
        """LCMScheduler on the training grid."""
        own = {"original_inference_steps": len(self.grid), "timestep_scaling": self.boundary["scaling"]}
        return self.backbone.scheduler("LCMScheduler", set_alpha_to_one=True, clip_sample=False, **own)

    def _policy(self, denoiser: Denoiser) -> Policy:
        return Policy(Consistency(denoiser, **self.boundary), "renoise")
