"""BOOT against METHODS 5.7: the signal's ODE in closed form on exact teachers, the boundary, and the states of roll-outs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_reflow import SD, Known, loss
from torch import Tensor, nn

from ddil_lightning.data.encoded import Encoded
from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.diffusion.policy import Policies
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import roll
from ddil_lightning.methods import BOOT
from ddil_lightning.methods.boot import signal
from ddil_lightning.records import FORWARD, STUDENT, TEACHER, Context, LatentBatch
from suite import Entry, build, captions, fit, pictures

MU, S = 0.5, 0.7


class Signals(nn.Module):
    """a + b z by the time that it is told, T - 2 - t: of N(mu, S^2) every signal of DDIM on a grid is such a map."""

    def __init__(self, times: list[int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1000, 2, dtype=torch.float64))
        a, b = x0_of(999, 0.0, 1.0)  # the boundary: the teacher's x0 of the noise
        last = 999
        with torch.no_grad():
            for t in times:
                if t != last:
                    alpha, sigma = float(SD.alphas[last]), float(SD.sigmas[last])
                    at, slope = x0_of(last, alpha * a, alpha * b + sigma)  # x_t = alpha y_t + sigma z
                    rho = float(SD.sigmas[t] * SD.alphas[last] / (SD.alphas[t] * SD.sigmas[last]))
                    a, b = rho * a + (1 - rho) * at, rho * b + (1 - rho) * slope
                self.table[max(998 - t, 0)] = torch.tensor([a, b])
                last = t

    def forward(self, z: Tensor, t: Tensor, c: Context) -> Tensor:
        return self.table[t, :1] + self.table[t, 1:] * z


def x0_of(t: int, a: float, b: float) -> tuple[float, float]:
    """The posterior mean of N(mu, S^2) at x_t = a + b z, as such a map."""
    alpha, sigma = float(SD.alphas[t]), float(SD.sigmas[t])
    k = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
    return MU + k * (a - alpha * MU), k * b


def made(student: nn.Module | None = None, teacher: nn.Module | None = None, steps: int = 8, **kwargs: Any) -> BOOT:
    times = [*(1000 - 1000 * k // steps - 1 for k in range(steps)), -1]
    net = Signals(times) if student is None else student
    return BOOT(pipeline=Known(Gaussian(MU, S, SD) if teacher is None else teacher, net), guidance=1.0, steps=steps, **kwargs)


def drawn(method: BOOT, n: int = 64) -> LatentBatch:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 2, generator=g, dtype=torch.float64)
    node = method.grid.draw(n, g)
    t, s = method.grid.times[node], method.grid.times[node + 1]
    c = Context(torch.zeros(n, 1, 1)).guided(0.0)
    return LatentBatch(z, t, s, node, c, None, t * 0 + FORWARD, torch.ones(n), t * 0 - 1, None, z)


@pytest.mark.parametrize("boundary", [0.0, 0.5])
def test_the_signals_of_ddim_leave_no_loss(boundary: float) -> None:
    """The recursion y_s = rho y_t + (1 - rho) x0, rho = e^(lambda_t - lambda_s), written out for N(mu, S^2)."""
    method = made(boundary=boundary)
    assert float(loss(method, drawn(method)).max()) < 1e-12
    with torch.no_grad():
        method.student.network.table[998] += 0.1  # the answer at the first time is told 0, those at the next ones more
    assert float(loss(method, drawn(method)).max()) < 1e-12  # t = 0 is no node
    with torch.no_grad():
        method.student.network.table[999, 0] += 0.1
    b = drawn(method)
    got = loss(method, b)
    assert boundary > 0 or float(got[b.s == -1].max()) == pytest.approx(0.01, rel=1e-4)
    assert float(got[b.s != -1].max()) < 1e-12


def test_the_end_of_fine_signals_is_that_of_the_flow() -> None:
    """mu + S (x_T - alpha mu) / sqrt(alpha^2 S^2 + sigma^2), from the x_T that the boundary makes of the noise."""
    method = made(steps=500)
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    c = Context(torch.zeros(5, 1, 1))
    alpha, sigma = float(SD.alphas[999]), float(SD.sigmas[999])
    x_T = alpha * signal(method.student, z, torch.full((5,), 999), c) + sigma * z
    exact = MU + S * (x_T - alpha * MU) / (alpha**2 * S**2 + sigma**2) ** 0.5
    assert float((signal(method.student, z, torch.full((5,), -1), c) - exact).abs().max()) < 0.02
    one = method.deployment.policy.sample(z, method.deployment.grid(1), c)
    torch.testing.assert_close(one, signal(method.student, z, torch.full((5,), -1), c))


def test_of_a_point_mass_the_signal_is_mu_at_every_time() -> None:
    mu = torch.tensor([0.3, -1.2], dtype=torch.float64)

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mu = nn.Parameter(mu.clone())

        def forward(self, z: Tensor, t: Tensor, c: Context) -> Tensor:
            return self.mu.expand_as(z)

    method = made(Constant(), PointMass(mu, SD), boundary=0.3)
    assert float(loss(method, drawn(method)).max()) < 1e-12


@torch.no_grad()
def test_a_teachers_state_asks_for_the_signal_of_the_next_one() -> None:
    method = made()
    c = Context(torch.zeros(3, 1, 1)).guided(0.0)
    walk = method.grid
    rolled = roll(method.policies, walk, [False] * 8, c, (2,), torch.Generator().manual_seed(0), ends=True)
    z, states = rolled.x_t[:3], [*rolled.x_t.split(3), rolled.end]
    for i in range(8):
        t, s = walk.times[i].repeat(3), walk.times[i + 1].repeat(3)
        tag = torch.full((3,), TEACHER)
        b = LatentBatch(states[i], t, s, t * 0 + i, c, None, tag, torch.ones(3), t * 0 - 1, None, z)  # type: ignore[arg-type]
        time, target = method.target(b, torch.zeros(3, dtype=torch.bool))
        alpha, sigma = SD.at(s, z)
        assert torch.equal(time, s) and torch.allclose(target.double(), ((states[i + 1] - sigma * z) / alpha).double(), atol=1e-4)  # type: ignore[operator]


@torch.no_grad()
def test_a_students_own_state_is_made_of_its_answer_to_the_noise() -> None:
    """And then its loss is the forward one, since the state that is stored is the one that is made there."""
    method = made()
    with torch.no_grad():
        method.student.network.table += 0.05
    c = Context(torch.zeros(3, 1, 1)).guided(0.0)
    actors = Policies(method.policies.student, method.policies.teacher)
    rolled = roll(actors, method.grid, [True] * 8, c, (2,), torch.Generator().manual_seed(0))
    z, x, t = rolled.x_t[:3], rolled.x_t[9:12], rolled.t[9:12]
    s = method.grid.times[4].repeat(3)
    y = signal(method.student, z, t, c)
    alpha, sigma = SD.at(t, z)
    assert torch.allclose(x.double(), (alpha * y + sigma * z).double(), atol=1e-6)
    none = torch.zeros(3, dtype=torch.bool)
    parts = [
        method.target(LatentBatch(x, t, s, t * 0 + 3, c, None, t * 0 + tag, torch.ones(3), t * 0 - 1, None, z), none)[1]
        for tag in (STUDENT, FORWARD)
    ]
    assert torch.allclose(*parts, atol=1e-5)


def test_it_needs_captions_alone(tiny: Path) -> None:
    data = captions(tiny, SamplingPrior(0.5, 0, 0.5))
    data.captions = Encoded(None, pictures(tiny).c)
    run = fit(build(Entry("boot", BOOT, {"guidance": 2.0, "steps": 3, "reflect": "off"}), tiny, updates=2), data)
    assert run.method.student_updates == 2 and run.rows[0]["loss/forward"] > 0 and run.rows[0]["loss/teacher"] > 0
