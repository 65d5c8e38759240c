"""CFG-aware step distillation of SnapFusion (Li et al. 2023, Eq. 5 to 9; METHODS 2.3 and 8), as a feedback loss of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.bounds import within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import Distance, mse
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.methods.pd import Weight, one_step, v_weight
from ddil_lightning.records import FORWARD, LatentBatch
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.randomness import numbers_of


class SnapFusion(Distillation):
    """One student step = two teacher steps, for both of them as they are, or for both of them under guidance of a random strength.

    The student keeps its unconditional branch, so that its users guide it as they guide the teacher, at any g of the range and with
    negative prompts. L = L_distil + gamma L_denoise: the first is progressive distillation's, whose target needs no x0, so all sources
    are legal; the second is the original loss on the data, of forward latents alone. A batch is guided with probability `guided`, and its
    w is the latents' own; roll-outs are guided as samples are. The student may be a smaller network that starts from the teacher's
    blocks: `pipeline.networks.student`. One stage; the next one distils the pipeline that this one has written.

    Args:
        steps: of the student, on trailing nodes; the teacher takes twice as many.
        guided: the probability of a guided batch.
        denoising: gamma, of the original loss.
        weight: of the squared error in x0 (`methods.pd.PD`).
        distance: of the error so weighted; mse is the paper's.
    """

    def __init__(
        self,
        *,
        steps: int = 8,
        guided: float = 0.1,
        denoising: float = 1.0,
        weight: Weight = "truncated-snr",
        distance: Distance = Distance("mse"),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        total = self.backbone.schedule.steps
        within(1, total // 2, steps=steps)
        within(0, 1, guided=guided)
        within(0, 1000, denoising=denoising)
        self.guided, self.denoising, self.weight, self.distance = guided, denoising, weight, distance
        self.loss_is_distance = not denoising
        self.grid, self.fine = (Grid.named("trailing", n, total) for n in (steps, 2 * steps))
        if self.fine.nodes[::2].tolist() != self.grid.nodes.tolist():
            raise ValueError(f"the trailing nodes of {steps} steps are not those of {2 * steps}: take a power of two")
        self.cast(student=self.role("student", guided=True), teacher=self.role("teacher", reflection=self.reflection))
        self.policies = Policies(Policy(self.student, ddim), Policy(self.teacher, ddim, fine=self.fine))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update, of a guided batch or of one that is not."""
        guided = numbers_of(self).shared("guided").random() < self.guided  # the same in every process
        c = b.c if guided else b.c.guided(None)
        with torch.no_grad():
            target = self.feed.answered(b._replace(c=c), self.answer)
        p = self.student(b.x_t, b.t, c)
        scale = v_weight(self.weight, self.student.schedule, b.t, b.x_t).sqrt().view(-1, *(1,) * (p.v.ndim - 1))
        loss = self.distance(scale * p.v, scale * target)
        if self.denoising and b.real is not None:
            plain = self.student(b.x_t, b.t, b.c.guided(None)) if guided else p
            loss = loss + self.denoising * self.original(self.student.output(plain), b)
        if self.descend(self.optimizers(), self.feedback(b, loss)):
            self.advance()

    def answer(self, b: LatentBatch) -> Tensor:
        """v* [B, C, H, W]: one DDIM step by it, t -> s, lands where the teacher lands in two, each of them guided where `b.c` is."""
        T, schedule, x_t, t, s = self.teacher, self.student.schedule, b.x_t, b.t, b.s
        m = self.fine.at(2 * b.node + 1)
        x_m = ddim(schedule, x_t, T(x_t, t, b.c), t, m)
        p = T(x_m, m, b.c)
        self.record_saturation(p.x0)  # of answers that the buffer keeps, when they are asked for
        x_s = ddim(schedule, x_m, p, m, s)
        return one_step(schedule, x_t, x_s, t, s)

    def original(self, out: Tensor, b: LatentBatch) -> Tensor:
        """[B] the denoising loss in the network's own space of forward latents, whose data are `b.real`; 0 of all others.

        What a same-timestep control has put in the buffer is none: `real` is what the batch came with.
        """
        assert b.real is not None
        schedule = self.student.schedule
        eps = schedule.from_x0(b.x_t, b.t, b.real).eps
        return ((b.source == FORWARD) & (b.slot < 0)) * mse(out, schedule.target(self.student.predicts, b.real, eps, b.t))

    def deploy(self, student: Denoiser) -> Deployment:
        """DDIM with classifier-free guidance, two evaluations a step, as the teacher's users sample."""
        n, total = len(self.grid), self.student.schedule.steps
        scheduler = partial(self.backbone.scheduler, ddim, student.predicts, "trailing", n)
        return Deployment(Policy(student, ddim), partial(Grid.named, "trailing", total=total), (n,), self.eval_guidance, scheduler)
