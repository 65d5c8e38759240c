"""PCM against METHODS 5.4: the loss written out by hand, phases, exact teachers, its GAN, and LCM as its limit of one phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_lcm import TIGHT, Batches
from test_pd import AsV, Exact, noise
from test_tcd import Flow, TrajectoryByHand
from torch import Tensor, nn

from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.diffusion.denoiser import Boundary
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.methods import LCM, PCM
from ddil_lightning.records import END, Context, LatentBatch
from ddil_lightning.runs import export
from ddil_lightning.training.gan import Gan
from suite import FORWARD, MIXED, Entry, Gradients, build, train

SD = NoiseSchedule.scaled_linear()
PCM_W = Entry("pcm", PCM)
GAN = {"gan": {"weight": 0.1, "critic_weight": 1.0, "features": "teacher", "kind": "hinge"}}


def exact(network: nn.Module, student: nn.Module | None = None, **kwargs: Any) -> PCM:
    """PCM of an exact teacher, with `student` as student and as target."""
    torch.manual_seed(0)
    method = PCM(pipeline=Exact(network, SD), w_conditioned=False, guidance=1.0, **kwargs)
    for role in (method.student, method.target) if student is not None else ():
        role.network = student
    return method


def batch(method: Any) -> LatentBatch:
    """One latent at every node of the training grid."""
    node = torch.arange(len(method.grid))
    c = Context(torch.zeros(len(node), 1, 1)).guided(0.0)
    return LatentBatch(noise(len(node)), method.grid.nodes, method.grid.times[1:], node, c, None, 0 * node, torch.ones(len(node)), node)


@pytest.mark.parametrize(("phases", "edges"), [(1, [END]), (4, [749, 499, 249, END]), (8, [874, 749, 624, 499, 374, 249, 124, END])])
def test_edges_are_the_nodes_that_the_student_samples_at(phases: int, edges: list[int]) -> None:
    method = exact(PointMass(0.0, SD), phases=phases)
    b = batch(method)
    e = method.edge(b)
    assert e.tolist() == [edge for edge in edges for _ in range(40 // phases)] and bool((e <= b.s).all())
    grid = method.deployment.sampler(phases)[1]
    assert grid.times.tolist() == [999, *edges] == method.grid.rollouts[0].times.tolist()
    span = method.phase(e)
    assert bool((span.low == e.clamp(min=0)).all()) and bool((span.high < b.t[(b.node // (40 // phases)) * (40 // phases)]).all())


# The algorithm box ----------------------------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_the_algorithm_box(tiny: Path) -> None:
    """Also says that gradients flow only through y, and that reflection acts on teacher and target but not on y."""
    seen, gradients = Batches(), Gradients()
    still = {"updates": 1, "optimizer": {"lr": 0.0, "clip": 0.0}}
    run = train(PCM_W, tiny, seen, gradients, prior=MIXED, reflect="static", box=TIGHT, **still)
    b, hand = seen.seen[0], TrajectoryByHand(run.method, clamp=True)
    hand.alpha, hand.sigma = (torch.cat([x, torch.tensor([end]).double()]) for x, end in ((hand.alpha, 1.0), (hand.sigma, 0.0)))
    edges = torch.tensor([749, 499, 249, END])
    e = edges[(b.t.view(-1, 1) <= torch.tensor([999, 749, 499, 249])).sum(1) - 1]
    y, target = hand.ends(b, e, step=25)
    loss = ((y - target).square() + 1e-6).sqrt().sub(1e-3).mean()
    assert run.rows[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    names = [name for name, p in run.method.student.named_parameters()]
    expected = torch.autograd.grad(loss, list(run.method.student.parameters()))
    scale = max(float(g.abs().max()) for g in expected)
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients.steps[0][f"student.{name}"], grad, rtol=2e-3, atol=1e-4 * scale)


# Closed forms ---------------------------------------------------------------------------------------------------------------------


def test_known_data_leave_no_loss_at_any_node() -> None:
    method = exact(PointMass(0.7, SD), AsV(PointMass(0.7, SD), SD))
    y, target = method.ends(batch(method))
    torch.testing.assert_close(y, target, rtol=0, atol=1e-9)


def test_at_the_edge_the_target_is_the_teachers_own_step(tiny: Path) -> None:
    """The last node of a phase: no network is asked what comes after it, so the phases are chained to the teacher's flow at their edges."""
    method = build(PCM_W, tiny, box=TIGHT, guidance=2.0)
    node = torch.tensor([9, 39])
    c = method.backbone.encode_text(["a"] * 2).guided(1.0)
    x, t, s = torch.randn(2, 4, 8, 8), method.grid.nodes[node], method.grid.times[node + 1]
    assert s.tolist() == [749, END]
    b = LatentBatch(x, t, s, node, c, None, 0 * node, torch.ones(2), node)
    _, target = method.ends(b)
    assert torch.equal(target, ddim(method.teacher.schedule, x, method.teacher(x, t, c), t, s))


