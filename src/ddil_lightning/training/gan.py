"""A discriminator's options, both sides of its loss, the penalty on its slope, and the times at which it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from ddil_lightning.bounds import at_least, within
from ddil_lightning.diffusion.losses import per_sample

Logits = Tensor | tuple[Tensor, ...]
"""What a discriminator says of samples: [B, ...] of one head, or of each of several."""


@dataclass(frozen=True)
class Gan:
    """A discriminator's part; 0 and 0 for none.

    Args:
        weight: lambda_g, of the discriminator's verdict in the student's loss.
        critic_weight: lambda_d, of telling real from fake in the critic's loss.
        features: whose features the head reads: the critic's, which learns to tell them apart, the frozen teacher's, or, where the teacher
            has none, a frozen copy's of the student as it starts (`initial`).
        layers: at which layers of that network (down0, mid, up1, ... of a U-Net); by default at its bottleneck.
        kind: of both sides' loss: `softplus`, the logistic one, or `hinge`.
        r1: the weight of the penalty on the slope of the discriminator at real samples, 0 for none.
        r1_noise: the standard deviation of noise on the real samples by whose effect the slope is approximated (Lin et al. 2025); 0 takes
            the gradient at the heads' inputs (Sauer et al. 2023).
    """

    weight: float = 0.0
    critic_weight: float = 0.0
    features: Literal["critic", "teacher", "initial"] = "critic"
    layers: tuple[str, ...] = ()
    kind: Literal["softplus", "hinge"] = "softplus"
    r1: float = 0.0
    r1_noise: float = 0.0

    def __post_init__(self) -> None:
        within(0, 1000, **{"gan.weight": self.weight, "gan.critic_weight": self.critic_weight})
        at_least(0, **{"gan.r1": self.r1, "gan.r1_noise": self.r1_noise})
        if self.kind not in ("softplus", "hinge"):
            raise ValueError(f"gan.kind is {self.kind!r}: give softplus or hinge")
        if self.weight and not self.critic_weight:
            raise ValueError(f"gan.weight = {self.weight} needs a discriminator that learns: set gan.critic_weight")
        if self.layers and not self.is_on:
            raise ValueError(f"gan.layers = {list(self.layers)} without a discriminator: set gan.weight and gan.critic_weight")

    @property
    def is_on(self) -> bool:
        """Whether there is a discriminator at all."""
        return bool(self.weight or self.critic_weight)

    def fooling(self, logits: Logits) -> Tensor:
        """[B] the student's side on the logits D of its samples: softplus(-D), or -D of the hinge loss."""
        return voices((lambda d: softplus(-d)) if self.kind == "softplus" else (lambda d: -d), logits)

    def fake(self, logits: Logits) -> Tensor:
        """[B] the discriminator's side on the student's samples: softplus(D), or max(0, 1 + D)."""
        return voices(softplus if self.kind == "softplus" else (lambda d: relu(1 + d)), logits)

    def real(self, logits: Logits) -> Tensor:
        """[B] the discriminator's side on real samples: softplus(-D), or max(0, 1 - D)."""
        return voices((lambda d: softplus(-d)) if self.kind == "softplus" else (lambda d: relu(1 - d)), logits)


def voices(loss: Callable[..., Tensor], *logits: Logits) -> Tensor:
    """[B] the mean over heads of the mean of `loss` over the places of its logits: a map of many places says no more than another."""
    several = [x if isinstance(x, tuple) else (x,) for x in logits]
    return torch.stack([per_sample(loss(*heads)) for heads in zip(*several, strict=True)]).mean(0)


def leaves(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Features [B, ...] in float32 without their history, at which a `slope` can be taken."""
    return tuple(x.detach().float().requires_grad_() for x in features)


def slope(logits: Logits, features: Sequence[Tensor]) -> Tensor:
    """[B] R1: the squared gradient of the summed logits at `features` [B, ...], the head's own inputs: no network below it has a part."""
    total = sum(x.float().sum() for x in (logits if isinstance(logits, tuple) else (logits,)))
    gradients = torch.autograd.grad(total, features, create_graph=True)  # type: ignore[arg-type]
    return torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0)


@dataclass(frozen=True)
class LogitNormal:
    """Times t = T sigmoid(mean + sd n), n ~ N(0, 1): few at both ends (Esser et al. 2024).

    Args:
        mean: of the logit of t / T; above 0, more of the times are noisy ones, where a discriminator sees structure rather than texture.
        sd: of the logit.
    """

    mean: float = 1.0
    sd: float = 1.0

    def __post_init__(self) -> None:
        within(-100, 100, **{"times.mean": self.mean})
        within(0, 100, **{"times.sd": self.sd})

    def __call__(self, n: int, total: int, generator: torch.Generator) -> Tensor:
        """[n] integer times below `total`."""
        logit = self.mean + self.sd * torch.randn(n, generator=generator, device=generator.device)
        return (total * logit.sigmoid()).long().clamp(max=total - 1)
