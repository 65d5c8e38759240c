"""The methods that move a student by the difference of two scores, the teacher's and a critic's: what they say of them, and share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser, to_w
from ddil_lightning.processes import averaged
from ddil_lightning.records import Context, LatentBatch
from ddil_lightning.training.adversarial import Adversarial
from ddil_lightning.training.adversary import Adversary, Critic
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.gan import Gan

Normaliser = Literal["sample", "batch", "none"]


@dataclass(frozen=True)
class Scores:
    """The real score, the guided teacher's, and the fake one, the critic's, as the student is moved by their difference.

    Args:
        guidance: g of the real score, by default the method's own; 1 takes one evaluation of the teacher instead of two.
        tau: range of the times at which the scores are compared, as shares of the schedule's T.
    """

    guidance: float | None = None
    tau: tuple[float, float] = (0.02, 0.98)

    def __post_init__(self) -> None:
        within(0, 1000, **{"scores.guidance": self.guidance})
        lengths(2, **{"scores.tau": self.tau})
        within(0, 1, **{"scores.tau": self.tau})
        if self.tau[0] >= self.tau[1]:
            raise ValueError(f"scores.tau is {list(self.tau)!r}: give shares of T with 0 <= tau[0] < tau[1] <= 1")

    def times(self, total: int) -> tuple[int, int]:
        """The first and the last of the schedule's `total` times at which they are compared."""
        low, high = (min(round(share * total), total - 1) for share in self.tau)
        return low, high

    def asked(self, c: Context, told: bool = False) -> Context:
        """The context of the real score: `c` at the guidance of its own, if it has one. `told`: whether the network itself is told it."""
        if self.guidance is None:
            return c
        return c.guided(None if self.guidance == 1 and not told else to_w(self.guidance))


@dataclass(frozen=True)
class Normalised(Scores):
    """The two scores where what moves a sample is taken relative to its distance from the real score's answer.

    Args:
        normaliser: of that distance, per `sample` or over the `batch`, for data of so few dimensions that a mean of one is noise; `none`
            leaves it out.
    """

    normaliser: Normaliser = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normaliser not in get_args(Normaliser):
            raise ValueError(f"scores.normaliser is {self.normaliser!r}: give {', '.join(get_args(Normaliser))}")


def scale(x: Tensor, real: Tensor, normaliser: Normaliser) -> Tensor:
    """mean |x - real| of samples x [B, C, ...] and the real score's x0, without gradient: [B, 1, ...] or [1, 1, ...], or 1 for `none`.

    `sample`: a mean per sample. `batch`: over batch and channels, of all processes, a position for itself. The mean is at least 1e-3
    rms(x), because reflection can make it tiny (DMD, Eq. 8; METHODS 4.2).
    """
    x, real = x.detach(), real.detach()
    if normaliser == "none":
        return x.new_ones(())
    dims = tuple(range(1, x.ndim)) if normaliser == "sample" else (0, 1)
    distance, square = (x - real).abs().mean(dims, keepdim=True), x.square().mean(dims, keepdim=True)
    if normaliser == "batch":
        distance, square = averaged(distance), averaged(square)
    return torch.maximum(distance, 1e-3 * square.sqrt())


@dataclass(frozen=True)
class Reflects:
    """Which estimates of x0 are held in the box.

    Args:
        real: the teacher's.
        critic: the critic's; not by default, because with both scores in one box nothing pulls an output back that has left it.
        student: the student's, straight-through and in training alone: no diffusers scheduler holds a box per channel, and roll-outs are as
            the student is deployed.
    """

    real: bool = True
    critic: bool = False
    student: bool = True


class TwoScores(Adversarial):
    """Base of DMD2, EM distillation, SiD, ...: a generator of samples whose law is to be the teacher's, with a critic that follows it.

    A method calls `oppose` in its constructor, and writes `training_step` with `both` optimisers. The critic, or a network of the method's
    own, knows the student's law by denoising its samples.

    Args:
        steps: nodes of the grid (4: 999, 749, 499, 249), a divisor of the schedule's times.
        start: the time t* that the student is told at its first node, where it is given pure noise, by default the last; the others lie
            below it (500 in EMD, 399 in DMD2's one step of SDXL; indices from 0, so 499: `start` + 1 is a multiple of `steps`).
        rollouts: the step counts that backward simulation walks.
        teacher_steps: of the teacher's DDIM roll-outs, on the whole grid; a multiple of `steps`.
        scores: the two scores whose difference moves the student.
        reflects: which estimates are thresholded where `reflect` is not off.
    """

    critic: Role

    def __init__(
        self,
        *,
        steps: int = 4,
        start: int | None = None,
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        scores: Scores = Scores(),
        reflects: Reflects = Reflects(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._fine = self.nodes(steps, rollouts, teacher_steps, start=start)
        self.scores, self.reflects, self.tau = scores, reflects, scores.times(self.backbone.schedule.steps)
        self.asked = partial(scores.asked, told=self.backbone.told)

    @property
    def unguided(self) -> bool:
        """Also where neither the real score nor its roll-outs have a guidance of their own."""
        return super().unguided and self.scores.guidance in (None, 1)

    def oppose(self, critic: Critic, gan: Gan = Gan()) -> None:
        """Cast the roles and set the adversary and the policies."""
        self.head, self.wants = None, replace(self.wants, real=gan.is_on)
        self.cast(
            student=self.role("student"),
            critic=self.role("critic"),
            **self.discriminator(gan),
            teacher=self.role("teacher", reflection=self.reflection if self.reflects.real else None),
        )
        # Its roll-outs are those of the distribution that it moves the student to: guided otherwise, they would be another mixture.
        self.against(Adversary(self, self.critic, self.head, critic.steps, gan), critic, self._fine, self.asked)

    def samples(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """The student's x0 [B, ...] at x_t, straight-through the box where `reflects.student` says so."""
        x = self.student(x_t, t, c).x0
        return self.reflection.through(x) if self.reflects.student else x

    def estimates(self, y: Tensor, t: Tensor, b: LatentBatch, fake: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x0 [B, ...] at y by the real score and by the fake one, reflected as `reflects` says. `fake`: what the critic has said before."""
        real = self.teacher(y, t, self.asked(b.c)).x0
        self.record_saturation(real)
        fake = self.critic(y, t, b.c).x0 if fake is None else fake
        return real, self.reflection(fake) if self.reflects.critic else fake

    def setup(self, stage: str) -> None:
        """Raises ValueError for a GAN without data."""
        super().setup(stage)
        self.adversary.check_data(self.feed.has_images())

    def check_prior(self, prior: Any) -> None:
        """Raises ValueError also for teacher roll-outs where the student's first node, given pure noise, is below the teacher's."""
        super().check_prior(prior)
        if prior.teacher > 0 and self.times < self.backbone.schedule.steps:
            raise ValueError(
                f"the prior gives {prior.teacher:g} to the teacher, which does not start from pure noise at t = {self.times - 1}: "
                "leave model.start out, or give that share to forward or student"
            )

    def deploy(self, student: Denoiser) -> Deployment:
        """Re-noising on trained nodes alone; its samples stand for the real score's guidance."""
        return replace(super().deploy(student), stands_for=self.scores.guidance)
