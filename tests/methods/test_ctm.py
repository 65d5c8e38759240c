"""CTM against METHODS 5.4: jumps that are told their end, soft consistency on exact teachers, the denoising term, and adaptive weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_lcm import TIGHT, Batches
from test_pcm import batch
from test_pcm import exact as phased
from test_pd import AsV, Exact
from torch import Tensor, nn

from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.methods import CTM
from ddil_lightning.records import END, FORWARD, STUDENT, Context, LatentBatch
from ddil_lightning.runs import export, finish
from ddil_lightning.streams import Streams
from ddil_lightning.toy import Toy
from ddil_lightning.training.randomness import numbers_of
from suite import MIXED, Entry, Gradients, backbone, build, captions, fit, train

SD = NoiseSchedule.scaled_linear()
CTM_W = Entry("ctm", CTM)


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


class Affine(nn.Module):
    """A student of the exact backbone that can be told s, and does not listen."""

    w_conditioned, s_conditioned = False, True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        assert c.s is not None
        return self.a * x_t

    def last_layer(self) -> nn.Parameter:
        return self.a


class Told(nn.Module):
    """The v whose jump to c.s is the exact flow of Gaussian data; at s = t, where none is, any."""

    w_conditioned, s_conditioned = False, True

    def __init__(self, exact: Gaussian) -> None:
        super().__init__()
        self.exact = exact

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        assert c.s is not None
        cos, sin = SD.rotation(t, c.s, x_t)
        return torch.where(sin == 0, 0.0, (cos * x_t - self.exact.flow(x_t, t, c.s)) / torch.where(sin == 0, 1.0, sin))


class Teacher(Exact):
    """An exact teacher whose students are told s."""

    def trainable(self, w_conditioned: bool = False, name: str = "student", s_conditioned: bool = False) -> Any:
        return Affine()


def exact(network: nn.Module, student: nn.Module | None = None, **kwargs: Any) -> CTM:
    """CTM of an exact teacher, with `student` as student and as target."""
    method = CTM(pipeline=Teacher(network, SD), w_conditioned=False, guidance=1.0, **kwargs)
    for role in (method.student, method.target) if student is not None else ():
        role.network = student
    return method


def moved(method: Any, by: float = 0.05) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in method.student.weights():
            p.add_(by * torch.randn_like(p))
    return method


# Networks that are told s ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("told", "adapter"), [(False, Adapter()), (True, Adapter(2))], ids=["s", "w and s, lora"])
def test_a_student_that_is_told_s_begins_as_its_teacher_at_every_s(told: bool, adapter: Adapter, tiny: Path) -> None:
    teacher = backbone(tiny)
    student = teacher.role("student", w_conditioned=told, s_conditioned=True, adapter=adapter)
    assert student.s_conditioned and student.network.w_conditioned is told and not teacher.network().s_conditioned
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([999, 259]), teacher.encode_text(["a red circle", "a"])
    want = teacher.network()(x, t, c)
    c = c.guided(2.0) if told else c

    def answer(*s: int) -> Tensor:
        return student.network(x, t, c._replace(s=torch.tensor(s)))

    torch.testing.assert_close(answer(759, END), want)
    with torch.no_grad():
        next(p for name, p in student.named_parameters() if "cond_proj" in name).normal_(0, 0.1)
    assert not torch.allclose(answer(759, END), answer(759, 0), atol=1e-4) and torch.equal(answer(759, END)[:1], answer(759, 0)[:1])
    with pytest.raises(ValueError, match="told the time that is jumped to, but the context carries no s"):
        student.network(x, t, c)
    assert teacher.role("student", w_conditioned=True).s_conditioned is False


def test_members_of_an_ensemble_are_told_s() -> None:
    toy = Toy(members=2, width=8, size=16, seed=0)
    student, plain = toy.ensemble(s_conditioned=True), toy.ensemble()
    student.load_state_dict(plain.state_dict(), strict=False)
    x, t, c = torch.randn(3, 2, 2), torch.tensor([999, 500, 20]), toy.encode_text(["class 0"] * 3)
    s = torch.tensor([END, 250, 0])
    assert torch.equal(student(x, t, c._replace(s=s)), plain(x, t, c))
    with torch.no_grad():
        student.jump.normal_(0, 0.1)
    one, other = (student(x, t, c._replace(s=s.clone().index_fill(0, torch.tensor([1]), k))) for k in (250, 100))
    assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [True, False, True]
    with pytest.raises(ValueError, match="carries no s"):
        student(x, t, c)


def test_policies_say_s(tiny: Path) -> None:
    method, asked = build(CTM_W, tiny, ema=0.0), []
    method.student.network.register_forward_hook(lambda net, args, out: asked.append((args[1].tolist(), args[2].s.tolist())))
    c = backbone(tiny).encode_text(["a"] * 2).guided(1.0)
    method.deployment.policy.sample(torch.randn(2, 4, 8, 8), Grid.named("trailing", 2), c)
    method.policies.student(torch.randn(2, 4, 8, 8), 999, 749, c)
    assert asked == [([999] * 2, [499] * 2), ([499] * 2, [END] * 2), ([999] * 2, [749] * 2)]
    assert c.s is None


# Soft consistency -----------------------------------------------------------------------------------------------------------------


def test_s_is_uniform_below_every_node() -> None:
    method = exact(PointMass(0.0, SD), solver_steps=8)
    node = torch.arange(8).repeat_interleave(4000)
    j = method.below(node)
    for k in range(8):
        counts = torch.bincount(j[node == k], minlength=9)
        assert counts[: k + 1].sum() == 0 and bool((counts[k + 1 :] - 4000 / (8 - k)).abs().max() < 5 * (4000 / (8 - k)) ** 0.5)
    assert torch.equal(j, method.below(node))
    method.student_updates = 1
    assert not torch.equal(j, method.below(node))


def test_s_is_drawn_anew_for_every_batch_of_a_discriminator(tiny: Path) -> None:
    """The student's clock stands still in its batches: with five of them to one of the student's, all jumps ended at the same s."""
    drawn: list[list[int]] = []
    method = build(Entry("ctm", CTM, {"denoising": 0.0}), tiny, updates=2, gan={"weight": 0.1, "critic_weight": 0.1}, critic={"steps": 3})
    below = method.below
    method.below = lambda node: (drawn.append(below(torch.zeros(8, dtype=torch.long)).tolist()), below(node))[1]
    fit(method, captions(tiny, MIXED))
    assert len(drawn) == 6 and len({tuple(s) for s in drawn}) == 6


def test_a_critic_of_ones_own_needs_no_adversary() -> None:
    """A method that takes turns without ours goes by the student's clock, as before."""
    common = {"descent": SimpleNamespace(accumulate=2, micro={"loss": 1}), "feed": SimpleNamespace(seed=5), "stage": 1, "global_rank": 3}
    mine = SimpleNamespace(takes_turns=True, student_updates=7, **common)
    ours = SimpleNamespace(takes_turns=True, student_updates=7, adversary=SimpleNamespace(updates=9), **common)
    assert numbers_of(mine) == Streams(5, 15, 1, 3) and numbers_of(ours) == Streams(5, 18, 1, 3)


