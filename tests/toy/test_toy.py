"""The analytic toy: members are experiments of their own, the teacher is exact, and what is measured is known in closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddil_lightning.callbacks import Checkpoints, Stages
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.data.encoded import encode
from ddil_lightning.diffusion.denoiser import Denoiser, w_embedding
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.reflection import Reflection
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.imitation.options import Buffer, Rollouts
from ddil_lightning.imitation.shift import energy_distance
from ddil_lightning.methods import (
    ADD,
    BOOT,
    CTM,
    DMD,
    DMD2,
    EMD,
    LADD,
    LCM,
    PCM,
    PD,
    TCD,
    ImagineFlash,
    MomentMatching,
    Reflow,
    SiD,
    SnapFusion,
    UFOGen,
)
from ddil_lightning.toy import Toy
from ddil_lightning.toy.networks import Ensemble, Exact, Head
from ddil_lightning.toy.problems import PROBLEMS, Problem
from ddil_lightning.toy.scores import Exam, high_quality, method_rows, mode_kl, outside
from ddil_lightning.training.plan import Stage
from options import options
from suite import MIXED, Run, StopInside, equal, fit, state

BOX = [[-2.4, -2.4], [2.4, 2.4]]  # given, not estimated: the data of all members would have a say in it
ENTRIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lcm": (LCM, {"w_conditioned": False, "solver_steps": 10, "rollouts": (2, 5)}),
    "lcm-told-guidance": (LCM, {"solver_steps": 10, "rollouts": (2, 5), "guidance": [1.0, 4.0]}),
    "pd": (PD, {"w_conditioned": False, "teacher_steps": 8, "stages": [Stage(steps=4, updates=3), Stage(steps=2, updates=3)]}),
    "dmd2": (DMD2, {"scores": {"normaliser": "batch"}, "critic": {"steps": 2}}),
    "dmd": (DMD, {"scores": {"normaliser": "batch"}, "steps": 2, "pairs": {"steps": 4}}),
    "boot": (BOOT, {"steps": 4}),
    "snapfusion": (SnapFusion, {"steps": 4, "guided": 0.5, "guidance": [1.0, 4.0]}),
    "reflow": (Reflow, {"nodes": 8, "relabel": 2, "teacher_steps": 4, "pairs": {"steps": 4}}),
    "emd": (EMD, {"chain": {"steps": 2, "gamma_z": 0.05}, "critic": {"steps": 2}}),
    "sid": (SiD, {"scores": {"normaliser": "batch"}, "critic": {"steps": 2}}),
    "moments": (MomentMatching, {}),
    "add": (ADD, {"gan": {"r1": 1e-2}}),
    "ladd": (LADD, {"gan": {"features": "initial", "r1": 1e-2}}),
    "ufogen": (UFOGen, {"label_steps": 1}),
    "imagine-flash": (ImagineFlash, {}),
    "tcd": (TCD, {"w_conditioned": False, "solver_steps": 10, "rollouts": (2, 5)}),
    "pcm": (PCM, {"w_conditioned": False, "phases": 2, "solver_steps": 10}),
    "ctm": (CTM, {"w_conditioned": False, "solver_steps": 4, "denoising": 0.0}),
}


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(members=2, seed=3, width=8, size=96)


def batch(toy: Toy, n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [f"class {k % 4}" for k in range(n)]
    x = 2 * torch.randn(n, *toy.latent_shape, generator=generator)
    return x, torch.randint(1000, (n,), generator=generator), toy.encode_text(prompts)


def train(toy: Toy, name: str, points: Tensor | None = None, ckpt: Path | None = None, *callbacks: Any) -> Run:
    """Six updates of a method on the toy's data, or on other `points` with the same classes."""
    cls, kwargs = ENTRIES[name]
    torch.manual_seed(5)
    settings = {"updates": 6, "optimizer": {"lr": 1e-2, "clip": 0.0}, "reflect": "static", "box": BOX, "ema": 0.5, "log_every": 1}
    method = cls(pipeline=toy, **options(cls, settings, kwargs))
    data = encode(toy.captions, toy)
    if points is not None:
        data.latents = points
    module = DDILDataModule(data, MIXED, batch_size=8, rollouts=Rollouts(every=2), buffer=Buffer(capacity=128))
    return fit(method, module, Stages(pipelines=False), *callbacks, ckpt=ckpt)


