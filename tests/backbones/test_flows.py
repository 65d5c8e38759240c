"""Schedulers of flow matching: their shifts, the nodes of their plain call, and students' that hold the trained ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from ddil_lightning.backbones import flows, schedulers
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import TCD, ddim, renoise

EULER: Any = FlowMatchEulerDiscreteScheduler
FAMILY: Any = SimpleNamespace(flow=True, passes_sigmas=False, positions=lambda shape: shape[1] * shape[2] // 4)
SHAPE = (16, 64, 96)


def even(n: int, shift: float) -> torch.Tensor:
    """f_s(u) at u = 1, 1 - 1/N, ..., 1/N."""
    u = torch.arange(n, 0, -1, dtype=torch.float64) / n
    return shift * u / (1 + (shift - 1) * u)


@pytest.mark.parametrize("passes", [False, True], ids=["own", "passed"])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 25])
def test_a_plain_call_walks_the_trained_nodes(n: int, shift: float, passes: bool) -> None:
    """Through the settings alone, as a pipeline reads them again; the shift is not applied twice."""
    sigmas = even(n, shift)
    for transition, kind in ((renoise, FlowMatchLCMScheduler), (ddim, EULER)):
        made = flows.student(1000, transition, sigmas, passes)
        again = kind.from_config(made.config)
        again.set_timesteps(n, **({"sigmas": even(n, 1.0).tolist()} if passes else {}))
        torch.testing.assert_close(again.sigmas.double(), torch.cat([sigmas, torch.zeros(1)]).double(), rtol=0, atol=2e-6)
        torch.testing.assert_close(again.timesteps, again.sigmas[:-1] * 1000)


@pytest.mark.parametrize("n", [2, 4, 32])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_a_scheduler_that_holds_few_nodes_is_told_from_one_that_holds_all(shift: float, n: int) -> None:
    """Those of pipelines that hand their scheduler its sigmas, and DPM-Solver++, walk the trained nodes in every number of steps."""
    made, told, solver = (*(flows.student(1000, ddim, even(n, shift), passes) for passes in (False, True)), schedulers.dpm(EULER(), shift))
    for k in (1, 2, 3, 4, 31, 32):
        told.set_timesteps(k, sigmas=even(k, 1.0).tolist())
        solver.set_timesteps(k)
        made.set_timesteps(k)
        for scheduler in (told, solver, *([made] if k == n else [])):
            flows.check_trained(scheduler, k, even(n, shift).tolist(), shift)
        if k != n:
            with pytest.raises(ValueError, match=rf"holds the nodes of {n} steps, and would walk .* \(ddil-export --steps {k}\), where"):
                flows.check_trained(made, k, even(n, shift).tolist(), shift)


def test_nodes_that_no_scheduler_walks_are_refused() -> None:
    for sigmas in ([0.9, 0.5, 0.2], [1.0, 0.9, 0.2, 0.1]):
        with pytest.raises(ValueError, match=f"^no flow scheduler of diffusers walks the nodes sigma = {sigmas[0]:g}, .* take trailing"):
            flows.student(1000, ddim, torch.tensor(sigmas, dtype=torch.float64), False)
    with pytest.raises(ValueError, match=r"steps by TCD\(gamma=0.3\) on a flow: known are Renoise\(\) and DDIM\(\)"):
        flows.student(1000, TCD(), even(4, 3.0), False)


def test_a_shift_by_size_is_that_of_the_pipelines() -> None:
    scheduler = EULER(use_dynamic_shifting=True, shift=3.0)
    positions = 32 * 48
    assert flows.mu(scheduler, positions) == pytest.approx(calculate_shift(positions), rel=1e-12)
    scheduler.set_timesteps(1000, mu=calculate_shift(positions))
    table = NoiseSchedule.from_scheduler(scheduler, flows.shift(scheduler, FAMILY, SHAPE, "p"))
    torch.testing.assert_close(table.sigmas[:-1].flip(0), scheduler.sigmas[:-1].double(), rtol=0, atol=1e-6)
    linear = EULER(use_dynamic_shifting=True, time_shift_type="linear")
    assert flows.shift(linear, FAMILY, SHAPE, "p") == flows.mu(linear, positions)
    with pytest.raises(ValueError, match=r"depends on the size of the image \(use_dynamic_shifting\): say which"):
        NoiseSchedule.from_scheduler(scheduler)
    without: Any = SimpleNamespace(positions=lambda shape: None)
    with pytest.raises(
        ValueError, match="^the FlowMatchEulerDiscreteScheduler of p shifts its times by the size of the image, and SimpleNames"
    ):
        flows.shift(scheduler, without, SHAPE, "p")


@pytest.mark.parametrize(
    "config",
    [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift": 3.0, "shift_terminal": 0.02}, {"use_karras_sigmas": True}],
    ids=["shifted twice", "by size", "terminal", "karras"],
)
def test_nodes_of_a_plain_call_are_met_as_they_are(config: dict[str, Any]) -> None:
    """The default of Stable Diffusion 3 ends at f_3(f_3(0.001)), some 0.009: its sigma_min was shifted before."""
    scheduler = EULER(**config)
    sigmas = flows.nodes(scheduler, 4, FAMILY, SHAPE)
    if config == {"shift": 3.0}:
        assert float(sigmas[-1]) == pytest.approx(9 / 1008, rel=1e-3)
    schedule, grid = flows.exactly(sigmas, 1000)
    t = grid.nodes
    assert torch.equal(schedule.sigmas[t], sigmas) and torch.equal(schedule.time(t), scheduler.timesteps) and int(grid.times[-1]) == -1
    near = flows.grid(NoiseSchedule.flow(1000, 3.0), sigmas)
    assert float((NoiseSchedule.flow(1000, 3.0).sigmas[near.nodes] - sigmas).abs().max()) < 2e-3
    with pytest.raises(ValueError, match="2 steps come closer than the 4 times of the schedule"):
        flows.grid(NoiseSchedule.flow(4), torch.tensor([0.51, 0.5]))


def test_a_shift_says_where_the_nodes_of_every_grid_lie() -> None:
    """DMD2's 999, 749, 499, 249 are sigma = 1, 0.9, 0.75, 0.5 by a shift of 3, and a network is told 1000 times that, in float32."""
    schedule = NoiseSchedule.from_scheduler(EULER(shift=3.0))
    nodes = Grid.named("trailing", 4).nodes
    torch.testing.assert_close(schedule.sigmas[nodes], torch.tensor([1.0, 0.9, 0.75, 0.5], dtype=torch.float64))
    assert schedule.time(nodes).tolist() == [1000.0, 900.0, 750.0, 500.0] and schedule.time(nodes).dtype == torch.float32
    moved = NoiseSchedule.from_scheduler(EULER(shift=3.0), shift=1.0)
    assert moved.time(nodes).tolist() == [1000.0, 750.0, 500.0, 250.0]
    plain = NoiseSchedule.scaled_linear()
    assert plain.time(nodes) is nodes  # a whole time is told as it is
    sana = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    assert torch.equal(NoiseSchedule.from_scheduler(sana).sigmas, schedule.sigmas)
