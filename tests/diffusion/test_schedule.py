"""Schedules against golden values and diffusers' tables, the hub's identities, and grids against diffusers' timesteps."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import END, Prediction

SD = NoiseSchedule.scaled_linear()
ZERO = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
FLOW = NoiseSchedule.flow()
SCHEDULES = pytest.mark.parametrize("schedule", [SD, ZERO, FLOW], ids=["sd", "zero-snr", "flow"])
SD_CONFIG: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# t: alpha, sigma, lambda of Stable Diffusion's schedule in float64 (METHODS 0.3)
GOLDEN = {
    999: (0.068265, 0.997667, -2.68202),
    749: (0.237957, 0.971276, -1.40652),
    500: (0.525674, 0.850686, -0.48136),
    499: (0.526944, 0.849900, -0.47803),
    250: (0.820849, 0.571146, 0.36269),
    249: (0.821847, 0.569708, 0.36643),
    19: (0.991082, 0.133252, 2.00656),
    0: (0.999575, 0.029155, 3.53471),
}


def scheduler(rule: str, total: int = 1000, **kwargs: Any) -> Any:
    import diffusers

    name = {"linspace": "DPMSolverMultistepScheduler", "lcm": "LCMScheduler"}.get(rule, "DDIMScheduler")
    if name == "DDIMScheduler":
        kwargs |= {"timestep_spacing": rule, "steps_offset": int(rule == "leading")}
    return getattr(diffusers, name)(num_train_timesteps=total, **{**SD_CONFIG, **kwargs})


def answer(kind: str, alpha: Tensor, sigma: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """What a perfect network of `kind` would say of x_t = alpha x0 + sigma eps."""
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]


@pytest.mark.parametrize("t", GOLDEN)
def test_golden_values(t: int):
    alpha, sigma, lam = GOLDEN[t]
    assert (float(SD.alphas[t]), float(SD.sigmas[t])) == pytest.approx((alpha, sigma), abs=6e-7)
    assert float(SD.half_log_snr(t)) == pytest.approx(lam, abs=6e-6)
    assert float(SD.snr(torch.tensor([t]), torch.zeros(1, 1))) == pytest.approx((alpha / sigma) ** 2, rel=2e-5)
    assert SD.alphas.dtype == torch.float64


@SCHEDULES
def test_end_is_a_row(schedule: NoiseSchedule):
    assert (schedule.alphas[END], schedule.sigmas[END]) == (1, 0) and len(schedule.alphas) == schedule.steps + 1 == 1001
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(schedule.add_noise(x, torch.randn_like(x), torch.tensor([END, END])), x)
    assert float(schedule.snr(torch.tensor([END]), x).squeeze()) == float("inf")


@SCHEDULES
def test_signal_falls_and_noise_rises(schedule: NoiseSchedule):
    assert bool((schedule.alphas[:-1].diff() < 0).all()) and bool((schedule.sigmas[:-1].diff() > 0).all())
    assert schedule.variance_preserving == (schedule is not FLOW)


def test_zero_terminal_snr():
    assert (ZERO.alphas[999], ZERO.sigmas[999]) == (0, 1)  # exactly
    assert float(ZERO.alphas[0]) == pytest.approx(float(SD.alphas[0]), abs=1e-15)
    theirs = scheduler("trailing", rescale_betas_zero_snr=True)
    assert torch.allclose(NoiseSchedule.from_scheduler(theirs).alphas[:-1], theirs.alphas_cumprod.double().sqrt(), atol=2e-6)
    x = torch.randn(3, 2)
    p = ZERO.prediction("v", x, torch.tensor([999, 999, 500]), torch.randn(3, 2))
    assert all(bool(y.isfinite().all()) for y in p)
    with pytest.raises(ValueError, match=r"zero terminal SNR.*convert the network to v"):
        ZERO.prediction("eps", x, torch.tensor([999, 999, 500]), x)
    assert torch.isfinite(ZERO.prediction("eps", x, torch.tensor([998, 3, 500]), x).x0).all()


@pytest.mark.parametrize(
    "config",
    [{}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1, 0.2, 0.3]}],
    ids=["scaled_linear", "linear", "cosine", "trained"],
)
def test_schedulers_are_recomputed_in_double(config: dict[str, Any]):
    theirs = scheduler("trailing", total=3 if "trained_betas" in config else 1000, **config)
    ours = NoiseSchedule.from_scheduler(theirs)
    assert ours.variance_preserving
    assert torch.allclose(ours.alphas[:-1].square(), theirs.alphas_cumprod.double(), atol=1e-6)


def test_schedulers_that_are_not_known():
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.allclose(NoiseSchedule.from_scheduler(theirs).sigmas[:-1].flip(0), theirs.sigmas[:1000].double(), atol=1e-6)
    assert NoiseSchedule.from_scheduler(EulerDiscreteScheduler(**SD_CONFIG)).steps == 1000  # the process, not the sampler
    sigmoid = {"num_train_timesteps": 9, "beta_start": 0, "beta_end": 1, "beta_schedule": "sigmoid"}
    with pytest.raises(ValueError, match="beta_schedule is 'sigmoid': known are linear"):
        NoiseSchedule.from_scheduler(SimpleNamespace(config=sigmoid))
    with pytest.raises(ValueError, match="neither betas nor a flow"):
        NoiseSchedule.from_scheduler(SimpleNamespace(config={}))
    with pytest.raises(ValueError, match="same length"):
        NoiseSchedule(torch.ones(3), torch.ones(4))


@SCHEDULES
@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_hub_round_trips(schedule: NoiseSchedule, kind: Any):
    t = torch.tensor([END, 0, 19, 250, 500, 749, 998])
    x0, eps = torch.randn(2, 7, 3, 2, 2, dtype=torch.float64)
    alpha, sigma = schedule.at(t, x0)
    x_t = schedule.add_noise(x0, eps, t)
    p = schedule.prediction(kind, x_t, t, answer(kind, alpha, sigma, x0, eps))
    noisy = slice(1, None)  # at END an x0 says nothing of eps
    assert torch.allclose(p.x0, x0, atol=1e-10)
    assert torch.allclose(p.eps[noisy], eps[noisy], atol=1e-9)
    assert torch.allclose(p.v[noisy], answer("v", alpha, sigma, x0, eps)[noisy], atol=1e-9)
    assert torch.allclose(alpha * p.x0 + sigma * p.eps, x_t, atol=1e-12)
    again: Prediction = schedule.from_x0(x_t, t, p.x0)
    assert torch.allclose(again.eps[noisy], p.eps[noisy], atol=1e-9) and torch.allclose(again.v[noisy], p.v[noisy], atol=1e-9)


def test_hub_refuses_an_unknown_space():
    with pytest.raises(ValueError, match="'eps', 'v', 'x0' or 'flow', not 'score'"):
        SD.prediction("score", torch.zeros(1, 1), torch.tensor([5]), torch.zeros(1, 1))  # type: ignore[arg-type]


def test_error_amplification():
    """|d eps|^2 = SNR |d x0|^2 and |d v|^2 = (1 + SNR) |d x0|^2 at fixed x_t; an eps error grows 14.6-fold in x0 at t = 999."""
    t = torch.tensor(list(GOLDEN))
    x_t, x0, d = torch.randn(3, len(t), 5, dtype=torch.float64)
    a, b = SD.from_x0(x_t, t, x0), SD.from_x0(x_t, t, x0 + d)
    snr = SD.snr(t, x_t)
    assert torch.allclose((b.eps - a.eps).square(), snr * d.square(), rtol=1e-9)
    assert torch.allclose((b.v - a.v).square(), (1 + snr) * d.square(), rtol=1e-9)
    one = torch.ones(1, 1, dtype=torch.float64)
    x0_of = [float(SD.prediction("eps", one, torch.tensor([999]), e * one).x0) for e in (0.0, 1.0)]
    assert x0_of[0] - x0_of[1] == pytest.approx(14.6, abs=0.02)


@SCHEDULES
def test_x0_where_a_division_would_fail(schedule: NoiseSchedule):
    x_t, x0 = torch.randn(2, 2, 3)
    x0.requires_grad_()
    end = schedule.from_x0(x_t, torch.tensor([END, END]), x0)
    assert torch.equal(end.eps, x_t)
    (end.eps + end.v).sum().backward()
    assert bool(x0.grad.isfinite().all())
    if schedule.alphas[999] == 0:
        start = schedule.from_x0(x_t, torch.tensor([999, 999]), x0)
        assert torch.equal(start.eps, x_t) and torch.equal(start.v, -x0)


@pytest.mark.parametrize("t", [0, torch.tensor([0])], ids=["int", "tensor"])
def test_tables_stay_above_half_precision(t: Any):
    """bf16(alpha_bar_0) is 1: sigma would be 0. So bf16 latents are noised with float32 tables, whatever the form of t."""
    assert torch.tensor(0.99915).bfloat16() == 1
    x0, eps = torch.ones(1, 4).bfloat16(), torch.full((1, 4), 2.0).bfloat16()
    x_t = SD.add_noise(x0, eps, t)
    assert x_t.dtype == torch.float32 and torch.allclose(x_t, torch.tensor(0.999575 + 2 * 0.029155), atol=1e-6)
    p = SD.prediction("eps", x_t.bfloat16(), t, eps)
    assert {y.dtype for y in p} == {torch.float32} and bool(torch.stack(p).isfinite().all())
    assert {y.dtype for y in SD.prediction("v", x_t.double(), t, eps.double())} == {torch.float64}


def test_tables_made_for_a_preview_serve_training():
    schedule = NoiseSchedule.scaled_linear()
    with torch.inference_mode():
        schedule.at(3, torch.zeros(1, 1))
    out = torch.ones(1, 1, requires_grad=True)
    schedule.prediction("eps", torch.ones(1, 1), 3, out).x0.sum().backward()
    assert float(out.grad) == pytest.approx(-float((SD.sigmas / SD.alphas)[3]), rel=1e-6)


@SCHEDULES
def test_mean_squares_of_forward_latents(schedule: NoiseSchedule) -> None:
    """Of data at the two points +-m; at END of the data themselves."""
    m, g = 1.7, torch.Generator().manual_seed(0)
    x0 = m * (2 * torch.randint(0, 2, (40_000,), generator=g) - 1)
    for t in (999, 500, 0, -1):
        x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=g), torch.full((len(x0),), t))
        assert float(schedule.mean_square(t, m * m)) == pytest.approx(float(x_t.square().mean()), rel=0.04)
    assert float(schedule.mean_square(-1, m * m)) == m * m


def test_rates_of_the_linear_path_are_those_of_t() -> None:
    alpha, sigma = FLOW.rates(torch.arange(1000), torch.zeros(1000, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(alpha, torch.full((1000, 1, 1), -1.0, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(sigma, torch.full((1000, 1, 1), 1.0, dtype=torch.float64), rtol=0, atol=1e-9)


def test_rates_of_a_vp_schedule_stay_on_the_circle_and_are_those_of_its_betas() -> None:
    """alpha^2 + sigma^2 = 1 differentiated, and d log alpha / dt = -beta / 2 in continuous time."""
    t, like = torch.arange(1, 999), torch.zeros(998, 1, dtype=torch.float64)
    (alpha, sigma), (da, ds) = SD.at(t, like), SD.rates(t, like)
    assert float((alpha * da + sigma * ds)[20:].abs().max()) < 1e-3  # of rates of 0.4 and more; sigma begins like a root of t
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()[1:-1, None]
    torch.testing.assert_close(da / alpha / 1000, -betas / 2, rtol=2e-2, atol=0)
    x0, eps = torch.randn(2, 998, 1, dtype=torch.float64)
    step = SD.add_noise(x0, eps, t + 1) - SD.add_noise(x0, eps, t - 1)
    torch.testing.assert_close(step * 500, da * x0 + ds * eps, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="not of END"):
        SD.rates(END, like)


def test_rotation_is_for_variance_preserving_paths():
    x = torch.zeros(1, 1, dtype=torch.float64)
    cos, sin = SD.rotation(torch.tensor([749]), torch.tensor([500]), x)
    angle = torch.atan2(SD.sigmas, SD.alphas)
    turn = angle[749] - angle[500]
    assert torch.allclose(torch.stack([cos, sin]).flatten(), torch.stack([turn.cos(), turn.sin()]), atol=1e-12)
    with pytest.raises(ValueError, match="variance-preserving"):
        FLOW.rotation(749, 500, x)


# Grids --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "steps", "nodes"),
    [
        ("linspace", 4, [999, 749, 500, 250]),
        ("linspace", 2, [999, 500]),
        ("linspace", 8, [999, 874, 749, 624, 500, 375, 250, 125]),
        ("trailing", 4, [999, 749, 499, 249]),
        ("leading", 4, [751, 501, 251, 1]),
        ("lcm", 4, [999, 759, 499, 259]),
        ("lcm", 3, [999, 679, 339]),
        ("lcm", 5, [999, 799, 599, 399, 199]),
    ],
)
def test_grids_by_hand(rule: str, steps: int, nodes: list[int]):
    grid = Grid.named(rule, steps)
    assert grid.nodes.tolist() == nodes and grid.times.tolist() == [*nodes, END] and len(grid) == steps
    assert grid.rollout(random.Random(0)) is grid


@pytest.mark.parametrize("total", [1000, 100, 64])
@pytest.mark.parametrize("rule", ["linspace", "trailing", "leading", "lcm"])
def test_grids_are_what_diffusers_walks(rule: str, total: int):
    """Also where a node falls on a half (26 steps: 499.5) and the order of floating-point operations decides."""
    theirs = scheduler(rule, total)
    for steps in [*range(1, 51 if rule == "lcm" else 64), *([128, 242, 500, 999] if total == 1000 and rule != "lcm" else [])]:
        theirs.set_timesteps(steps)
        # numpy's arange gives diffusers a time of -1 too many for some step counts of `trailing`
        assert Grid.named(rule, steps, total).nodes.tolist() == theirs.timesteps.tolist()[:steps], steps


def test_grids_nest_under_halving():
    for steps in range(1, 300):
        coarse, fine = Grid.named("linspace", steps), Grid.named("linspace", 2 * steps)
        assert torch.equal(coarse.times, fine.times[::2])


def test_grids_of_consistency_training():
    grid = Grid.consistency()
    assert grid.times.tolist() == [*range(999, 18, -20), 0] and len(grid) == 50  # the last interval ends at 0 and not at END
    assert [walk.nodes.tolist() for walk in grid.rollouts] == [Grid.named("lcm", n).nodes.tolist() for n in (3, 4, 5)]
    seen = {len(grid.rollout(random.Random(i))) for i in range(40)}
    assert seen == {3, 4, 5}


def test_grids_refuse_times_of_another_rule():
    """499 against 500: a roll-out off the training grid must not pass in silence."""
    with pytest.raises(ValueError, match=r"t = 499 is not a node of Grid\(custom, \[999, 749, 500, 250, -1\]\)"):
        Grid([999, 749, 500, 250, END], rollouts=[Grid.named("trailing", 4)])
    grid = Grid.named("linspace", 4)
    t = torch.tensor([[250, 999], [500, 749]])
    assert torch.equal(grid.rows(t), torch.tensor([[3, 0], [2, 1]]))
    assert torch.equal(grid.after(t), torch.tensor([[END, 749], [250, 500]]))
    with pytest.raises(ValueError, match="499 is not a node"):
        grid.after(torch.tensor([999, 499]))


@pytest.mark.parametrize("times", [[999], [999, 999, END], [1, 2, END], [5, -2], [5, END, END]], ids=str)
def test_grids_fall_strictly(times: list[int]):
    with pytest.raises(ValueError, match="fall strictly and end in END"):
        Grid(times)


@pytest.mark.parametrize(
    ("rule", "steps", "match"),
    [("karras", 4, "known are linspace, trailing"), ("linspace", 0, "between 1 and 1000"), ("linspace", 1001, "between 1 and 1000")]
    + [("lcm", 51, "50 nodes"), ("leading", 1000, "no 1000 different times below 1000"), ("linspace", 1000, "no 1000 different times")],
)
def test_grids_that_cannot_be(rule: str, steps: int, match: str):
    with pytest.raises(ValueError, match=match):
        Grid.named(rule, steps)


def test_forward_times_are_uniform_over_nodes():
    grid, n = Grid.named("linspace", 4), 40_000
    drawn = grid.draw(n, torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=4) / n
    assert bool(((share - 0.25).abs() < 4 * (0.25 * 0.75 / n) ** 0.5).all())  # node 0, the noisiest, is not lost
    assert torch.equal(drawn, grid.draw(n, torch.Generator().manual_seed(0)))
