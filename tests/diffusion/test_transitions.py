"""Transitions against diffusers' samplers given the same noise, closed forms of exact denoisers, and their parameters' limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.samplers import FLOW, KINDS, SCHEDULES, SD, SD_CONFIG, C, Curved, noise, run, theirs

from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.diffusion.denoiser import Consistency, Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import TCD, Posterior, Transition, ddim, renoise
from ddil_lightning.records import END, Context

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
    policy = Policy(Consistency(Denoiser(Curved(), SD, KINDS[prediction_type])), renoise)
    ours = list(policy.walk(noise(), Grid.named("lcm", steps), C, torch.Generator().manual_seed(5)))
    for a, b in zip(ours, run(scheduler, Curved(), noise(), generator=torch.Generator().manual_seed(5)), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_noise_is_fresh_and_independent():
    """DMD2 issue 9: a re-noising step that reuses noise. The noise of every step is read off the states of a point mass."""
    mu, grid, n = 0.7, Grid.named("lcm", 5), 2000
    c, x = Context(torch.zeros(n, 1, 1)), torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    policy = Policy(Denoiser(PointMass(mu, SD), SD, "x0"), renoise)
    states = list(policy.walk(x, grid, c, torch.Generator().manual_seed(1)))[:-1]
    drawn = [x] + [(y - SD.alphas[s] * mu) / SD.sigmas[s] for y, s in zip(states, grid.nodes[1:].tolist(), strict=True)]
    table = torch.stack([e.flatten() for e in drawn]).double()
    assert float((table.corrcoef() - torch.eye(5)).abs().max()) < 4 / math.sqrt(4 * n)
    assert bool(((table.std(1) - 1).abs() < 4 / math.sqrt(2 * 4 * n)).all())
    rows = torch.stack(drawn)[:, :, 0]  # and not shared by the samples of a batch either
    assert len(rows[1].unique()) == n
    assert torch.equal(torch.stack(list(policy.walk(x, grid, c, torch.Generator().manual_seed(1)))[:-1]), torch.stack(states))


def test_renoising_at_the_end_is_x0():
    t = torch.tensor([519, 519, 519])
    p = SD.prediction("v", noise(), t, noise(1))
    assert torch.equal(renoise(SD, noise(), p, t, torch.full((3,), END), torch.Generator()), p.x0)
    alpha, sigma = SD.alphas[500], SD.sigmas[500]
    got = renoise(SD, noise(), p, t, torch.full((3,), 500), torch.Generator().manual_seed(2))
    assert torch.allclose(got, alpha * p.x0 + sigma * noise(2), atol=1e-12)


def test_the_last_step_draws_no_noise():
    """As in LCMScheduler: one more draw would shift every later number of the generator."""
    used, untouched = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    Policy(Denoiser(Curved(), SD, "v"), renoise).step(noise(), 259, END, C, used)
    assert torch.equal(torch.randn(3, generator=used), torch.randn(3, generator=untouched))


# Ancestral and strategic steps, Euler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_ancestral_step_is_diffusers_ddim_with_eta(prediction_type: str, eta: float):
    scheduler = theirs("DDIMScheduler", 4, timestep_spacing="trailing", prediction_type=prediction_type)
    policy = Policy(Denoiser(Curved(), SD, KINDS[prediction_type]), Posterior(eta))
    ours = list(policy.walk(noise(), Grid.named("trailing", 4), C, torch.Generator().manual_seed(5)))
    want = run(scheduler, Curved(), noise(), eta=eta, generator=torch.Generator().manual_seed(5))
    for a, b in zip(ours, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@SCHEDULES
@pytest.mark.parametrize(("t", "s"), [(998, 749), (749, 748), (250, 0)])
def test_the_posterior_is_a_conditioned_gaussian(schedule: NoiseSchedule, t: int, s: int):
    """x_t given x_s is Gaussian: the law of x_s given x_t and x0 follows by conditioning the pair, whatever the path."""
    x_t, p, z = noise(), schedule.prediction("x0", noise(), torch.full((3,), t), noise(1)), noise(2)
    ratio = schedule.alphas[t] / schedule.alphas[s]
    gain = ratio * schedule.sigmas[s] ** 2 / schedule.sigmas[t] ** 2
    mean = schedule.alphas[s] * p.x0 + gain * (x_t - schedule.alphas[t] * p.x0)
    variance = schedule.sigmas[s] ** 2 - gain * ratio * schedule.sigmas[s] ** 2
    got = Posterior()(schedule, x_t, p, torch.full((3,), t), torch.full((3,), s), torch.Generator().manual_seed(2))
    assert torch.allclose(got, mean + variance.sqrt() * z, atol=1e-10)


@pytest.mark.parametrize("transition", [ddim, renoise, Posterior(), Posterior(0.3), TCD(), TCD(1.0)], ids=str)
@SCHEDULES
def test_every_transition_keeps_the_law_of_known_data(schedule: NoiseSchedule, transition: Transition):
    """Data of one point: from x_t of the forward law, x_s is of the forward law too, of mean alpha_s mu and deviation sigma_s."""
    n, t, s = 20_000, 900, 400
    x = schedule.alphas[t] * 0.7 + schedule.sigmas[t] * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    now, then = torch.full((n,), t), torch.full((n,), s)
    p = schedule.from_x0(x, now, torch.full_like(x, 0.7))
    got = transition(schedule, x, p, now, then, torch.Generator().manual_seed(1))
    assert abs(float(got.mean() - schedule.alphas[s] * 0.7)) < 5 * float(schedule.sigmas[s]) / n**0.5
    assert float(got.std() / schedule.sigmas[s]) == pytest.approx(1, abs=5 / (2 * n) ** 0.5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4])
def test_strategic_sampling_is_diffusers_given_the_noise(prediction_type: str, gamma: float, steps: int):
    scheduler = theirs("TCDScheduler", steps, prediction_type=prediction_type)
    policy = Policy(Denoiser(Curved(), SD, KINDS[prediction_type]), TCD(gamma))
    ends_at_0 = Grid([*Grid.named("lcm", steps).nodes.tolist(), 0])
    ours = list(policy.walk(noise(), ends_at_0, C, torch.Generator().manual_seed(5)))
    want = run(scheduler, Curved(), noise(), eta=gamma, generator=torch.Generator().manual_seed(5))
    for a, b in zip(ours, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.3, 0.8])
def test_strategic_sampling_rounds_as_diffusers_does(gamma: float):
    """(1 - gamma) s is often a whole number, from which float64 may fall to the one below."""
    from diffusers import TCDScheduler

    x, out = noise(dtype=torch.float32), noise(1, dtype=torch.float32)
    p = SD.prediction("eps", x, torch.full((3,), 999), out)
    for s in (990, 330, 180, 170, 90, 25, 5):
        scheduler = TCDScheduler(**SD_CONFIG)
        scheduler.set_timesteps(timesteps=[999, s], original_inference_steps=1000)
        want = scheduler.step(out, 999, x, eta=gamma, generator=torch.Generator().manual_seed(3)).prev_sample
        got = TCD(gamma)(SD, x, p, torch.full((3,), 999), torch.full((3,), s), torch.Generator().manual_seed(3))
        assert torch.allclose(got, want, atol=1e-4), s


@SCHEDULES
def test_without_noise_ancestral_and_strategic_steps_are_ddim(schedule: NoiseSchedule):
    t, s = torch.tensor([999, 749, 500]), torch.tensor([749, 0, END])
    p = schedule.prediction("v", noise(), t, noise(1))
    for transition in (Posterior(0.0), TCD(0.0)):
        assert torch.allclose(transition(schedule, noise(), p, t, s), ddim(schedule, noise(), p, t, s), atol=1e-7), transition


@pytest.mark.parametrize("transition", [renoise, Posterior(), TCD()], ids=str)
def test_at_the_end_every_transition_says_x0(transition: Transition):
    t, end = torch.tensor([999, 749, 19]), torch.full((3,), END)
    for schedule in (SD, FLOW):
        p = schedule.prediction("v", noise(), t, noise(1))
        assert torch.allclose(transition(schedule, noise(), p, t, end, torch.Generator().manual_seed(0)), p.x0, atol=1e-9)


def test_euler_steps_of_diffusers_are_ddim():
    """Along sigma, on the linear path and on a variance-preserving one, whose latents Euler's schedulers scale by 1 / alpha."""
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    euler = EulerDiscreteScheduler(**SD_CONFIG, timestep_spacing="trailing")
    euler.set_timesteps(4)
    x, alphas = noise(dtype=torch.float32), SD.alphas[[999, 749, 499, 249, END]].float()
    network = Curved()
    ours = list(Policy(Denoiser(network, SD, "eps")).walk(x, Grid.named("trailing", 4), C))
    for i, (t, want) in enumerate(zip(euler.timesteps, ours, strict=True)):
        out = network(x, t.long().expand(3), C)
        x = euler.step(out, t, x / alphas[i], return_dict=False)[0] * alphas[i + 1]
        assert torch.allclose(x, want, rtol=1e-3, atol=1e-4)
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(sigmas=[float(FLOW.sigmas[t]) for t in (999, 749, 499)])
    x = noise(dtype=torch.float32)
    for i, s in enumerate((749, 499, END)):
        t, out = (999, 749, 499)[i], noise(i + 1, dtype=torch.float32)
        now, then = torch.full((3,), t), torch.full((3,), s)
        want = ddim(FLOW, x, FLOW.prediction("flow", x, now, out), now, then)
        x = flow.step(out, flow.timesteps[i], x, return_dict=False)[0]
        assert torch.allclose(x, want, atol=1e-5)


@pytest.mark.parametrize(("make", "said"), [(lambda: Posterior(1.5), "eta"), (lambda: TCD(-0.1), "gamma")])
def test_parameters_outside_their_range_are_refused(make: Any, said: str):
    with pytest.raises(ValueError, match=said):
        make()