# Networks ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
def test_an_ensemble_is_its_members(toy: Toy, told: bool) -> None:
    """Against plain linear layers, one member at a time; a member's weights depend on its own seed alone."""
    net = toy.ensemble(told)
    if told:
        torch.nn.init.normal_(net.guidance, generator=torch.Generator().manual_seed(1))
    x, t, c = batch(toy)
    c = c.guided(torch.linspace(0, 3, len(x)))
    made, (features,) = net.with_features(x, t, c)
    for m in range(2):
        alpha, sigma = (a[t].float()[:, None] for a in (toy.schedule.alphas, toy.schedule.sigmas))
        moment = toy.problem.second_moment
        h = torch.cat([x[..., m] / (alpha**2 * moment + sigma**2).sqrt(), net.times[t], c.text[:, 0]], 1)
        for i, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):
            z = F.linear(h, w[m].T, b[m, 0])
            if told and i == 0:
                z = z + w_embedding(c.w) @ net.guidance[m]
            last, h = h, F.silu(z)
        torch.testing.assert_close(features[..., m], last)
        torch.testing.assert_close(made[..., m], z * (alpha**2 + sigma**2 * moment).sqrt(), atol=1e-5, rtol=1e-5)
    alone = Ensemble([toy.seeds[1]], 4, toy.problem.second_moment, toy.schedule, width=8, depth=3)
    assert all(torch.equal(a[1:], b) for a, b in zip(net.weights, alone.weights, strict=True))


@pytest.mark.slow
def test_a_member_has_no_gradient_in_the_weights_of_another(toy: Toy) -> None:
    net, head = toy.trainable(), toy.head()
    assert isinstance(head, Head)
    x, t, c = batch(toy)
    out, (features,) = net.with_features(x, t, c)
    (out[..., 0].square().sum() + head(features)[..., 0].sum()).backward()
    for p in [*net.parameters(), *head.parameters()]:
        assert bool((p.grad[1] == 0).all()) and float(p.grad[0].abs().sum()) > 0


def test_layers_of_an_ensemble_have_heads_of_their_own(toy: Toy) -> None:
    net, (x, t, c) = toy.trainable(), batch(toy)
    assert net.layers == ("hidden0", "hidden1", "hidden2")
    last, first = net.features(x, t, c, ["hidden2", "hidden0"])
    assert torch.equal(last, net.features(x, t, c)[0]) and not torch.equal(first, last)
    assert toy.head(["hidden2", "hidden0"])(last, first).shape == (len(x), 2 * x.shape[2])
    for ask in (lambda: net.features(x, t, c, ["mid"]), lambda: toy.head(["mid"])):
        with pytest.raises(ValueError, match="gan.layers has 'mid': Ensemble has hidden0, hidden1, hidden2, and each is read once"):
            ask()


def test_an_ensemble_that_is_told_guidance_needs_it(toy: Toy) -> None:
    x, t, c = batch(toy)
    torch.testing.assert_close(toy.trainable(True)(x, t, c.guided(3.0)), toy.trainable()(x, t, c))  # the embedding starts at zero
    with pytest.raises(ValueError, match="no w"):
        toy.trainable(True)(x, t, c)


def test_the_teacher_is_the_mixture_for_every_member(toy: Toy) -> None:
    x, t, c = batch(toy)
    t = t.clamp(min=20)
    guided = Denoiser(toy.network(), toy.schedule, "v", null=toy.null())
    p = guided(x, t, c.guided(2.0))
    assert isinstance(toy.network(), Exact) and guided.evaluations == 2 * len(x)
    for m in range(2):
        with_class, without = toy.mixture(x[..., m], t, c), toy.mixture(x[..., m], t, toy.null().expand(len(x)))
        torch.testing.assert_close(p.x0[..., m], without + 3.0 * (with_class - without), atol=2e-4, rtol=1e-4)


