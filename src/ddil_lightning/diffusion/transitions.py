"""Transitions x_t -> x_s, stateless so that student and teacher may take turns within one trajectory: one protocol, a class each.

The deterministic steps of the field's samplers are one here: Euler steps in sigma (FlowMatchEuler on the linear path, EulerDiscrete on
variance-preserving ones) and first-order DPM-Solver++ are DDIM's (METHODS 0.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddil_lightning.bounds import within
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import Prediction
from ddil_lightning.streams import Generators, normal

NEAR = (
    "a sampler of your own is exported with another's scheduler, as Deployment(..., scheduler=partial(self.backbone.scheduler, ddim, "
    "student.predicts, 'trailing', n)).without(Policy(student, ddim), 'what the card says of it')"
)
"""The way out for a transition that no scheduler of diffusers has, for whoever writes `deploy`."""


class Transition(ABC):
    """How a sampler goes from a time to a lower one, given a prediction. Two with equal parameters are equal.

    One of your own is exported with the scheduler of another one (`training.deployment.Deployment.without`).
    """

    noisy: ClassVar[bool] = True
    """Whether it draws noise. To END, where x_s is x0 whatever is drawn, a policy asks for none."""

    @property
    def called_with(self) -> Mapping[str, float]:
        """What a call of a diffusers pipeline is given so that its scheduler steps so, where the scheduler itself cannot hold it."""
        return {}

    @abstractmethod
    def __call__(
        self, schedule: NoiseSchedule, x_t: Tensor, p: Prediction, t: Tensor, s: Tensor, generator: Generators | None = None
    ) -> Tensor:
        """x_s [B, ...] from x_t [B, ...] and its prediction; times t > s [B], each sample its own; `generator` of the noise."""


@dataclass(frozen=True)
class DDIM(Transition):
    """x_s = alpha_s x0 + sigma_s eps (Song et al. 2021, eta = 0), deterministic."""

    noisy = False

    def __call__(
        self, schedule: NoiseSchedule, x_t: Tensor, p: Prediction, t: Tensor, s: Tensor, generator: Generators | None = None
    ) -> Tensor:
        """For VP a rotation, cos x_t - sin v: no division, safe at alpha_t = 0."""
        if schedule.variance_preserving:
            cos, sin = schedule.rotation(t, s, x_t)
            return cos * x_t - sin * p.v
        alpha, sigma = schedule.at(s, x_t)
        return alpha * p.x0 + sigma * p.eps


@dataclass(frozen=True)
class NoiseCorrected(Transition):
    """DDIM whose step from the time `first`, where x_t is noise alone, takes that noise for eps: x_s = alpha_s x0 + sigma_s x_t.

    A network asked for eps where there is nothing but eps has no reason to answer with x_t itself, and what it misses shifts colour and
    layout (Kohler et al. 2024, noise correction; METHODS 5.2). x0 is still the network's.
    """

    first: int
    noisy = False

    def __call__(
        self, schedule: NoiseSchedule, x_t: Tensor, p: Prediction, t: Tensor, s: Tensor, generator: Generators | None = None
    ) -> Tensor:
        """DDIM's step, and the corrected one where t is `first`."""
        corrected = schedule.add_noise(p.x0, x_t, s)
        top = (t == self.first).view(-1, *(1,) * (x_t.ndim - 1))
        return torch.where(top, corrected, ddim(schedule, x_t, p, t, s))


@dataclass(frozen=True)
class Renoise(Transition):
    """x_s = alpha_s x0 + sigma_s noise: fresh, independent noise, as LCM and DMD2 step."""

    def __call__(
        self, schedule: NoiseSchedule, x_t: Tensor, p: Prediction, t: Tensor, s: Tensor, generator: Generators | None = None
    ) -> Tensor:
        """alpha_s x0 + sigma_s noise."""
        return schedule.add_noise(p.x0, normal(p.x0, generator), s)


@dataclass(frozen=True)
class Posterior(Transition):
    """x_s ~ q(x_s | x_t, x0), the ancestral step; with `eta` below 1 between it and DDIM (Song et al. 2021, Eq. 16; METHODS 0.2).

    Variance eta^2 sigma_s^2 (1 - r) with r = SNR_t / SNR_s, the rest of sigma_s^2 along eps; eta = 1 is the posterior, 0 DDIM.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        within(0, 1, eta=self.eta)

    def __call__(
        self, schedule: NoiseSchedule, x_t: Tensor, p: Prediction, t: Tensor, s: Tensor, generator: Generators | None = None
    ) -> Tensor:
        """Its mean along x0 and eps, and its own share of noise."""
        (alpha_t, sigma_t), (alpha, sigma) = schedule.at(t, x_t), schedule.at(s, x_t)
        variance = (self.eta * sigma).square() * (1 - (alpha_t * sigma / (sigma_t * alpha)).square())
        along = (sigma.square() - variance).clamp(min=0).sqrt()
        return alpha * p.x0 + along * p.eps + variance.sqrt() * normal(p.x0, generator)


@dataclass(frozen=True)
class TCD(Transition):
    """Strategic stochastic sampling (Zheng et al. 2024, Alg. 4; METHODS 5.4): DDIM below s, to floor((1 - gamma) s), then noised up to s.

    gamma = 0 is DDIM, 1 nearly Renoise. The authors' sampler, and TCDScheduler, end at time 0: give them a grid that does, not END.
    """

    gamma: float = 0.3

    def __post_init__(self) -> None:
        within(0, 1, gamma=self.gamma)

    @property
    def called_with(self) -> Mapping[str, float]:
        """gamma by diffusers' name; pipelines hand their scheduler an eta of 0 where their call says none."""
        return {"eta": self.gamma}

    def __call__(
        self, schedule: NoiseSchedule, x_t: Tensor, p: Prediction, t: Tensor, s: Tensor, generator: Generators | None = None
    ) -> Tensor:
        """The deterministic step to below s, and the forward process up from there."""
        # In float32, as TCDScheduler does it: in float64 0.7 * 90 falls to 62.
        below = torch.floor((1 - self.gamma) * s.float()).long().where(s >= 0, s)
        y = ddim(schedule, x_t, p, t, below)
        return schedule.add_noise(y, normal(p.x0, generator), s, since=below)


ddim = DDIM()
"""The deterministic step of DDIM, which has no parameters."""
renoise = Renoise()
"""LCM's and DMD2's step by fresh noise, which has no parameters."""


def noise_corrected(schedule: NoiseSchedule) -> Transition:
    """DDIM with its step from the last time of all corrected; DDIM itself where that is noise alone, of which it takes this very step."""
    last = schedule.steps - 1
    # At alpha = 0 eps is x_t whatever v or a velocity says.
    return NoiseCorrected(last) if float(schedule.alphas[last]) > 0 else ddim
