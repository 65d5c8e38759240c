"""Policies of one and several substeps, and DPM-Solver++ against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from support.samplers import KINDS, SD, ZERO, C, Curved, noise, run, theirs

from ddil_lightning.diffusion.analytic import Gaussian, UniformBox
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import DPMSolver2M, Policy
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.records import END

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
    policy, grid = Policy(Denoiser(network, SD, "v"), renoise), Grid.named("trailing", 4)
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


def test_a_transition_by_its_old_name_is_refused_where_it_is_given():
    """And not at the first step, after a data set has been encoded."""
    with pytest.raises(TypeError, match="a policy's transition is 'ddim': give one of diffusion.transitions, such as ddim or renoise"):
        Policy(Denoiser(Curved(), SD, "v"), "ddim")  # type: ignore[arg-type]