class Phased(nn.Module):
    """The v whose one jump to its phase's edge is the exact flow of Gaussian data."""

    def __init__(self, exact: Gaussian, edges: list[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Flow(exact, e) for e in edges)
        self.edges = edges

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        v = torch.zeros_like(x_t)
        for part, e in zip(self.parts, self.edges, strict=True):  # from the highest edge down: the first below t is its own
            v = torch.where((t > e).view(-1, 1, 1, 1) & (v == 0), part(x_t, t.clamp(min=max(e, 0)), c), v)
        return v


@pytest.mark.parametrize("phases", [1, 4])
def test_the_exact_jumps_of_gaussian_data_are_the_fixed_point_of_a_fine_solver(phases: int) -> None:
    """The teacher's step is the one error left. That of DDIM is of second order: five times finer, about 25 times smaller."""
    gaussian, errors = Gaussian(0.5, 0.6, SD), []
    edges = Grid.named("trailing", phases).times.tolist()[1:]
    for solver_steps in (40, 200):
        method = exact(gaussian, Phased(gaussian, edges), phases=phases, solver_steps=solver_steps)
        b = batch(method)
        y, target = method.ends(b)
        sampled = gaussian.flow(b.x_t, b.t, method.edge(b))
        torch.testing.assert_close(y, sampled, rtol=0, atol=1e-9)
        late = (b.t >= 200) & (b.t < 990)  # below, a step of fixed length in t is a long one in the log-SNR
        errors.append(float((y - target)[late].square().mean().sqrt()))
    assert errors[0] < 2e-2 and 15 < errors[0] / errors[1] < 35


def test_one_phase_is_lcm_without_boundary_scaling() -> None:
    """But for the very last interval, which LCM ends at time 0 and PCM at the clean end."""
    teacher, student = Gaussian(0.5, 0.6, SD), AsV(Gaussian(0.2, 0.9, SD), SD)
    method = exact(teacher, student, phases=1, solver_steps=50)
    lcm = LCM(pipeline=Exact(teacher, SD), w_conditioned=False, guidance=1.0, boundary=Boundary(scaling=1e10))
    lcm.student.network = lcm.target.network = student
    b = batch(method)
    mine, last = method.distance(*method.ends(b)), len(b.t) - 1
    theirs = batch(lcm)
    p = lcm.teacher(theirs.x_t, theirs.t, theirs.c)
    x_s = ddim(SD, theirs.x_t, p, theirs.t, theirs.s)
    want = lcm.distance(lcm.f(lcm.student, theirs.x_t, theirs.t, theirs), lcm.f(lcm.target, x_s, theirs.s, theirs))
    torch.testing.assert_close(mine[:last], want[:last], rtol=0, atol=1e-9)


# The GAN --------------------------------------------------------------------------------------------------------------------------


def test_its_real_is_the_targets_jump_noised_inside_the_phase(tiny: Path) -> None:
    """Discriminator and student by hand: the hinge losses of logits on the teacher's features, no data anywhere."""
    method = build(Entry("pcm", PCM, GAN), tiny, guidance=2.0)
    assert method.head is not None and method.takes_turns
    adversary, node = method.adversary, torch.tensor([0, 9, 12, 39])
    c = method.backbone.encode_text(["a"] * 4).guided(1.0)
    x, t, s = torch.randn(4, 4, 8, 8), method.grid.nodes[node], method.grid.times[node + 1]
    b = LatentBatch(x, t, s, node, c, None, 0 * node, torch.tensor([1.0, 2.0, 1.0, 0.5]), node)
    y, target = method.ends(b)
    span = method.phase(method.edge(b))
    drawn = {
        name: adversary.diffuse(z, name, span.low, span.high, span.since) for name, z in (("critic", y), ("real", target), ("realism", y))
    }

    def logits(name: str) -> Tensor:
        z, tau, _ = drawn[name]
        assert bool(((tau >= span.low) & (tau <= span.high)).all())
        return method.head(*method.teacher.features(z, tau, c)).flatten(1)

    loss = adversary.following(y.detach(), b, target, span)
    want = (b.weight * ((1 + logits("critic")).relu() + (1 - logits("real")).relu()).mean(1)).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(adversary.realism(y, b, span), (1 - logits("realism")).relu().mean(1))


def test_a_student_beyond_the_margin_is_left_alone() -> None:
    """The authors' hinge on the student's side, max(0, 1 - D), mean over the logits; of the logistic loss softplus(-D)."""
    logits = torch.tensor([[3.0, 1.5], [0.5, -2.0]], requires_grad=True)
    adversary = exact(PointMass(0.0, SD)).adversary
    for kind, want in (("softplus", [0.1250, 1.3005]), ("hinge", [0.0, 1.75])):
        adversary.gan = Gan(0.1, 1.0, "teacher", kind=kind)  # type: ignore[arg-type]
        torch.testing.assert_close(adversary.fooling(logits), torch.tensor(want), atol=1e-4, rtol=0)
    (slope,) = torch.autograd.grad(adversary.fooling(logits).sum(), logits)
    assert slope.tolist() == [[0, 0], [-0.5, -0.5]]


def test_latents_noised_since_their_edge_have_the_forward_law() -> None:
    """Data of one point, at the edge by its law: noised further to t the mean is alpha_t mu and the deviation sigma_t."""
    n, mu = 40_000, 0.7
    g = torch.Generator().manual_seed(0)
    for schedule in (SD, NoiseSchedule.flow()):
        for e, t in ((249, 400), (499, 499), (END, 100)):
            x = schedule.alphas[e] * mu + schedule.sigmas[e] * torch.randn(n, 1, dtype=torch.float64, generator=g)
            got = schedule.add_noise(x, torch.randn(n, 1, dtype=torch.float64, generator=g), torch.full((n,), t), torch.full((n,), e))
            assert abs(float(got.mean() - schedule.alphas[t] * mu)) < 5 * float(schedule.sigmas[t]) / n**0.5
            assert float(got.std() / schedule.sigmas[t]) == pytest.approx(1, abs=5 / (2 * n) ** 0.5)


def test_a_student_of_phases_is_exported_with_ddim_at_its_edges(tiny: Path, tmp_path: Path) -> None:
    method = build(PCM_W, tiny, guidance=3.0, phases=2)
    with torch.no_grad():
        for p in method.deployment.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert export.deliver(method, tmp_path / "out", ["a small red circle"], 2) < 1e-4
    scheduler = method.deployment.scheduler()
    scheduler.set_timesteps(2)
    assert type(scheduler).__name__ == "DDIMScheduler" and scheduler.timesteps.tolist() == [999, 499]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"phases": 3}, "phases = 3 must divide solver_steps"),
        ({"solver_steps": 48}, "solver_steps = 48 must divide the schedule's 1000 times"),
        (
            {"gan": {"weight": 0.1, "critic_weight": 1.0, "features": "critic"}},
            "gan.features is 'critic', and PCM has none: set it to teacher",
        ),
        ({"gan": {"kind": "wgan"}}, "gan.kind is 'wgan'"),
    ],
)
def test_settings_that_cannot_be_are_refused(kwargs: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        train(PCM_W, tiny, prior=FORWARD, updates=1, **kwargs)