@pytest.mark.parametrize(
    ("solver_steps", "rollouts", "counts"), [(40, (4,), (4, 2, 1)), (50, (5,), (5, 2, 1)), (10, (5,), (5, 2, 1)), (25, (5,), (5, 1))]
)
def test_it_is_used_at_times_that_it_is_trained_at(solver_steps: int, rollouts: tuple[int, ...], counts: tuple[int, ...]) -> None:
    method = exact(PointMass(0.0, SD), solver_steps=solver_steps, rollouts=rollouts)
    assert method.deployment.steps == counts
    for n in counts:
        method.grid.rows(method.deployment.grid(n).nodes)  # raises for a time that is none of its own


def test_known_data_leave_no_loss_at_any_time() -> None:
    class Point(AsV):
        w_conditioned, s_conditioned = False, True

    method = exact(PointMass(0.7, SD), Point(PointMass(0.7, SD), SD), teacher_steps=3)
    b = batch(method)
    y, target = method.ends(b, method.below(b.node))
    torch.testing.assert_close(y, target, rtol=0, atol=1e-9)
    torch.testing.assert_close(y, torch.full_like(y, 0.7), rtol=0, atol=1e-9)


@pytest.mark.parametrize("s", [499, END])
def test_the_exact_flow_of_gaussian_data_is_the_fixed_point_of_a_fine_solver(s: int) -> None:
    """For every t, u and s the jumps compose exactly: the teacher's step of second order is the one error left."""
    gaussian, errors = Gaussian(0.5, 0.6, SD), []
    for solver_steps in (40, 200):
        method = exact(gaussian, Told(gaussian), solver_steps=solver_steps)
        b = batch(method)
        j = int((method.grid.times == s).nonzero()[0])
        y, target = method.ends(b, torch.full_like(b.node, j).maximum(b.node + 1))
        torch.testing.assert_close(y, gaussian.flow(b.x_t, b.t, END), rtol=0, atol=1e-6)
        far = (b.t > 520) & (b.t < 990)
        errors.append(float((y - target)[far].square().mean().sqrt()))
    assert errors[0] < 2e-2 and 15 < errors[0] / errors[1] < 35


