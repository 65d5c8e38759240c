"""TCD against METHODS 5.4: the loss written out by hand, exact teachers in closed form, and its sampler against diffusers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from test_lcm import TIGHT, Batches, ByHand
from test_pd import AsV, Exact, noise
from torch import Tensor, nn

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.samplers import grid_of, transition_of
from ddil_lightning.diffusion import transitions
from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.methods import TCD
from ddil_lightning.records import Context, LatentBatch
from ddil_lightning.runs import export
from suite import FORWARD, MIXED, Entry, Gradients, backbone, build, train

SD = NoiseSchedule.scaled_linear()
TCD_W = Entry("tcd", TCD)
PROMPTS = ["a small red circle", "a handwritten one"]


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


def exact(network: nn.Module, student: nn.Module | None = None, **kwargs: Any) -> TCD:
    """TCD of an exact teacher, with `student` as student and as target."""
    torch.manual_seed(0)
    method = TCD(pipeline=Exact(network, SD), w_conditioned=False, guidance=1.0, **kwargs)
    for role in (method.student, method.target) if student is not None else ():
        role.network = student
    return method


def batch(method: TCD, n: int = 64) -> LatentBatch:
    """`n` latents at nodes of the training grid, from the first to the last."""
    node = torch.linspace(0, len(method.grid) - 1, n).long()
    t, s = method.grid.nodes[node], method.grid.times[node + 1]
    c = Context(torch.zeros(n, 1, 1)).guided(0.0)
    return LatentBatch(noise(n), t, s, node, c, None, torch.zeros_like(node), torch.ones(n), node)


# The algorithm box ----------------------------------------------------------------------------------------------------------------


class TrajectoryByHand(ByHand):
    """The loss of METHODS 5.4 from the networks' raw outputs, in float64, with diffusers' own table of alpha_bar."""

    def jump(self, network: Any, x: Tensor, t: Tensor, s: Tensor, c: Context, target: bool) -> Tensor:
        x0, eps = self.x0_eps(network, x, t, c)
        (a, sd), (a_s, sd_s) = self.at(t), self.at(s)
        if target and self.clamp:
            x0 = self.reflect(x0)
            eps = (x - a * x0) / sd
        return a_s * x0 + sd_s * eps

    def ends(self, b: LatentBatch, s: Tensor, step: int = 20) -> tuple[Tensor, Tensor]:
        x, t = b.x_t.double(), b.t
        u = (t - step).clamp(min=min(int(s.min()), 0))
        y = self.jump(self.method.student.network, x, t, s, b.c, False)
        with torch.no_grad():
            unet, w, none = self.method.backbone.network(), b.c.w.double().view(-1, 1, 1, 1), b.c.guided(None)
            given = self.x0_eps(unet, x, t, none)
            free = self.x0_eps(unet, x, t, self.method.backbone.null().expand(len(x)))
            x0, eps = (one + w * (one - other) for one, other in zip(given, free, strict=True))
            (a, sd), (a_u, sd_u) = self.at(t), self.at(u)
            if self.clamp:
                x0 = self.reflect(x0)
                eps = (x - a * x0) / sd
            return y, self.jump(self.method.target.network, a_u * x0 + sd_u * eps, u, s, b.c, True)


def test_loss_and_gradient_are_the_algorithm_box(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also says that gradients flow only through y, and that reflection acts on teacher and target but not on y."""
    drawn: list[Tensor] = []
    below = TCD.below
    monkeypatch.setattr(TCD, "below", lambda self, u: drawn.append(below(self, u)) or drawn[-1])
    seen, gradients = Batches(), Gradients()
    still = {"updates": 1, "optimizer": {"lr": 0.0, "clip": 0.0}}
    run = train(TCD_W, tiny, seen, gradients, prior=MIXED, reflect="static", box=TIGHT, **still)
    y, target = TrajectoryByHand(run.method, clamp=True).ends(seen.seen[0], drawn[0])
    loss = ((y - target).square() + 1e-6).sqrt().sub(1e-3).mean()
    assert run.rows[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    names = [name for name, p in run.method.student.named_parameters()]
    expected = torch.autograd.grad(loss, list(run.method.student.parameters()))
    scale = max(float(g.abs().max()) for g in expected)
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients.steps[0][f"student.{name}"], grad, rtol=2e-3, atol=1e-4 * scale)


