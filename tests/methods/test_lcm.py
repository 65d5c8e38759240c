"""LCM against METHODS 3 written out by hand: loss and gradient, target, boundary, reflection, guidance and times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from ddil_lightning.diffusion.denoiser import Boundary, Consistency
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.methods import LCM
from ddil_lightning.records import Context, LatentBatch
from suite import FORWARD, MIXED, Entry, Gradients, Run, backbone, build, captions, fit, train

LCM_W = Entry("lcm", LCM)
TIGHT = [[-0.3, -0.2, -0.25, -0.1], [0.2, 0.3, 0.15, 0.2]]  # cuts a good part of every estimate


class Batches(Callback):
    """The batches of a run, and the student's weights before each."""

    def __init__(self) -> None:
        self.seen: list[LatentBatch] = []
        self.weights: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)
        self.weights.append([p.detach().clone() for p in pl_module.student.parameters()])


def one_step(folder: Path, prior: SamplingPrior = MIXED, **kwargs: Any) -> tuple[Run, LatentBatch, dict[str, Tensor]]:
    """One update that moves nothing: the run, its batch, its gradients."""
    batches, gradients = Batches(), Gradients()
    run = train(LCM_W, folder, batches, gradients, prior=prior, updates=1, optimizer={"lr": 0.0, "clip": 0.0}, **kwargs)
    return run, batches.seen[0], gradients.steps[0]


def test_a_teacher_s_roll_out_walks_the_solver_s_grid(tiny: Path) -> None:
    """Its latents are samples of the teacher, which a jump over a dozen nodes at once would not be."""
    run = train(LCM_W, tiny, prior=FORWARD, updates=1)
    policies, nodes = run.method.policies, run.method.grid.nodes.tolist()
    t, s = nodes[0], nodes[12]
    seen: list[int] = []
    handle = run.method.teacher.network.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1][0])))
    c = run.method.backbone.encode_text(["a small red circle"]).guided(1.0)
    policies.teacher(torch.randn(1, *run.method.backbone.latent_shape), t, s, c, torch.Generator())
    handle.remove()
    assert seen == nodes[:12]


# The algorithm box ----------------------------------------------------------------------------------------------------------------


