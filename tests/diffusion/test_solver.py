"""Transitions against diffusers' samplers given the same noise, closed forms of exact denoisers, and policies of several substeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.analytic import Gaussian, PointMass, UniformBox
from ddil_lightning.diffusion.denoiser import Consistency, Denoiser
from ddil_lightning.diffusion.schedule import Grid, NoiseSchedule
from ddil_lightning.diffusion.solver import DPMSolver2M, Policy, ddim, renoise
from ddil_lightning.records import END, Context

SD = NoiseSchedule.scaled_linear()
ZERO = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
FLOW = NoiseSchedule.flow()
SCHEDULES = pytest.mark.parametrize("schedule", [SD, ZERO, FLOW], ids=["sd", "zero-snr", "flow"])
SD_CONFIG: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS: dict[str, Any] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
C = Context(torch.zeros(3, 1, 1))


def noise(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Curved(nn.Module):
    """A nonlinear network of its own, that counts its calls and remembers their times."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        assert t.dtype == torch.long and len(t) == len(x_t) and len(t.unique()) == 1
        self.times.append(int(t[0]))
        return torch.tanh(x_t + t.view(-1, 1, 1, 1) / 1000) + 0.3 * x_t.roll(1, 1)


def theirs(name: str, steps: int, exact: bool = True, **config: Any) -> Any:
    import diffusers

    clip = {} if name.startswith("DPM") else {"clip_sample": False}
    scheduler = getattr(diffusers, name)(**SD_CONFIG, **clip, **config)
    if exact:  # diffusers keeps float32 tables; with ours the algorithms can be compared to the last digits
        scheduler.alphas_cumprod = SD.alphas[:-1].square()
    scheduler.set_timesteps(steps)
    return scheduler


def run(scheduler: Any, network: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(3), C), t, x, return_dict=False, **kwargs)[0]
        states.append(x)
    return states


