"""Reflow against METHODS 5.5: straight lines in the teacher's own times, and the teacher's answers to a student's latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import LatentsAlone
from ddil_lightning.backbones.roles import Role
from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import NoiseCorrected, ddim
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.methods import Reflow
from ddil_lightning.methods.reflow import straight
from ddil_lightning.records import FORWARD, MIXED, STUDENT, TEACHER, Context, LatentBatch, cat
from suite import BY_NAME, Entry, build, captions, fit

SD = NoiseSchedule.scaled_linear()
A = torch.tensor([[1.3, 0.4], [0.4, 0.6]], dtype=torch.float64)  # symmetric, positive


class Matrix(nn.Module):
    """E[y | x_t] on the lines of y = A z: A (alpha A + sigma I)^-1 x_t, and A z of pure noise at the first node."""

    def __init__(self) -> None:
        super().__init__()
        self.error = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        alpha, sigma = (table[t].view(-1, 1, 1) for table in (SD.alphas, SD.sigmas))
        mixed = alpha * A + sigma * torch.eye(2, dtype=torch.float64)
        mixed = torch.where((t == 999).view(-1, 1, 1), torch.eye(2, dtype=torch.float64), mixed)
        return (A @ torch.linalg.solve(mixed, x_t[..., None]))[..., 0] + self.error


class Known(LatentsAlone):
    """A teacher and a student that are given."""

    def __init__(self, teacher: nn.Module, student: nn.Module, schedule: NoiseSchedule = SD) -> None:
        super().__init__("known", schedule, "x0", (2,), {"guidance": 1.0})
        self.exact, self.net = teacher, student

    def network(self) -> Any:
        return self.exact

    def role(self, name: str, **kwargs: Any) -> Role:
        if name == "teacher":
            return super().role(name, **{k: v for k, v in kwargs.items() if k == "reflection"})
        return Role(name, self.net, self.schedule, self.predicts)

    def null(self) -> Context:
        return Context(torch.zeros(1, 1, 1))


def made(student: nn.Module | None = None, teacher: nn.Module | None = None, **kwargs: Any) -> Reflow:
    exact = Gaussian(0.5, 0.7, SD) if teacher is None else teacher
    return Reflow(pipeline=Known(exact, Matrix() if student is None else student), guidance=1.0, nodes=16, **kwargs)


def paired(method: Reflow, source: int = FORWARD, whole: int | None = None, n: int = 64) -> LatentBatch:
    """Lines of y = A z at random nodes, the first of them among them; x_t as the draw makes it for forward latents, else anything."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 2, generator=g, dtype=torch.float64)
    y = z @ A.T
    node = method.grid.draw(n, g)
    node[:4] = 0
    t, s = method.grid.times[node], method.grid.times[node + 1]
    x = SD.add_noise(y, z, t) if source == FORWARD else torch.randn(n, 2, generator=g, dtype=torch.float64)
    x = torch.where((node == 0)[:, None], z, x)
    c, tag = Context(torch.zeros(n, 1, 1)).guided(0.0), torch.full((n,), source)
    return LatentBatch(x, t, s, node, c, None, tag, torch.ones(n), t * 0 - 1, None, z, y, tag if whole is None else tag * 0 + whole)


def loss(method: Reflow, b: LatentBatch) -> Tensor:
    """The per-sample losses of a step."""
    kept: list[Tensor] = []
    method.optimizers = lambda: None  # type: ignore[method-assign,assignment]
    method.descend = lambda optimizer, loss, name="": False  # type: ignore[method-assign]
    method.feedback = lambda b, loss: kept.append(loss) or loss.mean()  # type: ignore[method-assign,func-returns-value]
    method.training_step(b, 0)
    return kept[0]


def test_of_a_linear_coupling_the_straight_line_error_is_0_and_every_step_count_ends_in_y() -> None:
    """From noise, as the student is deployed and rolled out, and from a point of a line."""
    method = made()
    b = paired(method)
    assert b.noise is not None and b.end is not None
    assert float(loss(method, b).max()) < 1e-24
    for n in (4, 2, 1):
        policy, grid = method.deployment.sampler(n)
        torch.testing.assert_close(policy.sample(b.noise, grid, b.c), b.end)
    assert method.policies.student.transition == NoiseCorrected(999)
    x = SD.add_noise(b.end, b.noise, torch.full((64,), 749))
    torch.testing.assert_close(policy.sample(x, Grid([749, 400, 33, -1]), b.c), b.end)


@pytest.mark.parametrize(("rollouts", "teacher_steps", "counts"), [((4,), 32, (4, 2, 1)), ((5,), 20, (5, 1)), ((3,), 30, (3, 1))])
def test_it_is_used_at_times_that_it_is_trained_at(tiny: Path, rollouts: Any, teacher_steps: int, counts: tuple[int, ...]) -> None:
    entry = Entry("reflow", Reflow, {"guidance": 2.0, "pairs": {"steps": 2}})
    method = build(entry, tiny, rollouts=rollouts, teacher_steps=teacher_steps)
    assert method.deployment.steps == counts
    for n in counts:
        method.grid.rows(method.deployment.grid(n).nodes)  # raises for a time that is none of its own


def test_ddims_own_first_step_leaves_the_line_and_the_card_of_several_steps_says_so(tiny: Path) -> None:
    """The exported pipeline's: of y = z it ends short of y by the share of y that DDIM takes noise to hold."""
    method = made()
    b = paired(method)
    assert b.noise is not None
    plain = method.deployment.exported
    assert plain.policy.transition == ddim and "noise correction" in method.deployment.remark
    short = plain.policy.sample(b.noise, plain.grid(4), b.c)
    assert float((short - b.end).abs().max()) > 0.05  # type: ignore[operator]
    one = Reflow(pipeline=Known(Gaussian(0.5, 0.7, SD), Matrix()), guidance=1.0, nodes=1).deployment
    assert one.remark == "" and one.policy.transition == ddim