def test_the_box_is_per_coordinate(toy: Toy) -> None:
    """Guidance leaves the hull of the data; reflection keeps every member in the box, which differs between the two coordinates."""
    x, _, c = batch(toy, 64)
    t = torch.full((64,), 900)
    free = Denoiser(toy.network(), toy.schedule, "v", null=toy.null())(x, t, c.guided(6.0))
    box = Reflection([-1.0, -2.0], [1.0, 2.0], "static")
    p = Denoiser(toy.network(), toy.schedule, "v", null=toy.null(), reflection=box)(x, t, c.guided(6.0))
    assert float(free.x0.abs().amax()) > 2
    assert float(p.x0[:, 0].abs().amax()) == 1 and 1 < float(p.x0[:, 1].abs().amax()) <= 2
    alpha, sigma = toy.schedule.at(t, x)
    torch.testing.assert_close(alpha * p.x0 + sigma * p.eps, x, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_students_start_near_the_unguided_teacher(toy: Toy) -> None:
    wide = Toy(members=1, seed=3, width=32)
    x0, prompts = wide.captions.points[:2048], wide.captions.prompts(range(2048))
    for t, limit in ((999, 0.05), (700, 0.03), (400, 0.05)):
        times = torch.full((2048,), t)
        x = wide.schedule.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), times)
        c = wide.encode_text(prompts)
        exact = wide.exact(x, times, c)
        assert float((wide.trainable()(x, times, c) - exact).square().mean() / exact.square().mean()) < limit
    again = Toy(members=1, seed=3, width=32).trainable()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), wide.trainable().parameters(), strict=True))


# Data and prompts ----------------------------------------------------------------------------------------------------------------


def test_data_follow_the_law_and_members_have_their_own() -> None:
    toy = Toy(members=2, seed=8, size=20_000)
    points, classes = toy.captions.points, toy.captions.classes
    shares = classes.bincount() / len(classes)
    torch.testing.assert_close(shares, torch.tensor([0.3, 0.2, 0.25, 0.25]), atol=0.015, rtol=0)
    assert float((points[..., 0] - points[..., 1]).abs().mean()) > 0.1
    for m in range(2):
        near = torch.cdist(points[..., m], toy.problem.means).argmin(1)
        torch.testing.assert_close(near.bincount() / len(near), toy.problem.weights, atol=0.015, rtol=0)
        assert bool((toy.problem.classes[near] == classes).all())


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_laws(name: str) -> None:
    problem = PROBLEMS[name](2.0)
    assert float(problem.weights.sum()) == pytest.approx(1) and float(problem.means.abs().max()) == pytest.approx(2)
    made = Toy(name, members=1, seed=0, size=40_000).captions.points
    assert float(made.square().mean()) == pytest.approx(problem.second_moment, rel=0.02)


