"""Policies, who acts in a roll-out and at inference: a denoiser with a transition; and DPM-Solver++ 2M, which remembers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import Transition, ddim
from ddil_lightning.records import END, Context, Prediction
from ddil_lightning.streams import Generators


class DPMSolver2M:
    """DPM-Solver++ 2M in data prediction (Lu et al. 2022; METHODS 0.2), for evaluation: it remembers x0, so it cannot be interleaved.

    The first and the last interval are first order, as in diffusers' default for few steps.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self._last: tuple[Tensor, float] | None = None

    def __call__(self, x_t: Tensor, p: Prediction, t: int, s: int) -> Tensor:
        """x_s [B, ...] from the prediction at integer times t > s."""
        if s == END:
            self._last = None
            return p.x0
        lam_t, lam_s = float(self.schedule.half_log_snr(t)), float(self.schedule.half_log_snr(s))
        h, estimate = lam_s - lam_t, p.x0
        if self._last is not None:
            x0_last, lam_last = self._last
            estimate = p.x0 + h / (2 * (lam_t - lam_last)) * (p.x0 - x0_last)
        self._last = (p.x0, lam_t)
        (_, sigma_t), (alpha_s, sigma_s) = self.schedule.at(t, x_t), self.schedule.at(s, x_t)
        return sigma_s / sigma_t * x_t - alpha_s * math.expm1(-h) * estimate


class Policy(nn.Module):
    """A denoiser and the way it steps: `(x_t, t, s, c) -> x_s`. "One student step is eight teacher steps" is `substeps=8`.

    `transition`: one of diffusion.transitions. `substeps` divide an interval evenly in t, rounded, or walk the nodes of `fine` inside it:
    a progressive-distillation teacher must stand on its own grid, not on rounded halves of the student's. `asks`: the context under which
    the denoiser is asked, made of the one that is given: a teacher acts under the guidance of its feedback.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        transition: Transition = ddim,
        substeps: int = 1,
        fine: Grid | None = None,
        asks: Callable[[Context], Context] | None = None,
    ) -> None:
        super().__init__()
        if substeps < 1:
            raise ValueError(f"a policy takes at least one substep per interval, got {substeps}")
        if not isinstance(transition, Transition):  # it was a name once
            raise TypeError(f"a policy's transition is {transition!r}: give one of diffusion.transitions, such as ddim or renoise")
        self.denoiser, self.transition, self.substeps, self.fine, self.asks = denoiser, transition, substeps, fine, asks

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of its denoiser."""
        return self.denoiser.schedule  # type: ignore[return-value]

    def begin(self, x_T: Tensor) -> None:
        """A trajectory begins in x_T [B, ...]: for a policy whose steps depend on it (BOOT's). All other steps are Markov."""

    def forward(self, x_t: Tensor, t: int, s: int, c: Context, generator: Generators | None = None) -> Tensor:
        """One interval of the student's grid, all samples at the same times. `generator` draws its noise (streams.normal)."""
        stops = self._stops(t, s)
        for a, b in zip(stops, stops[1:], strict=False):
            x_t = self.step(x_t, a, b, c, generator)
        return x_t

    def step(self, x_t: Tensor, t: int, s: int, c: Context, generator: Generators | None = None) -> Tensor:
        """One network call and its transition."""
        now, then = self.asked(x_t, t, s), torch.full((len(x_t),), s, device=x_t.device)
        if getattr(self.denoiser, "s_conditioned", False):
            c = c._replace(s=then)
        p: Prediction = self.denoiser(x_t, now, c if self.asks is None else self.asks(c))
        if s == END and self.transition.noisy:
            return p.x0
        return self.transition(self.schedule, x_t, p, now, then, generator)

    def asked(self, x_t: Tensor, t: int, s: int) -> Tensor:
        """[B] the times that the network is told of x_t, and that it steps from: t."""
        return torch.full((len(x_t),), t, device=x_t.device)

    def walk(self, x_t: Tensor, grid: Grid, c: Context, generator: Generators | None = None) -> Iterator[Tensor]:
        """The states after every interval of `grid`, the last at its end: the inference sampler, one state at a time."""
        self.begin(x_t)
        times = grid.times.tolist()
        for t, s in zip(times, times[1:], strict=False):
            x_t = self(x_t, t, s, c, generator)
            yield x_t

    @torch.no_grad()
    def sample(self, x_t: Tensor, grid: Grid, c: Context, generator: Generators | None = None) -> Tensor:
        """x0 [B, ...] from x_T [B, ...] down `grid`."""
        for state in self.walk(x_t, grid, c, generator):
            x_t = state
        return x_t

    @torch.no_grad()
    def solve(self, x_t: Tensor, t: Tensor, c: Context, steps: int) -> Tensor:
        """Where the flow ends from x_t [B, ...] at times t [B], each sample its own, in `steps` deterministic steps even in t."""
        for left in range(steps, 0, -1):
            on, now = t >= 0, t.clamp(min=0)  # a time below `steps` is at its end before the others
            s = torch.full_like(t, END) if left == 1 else now - torch.div(now, left, rounding_mode="floor").clamp(min=1)
            moved = self.transition(self.schedule, x_t, self.denoiser(x_t, now, c), now, s)
            x_t, t = torch.where(on.view(-1, *(1,) * (x_t.ndim - 1)), moved, x_t), torch.where(on, s, t)
        return x_t

    def _stops(self, t: int, s: int) -> list[int]:
        if self.fine is not None:
            inside = [x for x in self.fine.nodes.tolist() if s < x < t]
            return [t, *inside, s]
        # A set: an interval shorter than its substeps must not visit a time twice, nor call the network at END.
        return sorted({t, s, *(round(t + (s - t) * k / self.substeps) for k in range(1, self.substeps))}, reverse=True)


def solve(denoiser: nn.Module, x_t: Tensor, t: Tensor, c: Context, steps: int) -> Tensor:
    """x0 [B, ...] at the end of the flow from x_t [B, ...], each sample at a time t [B] of its own, by DDIM in so many even `steps`."""
    first = now = t
    for left in range(steps - 1, 0, -1):
        then = torch.div(first * left, steps, rounding_mode="floor")
        x_t, now = ddim(denoiser.schedule, x_t, denoiser(x_t, now, c), now, then), then  # type: ignore[arg-type]
    return denoiser(x_t, now, c).x0


class Multistep(Policy):
    """A DDIM policy evaluated with DPM-Solver++ 2M: a walk remembers x0; one interval by itself is first order, which is DDIM."""

    def walk(self, x_t: Tensor, grid: Grid, c: Context, generator: Generators | None = None) -> Iterator[Tensor]:
        """The states after every interval of `grid`, the last at its end."""
        solver, times = DPMSolver2M(self.schedule), grid.times.tolist()
        for t, s in zip(times, times[1:], strict=False):
            x_t = solver(x_t, self.denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), c), t, s)
            yield x_t


class Policies(NamedTuple):
    """Who can act in a roll-out."""

    student: Policy
    teacher: Policy | None = None