def test_where_the_process_ends_in_noise_alone_ddim_is_on_the_line() -> None:
    flow = NoiseSchedule.flow()
    method = Reflow(pipeline=Known(PointMass(0.3, flow), PointMass(0.3, flow), flow), guidance=1.0, nodes=16)
    assert method.policies.student.transition == method.deployment.policy.transition == ddim and method.deployment.remark == ""


def test_of_a_point_mass_the_velocity_is_mu_minus_z() -> None:
    mu = torch.tensor([0.3, -1.2], dtype=torch.float64)
    exact = PointMass(mu, SD)
    method = made(exact, exact)
    b = paired(method)
    b = b._replace(end=mu.expand(64, 2))
    assert float(loss(method, b).max()) < 1e-24
    x, _ = method.line(b)
    p = method.student(x, b.t, b.c)
    on = b.node > 0
    torch.testing.assert_close((p.x0 - p.eps)[on], (mu - b.noise)[on])  # type: ignore[operator]


@pytest.mark.parametrize("source", [FORWARD, TEACHER])
def test_the_loss_is_that_of_the_velocity_on_the_line(source: int) -> None:
    """|v - (y - z)|^2 with v read off the network's answer at u_r = (1 - r) z + r y; of a teacher's latent only its ends count."""
    method = made()
    with torch.no_grad():
        method.student.network.error += 0.1
    b = paired(method, source)
    z, y = b.noise, b.end
    assert z is not None and y is not None
    alpha, sigma = SD.at(b.t, z)
    r = torch.where((b.node == 0)[:, None], torch.zeros_like(alpha), alpha / (alpha + sigma))
    u = (1 - r) * z + r * y
    v = (method.student.network(torch.where(r == 0, z, (alpha + sigma) * u), b.t, b.c) - u) / (1 - r)  # x0 = u + (1 - r) v
    torch.testing.assert_close(loss(method, b), (v - (y - z)).square().mean(1))
    assert float(r.max()) > 0.8


def test_a_students_latents_are_answered_by_the_teachers_flow_from_where_they_are() -> None:
    method = made(relabel=200)
    b = paired(method, STUDENT)
    x, y = method.line(b)
    assert torch.equal(x, b.x_t)
    a, s = (table[b.t][:, None] for table in (SD.alphas, SD.sigmas))
    exact = 0.5 + 0.7 * (b.x_t - a * 0.5) / (a * a * 0.49 + s * s).sqrt()  # the flow map of N(mu, S^2) to t = END
    assert float((y - exact).abs().max()) < 0.05
    mixed = paired(method, TEACHER, MIXED)  # the teacher's latent of a trajectory that the student has ended
    assert torch.equal(method.line(mixed)[0], mixed.x_t) and not torch.equal(method.line(mixed)[1], mixed.end)
    before = method.teacher.evaluations
    method.line(b)
    alone = method.teacher.evaluations - before
    method.line(cat([b, paired(method, TEACHER)]))  # of states with an end of the teacher's none is solved for
    assert method.teacher.evaluations - before == 2 * alone > 0
    few = Policy(Denoiser(Gaussian(0.5, 0.7, SD), SD, "x0"), ddim)
    times = torch.tensor([0, 1, 2, 500])
    many = few.solve(torch.ones(4, 2, dtype=torch.float64), times, Context(torch.zeros(4, 1, 1)), 8)
    alone = [few.solve(torch.ones(1, 2, dtype=torch.float64), t[None], Context(torch.zeros(1, 1, 1)), 8) for t in times]
    torch.testing.assert_close(many, torch.cat(alone))
    torch.testing.assert_close(many[:1], few.step(torch.ones(1, 2, dtype=torch.float64), 0, -1, Context(torch.zeros(1, 1, 1))))


def test_times_are_even_along_the_line() -> None:
    times = straight(SD, 33)
    r = (SD.alphas / (SD.alphas + SD.sigmas))[torch.tensor(times)]
    assert times[0] == 999 and len(times) == 33 and torch.allclose(r.diff(), torch.tensor((1 - r[0]) / 33, dtype=torch.float64), atol=4e-3)
    assert straight(SD, 1) == [999] and made().grid.rollouts[0].nodes.tolist() == [999, 749, 499, 249]


def test_student_latents_are_refused_where_nobody_answers_them(tiny: Path) -> None:
    entry = Entry("reflow", Reflow, {"guidance": 2.0, "pairs": {"steps": 2}})
    with pytest.raises(ValueError, match=r"gives 0\.5 to student latents, .*: set model\.relabel"):
        fit(build(entry, tiny), captions(tiny, SamplingPrior(0.5, 0.5)))
    with pytest.raises(ValueError, match="not a node of"):
        build(entry, tiny, teacher_steps=10)


def test_a_straight_student_is_distilled_into_one_step(tiny: Path) -> None:
    method = build(
        Entry("reflow", Reflow, {"guidance": 2.0, "pairs": {"steps": 2}}), tiny, nodes=1, regression={"of": "features"}, updates=2
    )
    assert method.grid.times.tolist() == [999, -1] and method.deployment.steps == (1,)
    for made in (method, build(BY_NAME["boot"], tiny)):
        assert made.deployment.sampler(1)[1].times.tolist() == [999, -1]
        with pytest.raises(ValueError, match=r"^the student is made for one step: further ones begin at latents"):
            made.deployment.sampler(4)
    run = fit(method, captions(tiny, SamplingPrior()))
    assert run.method.student_updates == 2 and all(row["loss"] > 0 for row in run.rows)
