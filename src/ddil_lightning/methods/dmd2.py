"""Improved distribution matching distillation, DMD2 (Yin et al. 2024; METHODS 4), as a feedback loss of DDIL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddil_lightning.diffusion.losses import mse
from ddil_lightning.processes import averaged
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.adversary import Critic, Heard, Span
from ddil_lightning.training.gan import Gan
from ddil_lightning.training.scores import Normalised, Normaliser, TwoScores, scale

Divergence = Literal["reverse_kl", "kl", "js", "hellinger", "jeffreys", "softened_reverse_kl"]


@dataclass(frozen=True)
class Matching(Normalised):
    """The two scores as DMD compares them.

    Args:
        normaliser: of the gradient; `none` for Diff-Instruct (Luo et al. 2023, arXiv 2305.18455), which has no GAN either.
        divergence: of the two laws. Any but the reverse KL divergence weighs samples by the density ratio that the discriminator sees
            (f-distill, Xu et al. 2025, arXiv 2502.15681): `kl` and `jeffreys` look for modes that are missing.
        share: on the student's turn the critic is asked once, for the student's loss and for its own, at times of `tau` (METHODS 4.4):
            one of its forwards less in `critic.steps`, and memory for its activations beside the student's.
    """

    divergence: Divergence = "reverse_kl"
    share: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"scores.divergence is {self.divergence!r}: give {', '.join(get_args(Divergence))}")


class DMD2(TwoScores):
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
        if not isinstance(scores, Matching):  # the other methods' own, which is a way to say the same
            scores = Matching(**vars(scores))
        self.normaliser, self.divergence, self.share = scores.normaliser, scores.divergence, scores.share
        if self.divergence != "reverse_kl" and not gan.is_on:
            raise ValueError(
                f"scores.divergence = {self.divergence} weighs samples by what a discriminator says of them: set model.gan.critic_weight"
            )
        if self.divergence != "reverse_kl" and gan.kind != "softplus":
            raise ValueError(
                f"scores.divergence = {self.divergence} takes the discriminator's logit for that of a density ratio, which it is of the "
                f"logistic loss alone: set model.gan.kind to softplus, not {gan.kind}"
            )
        if self.share and critic.pull:
            raise ValueError("scores.share keeps an answer of the critic, which critic.pull moves on before its own step: give one of them")
        if self.share and critic.steps == 1 and gan.is_on:
            raise ValueError("scores.share has the discriminator learn at times of scores.tau alone: set it to false, or critic.steps to 2")
        self.oppose(critic, gan)

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of critic and head; every `critic.steps`-th time one of the student before it, on the same outputs."""
        student, critic = self.both()
        with torch.set_grad_enabled(self.adversary.student_turn):
            x = self.samples(b.x_t, b.t, b.c)

        heard = None
        if self.adversary.student_turn:
            if self.share:
                heard = self.adversary.hear(x.detach(), b, "matching", Span(low=self.tau[0], high=self.tau[1]))
            with self.adversary.still():
                if self.descend(student, self.feedback(b, self.loss(x, b, heard))):
                    self.advance()

        self.adversary.descend(critic, x.detach(), b, heard=heard)

    def loss(self, x: Tensor, b: LatentBatch, heard: Heard | None = None) -> Tensor:
        """[B] what moves the student: the two scores, and the discriminator."""
        return self.matching(x, b, heard) + self.adversary.gan.weight * self.adversary.realism(x, b)

    def matching(self, x: Tensor, b: LatentBatch, heard: Heard | None = None) -> Tensor:
        """[B] pseudo-loss whose gradient in x is `direction` / numel. `heard`: the critic's answer, where it was asked before."""
        y, t, _ = self.adversary.diffuse(x.detach(), "matching", *self.tau) if heard is None else heard[:3]
        with torch.no_grad():
            d = direction(x, *self.estimates(y, t, b, None if heard is None else heard.p.x0), self.normaliser)
            if self.divergence != "reverse_kl":
                d = d * emphasis(self.adversary.verdict(y, t, b.c), self.divergence, d.ndim)
        return 0.5 * mse(x, (x - d).detach())


def direction(x: Tensor, real: Tensor, fake: Tensor, normaliser: Normaliser = "sample") -> Tensor:
    """g [B, ...] = (fake - real) / mean |x - real| in float32 or wider, 0 where that is not a number (DMD, Eq. 7 and 8; METHODS 4.2).

    The mean is `scores.scale`'s; `none`: fake - real.
    """
    x, real, fake = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (x, real, fake))
    if normaliser == "none":
        return fake - real
    return ((fake - real) / scale(x, real, normaliser)).nan_to_num(0.0, 0.0, 0.0)


LOGIT = 5.0  # of the density ratio: a discriminator that is sure of one sample must not make it the only one
EMPHASIS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
}
"""h(r) = r^2 f''(r) of the f-divergence, up to a factor, with r = p_real / p_fake (f-distill, Table 1; METHODS 5.7)."""


def emphasis(logits: Tensor, divergence: Divergence, ndim: int) -> Tensor:
    """h(r) over its mean in the batch, [B, 1, ...] of `ndim` dimensions, from a discriminator's logits [B, ...] of samples.

    The mean is that of all processes' batches. Logits with as many dimensions as the samples keep theirs beyond the channels; others are
    averaged.
    """
    logits = logits if logits.ndim == ndim else logits.flatten(1).mean(1).view(-1, *(1,) * (ndim - 1))
    h = EMPHASIS[divergence](logits.float().clamp(-LOGIT, LOGIT).exp())
    return h / averaged(h.mean(0, keepdim=True))