def test_the_teacher_takes_its_steps_and_none_beyond_s() -> None:
    method = exact(Gaussian(0.5, 0.6, SD), teacher_steps=3, solver_steps=8)
    b, seen = batch(method), []
    method.target.network.register_forward_hook(lambda net, args, out: seen.append((args[0], args[1], args[2].s)))
    j = torch.minimum(b.node + 2, torch.tensor(8))
    method.ends(b, j)
    x_u, u, s = seen[0]
    times = method.grid.times
    assert torch.equal(s, times[j]) and torch.equal(u, times[j].clamp(min=0))  # three were allowed, s was two nodes away
    x = ddim(SD, b.x_t, method.teacher(b.x_t, b.t, b.c), b.t, times[b.node + 1])
    x = torch.cat([ddim(SD, x, method.teacher(x, b.s.clamp(min=0), b.c), b.s, times[j])[:7], x[7:]])
    torch.testing.assert_close(x_u, x)


def test_with_s_at_the_clean_end_it_is_a_consistency_model() -> None:
    """That of PCM with one phase, which is LCM's without boundary scaling."""

    class Deaf(AsV):
        w_conditioned, s_conditioned = False, True

    teacher, student = Gaussian(0.5, 0.6, SD), Deaf(Gaussian(0.2, 0.9, SD), SD)
    method, pcm = exact(teacher, student), phased(teacher, student, phases=1)
    b = batch(method)
    for mine, theirs in zip(method.ends(b, torch.full_like(b.node, 40)), pcm.ends(b), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_gradients_pass_through_the_target_to_the_students_jump_alone(tiny: Path) -> None:
    """The loss by hand from both networks' jumps, reflected on the target's side, and its gradient by autograd."""
    seen, gradients, drawn = Batches(), Gradients(), []
    below = CTM.below
    entry = Entry("ctm", CTM, {"denoising": 0.0})
    method = moved(build(entry, tiny, updates=1, optimizer={"lr": 0.0, "clip": 0.0}, reflect="static", box=TIGHT))
    method.target.follow(method.student)
    method.below = lambda node: drawn.append(below(method, node)) or drawn[-1]
    run = fit(method, captions(tiny, MIXED), seen, gradients)
    b, student, target = seen.seen[0], method.student, method.target
    s, end, u = method.grid.times[drawn[0]], torch.full_like(b.t, END), b.s

    def hop(role: Denoiser, x: Tensor, t: Tensor, s: Tensor, clamp: bool) -> Tensor:
        p = role(x, t.clamp(min=0), b.c._replace(s=s))
        p = role.reflected(x, t.clamp(min=0), p, method.reflection) if clamp else p
        return torch.stack([x[i] if t[i] == s[i] else ddim(SD, x, p, t, s)[i] for i in range(len(x))])

    with torch.no_grad():
        x_u = ddim(SD, b.x_t, method.teacher(b.x_t, b.t, b.c), b.t, u)
        want = hop(target, hop(target, x_u, u, s, True), s, end, True)
    y = hop(target, hop(student, b.x_t, b.t, s, False), s, end, False)
    loss = ((y - want).square() + 1e-6).sqrt().sub(1e-3).mean()
    assert run.rows[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    names = [name for name, p in student.named_parameters()]
    expected = torch.autograd.grad(loss, list(student.parameters()))
    scale = max(float(g.abs().max()) for g in expected)
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients.steps[0][f"student.{name}"], grad, rtol=2e-3, atol=1e-4 * scale)
    assert all(p.grad is None for p in target.parameters())


# The other terms ------------------------------------------------------------------------------------------------------------------


def test_the_denoising_term_is_of_forward_latents_alone(tiny: Path) -> None:
    """In the network's own space, told s = t and no guidance; a buffered stand-in's `real` is another picture's."""
    method = moved(build(CTM_W, tiny))
    c = backbone(tiny).encode_text(["a"] * 4).guided(2.0)
    x, real, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([999, 499, 249, 24])
    source, slot = torch.tensor([FORWARD, STUDENT, FORWARD, FORWARD]), torch.tensor([-1, -1, 7, -1])
    b = LatentBatch(x, t, t, t, c, real, source, torch.ones(4), slot)
    got = method.denoised(b)
    out = method.student.network(x, t, c.guided(0.0)._replace(s=t))
    (alpha, sigma) = SD.at(t, x)
    v = (alpha * x - real) / sigma
    want = (out - v).square().flatten(1).mean(1) * torch.tensor([1.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert method.denoised(b._replace(source=torch.full((4,), STUDENT))).tolist() == [0.0] * 4
    assert method.denoised(b._replace(real=None)).tolist() == [0.0] * 4


def test_terms_are_made_as_large_as_soft_consistency_in_the_last_layer(tiny: Path) -> None:
    method = moved(build(CTM_W, tiny, guidance=2.0))
    b = captions(tiny, SamplingPrior())
    seen = Batches()
    fit(build(CTM_W, tiny, updates=1), b, seen)
    b = seen.seen[0]
    y, target = method.ends(b, method.below(b.node))
    soft, term = method.distance(y, target), method.denoised(b)
    layer = method.student.network.last_layer()
    assert layer is method.student.network.model.conv_out.weight
    weighed = method.as_large(soft, term, b)
    norms = [float(torch.autograd.grad(x.mean(), layer, retain_graph=True)[0].norm()) for x in (soft, weighed, term)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2) and norms[2] != pytest.approx(norms[0], rel=0.1)
    assert method.as_large(soft, torch.zeros(len(b.t)), b).tolist() == [0.0] * len(b.t)  # all of it masked


def test_shards_of_the_last_layer_are_refused_before_anything_is_trained(tiny: Path) -> None:
    with pytest.raises(ValueError, match="fsdp2 shards: set model.denoising to 0"):
        fit(build(CTM_W, tiny, updates=1), captions(tiny), strategy="fsdp2", devices=1)


# What it leaves -------------------------------------------------------------------------------------------------------------------


def test_a_student_that_is_told_s_goes_out_as_its_weights_and_comes_back(tiny: Path, tmp_path: Path) -> None:
    method = moved(build(CTM_W, tiny, guidance=2.0, ema=0.0))
    with pytest.raises(ValueError, match="^no pipeline of diffusers tells a network the time that it jumps to.* in checkpoints$"):
        export.export(method, tmp_path / "out")
    found = finish.finish(method, tmp_path, finish.Test(n=0), None, ["a"], {})
    assert not found["failed"] and not (tmp_path / "pipeline").exists()
    other = Pipeline(str(tiny)).trainable(w_conditioned=True, s_conditioned=True)
    other.load_state_dict(load_file(tmp_path / "student.safetensors"))
    c, x = backbone(tiny).encode_text(["a small red circle"]).guided(1.0), torch.randn(1, 4, 8, 8)
    policy, grid = method.deployment.sampler(4)
    assert torch.equal(Policy(Denoiser(other, SD, "v"), ddim).sample(x, grid, c), policy.sample(x, grid, c))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"w_conditioned": False, "guidance": 3.0}, "denoising = 1 asks the student for data, which guidance 3 has not made: set it to 0"),
        ({"teacher_steps": 0}, "teacher_steps is 0: give a number from 1"),
        ({"gan": {"weight": 0.1, "critic_weight": 1.0, "features": "critic"}}, "gan.features is 'critic', and CTM has none"),
    ],
)
def test_settings_that_cannot_be_are_refused(kwargs: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        train(CTM_W, tiny, updates=1, **kwargs)