class ByHand:
    """The loss of METHODS 3 from the network's raw output, in float64, with diffusers' own table of alpha_bar."""

    def __init__(self, method: LCM, clamp: bool, h: float = 1e-3) -> None:
        bar = method.backbone.pipe.scheduler.alphas_cumprod.double()
        self.alpha, self.sigma = bar.sqrt(), (1 - bar).sqrt()
        self.method, self.clamp, self.h = method, clamp, h

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def x0_eps(self, network: Any, x: Tensor, t: Tensor, c: Context) -> tuple[Tensor, Tensor]:
        (a, s), out = self.at(t), network(x.float(), t, c).double()
        if self.method.backbone.predicts == "v":
            return a * x - s * out, s * x + a * out
        return (x - s * out) / a, out

    def reflect(self, x0: Tensor) -> Tensor:
        lo, hi = (torch.tensor(side).view(1, -1, 1, 1) for side in TIGHT)
        return x0.clamp(lo, hi) if self.clamp else x0

    def f(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        k = 10.0 * t.double().view(-1, 1, 1, 1)
        return 0.25 / (k.square() + 0.25) * x + k / (k.square() + 0.25).sqrt() * x0

    def loss(self, b: LatentBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, y, y')."""
        x, t, s = b.x_t.double(), b.t, (b.t - 20).clamp(min=0)
        y = self.f(x, t, self.x0_eps(self.method.student.network, x, t, b.c)[0])
        with torch.no_grad():
            unet, w, none = self.method.backbone.network(), b.c.w.double().view(-1, 1, 1, 1), b.c.guided(None)
            null = self.method.backbone.null().expand(len(x))
            given, free = self.x0_eps(unet, x, t, none), self.x0_eps(unet, x, t, null)
            x0, eps = (one + w * (one - other) for one, other in zip(given, free, strict=True))
            (a, sd), (a_s, sd_s) = self.at(t), self.at(s)
            if self.clamp:
                x0 = self.reflect(x0)
                eps = (x - a * x0) / sd
            x_s = a_s * x0 + sd_s * eps
            target = self.f(x_s, s, self.reflect(self.x0_eps(self.method.target.network, x_s, s, b.c)[0]))
        return ((y - target).square() + self.h**2).sqrt().sub(self.h).mean(), y, target


@pytest.mark.parametrize(
    ("kind", "reflect"),
    [
        ("tiny", "static"),
        ("tiny_eps", "off"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("tiny", "off"), ("tiny_eps", "static"))),
    ],
)
def test_loss_and_gradient_are_the_algorithm_box(kind: str, reflect: str, request: pytest.FixtureRequest) -> None:
    """Also says that gradients flow only through y, and that reflection acts on teacher and target but not on y."""
    folder = request.getfixturevalue(kind)
    run, b, gradients = one_step(folder, reflect=reflect, box=TIGHT)
    hand = ByHand(run.method, clamp=reflect == "static")
    loss, y, target = hand.loss(b)
    assert run.rows[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    names = [name for name, p in run.method.student.named_parameters()]
    expected = torch.autograd.grad(loss, [p for _, p in run.method.student.named_parameters()])
    scale = max(float(g.abs().max()) for g in expected)
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients[f"student.{name}"], grad, rtol=2e-3, atol=1e-4 * scale)
    if reflect == "static":
        lo, hi = (torch.tensor(side).view(1, -1, 1, 1) for side in TIGHT)
        outside = ((y < lo) | (y > hi)).double().mean()
        assert outside > 0.2 and bool(((target >= lo - 1e-4) & (target <= hi + 1e-4)).all())
        assert hand.clamp and not torch.allclose(loss, ByHand(run.method, clamp=False).loss(b)[0], rtol=1e-2)
        assert run.rows[0]["reflect/saturated"] > 0


def test_the_mse_distance(tiny: Path) -> None:
    run, b, _ = one_step(tiny, reflect="off", distance={"kind": "mse"})
    _, y, target = ByHand(run.method, clamp=False).loss(b)
    assert run.rows[0]["loss"] == pytest.approx(float((y - target).square().mean()), rel=1e-4)


# The parts ------------------------------------------------------------------------------------------------------------------------


def test_the_function_is_the_identity_at_0(tiny: Path) -> None:
    method = build(LCM_W, tiny)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.zeros(3, dtype=torch.long)
    b = LatentBatch(x, t, t, t, backbone(tiny).encode_text(["a"] * 3).guided(1.0), None, t, torch.ones(3), t)
    for denoiser in (method.student, method.target):
        assert torch.equal(method.f(denoiser, x, t, b), x)
        assert torch.equal(method.f(denoiser, x, t, b, reflect=True), x)
        assert not torch.allclose(method.f(denoiser, x, t + 19, b), x, atol=1e-2)


@pytest.mark.parametrize("decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_the_target_follows_the_student(decay: float, light: Path) -> None:
    """target <- decay target + (1 - decay) student after every update; decay 0 is the online student itself."""
    seen = Batches()
    run = train(LCM_W, light, seen, updates=4, target_decay=decay)
    target = seen.weights[0]
    for weights in [*seen.weights[1:], [p.detach() for p in run.method.student.parameters()]]:
        target = [decay * a + (1 - decay) * b for a, b in zip(target, weights, strict=True)]
    found = list(run.method.target.parameters())
    for a, b, start in zip(found, target, seen.weights[0], strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=1e-6)
        assert not torch.equal(a, start) and not a.requires_grad
    assert (decay == 0) == all(torch.equal(a, b) for a, b in zip(found, run.method.student.parameters(), strict=True))
    assert not any(m.training for m in run.method.target.modules())


def test_every_time_is_a_node_of_the_50_and_its_next(light: Path) -> None:
    seen = Batches()
    run = train(LCM_W, light, seen, prior=MIXED, updates=8)
    t, s, node = (torch.cat([getattr(b, name) for b in seen.seen]) for name in ("t", "s", "node"))
    nodes = [20 * k - 1 for k in range(50, 0, -1)]
    assert run.method.grid.nodes.tolist() == nodes
    assert set(t.tolist()) <= set(nodes) and torch.equal(s, (t - 20).clamp(min=0)) and torch.equal(t, torch.tensor(nodes)[node])
    rolled = torch.cat([b.t[b.source != 0] for b in seen.seen])
    assert set(rolled.tolist()) <= {999, 759, 499, 259, 679, 339, 799, 599, 399, 199} and len(rolled.unique()) > 3


def test_w_of_a_rollout_is_w_of_its_loss(light: Path) -> None:
    """Student and target are told the w under which the latent was made; the teacher's guidance is the same w."""
    told: dict[str, list[Tensor]] = {"student": [], "target": []}
    method, data, seen = build(LCM_W, light, updates=4, guidance=[1.0, 9.0]), captions(light, SamplingPrior(0, 1, 0)), Batches()
    method.target.network.register_forward_hook(lambda net, args, out: told["target"].append(args[2].w))
    training = torch.is_grad_enabled  # roll-outs have no gradient
    method.student.network.register_forward_hook(lambda net, args, out: told["student"].append(args[2].w) if training() else None)
    fit(method, data, seen)
    for b, student, target in zip(seen.seen, told["student"], told["target"], strict=True):
        assert torch.equal(b.c.w, student) and torch.equal(b.c.w, target)
        assert b.c.w.ge(0).all() and b.c.w.le(8).all() and len(b.c.w.unique()) > 1
    (chunk, *_) = data.state_dict()["buffers"][0]["chunks"]
    first = seen.seen[0]
    assert torch.equal(first.c.w, chunk["c"]["w"][chunk["states"]["row"][first.slot]])


def test_without_w_the_guidance_is_baked_in(tiny: Path) -> None:
    """The student does not hear w; the teacher does, so the loss depends on it."""
    method = build(LCM_W, tiny, w_conditioned=False, guidance=2.0)
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([999, 259]), backbone(tiny).encode_text(["a red circle", "a"])
    assert not method.student.network.w_conditioned
    assert torch.equal(method.student(x, t, c.guided(0.0)).x0, method.student(x, t, c.guided(8.0)).x0)
    losses = [one_step(tiny, FORWARD, w_conditioned=False, guidance=g)[0].rows[0]["loss"] for g in (1.0, 9.0)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_evaluations_count_every_network_call(light: Path) -> None:
    """Per update and sample: one of the student, two of the guided teacher, one of the target; fresh roll-outs come on top."""
    run = train(LCM_W, light, prior=FORWARD, updates=3)
    assert run.method.evaluations == {"student": 12, "teacher": 24, "target": 12}
    seen = Batches()
    run = fit(build(LCM_W, light, updates=3, rollouts=(4,)), captions(light, SamplingPrior(0, 1, 0), buffer={"capacity": 0}), seen)
    walk = [999, 759, 499, 259]
    assert run.method.evaluations["student"] == 12 + sum(4 * walk.index(int(b.t[0])) for b in seen.seen)


# Inference ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [Boundary(), Boundary(0.02, 0.5), Boundary(0.1, 2.0), Boundary(10.0, 0.1)], ids=str)
def test_the_exported_scheduler_has_the_trained_boundary(boundary: Boundary, tiny: Path) -> None:
    """Its own sigma_data is 0.5, whatever the student was trained with."""
    method = build(LCM_W, tiny, boundary=boundary)
    scheduler, t = method.deployment.scheduler(), method.grid.nodes
    x, x0, sd = torch.randn(len(t), 4, 2, 2), torch.randn(len(t), 4, 2, 2), boundary.sigma_data
    skip, out = (torch.as_tensor(y).view(-1, 1, 1, 1) for y in scheduler.get_scalings_for_boundary_condition_discrete(t))
    k = boundary.scaling * t.view(-1, 1, 1, 1)
    torch.testing.assert_close(skip, sd**2 / (k**2 + sd**2))
    torch.testing.assert_close(out, k / (k**2 + sd**2).sqrt())
    found = Consistency(method.student, boundary).bounded(x, t, method.student.schedule.from_x0(x, t, x0)).x0
    torch.testing.assert_close(found, skip * x + out * x0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_the_sampler_walks_the_schedulers_times(steps: int, tiny: Path) -> None:
    method = build(LCM_W, tiny)
    scheduler = method.deployment.scheduler()
    scheduler.set_timesteps(steps)
    _, grid = method.deployment.sampler(steps)
    assert grid.nodes.tolist() == scheduler.timesteps.tolist() and grid.times[-1] == -1
    method.grid.rows(grid.nodes)  # all of them are training nodes


def test_the_sampler_is_the_rollout_policy_with_the_deployed_weights(tiny: Path) -> None:
    method = build(LCM_W, tiny, updates=1, ema=0.0)
    policy, grid = method.deployment.sampler(4)
    x, c = torch.randn(2, 4, 8, 8), backbone(tiny).encode_text(["a red circle", "a"]).guided(2.0)
    a, b = (p.sample(x, grid, c, torch.Generator().manual_seed(3)) for p in (policy, method.policies.student))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"target_decay": 1.0}, "target_decay is 1.0: give a number from 0 to below 1"),
        ({"distance": {"kind": "l3"}}, "not 'l3'"),
        ({"distance": {"width": -1.0}}, "above 0, got -1"),
    ],
)
def test_settings_outside_their_range_are_refused(kwargs: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        train(LCM_W, tiny, updates=1, **kwargs)
