"""Latent adversarial diffusion distillation, LADD (Sauer et al. 2024, arXiv 2403.12015; METHODS 5.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ddil_lightning.diffusion.denoiser import S_EMBEDDING, s_embedding
from ddil_lightning.feed import Wants
from ddil_lightning.processes import averaged
from ddil_lightning.records import TEACHER, Context, LatentBatch
from ddil_lightning.training.adversarial import Adversarial
from ddil_lightning.training.adversary import Adversary, Critic, Real
from ddil_lightning.training.gan import Gan, LogitNormal
from ddil_lightning.training.vision import ToldHeads, embedding


class Told(Adversary):
    """A discriminator whose heads are told the caption and tau beside the features, where they are made for it (`ToldHeads`)."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.conditions = int(isinstance(self.head, ToldHeads))

    def _features(self, x: Tensor, t: Tensor, c: Context) -> tuple[Tensor, ...]:
        """The features of x at tau and, [B, D + S_EMBEDDING], what the heads are told: the pooled text and sinusoids of tau."""
        features = super()._features(x, t, c)
        if not self.conditions:
            return features
        tau = self.method.student.schedule.time(t)  # as networks are told it
        return (*features, torch.cat([embedding(c), s_embedding(tau)], 1))


class Ends(Told):
    """A discriminator whose real samples are what the teacher made: the ends of its roll-outs, and of no other latents."""

    def real(self, b: LatentBatch) -> Real | None:
        """All ends, of which those of the teacher's trajectories have a weight, one on average of all processes, others never any."""
        assert b.end is not None
        ours = (b.source == TEACHER).to(b.weight)
        self._share = averaged(ours.mean())
        return b.end, b.c, ours / self._share.clamp(min=1e-6)  # 0 where nobody has any

    def telling(self, *given: Any, **named: Any) -> Tensor | None:
        """Nothing is learned of fakes alone, in a step where no process has a real one."""
        told = super().telling(*given, **named)
        return None if told is None else told * (self._share > 0)


class LADD(Adversarial):
    """The student's samples, noised anew, should look real to small heads on the features of the frozen teacher, and that is all.

    L_student = -D(teacher's features of alpha_tau xS + sigma_tau eps, caption), the mean of its heads, tau logit-normal; the heads learn by
    the hinge loss, with independent (tau, eps) for real and fake. Nothing is decoded and no target is regressed on, so every source is
    legal; it decides which outputs must look real. The heads are told the pooled text and tau (projection, as ADD's), which the teacher
    computes their features under as well; only where samples are no images they have the features alone. Real are the data or, as in the
    paper, the guided teacher's own samples: the ends of its roll-outs, of which the prior then has to have some, and with (0, 0, 1) no
    image is needed. Reflection acts on the student's samples, straight-through.

    Args:
        steps: nodes of the grid (4: 999, 749, 499, 249), a divisor of the schedule's times.
        rollouts: the step counts that the student's roll-outs walk.
        teacher_steps: of the teacher's DDIM roll-outs, on the whole grid; a multiple of `steps`.
        shares: how often noised data are put at each node, by default equally often; the paper ends with 0.7 at the noisiest and 0.1 at
            each of the others.
        real: what counts as real, `data` or `teacher` (roll-outs' ends).
        critic: the discriminator's time scale; public code takes up to four of its updates to one of the student's.
        gan: the discriminator; without `layers`, heads at all of the network's.
        times: the law of tau.
    """

    def __init__(
        self,
        *,
        steps: int = 4,
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        shares: tuple[float, ...] = (),
        real: Literal["data", "teacher"] = "data",
        critic: Critic = Critic(1),
        gan: Gan = Gan(1.0, 1.0, "teacher", kind="hinge"),
        times: LogitNormal = LogitNormal(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        fine = self.nodes(steps, rollouts, teacher_steps, shares)
        if not gan.weight:
            raise ValueError("LADD is its discriminator, and gan.weight is 0: give a number above 0")
        if gan.features == "critic":
            raise ValueError("LADD has no critic whose features a head could read: set gan.features to teacher (or initial)")
        self.real = real
        self.wants = Wants(pure_noise=True, ends=real == "teacher")
        student, teacher = self.role("student"), self.role("teacher", reflection=self.reflection)
        read: Any = teacher.network if gan.features == "teacher" else student.network
        gan = replace(gan, layers=gan.layers or tuple(read.layers))
        heads = None
        if self.backbone.size is not None:
            heads = ToldHeads(read.widths(gan.layers), embedding(self.backbone.null()).shape[1] + S_EMBEDDING)
        self.cast(student=student, **self.discriminator(gan, heads), teacher=teacher)
        kind = Told if real == "data" else Ends
        self.against(kind(self, None, self.head, critic.steps, gan, times), critic, fine)

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of the heads; every `critic.steps`-th time one of the student before it, on the same samples."""
        optimizers: Any = self.optimizers()
        student, heads = optimizers
        with torch.set_grad_enabled(self.adversary.student_turn):
            x = self.reflection.through(self.student(b.x_t, b.t, b.c).x0)
        self.record_saturation(x)

        if self.adversary.student_turn:
            with self.adversary.still():
                loss: Any = self.adversary.gan.weight * self.adversary.realism(x, b)
                if self.descend(student, self.feedback(b, loss)):
                    self.advance()

        self.adversary.descend(heads, x.detach(), b)

    # What the rest of the library asks -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Raises ValueError for real data that are not there."""
        super().setup(stage)
        if self.real == "data":
            self.adversary.check_data(self.feed.has_images(), "set model.real to teacher and give data.prior.teacher a share")

    def check_prior(self, prior: Any) -> None:
        """Raises ValueError for a prior that gives no end of a teacher's own trajectory where those are what is real."""
        super().check_prior(prior)
        if self.real == "data":
            return
        whose = "LADD's real samples are the teacher's (model.real)"
        if prior.teacher == 0:
            raise ValueError(f"{whose}, and the prior gives it no share: give data.prior.teacher one, or set model.real to data")
        if prior.student > 0 and prior.mix == "interval":
            raise ValueError(f"{whose}, and in mixed trajectories the student acts too: set data.prior.mix to trajectory")
