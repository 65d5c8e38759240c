"""PD against METHODS 2: the target in closed form on exact teachers, the loss written out by hand, weights, and diffusers' samplers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_lcm import Batches
from torch import Tensor, nn

from backbones import LatentsAlone
from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Multistep, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.methods import PD
from ddil_lightning.methods.pd import one_step, v_weight
from ddil_lightning.records import END, Context, LatentBatch
from ddil_lightning.training.plan import Stage
from suite import FORWARD, PLAN, Entry, Run, backbone, build, train

SD, ZERO, FLOW = NoiseSchedule.scaled_linear(), NoiseSchedule.scaled_linear(zero_terminal_snr=True), NoiseSchedule.flow()
SCHEDULES = pytest.mark.parametrize("schedule", [SD, ZERO, FLOW], ids=["sd", "zero-snr", "flow"])
PD_W = Entry("pd", PD, {"stages": PLAN, "teacher_steps": 16})
TIGHT = [[-0.3, -0.2, -0.25, -0.1], [0.2, 0.3, 0.15, 0.2]]  # cuts a good part of every estimate
EVERY = [(t, s) for n in (8, 4, 2, 1) for t, s in zip(*(Grid.named("trailing", n).times.tolist()[i : n + i] for i in (0, 1)), strict=True)]


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class AsV(nn.Module):
    """A posterior mean as a network that predicts v."""

    def __init__(self, exact: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.exact, self.schedule = exact, schedule

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        return self.schedule.from_x0(x_t, t, self.exact(x_t, t, c)).v


class Affine(nn.Module):
    """v = a_t x + b_t: on Gaussian data it can be a perfect student."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(steps, dtype=torch.float64)) for _ in range(2))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        return self.a[t].view(-1, 1, 1, 1) * x_t + self.b[t].view(-1, 1, 1, 1)