def test_bad_arguments_are_refused(toy: Toy) -> None:
    for kwargs, word in ({"problem": "ring"}, "ring8c"), ({"members": 0}, "members"), ({"scale": 0.0}, "scale"):
        with pytest.raises(ValueError, match=word):
            Toy(**kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class 0"):
        toy.encode_text(["a red circle"])
    with pytest.raises(ValueError, match=r"previews\.every"):
        toy.decode(torch.zeros(1, 2, 2))


# Methods -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENTRIES)
def test_members_of_a_run_do_not_talk(toy: Toy, name: str) -> None:
    """Other data for member 0, the same for member 1: after updates on forward latents and roll-outs, member 1 has not noticed."""
    points = toy.captions.points
    other = points.clone()
    other[..., 0] += 0.3
    a, b = (train(toy, name, p).method.student.network.state_dict() for p in (points, other))
    for key in a:
        assert torch.equal(a[key][1], b[key][1]), key
    # What trains on noise and the teacher's answers to it alone has not noticed in member 0 either.
    assert any(not torch.equal(a[key][0], b[key][0]) for key in a) is (name not in ("dmd", "reflow", "boot"))


@pytest.mark.parametrize("name", ENTRIES)
def test_resuming_is_exact(toy: Toy, name: str, tmp_path: Path) -> None:
    """In the middle of a run; of PD in its second stage, whose teacher is the former student."""
    run = train(toy, name, None, None, Checkpoints(every=4, keep=9, folder=str(tmp_path)))
    resumed = train(toy, name, None, tmp_path / "updates=4.ckpt")
    mine, theirs = state(run), state(resumed)
    assert all(equal(mine[part], theirs[part]) for part in mine) and resumed.rows == run.rows[4:]


TURNS = [name for name, (cls, _) in ENTRIES.items() if cls.takes_turns is True]


@pytest.mark.parametrize("name", TURNS)
def test_resuming_within_a_cycle_is_exact(toy: Toy, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic has followed twice and the student once; the next batch is the student's."""
    cls, kwargs = ENTRIES[name]
    monkeypatch.setitem(ENTRIES, name, (cls, kwargs | {"critic": {"steps": 2}}))
    run = train(toy, name)
    train(toy, name, None, None, StopInside(3, tmp_path / "inside.ckpt"))
    resumed = train(toy, name, None, tmp_path / "inside.ckpt")
    assert torch.load(tmp_path / "inside.ckpt", weights_only=True)["ddil"]["student_updates"] == 1
    mine, theirs = state(run), state(resumed)
    assert all(equal(mine[part], theirs[part]) for part in mine)
    assert resumed.rows[1:] == run.rows[2:]  # the first has the means of what is left of its cycle


# Scores --------------------------------------------------------------------------------------------------------------------------


def test_the_teacher_passes_its_own_exam(toy: Toy) -> None:
    exam = Exam(toy, g=1.0, n=600, near=300)
    teacher = Denoiser(toy.network(), toy.schedule, "v", null=toy.null())
    fine = Grid.named("trailing", 32, 1000)
    scores = exam.score(Policy(teacher, ddim, fine=fine), Grid.named("trailing", 4, 1000))
    assert {len(v) for v in scores.values()} == {2}
    for m in range(2):
        assert abs(scores["energy_distance"][m]) < 0.02 and abs(scores["energy_teacher"][m]) < 0.02 and abs(scores["shift"][m]) < 0.02
        assert scores["teacher_rmse"][m] == 0 and scores["high_quality"][m] > 0.98 and scores["outside"][m] == 0
        assert scores["coverage"][m] > 0.85 and 0.8 < scores["density"][m] < 1.3 and scores["mode_kl"][m] < 0.03
        nodes = [scores[f"shift@{t}"][m] for t in (749, 499, 249)]
        assert scores["shift"][m] == pytest.approx(sum(nodes) / 3) and "shift@999" not in scores
    one = exam.score(Policy(teacher, ddim), Grid.named("trailing", 1, 1000))
    assert min(one["energy_distance"]) > 0.05 and min(one["teacher_rmse"]) > 0.3 and one["shift"] == [0.0, 0.0]


def test_energy_distance_in_closed_form() -> None:
    """Two points a, b against two points c, d in the plane; and zero on average between samples of one law, so it must go below zero."""
    x, y = torch.zeros(4, 2), torch.tensor([[3.0, 4.0]] * 4)
    assert energy_distance(x, y) == pytest.approx(10)
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([energy_distance(*torch.randn(2, 12, 2, generator=generator)) for _ in range(400)])
    assert float(found.min()) < 0 and abs(float(found.mean())) < 4 * float(found.std()) / 20
    a, b = torch.randn(1500, 1, generator=generator), 2 + torch.randn(1500, 1, generator=generator)
    # 2 E|X - Y| - E|X - X'| - E|Y - Y'| for N(0, 1) and N(2, 1): differences are N(2, 2), N(0, 2), N(0, 2).
    s, m = 2**0.5, 2.0
    folded = s * (2 / torch.pi) ** 0.5 * torch.tensor(-(m**2) / (2 * s**2)).exp() + m * torch.erf(torch.tensor(m / (s * 2**0.5)))
    assert energy_distance(a, b) == pytest.approx(float(2 * folded - 2 * s * (2 / torch.pi) ** 0.5), rel=0.08)


def test_modes_in_closed_form() -> None:
    problem = Problem(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([0.25, 0.75]), torch.tensor([0, 1]), 0.5)
    x = torch.tensor([[0.0, 0.0]] + [[10.0, 0.0]] * 3)
    # With half a point added, the shares are 1.5 / 5 and 3.5 / 5.
    expected = 0.25 * math.log(0.25 / 0.3) + 0.75 * math.log(0.75 / 0.7)
    assert mode_kl(x, problem) == pytest.approx(expected)
    assert mode_kl(x[1:].repeat(100, 1), problem) > 1  # a lost mode
    classes = torch.tensor([0, 1, 1, 0])
    assert high_quality(x, classes, problem) == 0.75  # the last lies on a mode, but of another class
    assert high_quality(x + torch.tensor([0.0, 1.99]), classes, problem) == 0.75
    assert high_quality(x + torch.tensor([0.0, 2.01]), classes, problem) == 0
    assert outside(x - torch.tensor([2.01, 0.0]), problem) == 0.25


def test_rows_of_a_method(toy: Toy) -> None:
    method = LCM(pipeline=toy, w_conditioned=False, guidance=2.0)
    rows = method_rows(method.eval(), [4], [2, 1], n=64)
    assert [(r["name"], r["nfe"]) for r in rows] == [("teacher@4", 8), ("student@2", 2), ("student@1", 1)]
    assert all(r["metrics"]["energy_distance"] is not None and r["seconds_per_image"] > 0 for r in rows)