# DDIM ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize("rule", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_ddim_is_diffusers(prediction_type: str, rule: str, steps: int):
    scheduler = theirs("DDIMScheduler", steps, timestep_spacing=rule, steps_offset=int(rule == "leading"), prediction_type=prediction_type)
    policy = Policy(Denoiser(Curved(), SD, KINDS[prediction_type]))
    ours = list(policy.walk(noise(), Grid.named(rule, steps), C))
    for a, b in zip(ours, run(scheduler, Curved(), noise()), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_is_diffusers_in_single_precision(prediction_type: str):
    scheduler = theirs("DDIMScheduler", 4, exact=False, timestep_spacing="trailing", prediction_type=prediction_type)
    x = noise(dtype=torch.float32)
    ours = Policy(Denoiser(Curved(), SD, KINDS[prediction_type])).sample(x, Grid.named("trailing", 4), C)
    want = run(scheduler, Curved(), x)[-1]
    assert ours.dtype == torch.float32 and torch.allclose(ours, want, rtol=1e-5, atol=1e-5)


@SCHEDULES
@pytest.mark.parametrize(("t", "s"), [(999, 749), (749, 748), (250, 0), (19, END), (999, END), (0, END)])
def test_rotation_is_alpha_x0_plus_sigma_eps(schedule: NoiseSchedule, t: int, s: int):
    x = noise()
    now, then = torch.full((3,), t), torch.full((3,), s)
    p = schedule.prediction("v", x, now, noise(1))
    alpha, sigma = schedule.at(then, x)
    stepped = ddim(schedule, x, p, now, then)
    assert torch.allclose(stepped, alpha * p.x0 + sigma * p.eps, atol=1e-12)
    if s == END:
        assert torch.allclose(stepped, p.x0, atol=1e-12)


def test_ddim_is_stateless():
    """With one prediction, t -> m -> s is t -> s; and samples of one batch may stand at different times."""
    x, out = noise(), noise(1)
    t, m, s = torch.tensor([999, 749, 500]), torch.tensor([600, 749, 300]), torch.tensor([500, 250, END])
    p = SD.prediction("v", x, t, out)
    middle = ddim(SD, x, p, t, m)
    assert torch.allclose(ddim(SD, middle, SD.from_x0(middle, m, p.x0), m, s), ddim(SD, x, p, t, s), atol=1e-9)
    one = [ddim(SD, a, SD.prediction("v", a, b, d), b, e) for a, b, d, e in zip(*(y.split(1) for y in (x, t, out, s)), strict=True)]
    assert torch.equal(torch.cat(one), ddim(SD, x, p, t, s))


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_point_mass_is_exact_on_every_grid(schedule: NoiseSchedule, steps: int):
    mu = noise(7)[0]
    grid, x = Grid.named("linspace", steps), noise()
    e = (x - schedule.alphas[999] * mu) / schedule.sigmas[999]
    states = list(Policy(Denoiser(PointMass(mu, schedule), schedule, "x0")).walk(x, grid, C))
    for state, s in zip(states, grid.times[1:].tolist(), strict=True):
        assert torch.allclose(state, schedule.alphas[s] * mu + schedule.sigmas[s] * e, atol=1e-10)
    assert torch.allclose(states[-1], mu.expand(3, -1, -1, -1), atol=1e-10)


def test_unit_gaussian_is_turned():
    """x0 ~ N(0, I): v = 0, so a DDIM step multiplies by the cosine of its angle."""
    angle = torch.atan2(SD.sigmas, SD.alphas)
    stepped = Policy(Denoiser(Gaussian(0.0, 1.0, SD), SD, "x0")).step(noise(), 749, 500, C)
    assert torch.allclose(stepped, (angle[749] - angle[500]).cos() * noise(), atol=1e-10)


@SCHEDULES
def test_ddim_converges_to_the_flow_at_first_order(schedule: NoiseSchedule):
    law = Gaussian(0.8, 0.5, schedule)
    policy = Policy(Denoiser(law, schedule, "x0"))
    want = law.flow(noise(), 999, END)
    errors = [float((policy.sample(noise(), Grid.named("linspace", n), C) - want).abs().max()) for n in (111, 333)]
    assert errors[1] < 0.02 and errors[0] / errors[1] == pytest.approx(3, rel=0.2)


# Re-noising ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_consistency_sampling_is_diffusers_given_the_noise(prediction_type: str, steps: int):
    scheduler = theirs("LCMScheduler", steps, prediction_type=prediction_type)
    policy = Policy(Consistency(Denoiser(Curved(), SD, KINDS[prediction_type])), "renoise")
    ours = list(policy.walk(noise(), Grid.named("lcm", steps), C, torch.Generator().manual_seed(5)))
    for a, b in zip(ours, run(scheduler, Curved(), noise(), generator=torch.Generator().manual_seed(5)), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_noise_is_fresh_and_independent():
    """DMD2 issue 9: a re-noising step that reuses noise. The noise of every step is read off the states of a point mass."""
    mu, grid, n = 0.7, Grid.named("lcm", 5), 2000
    c, x = Context(torch.zeros(n, 1, 1)), torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    policy = Policy(Denoiser(PointMass(mu, SD), SD, "x0"), "renoise")
    states = list(policy.walk(x, grid, c, torch.Generator().manual_seed(1)))[:-1]
    drawn = [x] + [(y - SD.alphas[s] * mu) / SD.sigmas[s] for y, s in zip(states, grid.nodes[1:].tolist(), strict=True)]
    table = torch.stack([e.flatten() for e in drawn]).double()
    assert float((table.corrcoef() - torch.eye(5)).abs().max()) < 4 / math.sqrt(4 * n)
    assert bool(((table.std(1) - 1).abs() < 4 / math.sqrt(2 * 4 * n)).all())
    rows = torch.stack(drawn)[:, :, 0]  # and not shared by the samples of a batch either
    assert len(rows[1].unique()) == n
    assert torch.equal(torch.stack(list(policy.walk(x, grid, c, torch.Generator().manual_seed(1)))[:-1]), torch.stack(states))


def test_renoising_at_the_end_is_x0():
    p = SD.prediction("v", noise(), torch.tensor([19, 19, 19]), noise(1))
    assert torch.equal(renoise(SD, p, torch.full((3,), END), noise(2)), p.x0)
    alpha, sigma = SD.alphas[500], SD.sigmas[500]
    assert torch.allclose(renoise(SD, p, torch.full((3,), 500), noise(2)), alpha * p.x0 + sigma * noise(2), atol=1e-12)


def test_the_last_step_draws_no_noise():
    """As in LCMScheduler: one more draw would shift every later number of the generator."""
    used, untouched = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    Policy(Denoiser(Curved(), SD, "v"), "renoise").step(noise(), 259, END, C, used)
    assert torch.equal(torch.randn(3, generator=used), torch.randn(3, generator=untouched))


# DPM-Solver++ -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
def test_dpm_solver_is_diffusers(prediction_type: str, steps: int):
    scheduler = theirs("DPMSolverMultistepScheduler", steps, exact=False, prediction_type=prediction_type)
    x = noise(dtype=torch.float32)
    want = run(scheduler, Curved(), x)
    solver, network, grid = DPMSolver2M(SD), Curved(), Grid.named("linspace", steps)
    for (t, s), theirs_s in zip(zip(grid.times.tolist(), grid.times[1:].tolist(), strict=False), want, strict=True):
        now = torch.full((3,), t)
        x = solver(x, SD.prediction(KINDS[prediction_type], x, now, network(x, now, C)), t, s)
        assert float((x - theirs_s).abs().max() / theirs_s.abs().max()) < 2e-6  # float32 tables and arithmetic: 8e-7 was seen


@pytest.mark.parametrize(("t", "s"), [(999, 749), (250, 19)])
def test_first_order_dpm_solver_is_ddim(t: int, s: int):
    p = SD.prediction("v", noise(), torch.full((3,), t), noise(1))
    one = DPMSolver2M(SD)(noise(), p, t, s)
    assert torch.allclose(one, ddim(SD, noise(), p, torch.full((3,), t), torch.full((3,), s)), rtol=0, atol=1e-14)


def test_dpm_solver_is_second_order_and_forgets_at_the_end():
    law = Gaussian(0.8, 0.5, SD)
    solver = DPMSolver2M(SD)

    def error(steps: int) -> float:
        times = [round(999 * (1 - k / steps) + 200 * k / steps) for k in range(steps + 1)]
        x = noise()
        for t, s in zip(times, times[1:], strict=False):
            x = solver(x, SD.from_x0(x, t, law(x, torch.full((3,), t), C)), t, s)
        solver(x, SD.from_x0(x, 200, x), 200, END)
        return float((x - law.flow(noise(), 999, 200)).abs().max())

    coarse, fine = error(50), error(200)
    assert coarse / fine > 8 and error(50) == coarse  # between first (4) and second order (16): the first step is first order


def test_dpm_solver_at_zero_terminal_snr():
    law, solver, x = UniformBox(-1.0, 1.0, ZERO), DPMSolver2M(ZERO), noise()
    for t, s in ((999, 749), (749, 500), (500, 250), (250, END)):
        x = solver(x, ZERO.from_x0(x, t, law(x, torch.full((3,), t), C)), t, s)
    assert bool(x.isfinite().all()) and float(x.abs().max()) <= 1


# Policies -----------------------------------------------------------------------------------------------------------------------


def test_substeps_are_a_finer_walk():
    """One student step is eight teacher steps, at the nodes of the finer grid where one is given."""
    coarse, fine = Grid.named("linspace", 4), Grid.named("linspace", 32)
    many, few = Curved(), Curved()
    policy = Policy(Denoiser(many, SD, "v"), fine=fine)
    stepped = policy(noise(), 749, 500, C)
    assert many.times == [749, *(t for t in fine.nodes.tolist() if 500 < t < 749)] and len(many.times) == 8
    teacher = Policy(Denoiser(few, SD, "v"))
    x = noise()
    for t, s in zip(many.times, [*many.times[1:], 500], strict=True):
        x = teacher.step(x, t, s, C)
    assert torch.equal(stepped, x)
    assert torch.equal(policy.sample(noise(), coarse, C), teacher.sample(noise(), fine, C))


@pytest.mark.parametrize(
    ("t", "s", "substeps", "times"),
    [(999, 499, 2, [999, 749]), (250, END, 2, [250, 124]), (600, 200, 4, [600, 500, 400, 300])],
)
def test_substeps_without_a_grid_divide_time(t: int, s: int, substeps: int, times: list[int]):
    network = Curved()
    Policy(Denoiser(network, SD, "v"), substeps=substeps)(noise(), t, s, C)
    assert network.times == times


def test_short_intervals_take_fewer_substeps():
    """No time twice, and no call of the network at END."""
    network = Curved()
    Policy(Denoiser(network, SD, "v"), substeps=8)(noise(), 1, END, C)
    assert network.times == [1, 0]
    with pytest.raises(ValueError, match="at least one substep"):
        Policy(Denoiser(network, SD, "v"), substeps=0)


def test_a_sample_is_the_last_state_of_the_walk():
    network = Curved()
    policy, grid = Policy(Denoiser(network, SD, "v"), "renoise"), Grid.named("trailing", 4)
    states = list(policy.walk(noise(), grid, C, torch.Generator().manual_seed(3)))
    assert len(states) == 4 and network.times == [999, 749, 499, 249]
    x0 = policy.sample(noise().requires_grad_(), grid, C, torch.Generator().manual_seed(3))
    assert torch.equal(x0, states[-1]) and not x0.requires_grad
    assert policy.denoiser.evaluations == 2 * 4 * 3 and policy.schedule is SD


def test_steps_carry_gradients():
    """DMD2's generator turn differentiates through a step; only `sample` is without a graph."""
    x = noise().requires_grad_()
    Policy(Denoiser(Curved(), SD, "v"))(x, 749, 500, C).sum().backward()
    assert float(x.grad.abs().sum()) > 0
