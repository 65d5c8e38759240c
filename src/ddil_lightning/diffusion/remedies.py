"""What can be done against exposure bias without training: asking at another time, and scaling what is predicted.

A few-step student's latents have another law than those it was trained on. DDIL trains that away; these two change the sampler alone, at no
cost, and are what it has to be compared with. So does noise correction, which mends the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddil_lightning.bounds import at_least, within
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import NoiseCorrected, ddim
from ddil_lightning.records import Context, Prediction, wide


@dataclass(frozen=True)
class Remedy:
    """Shifted time steps (Li et al. 2024, arXiv 2305.15583, Alg. 3), scaled eps (Ning et al. 2024, arXiv 2308.15321, Sec. 5), and noise
    correction (Kohler et al. 2024, arXiv 2405.05224), or any of them.

    Args:
        window: of times, centred at t, of which the one is asked whose noise has the variance that x_t has; 0 for no shift.
        cutoff: the time up to which nothing is shifted.
        variance: what of a sample's variance is its data's. Its authors leave it out (0), which is right for dark or narrow images alone:
            of latents of variance 1 every x_t has variance 1, which tells nothing of its time, and without it all are shifted upwards.
            It is that within one latent, over its channels and places, and is measured on data (1.0 for what an autoencoder scales so).
        scale: lambda, by which eps is divided; above 1 for a network whose eps is too large in its own roll-outs.
        corrected: DDIM's first step takes the noise itself for eps (`NoiseCorrected`).
    """

    window: int = 0
    cutoff: int = 0
    variance: float = 0.0
    scale: float = 1.0
    corrected: bool = False

    def __post_init__(self) -> None:
        within(0, 1000, window=self.window)
        at_least(0, cutoff=self.cutoff, variance=self.variance)
        within(0.5, 2, scale=self.scale)

    def __str__(self) -> str:
        """As the name of a sampler has it behind the sampler's own."""
        said = {"ts": self.window, "tv": self.variance, "tc": self.cutoff} if self.window else {}
        said |= {"es": self.scale} if self.scale != 1 else {}
        return "-".join(["nc"] * self.corrected + [f"{word}{number:g}" for word, number in said.items() if number])

    @classmethod
    def named(cls, words: Sequence[str]) -> Remedy:
        """The remedy that words behind a sampler's name say: `nc`, corrected; `ts20`, a window, `tv1.0`, a variance, `tc100`, a cutoff;
        `es1.01`, a scale."""
        said = {word[:2]: word[2:] for word in words}
        return cls(int(said.get("ts", 0)), int(said.get("tc", 0)), float(said.get("tv", 0)), float(said.get("es", 1)), "nc" in said)

    def on(self, policy: Policy) -> Policy:
        """The same policy, sampled so; nothing is trained, and none of its network's evaluations is added.

        Raises ValueError where the noise of other steps than DDIM's is to be corrected.
        """
        if self.corrected and policy.transition != ddim:
            raise ValueError(f"noise correction is of DDIM's first step, and the policy steps by {policy.transition}")
        transition = NoiseCorrected(policy.schedule.steps - 1) if self.corrected else policy.transition
        denoiser = policy.denoiser if self.scale == 1 else Scaled(policy.denoiser, self.scale)
        if not self.window:
            return Policy(denoiser, transition, policy.substeps, policy.fine)
        return Shifted(denoiser, transition, policy.substeps, policy.fine, remedy=self)

    def shifted(self, schedule: NoiseSchedule, x_t: Tensor, t: int, s: int) -> Tensor:
        """[B] the times in the window around t, above s, whose variance alpha^2 `variance` + sigma^2 is nearest to that of each x_t."""
        last = schedule.steps - 1
        if t <= self.cutoff or t == last:  # what sampling begins with is noise and no one's error
            return torch.full((len(x_t),), t, device=x_t.device)
        times = torch.arange(max(t - self.window // 2, s + 1), min(t + self.window // 2, last) + 1)
        level = schedule.mean_square(times, self.variance)
        found = wide(x_t.flatten(1)).var(1)[:, None]
        nearest = (found - level.to(found.device)).abs().argmin(1).to(x_t.device)
        return times.to(x_t.device)[nearest]


class Scaled(nn.Module):
    """A denoiser whose eps is divided by `scale`, and its x0 taken from that; itself a denoiser."""

    def __init__(self, denoiser: nn.Module, scale: float) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.schedule: NoiseSchedule = denoiser.schedule  # type: ignore[assignment]
        self.s_conditioned = bool(getattr(denoiser, "s_conditioned", False))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Prediction:
        """The prediction of eps / scale. Where alpha is 0, and eps says nothing of x0, it is left as it is."""
        p: Prediction = self.denoiser(x_t, t, c)
        alpha, sigma = self.schedule.at(t, x_t)
        eps = torch.where(alpha == 0, p.eps, p.eps / self.scale)
        x0 = torch.where(alpha == 0, p.x0, (x_t - sigma * eps) / torch.where(alpha == 0, 1.0, alpha))
        return Prediction(x0, eps, alpha * eps - sigma * x0)


class Shifted(Policy):
    """A policy whose network is asked, and steps, from the time that x_t itself looks like; its nodes stay where they are.

    The choice is a function of the state, so that roll-outs may be interleaved. In the authors' code the end of a step moves along with its
    beginning; here it does not, because latents are compared node by node.
    """

    def __init__(self, *policy: object, remedy: Remedy) -> None:
        super().__init__(*policy)  # type: ignore[arg-type]
        self.remedy = remedy

    def asked(self, x_t: Tensor, t: int, s: int) -> Tensor:
        """[B] the shifted times."""
        return self.remedy.shifted(self.schedule, x_t, t, s)
