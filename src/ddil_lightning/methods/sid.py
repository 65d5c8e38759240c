"""Score identity distillation, SiD (Zhou et al. 2024, arXiv 2404.04057; METHODS 5.7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddil_lightning.bounds import within
from ddil_lightning.diffusion.losses import per_sample
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.adversary import Critic
from ddil_lightning.training.scores import Normalised, TwoScores, scale


class SiD(TwoScores):
    """The student's samples should have the teacher's law: the Fisher divergence of the two, without the gradient of the critic's own law.

    With f_T and f_p the x0 of teacher and critic at y, x noised, the loss is <f_T - f_p, (f_T - x) - alpha (f_T - f_p)>, whose gradient
    passes through both frozen networks to y (SiD, Eq. 23 and Alg. 1). A latent needs no x0 and no image, so all sources are legal.
    Guidance is the teacher's alone, as in DMD2; SiD-LSG (arXiv 2406.01561), which guides the critic too, is another method.

    Args:
        critic: the critic's time scale.
        scores: the two scores, and what the loss is divided by.
        alpha: how much of the divergence's first, biased form is subtracted; 1 and 1.2 are the paper's.
    """

    def __init__(self, *, critic: Critic = Critic(1), scores: Normalised = Normalised(), alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(scores=scores, **kwargs)
        within(-10, 10, alpha=alpha)
        self.alpha = alpha
        self.normaliser = scores.normaliser if isinstance(scores, Normalised) else "sample"  # plain Scores say the same
        self.oppose(critic)

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of the critic; every `critic.steps`-th time one of the student before it, on the same samples."""
        student, critic = self.both()
        with torch.set_grad_enabled(self.adversary.student_turn):
            x = self.samples(b.x_t, b.t, b.c)

        if self.adversary.student_turn:
            with self.adversary.still():
                if self.descend(student, self.feedback(b, self.identity(x, b))):
                    self.advance()

        self.adversary.descend(critic, x.detach(), b)

    def identity(self, x: Tensor, b: LatentBatch) -> Tensor:
        """[B] the loss on samples x [B, ...] over mean |x - f_T|, DMD's normaliser, which the authors took over."""
        y, t, _ = self.adversary.diffuse(x, "matching", *self.tau)
        real, fake = self.estimates(y, t, b)
        gap = real - fake
        return per_sample(gap * (real - x - self.alpha * gap) / scale(x, real, self.normaliser))