def test_s_is_uniform_below_u_and_follows_from_the_clock(tiny: Path) -> None:
    method = build(TCD_W, tiny)
    method.student_updates = 3
    u = torch.tensor([0, 1, 19, 979]).repeat_interleave(20_000)
    s = method.below(u)
    assert torch.equal(s, method.below(u)) and bool(((s >= 0) & (s <= u)).all())
    for value in (1, 19, 979):
        mine = s[u == value].double()
        assert set(mine[:4000].long().tolist()) >= {0, 1} or value == 979
        assert float(mine.mean()) == pytest.approx(value / 2, abs=5 * value / (12 * len(mine)) ** 0.5 + 0.02)
    method.student_updates = 4
    assert not torch.equal(s, method.below(u))


# Closed forms ---------------------------------------------------------------------------------------------------------------------


def test_a_jump_to_its_own_time_is_the_identity(tiny: Path) -> None:
    method = build(TCD_W, tiny, box=TIGHT)
    x, t = torch.randn(4, 4, 8, 8), torch.tensor([999, 259, 19, 0])
    b = batch(exact(PointMass(0.0, SD)), 4)._replace(c=backbone(tiny).encode_text(["a"] * 4).guided(1.0))
    for reflect in (False, True):
        torch.testing.assert_close(method.f(method.student, x, t, t, b, reflect), x, rtol=0, atol=2e-5)


def test_the_target_is_not_asked_from_time_0(tiny: Path) -> None:
    """Of the last node's rows it is x_u, whatever a network answers: METHODS 1.7."""
    method = build(TCD_W, tiny, box=TIGHT, solver_steps=4, rollouts=(4,))
    b = batch(method, 8)._replace(x_t=torch.randn(8, 4, 8, 8), c=backbone(tiny).encode_text(["a"] * 8).guided(1.0))
    s, before = method.below(b.s), method.target.evaluations
    _, target = method.ends(b, s)
    assert method.target.evaluations - before == 7 and int((b.s == 0).sum()) == 1
    x_u = method.answer(b)
    whole = method.f_target(x_u, b._replace(t=b.s, s=s))
    torch.testing.assert_close(target, whole, rtol=0, atol=2e-5)
    assert torch.equal(target[7:], x_u[7:])


def test_known_data_leave_no_loss_at_any_time() -> None:
    """With data of one point every flow line is a DDIM step: all jumps t -> s and u -> s end in one point."""
    method = exact(PointMass(0.7, SD), AsV(PointMass(0.7, SD), SD))
    b = batch(method, 200)
    for _ in range(3):
        s = method.below(b.s)
        y, target = method.ends(b, s)
        torch.testing.assert_close(y, target, rtol=0, atol=1e-9)
        (alpha, sigma), (a, sd) = SD.at(s, b.x_t), SD.at(b.t, b.x_t)
        torch.testing.assert_close(y, alpha * 0.7 + sigma * (b.x_t - a * 0.7) / sd, rtol=0, atol=1e-9)
        method.student_updates += 1


class Flow(nn.Module):
    """The v whose one jump to a fixed time s is the exact flow of Gaussian data; at s itself any v is."""

    def __init__(self, exact: Gaussian, s: int) -> None:
        super().__init__()
        self.exact, self.s = exact, s

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        cos, sin = SD.rotation(t, self.s, x_t)
        return torch.where(sin == 0, 0.0, (cos * x_t - self.exact.flow(x_t, t, self.s)) / torch.where(sin == 0, 1.0, sin))


