"""Improved distribution matching distillation, DMD2 (Yin et al. 2024; METHODS 4), as a feedback loss of DDIL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ddil_lightning.diffusion.losses import mse
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.adversarial import Adversarial
from ddil_lightning.training.adversary import Critic, Gan
from ddil_lightning.training.scores import Scores

Normaliser = Literal["sample", "batch"]


@dataclass(frozen=True)
class Matching(Scores):
    """The two scores as DMD compares them.

    Args:
        normaliser: of the gradient, per `sample` or over the `batch`, for data of so few dimensions that a sample's own mean is noise.
    """

    normaliser: Normaliser = "sample"


class DMD2(Adversarial):
    """The student's outputs should have the teacher's law: the KL divergence's gradient is the difference of two scores, and a GAN helps.

    The real score is the guided teacher's, the fake score that of a critic that follows the student's outputs on a faster time scale:
    `critic.steps` updates to one of the student's. A latent needs no x0, so all sources are legal; student latents are DMD2's backward
    simulation. Both turns take their latents from the same batches of the DataModule, and the real side of the GAN is data alone.
    The guidance is baked into the student: it is not told w, and its pipeline is called with guidance_scale 1.

    Args:
        critic: the critic's time scale.
        gan: the discriminator on the critic's features; 0 and 0 for no GAN.
        scores: the two scores whose difference moves the student.
    """

    def __init__(
        self,
        *,
        critic: Critic = Critic(),
        gan: Gan = Gan(5e-3, 1e-2),
        scores: Matching = Matching(),
        **kwargs: Any,
    ) -> None:
        super().__init__(scores=scores, **kwargs)
        self.normaliser = scores.normaliser
        self.oppose(critic, gan)

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of critic and head; every `critic.steps`-th time one of the student before it, on the same outputs."""
        student, critic = self.optimizers()  # type: ignore[misc,attr-defined]
        with torch.set_grad_enabled(self.adversary.student_turn):
            x = self.samples(b.x_t, b.t, b.c)

        if self.adversary.student_turn:
            with self.adversary.still():
                loss = self.matching(x, b) + self.adversary.gan.weight * self.adversary.realism(x, b)
                if self.descend(student, self.feedback(b, loss)):
                    self.advance()

        self.adversary.descend(critic, x.detach(), b)

    def matching(self, x: Tensor, b: LatentBatch) -> Tensor:
        """[B] pseudo-loss whose gradient in x is `direction` / numel."""
        y, t, _ = self.adversary.diffuse(x.detach(), "matching", *self.tau)
        with torch.no_grad():
            d = direction(x, *self.both(y, t, b), self.normaliser)
        return 0.5 * mse(x, (x - d).detach())


def direction(x: Tensor, real: Tensor, fake: Tensor, normaliser: Normaliser = "sample") -> Tensor:
    """g [B, ...] = (fake - real) / mean |x - real| in float32 or wider, 0 where that is not a number (DMD, Eq. 7 and 8; METHODS 4.2).

    `sample`: a mean per sample. `batch`: over batch and channels, a position for itself: for data of so few dimensions that a sample's own
    mean is noise. The mean is at least 1e-3 rms(x), because reflection can make it tiny.
    """
    x, real, fake = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (x, real, fake))
    dims = tuple(range(1, x.ndim)) if normaliser == "sample" else (0, 1)
    floor = 1e-3 * x.square().mean(dims, keepdim=True).sqrt()
    return ((fake - real) / torch.maximum((x - real).abs().mean(dims, keepdim=True), floor)).nan_to_num(0.0, 0.0, 0.0)
