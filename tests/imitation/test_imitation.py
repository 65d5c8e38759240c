"""What DDIL is for (METHODS 1.10): a student with an error in every step, trained on forward latents and on its own.

Data N(mu, 1) in one dimension. The student's step is (1 + d) times the teacher's plus a shift that it learns per node. All means are
affine: with the deviation D_i = E x_i - alpha_i mu and the teacher's gain r_i per step, forward latents (D = 0) teach the shift
-d alpha mu, with which the student's own deviation grows by (1 + d) r_i instead of r_i. Roll-outs start from noise, so D_0 = -alpha_T mu,
and the bias against the teacher at the end is ((1 + d)^N - 1) D_0 prod r_i. On its own latents the student learns the shift that undoes it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.feed import Wants
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import draw
from ddil_lightning.records import CaptionBatch, Context
from ddil_lightning.streams import Streams

SD = NoiseSchedule.scaled_linear()
MU, D, BATCH = 6.0, 0.15, 256
ANTITHETIC = torch.randn(500, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
NOISE = torch.cat([ANTITHETIC, -ANTITHETIC])  # its mean is 0, so the means of affine maps of it are exact


class Drifting(nn.Module):
    """The teacher's DDIM step times 1 + d, plus a learnt shift per node, as a v prediction."""

    def __init__(self, teacher: Denoiser, grid: Grid) -> None:
        super().__init__()
        self.teacher, self.grid, self.shift = teacher, grid, nn.Parameter(torch.zeros(len(grid), dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        s = self.grid.after(t)
        right = ddim(SD, x_t, self.teacher(x_t, t, c), t, s)
        cos, sin = SD.rotation(t, s, right)
        return (cos * x_t - (1 + D) * right - self.shift[self.grid.rows(t)][:, None]) / sin


class Method(NamedTuple):
    policies: Policies
    grid: Grid
    guidance: tuple[float, float] = (1.0, 1.0)
    wants: Wants = Wants()


def context(n: int) -> Context:
    return Context(torch.zeros(n, 1, 1))


@cache
def trained(steps: int, prior: SamplingPrior, updates: int = 200) -> tuple[Policy, Policy, Grid]:
    """Student and teacher after training on `prior`, through Algorithm 1 and a regression on the teacher's step."""
    grid, teacher = Grid.named("linspace", steps), Denoiser(Gaussian(MU, 1.0, SD), SD, "x0")
    student = Denoiser(Drifting(teacher, grid), SD, "v")
    method = Method(Policies(Policy(student), Policy(teacher)), grid)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.4 * steps)
    for update in range(updates):
        data = MU + torch.randn(BATCH, 1, generator=torch.Generator().manual_seed(update))
        b = draw(CaptionBatch(data, context(BATCH), torch.arange(BATCH)), method, prior, Streams(0, update), shape=(1,))
        made, right = (ddim(SD, b.x_t, d(b.x_t, b.t, b.c), b.t, b.s) for d in (student, teacher))
        optimizer.param_groups[0]["lr"] = 0.4 * steps / (1 + update / 25)
        optimizer.zero_grad()
        mse(made, right.detach()).mean().backward()
        optimizer.step()
    return method.policies.student, method.policies.teacher, grid


def means(policy: Policy, grid: Grid) -> Tensor:
    with torch.no_grad():
        return torch.stack([x.mean() for x in policy.walk(NOISE, grid, context(len(NOISE)))])


@pytest.mark.parametrize("steps", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_forward_latents_leave_a_bias_that_grows_and_own_latents_remove_it(steps: int):
    student, teacher, grid = trained(steps, SamplingPrior())
    right, drift = means(teacher, grid), means(student, grid) - means(teacher, grid)
    deviation = right - SD.alphas[grid.times[1:]] * MU  # the teacher's: D_0 prod r
    growth = (1 + D) ** torch.arange(1, steps + 1) - 1
    assert float(deviation[-1]) < -0.15 and torch.allclose(drift, growth * deviation, atol=0.03)
    assert abs(float(drift[-1])) > {2: 0.05, 6: 0.3}[steps]
    own, _, _ = trained(steps, SamplingPrior(0.0, 1.0, 0.0))
    assert float((means(own, grid) - right).abs().max()) < 0.03
    mixed, _, _ = trained(steps, SamplingPrior(0.5, 0.5, 0.0))
    assert 0.03 < abs(float((means(mixed, grid) - right)[-1])) < 0.8 * abs(float(drift[-1]))


def test_on_forward_latents_the_drifting_student_looks_right():
    """Its mean error there is 0: the shift cannot be seen in the forward loss."""
    student, teacher, grid = trained(6, SamplingPrior())
    for t, s in zip(grid.times.tolist(), grid.times[1:].tolist(), strict=False):
        x_t = SD.add_noise(MU + NOISE.flip(0).roll(1, 0), NOISE, t)
        with torch.no_grad():
            error = student.step(x_t, t, s, context(len(x_t))) - teacher.step(x_t, t, s, context(len(x_t)))
        assert abs(float(error.mean())) < 0.03