def test_the_exact_jump_of_gaussian_data_is_the_fixed_point_of_a_fine_solver() -> None:
    """The teacher's step is the one error left. That of DDIM is of second order in the step: four times finer, sixteen times smaller."""
    gaussian, errors = Gaussian(0.5, 0.6, SD), []
    for solver_steps in (50, 200):
        method = exact(gaussian, Flow(gaussian, 99), solver_steps=solver_steps)
        b = batch(method, 51)._replace(x_t=noise(51), node=torch.zeros(51, dtype=torch.long))  # of the times below
        b = b._replace(t=b.t.clamp(min=119), s=b.t.clamp(min=119) - 1000 // solver_steps)
        y, target = method.ends(b, torch.full_like(b.t, 99))
        errors.append((y - target).square().mean().sqrt())
    assert float(errors[0]) < 2e-2 and 10 < float(errors[0] / errors[1]) < 22


# Inference ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_the_sampler_walks_the_schedulers_times_to_0(steps: int, tiny: Path) -> None:
    method = build(TCD_W, tiny)
    scheduler = method.deployment.scheduler()
    scheduler.set_timesteps(steps)
    _, grid = method.deployment.sampler(steps)
    assert grid.nodes.tolist() == scheduler.timesteps.tolist() and grid.times[-1] == 0
    assert method.grid.rollouts[-1].times.tolist() == Grid.named("tcd", 5).times.tolist()


@pytest.mark.slow
def test_a_folder_samples_as_the_trainer_does(tiny: Path, tmp_path: Path) -> None:
    """diffusers is told gamma by the call: its card says so, and everybody here who calls the folder's pipeline does."""
    gamma, folder = 0.4, tmp_path / "out"
    method = build(TCD_W, tiny, guidance=3.0, gamma=gamma)
    with torch.no_grad():
        for p in method.deployment.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert export.deliver(method, folder, PROMPTS, 4) < 1e-4
    mine = sampling.latents(method.backbone, *method.deployment.sampler(4), PROMPTS, 3.0)
    noise = {"latents": sampling.noise(2, method.backbone.latent_shape, 0), "generator": sampling.renoising(2, 0)}
    pipe = DiffusionPipeline.from_pretrained(folder)  # as somebody does who has only diffusers
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", **noise}
    assert export.relative(mine, pipe(PROMPTS, eta=gamma, **call).images) < 1e-4
    made = Pipeline(str(folder))
    assert export.relative(mine, sampling.pipeline_latents(made, PROMPTS, 4, 3.0)) < 1e-4
    assert made.called_with == {"eta": gamma} and transition_of(made) == transitions.TCD(gamma)
    assert grid_of(made, 4).times.tolist() == Grid.named("tcd", 4).times.tolist()
    assert f"guidance_scale=3, eta={gamma:g})" in (folder / "README.md").read_text()
    assert json.loads((folder / "ddil.json").read_text())["eta"] == gamma
    assert dict(made.with_solver(True).called_with) == {}  # another scheduler is not told so
    without = DiffusionPipeline.from_pretrained(folder)(PROMPTS, **{**call, "generator": sampling.renoising(2, 0)}).images
    assert export.relative(mine, without) > 1e-2


def test_without_gamma_the_student_steps_by_ddim(tiny: Path) -> None:
    """So that teacher and student may take turns in a trajectory of one and the same transport."""
    policy, c = build(TCD_W, tiny, gamma=0.0).policies.student, backbone(tiny).encode_text(["a"] * 3).guided(1.0)
    x = torch.randn(3, 4, 8, 8)
    t, s = torch.full((3,), 999), torch.full((3,), 759)
    want = transitions.ddim(policy.schedule, x, policy.denoiser(x, t, c), t, s)
    torch.testing.assert_close(policy(x, 999, 759, c, torch.Generator()), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"gamma": 1.5}, "gamma is 1.5: give a number from 0 to 1"),
        ({"solver_steps": 30}, "30 does not divide"),
        ({"rollouts": [60]}, "a TCD grid"),
    ],
)
def test_settings_outside_their_range_are_refused(kwargs: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        train(TCD_W, tiny, prior=FORWARD, updates=1, **kwargs)