class Exact(LatentsAlone):
    """An exact teacher behind the interface of a pipeline, with affine students."""

    def __init__(self, exact: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__("exact", schedule, "v", (2, 2, 2), {"guidance": 1.0})
        self.exact = AsV(exact, schedule).eval()

    def network(self) -> Any:
        return self.exact

    def trainable(self, w_conditioned: bool = False, name: str = "student") -> Any:
        return Affine(self.schedule.steps)

    def null(self) -> Context:
        return Context(torch.zeros(1, 1, 1))


def exact(network: nn.Module, schedule: NoiseSchedule = SD, steps: int = 8, to: int | None = None, **kwargs: Any) -> PD:
    """PD of an exact teacher from `steps` down `to` (default: one halving)."""
    counts = [steps >> k for k in range(1, steps.bit_length())]
    stages = [Stage(steps=n, updates=1) for n in counts if n >= (to or steps // 2)]
    return PD(pipeline=Exact(network, schedule), stages=stages, teacher_steps=steps, **kwargs)


def batch(method: PD, seed: int = 0) -> LatentBatch:
    """One latent at every node of the method's grid."""
    grid = method.grid
    x, node = noise(len(grid), seed), torch.arange(len(grid))
    c = Context(torch.zeros(len(grid), 1, 1)).guided(0.0)
    return LatentBatch(x, grid.nodes, grid.times[1:], node, c, None, torch.zeros_like(node), torch.ones(len(grid)), node)


# The target -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SD, ZERO], ids=["sd", "zero-snr"])
def test_the_rotation_form_is_the_x0_form(schedule: NoiseSchedule) -> None:
    t, s = (torch.tensor(column) for column in zip(*EVERY, strict=True))
    x_t, x_s = noise(len(t)), noise(len(t), 1)
    (a, sd), (a_s, sd_s) = schedule.at(t, x_t), schedule.at(s, x_t)
    x0 = (x_s - sd_s / sd * x_t) / (a_s - sd_s / sd * a)
    v = one_step(schedule, x_t, x_s, t, s)
    torch.testing.assert_close(v, (a * x_t - x0) / sd, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(v[s == END], ((a * x_t - x_s) / sd)[s == END], rtol=1e-12, atol=1e-12)  # at END x0* is x_s itself
    assert bool(v.isfinite().all()) and (schedule is SD or bool((a == 0).any()))


@SCHEDULES
def test_a_student_that_predicts_the_target_lands_where_the_teacher_does(schedule: NoiseSchedule) -> None:
    method = exact(Gaussian(0.7, 0.4, schedule), schedule)
    b = batch(method)
    x_s = b.x_t
    for k in range(2):  # the teacher's two steps, by its own grid
        t, s = (Grid.named("trailing", 8).times[2 * b.node + k + j] for j in (0, 1))
        x_s = ddim(schedule, x_s, method.teacher(x_s, t, b.c), t, s)
    p = schedule.prediction("v", b.x_t, b.t, method.target(b))
    torch.testing.assert_close(ddim(schedule, b.x_t, p, b.t, b.s), x_s, rtol=1e-12, atol=1e-12)
    assert bool(x_s.isfinite().all()) and b.s[-1] == END and bool((x_s - b.x_t).abs().max() > 0.1)


@SCHEDULES
def test_a_point_mass_needs_no_correction(schedule: NoiseSchedule) -> None:
    """The teacher is step-invariant, so v* is its own v."""
    method = exact(PointMass(0.3, schedule), schedule)
    b = batch(method)
    torch.testing.assert_close(method.target(b), method.teacher(b.x_t, b.t, b.c).v, rtol=1e-9, atol=1e-10)


def test_a_unit_gaussian_in_closed_form() -> None:
    """The exact v is 0, so two steps multiply x by two cosines: v* = -(sin D1 sin D2 / sin D) x."""
    method = exact(Gaussian(0.0, 1.0, SD))
    b = batch(method)
    m = Grid.named("trailing", 8).times[2 * b.node + 1]
    phi = {name: torch.atan2(SD.sigmas[u], SD.alphas[u]) for name, u in (("t", b.t), ("m", m), ("s", b.s))}
    k = -(phi["t"] - phi["m"]).sin() * (phi["m"] - phi["s"]).sin() / (phi["t"] - phi["s"]).sin()
    torch.testing.assert_close(method.target(b), k.view(-1, 1, 1, 1) * b.x_t, rtol=1e-10, atol=1e-12)
    assert k.abs().max() > 0.05


def distilled(law: Gaussian, schedule: NoiseSchedule, steps: int) -> PD:
    """All halvings down to one step, every student perfect: the affine map through the target at two points."""
    method = exact(law, schedule, steps, to=1)
    method._trainer = SimpleNamespace(optimizers=[])  # type: ignore[assignment]
    for stage in method.stages:
        b, net = batch(method), method.student.network
        zero, one = (method.target(b._replace(x_t=torch.full_like(b.x_t, x)))[:, 0, 0, 0] for x in (0.0, 1.0))
        with torch.no_grad():
            net.a[b.t], net.b[b.t] = one - zero, zero  # type: ignore[union-attr,operator]
        if stage is not method.stages[-1]:
            method.next_stage()
    return method


@pytest.mark.parametrize("schedule", [SD, ZERO], ids=["sd", "zero-snr"])
def test_after_all_halvings_one_step_is_the_product_of_the_rotations(schedule: NoiseSchedule) -> None:
    method = distilled(Gaussian(0.0, 1.0, schedule), schedule, 16)
    policy, grid = method.deployment.sampler(1)
    phi = torch.atan2(schedule.sigmas, schedule.alphas)[Grid.named("trailing", 16).times]
    x = noise(3)
    found = policy.sample(x, grid, Context(torch.zeros(3, 1, 1)))
    torch.testing.assert_close(found, (phi[:-1] - phi[1:]).cos().prod() * x, rtol=1e-10, atol=1e-12)


def test_one_step_converges_to_the_flow() -> None:
    """N(mu, S^2): the one-step student is its first teacher's N DDIM steps, and these tend to the exact map like 1 / N."""
    law, x, c = Gaussian(0.8, 0.5, SD), noise(3), Context(torch.zeros(3, 1, 1))
    errors = []
    for steps in (16, 64, 256):
        method = distilled(law, SD, steps)
        found = method.deployment.sampler(1)[0].sample(x, Grid.named("trailing", 1), c)
        fine = Policy(method.teacher, ddim).sample(x, Grid.named("trailing", steps), c.guided(0.0))
        torch.testing.assert_close(found, fine, rtol=1e-8, atol=1e-9)
        errors.append(float((found - law.flow(x, 999, END)).abs().max()))
    assert errors[2] < 0.02 and 2 < errors[0] / errors[1] < 6 and 2.5 < errors[1] / errors[2] < 6


@SCHEDULES
def test_the_targets_x0_is_a_mean_of_the_teachers_two(schedule: NoiseSchedule) -> None:
    """x0* (r_s - r_t) = x0_1 (r_m - r_t) + x0_2 (r_s - r_m) with r = alpha / sigma, so reflecting the teacher keeps x0* in the box."""
    box = {"reflect": "static", "box": [[-0.5] * 2, [0.5] * 2]}
    method = exact(Gaussian(0.8, 0.5, schedule), schedule, **box)  # type: ignore[arg-type]
    b = batch(method)
    m = Grid.named("trailing", 8).times[2 * b.node + 1]
    first = method.teacher(b.x_t, b.t, b.c)
    second = method.teacher(ddim(schedule, b.x_t, first, b.t, m), m, b.c)
    r, r_m, r_s = ((schedule.alphas[u] / schedule.sigmas[u]).view(-1, 1, 1, 1) for u in (b.t, m, b.s))
    share = torch.where(r_s.isinf(), 0.0, (r_m - r) / (r_s - r))
    x0 = schedule.prediction("v", b.x_t, b.t, method.target(b)).x0
    torch.testing.assert_close(x0, share * first.x0 + (1 - share) * second.x0, rtol=1e-7, atol=1e-8)
    assert x0.abs().max() <= 0.5 + 1e-9 and 0.1 < method.measures.flush()["reflect/saturated"] < 1
    assert method.teacher.reflection is not None and method.former is None


@pytest.mark.parametrize("schedule", [SD, FLOW], ids=["sd", "flow"])
def test_weights(schedule: NoiseSchedule) -> None:
    """Every weight times |dv|^2 is its function of the SNR times |dx0|^2, sample by sample; eps is x0 times SNR."""
    t = torch.tensor([999, 749, 500, 249, 19])
    x, v, other = noise(5), noise(5, 1), noise(5, 2)
    p, q = (schedule.prediction("v", x, t, out) for out in (v, other))
    snr = schedule.snr(t, x).flatten()
    dv, d0, de = (((a - b).square().flatten(1).mean(1)) for a, b in zip((p.v, p.x0, p.eps), (q.v, q.x0, q.eps), strict=True))
    expected = {"snr+1": (snr + 1) * d0, "truncated-snr": snr.clamp(min=1) * d0, "snr": de, "x0": d0}
    for kind, value in expected.items():
        torch.testing.assert_close(v_weight(kind, schedule, t, x) * dv, value, rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]
    assert schedule is FLOW or torch.equal(v_weight("snr+1", schedule, t, x), torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"snr\+1, truncated-snr, snr, x0, not 'min-snr'"):
        v_weight("min-snr", schedule, t, x)  # type: ignore[arg-type]


# The loss on a pipeline -----------------------------------------------------------------------------------------------------------


class ByHand:
    """METHODS 2.1 to 2.3 from the networks' raw outputs, in float64, with diffusers' own table of alpha_bar."""

    def __init__(self, method: PD) -> None:
        bar = method.backbone.pipe.scheduler.alphas_cumprod.double()
        self.alpha, self.sigma = (torch.cat([x.sqrt(), torch.tensor([end]).double()]) for x, end in ((bar, 1), (1 - bar, 0)))
        self.method, (self.lo, self.hi) = method, (torch.tensor(side).view(1, -1, 1, 1) for side in TIGHT)

    def teacher(self, x: Tensor, t: Tensor, c: Context, guided: bool = True) -> tuple[Tensor, Tensor]:
        """(x0, eps), guided and reflected."""
        unet, null = self.method.backbone.network(), self.method.backbone.null().expand(len(x))
        out = unet(x.float(), t, c.guided(None)).double()
        if guided:
            out = out + c.w.double().view(-1, 1, 1, 1) * (out - unet(x.float(), t, null).double())  # type: ignore[union-attr]
        a, s = self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)
        x0 = (a * x - s * out if self.method.backbone.predicts == "v" else (x - s * out) / a).clamp(self.lo, self.hi)
        return x0, (x - a * x0) / s

    @torch.no_grad()
    def loss(self, b: LatentBatch) -> Tensor:
        """[] the loss of the method's first stage, in v."""
        x, kind = b.x_t.double(), self.method.stages[0].kind
        a, s = self.alpha[b.t].view(-1, 1, 1, 1), self.sigma[b.t].view(-1, 1, 1, 1)
        x0, eps = self.teacher(x, b.t, b.c, guided=kind != "eps_to_v")
        if kind == "halve":
            fine = Grid.named("trailing", 16).times.tolist()
            m, end = (torch.tensor([fine[fine.index(t) + k] for t in b.t.tolist()]) for k in (1, 2))
            x_m = self.alpha[m].view(-1, 1, 1, 1) * x0 + self.sigma[m].view(-1, 1, 1, 1) * eps
            x0, eps = self.teacher(x_m, m, b.c)
            a_s, s_s = self.alpha[end].view(-1, 1, 1, 1), self.sigma[end].view(-1, 1, 1, 1)
            x0 = (a_s * x0 + s_s * eps - s_s / s * x) / (a_s - s_s / s * a)
        return (self.method.student.network(b.x_t, b.t, b.c).double() - (a * x - x0) / s).square().mean()


def one_update(folder: Path, **kwargs: Any) -> tuple[Run, LatentBatch]:
    """One update that moves nothing: the run and its batch."""
    seen = Batches()
    run = train(
        PD_W,
        folder,
        seen,
        prior=FORWARD,
        updates=1,
        optimizer={"lr": 0.0},
        **{"reflect": "static", "box": TIGHT, "guidance": [2.0, 6.0], **kwargs},
    )
    return run, seen.seen[0]


PRELIMINARY = {"eps_to_v": "tiny_eps", "guidance": "tiny"}


@pytest.mark.parametrize("kind", ["halve", *PRELIMINARY])
def test_the_loss_is_the_algorithm_box(kind: str, request: pytest.FixtureRequest) -> None:
    first = [] if kind == "halve" else [Stage(kind=kind, updates=2)]  # type: ignore[arg-type]
    run, b = one_update(request.getfixturevalue(PRELIMINARY.get(kind, "tiny")), stages=[*first, *PLAN])
    hand = ByHand(run.method)
    assert run.rows[0]["loss"] == pytest.approx(float(hand.loss(b)), rel=1e-4)
    hand.lo, hand.hi = torch.tensor(-99.0), torch.tensor(99.0)  # type: ignore[assignment]
    assert run.rows[0]["loss"] != pytest.approx(float(hand.loss(b)), rel=1e-2)  # reflection was at work
    assert set(b.t.tolist()) <= set(range(1000) if first else Grid.named("trailing", 8).nodes.tolist())


@pytest.mark.parametrize(("weight", "factor"), [("x0", lambda a, s: s * s), ("truncated-snr", lambda a, s: torch.maximum(a, s).square())])
def test_the_weighted_loss(weight: str, factor: Any, tiny: Path) -> None:
    run, b = one_update(tiny, weight=weight, w_conditioned=False, guidance=4.0)
    m = run.method
    with torch.no_grad():
        each = (m.student(b.x_t, b.t, b.c).v - m.target(b)).square().flatten(1).mean(1)
    by_hand = (factor(SD.alphas[b.t], SD.sigmas[b.t]) * each).mean()
    assert run.rows[0]["loss"] == pytest.approx(float(by_hand), rel=1e-4) and float(by_hand) != pytest.approx(float(each.mean()), rel=1e-2)


@pytest.mark.parametrize(("weight", "factor"), [("snr+1", lambda a, s: torch.ones_like(a)), ("x0", lambda a, s: s)])
def test_the_pseudo_huber_loss_of_the_weighted_error(weight: str, factor: Any, tiny: Path) -> None:
    run, b = one_update(tiny, weight=weight, distance={"kind": "huber", "width": 0.07}, w_conditioned=False, guidance=4.0)
    m = run.method
    with torch.no_grad():
        error = factor(SD.alphas[b.t], SD.sigmas[b.t]).view(-1, 1, 1, 1) * (m.student(b.x_t, b.t, b.c).v - m.target(b))
    by_hand = ((error.square() + 0.07**2).sqrt() - 0.07).mean()
    assert run.rows[0]["loss"] == pytest.approx(float(by_hand), rel=1e-4)
    assert float(by_hand) != pytest.approx(float(error.square().mean()), rel=1e-2)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"distance": {"kind": "l3"}}, "not 'l3'"), ({"distance": {"kind": "huber", "width": 0.0}}, "above 0, got 0")]
)
def test_a_loss_that_is_none(wrong: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build(PD_W, tiny, stages=PLAN, **wrong)


def test_who_teaches_what(tiny_eps: Path, tiny: Path) -> None:
    """The pipeline teaches until guidance is learnt, by a stage of its own or by the first halving; then the former student does."""
    plan = [Stage(kind="eps_to_v", updates=1), Stage(kind="guidance", updates=1), *PLAN]
    for folder, stages, experts in (
        (tiny_eps, plan, "ttff"),
        (tiny_eps, [plan[0], *PLAN], "ttf"),
        (tiny, PLAN, "tf"),
        (tiny, PLAN[:1], "t"),
    ):
        method = build(PD_W, folder, stages=stages)
        found = ""
        for k in range(len(stages)):
            method.stage = k
            method._begin()
            assert method.policies.teacher.denoiser is method.expert and method.policies.student.denoiser is method.student
            found += "t" if method.expert is method.teacher else "f"
        assert found == experts and (method.former is None) == ("f" not in experts)


@pytest.mark.slow
def test_evaluations_and_the_teachers_nodes(tiny: Path) -> None:
    """A sample costs a student's evaluation and the teacher's two, twice as many while guidance is two passes."""
    run = train(PD_W, tiny, prior=FORWARD, updates=5)
    assert run.method.evaluations == {"student": 5 * 4, "teacher": 3 * 4 * 4, "former": 2 * 4 * 2}
    times: list[int] = []
    method = build(PD_W, tiny)
    method.teacher.network.register_forward_hook(lambda net, args, out: times.append(int(args[1][0])))
    x, c = torch.randn(2, 4, 8, 8), backbone(tiny).encode_text(["a", "one"]).guided(1.0)
    method.policies.teacher(x, 749, 624, c)
    assert times == [749, 687]  # 624 is the student's next node


# Inference ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["trailing", "linspace"])
def test_the_exported_scheduler_holds_the_trained_nodes(rule: str, tiny: Path) -> None:
    method = build(PD_W, tiny, stages=[Stage(steps=n, updates=1) for n in (16, 8, 4, 2, 1)], teacher_steps=32, rule=rule)
    for k, stage in enumerate(method.stages):
        method.stage = k
        method._begin()
        scheduler = method.deployment.scheduler()
        scheduler.set_timesteps(stage.steps)
        assert scheduler.timesteps.tolist() == method.grid.nodes.tolist() and method.deployment.steps == (stage.steps,)
        fits = rule == "trailing" and stage.steps != 16
        assert type(scheduler).__name__ == ("DDIMScheduler" if fits else "DPMSolverMultistepScheduler")
        assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("rule", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [pytest.param(16, marks=pytest.mark.slow), 4, 1])
def test_the_sampler_is_the_schedulers(steps: int, rule: str, tiny: Path) -> None:
    """Also at 16 steps, where DDIMScheduler would leave the nodes; and DPM-Solver++ 2M made from the same configuration."""
    from diffusers import DPMSolverMultistepScheduler

    plan = {"stages": [Stage(steps=steps, updates=1)], "teacher_steps": 2 * steps, "rule": rule}
    method = build(PD_W, tiny, **plan, w_conditioned=False, guidance=2.0)
    x, c = torch.randn(2, 4, 8, 8), backbone(tiny).encode_text(["a", "one"])
    policy, grid = method.deployment.sampler(steps)
    second = DPMSolverMultistepScheduler.from_config(method.deployment.scheduler().config, solver_order=2)
    for scheduler, mine in ((method.deployment.scheduler(), policy), (second, Multistep(policy.denoiser))):
        scheduler.set_timesteps(steps)
        y = x
        for t in scheduler.timesteps:
            with torch.no_grad():
                y = scheduler.step(method.student.network(y, t.expand(2), c), t, y, return_dict=False)[0]
        torch.testing.assert_close(mine.sample(x, grid, c), y, rtol=1e-4, atol=1e-4)
    same = torch.allclose(policy.sample(x, grid, c), Multistep(policy.denoiser).sample(x, grid, c), atol=1e-3)
    assert same == (steps == 1)


def test_dpm_solver_is_finite_at_zero_terminal_snr() -> None:
    method = exact(Gaussian(0.8, 0.5, ZERO), ZERO, 16)
    x, c = noise(3), Context(torch.zeros(3, 1, 1))
    found, flow = Multistep(method.teacher).sample(x, Grid.named("trailing", 16), c), Gaussian(0.8, 0.5, ZERO).flow(x, 999, END)
    plain = Policy(method.teacher).sample(x, Grid.named("trailing", 16), c)
    errors = [float((y - flow).abs().max()) for y in (found, plain)]
    assert math.isfinite(errors[0]) and errors[0] < errors[1]
