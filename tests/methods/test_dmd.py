"""DMD against METHODS 4: matching as DMD2's, and the regression on the teacher's answers where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_dmd2 import Exact
from torch import Tensor

from ddil_lightning.data.pairs import Maker
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.feed import Pairs, Wants
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import roll
from ddil_lightning.methods import DMD, DMD2
from ddil_lightning.processes import Processes
from ddil_lightning.records import FORWARD, MIXED, STUDENT, TEACHER, CaptionBatch, Context, LatentBatch
from ddil_lightning.training.regression import Regression, evaluator_distance, map_distance
from suite import Entry, backbone, build, captions, fit
from toys import Toy

ENTRY = Entry("dmd", DMD, {"guidance": 2.0, "reflect": "off", "pairs": {"steps": 2}})


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


def batch(method: Any, tiny: Path, whole: list[int], source: list[int], node: list[int]) -> LatentBatch:
    """Random latents, noise and ends of so many samples."""
    n, g = len(whole), torch.Generator().manual_seed(0)
    x, noise, end = torch.randn(3, n, 4, 8, 8, generator=g)
    c = backbone(tiny).encode_text(["a red circle"] * n).guided(1.0)
    i = torch.tensor(node)
    t, s = method.grid.times[i], method.grid.times[i + 1]
    return LatentBatch(x, t, s, i, c, None, torch.tensor(source), torch.ones(n), t * 0 - 1, None, noise, end, torch.tensor(whole))


def test_the_regression_is_there_where_the_teacher_has_an_answer_and_nowhere_else(tiny: Path) -> None:
    """At the noise of a pair and on trajectories of its own; not at a later point between the ends, nor where the student took part."""
    method = build(ENTRY, tiny, steps=2, regression={"weight": 0.25})
    with torch.no_grad():
        for p in method.critic.parameters():
            p.add_(0.05 * torch.randn_like(p, memory_format=torch.contiguous_format))
    b = batch(method, tiny, [FORWARD, FORWARD, TEACHER, TEACHER, MIXED, STUDENT], [0, 0, 2, 2, 2, 1], [0, 1, 0, 1, 0, 0])
    x = method.student(b.x_t, b.t, b.c).x0
    added = method.loss(x, b) - method.matching(x, b)
    expected = 0.25 * mse(x, b.end) * torch.tensor([1, 0, 1, 1, 0, 0])
    torch.testing.assert_close(added, expected, atol=1e-6, rtol=1e-5)
    assert float(expected[0].detach()) > 0


def test_with_weight_0_it_is_dmd2_without_a_gan_and_asks_for_no_pairs(tiny: Path) -> None:
    made = build(ENTRY, tiny, regression={"weight": 0.0})
    other = build(
        Entry("dmd2", DMD2, {"guidance": 2.0, "reflect": "off", "gan": {"weight": 0.0, "critic_weight": 0.0}}), tiny, steps=1, rollouts=(1,)
    )
    b = batch(made, tiny, [TEACHER], [2], [0])
    assert made.wants == other.wants == Wants(pure_noise=True, real=False)
    assert build(ENTRY, tiny).wants == Wants(pure_noise=True, ends=True, pairs=Pairs(steps=2), real=False)
    assert made.adversary.every == 1 and made.grid.times.tolist() == [999, -1]
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(made.loss(x, b), other.loss(x, b))


def test_the_generator_that_the_regression_asks_for_is_the_teachers_map() -> None:
    """Of N(mu, S^2) DDIM is an affine map of noise, as is a + b z: where least squares finds that map, no gradient is left."""
    exact = Exact(0.5, 0.7, 0.0, 0.5)
    rows = torch.arange(256)

    def taken(some: Tensor) -> CaptionBatch:
        return CaptionBatch(None, Context(torch.zeros(len(some), 1, 1)), some)

    exact.fingerprint = lambda: "exact"  # type: ignore[method-assign]
    pair = Maker(Pairs(steps=16), exact, (1.0, 1.0), taken, 256, Processes()).made([rows], None).of(rows, rows * 0)  # type: ignore[arg-type]
    z, y = pair.noise.double(), pair.end.double()
    design = torch.cat([torch.ones_like(z), z], 1)
    a, b = torch.linalg.lstsq(design, y).solution.flatten().tolist()
    assert float((design @ torch.tensor([[a], [b]], dtype=torch.float64) - y).abs().max()) < 2e-3  # affine, up to half precision
    assert a == pytest.approx(0.5, abs=0.1) and b == pytest.approx(0.7, abs=0.1)  # of so few steps

    def gradient(a: float, b: float) -> list[float]:
        method = DMD(pipeline=Exact(0.5, 0.7, a, b), guidance=1.0, regression=Regression(1.0))
        method.matching = lambda x, b, *heard: 0 * x.flatten(1).mean(1)  # type: ignore[method-assign]
        t = torch.full((256,), 999)
        one = LatentBatch(
            z, t, t * 0 - 1, t * 0, Context(torch.zeros(256, 1, 1)), None, t * 0, torch.ones(256), t * 0 - 1, None, z, y, t * 0
        )
        method.loss(method.student(one.x_t, one.t, one.c).x0, one).mean().backward()
        net = method.student.network
        return [float(net.a.grad), float(net.b.grad)]

    assert max(map(abs, gradient(a, b))) < 1e-4
    assert gradient(a - 0.1, b)[0] == pytest.approx(-0.2, abs=0.02) and gradient(a, b + 0.1)[1] > 0.1


def test_who_made_the_end_of_a_trajectory_is_known() -> None:
    toy = Toy()
    policies = Policies(toy.policies.student, toy.policies.teacher)
    c = Context(torch.zeros(3, 1, 1)).guided(1.0)
    for actors, tag in (([False] * 4, TEACHER), ([True] * 4, STUDENT), ([False, False, False, True], MIXED)):
        made = roll(policies, toy.grid, actors, c, (2, 4, 4), torch.Generator().manual_seed(0), ends=True)
        assert made.whole is not None and made.whole.tolist() == [tag] * 3
    assert made.source.tolist() == [TEACHER] * 12  # its states are the teacher's, and its end is not
    assert isinstance(policies.student, Policy)


def test_a_run_regresses_on_stored_pairs_and_on_trajectories(tiny: Path) -> None:
    for prior in (SamplingPrior(0.5, 0.5), SamplingPrior(0, 0.5, 0.5)):
        run = fit(build(ENTRY, tiny, updates=2), captions(tiny, prior))
        assert all(row["regression"] > 0 for row in run.rows) and run.method.student_updates == 2
    with pytest.raises(ValueError, match=r"set model\.pairs\.each to 1 or more"):
        fit(build(ENTRY, tiny, updates=2, pairs={"each": 0}), captions(tiny, SamplingPrior()))


def test_images_are_compared_by_what_the_evaluator_sees(tiny: Path) -> None:
    method = build(ENTRY, tiny, regression={"of": "features"})
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x.detach() + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
    d = method._distance(x, y)
    d.sum().backward()
    assert float(d[0]) < 3e-4 < 1e-3 < float(d[1]) < 4 and x.grad is not None and float(x.grad[1].abs().max()) > 0
    assert not any("evaluator" in name or "clip" in name for name in method.state_dict())
    a, b = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    from ddil_lightning.evaluation.networks.lpips import MapDistance
    from ddil_lightning.miniature.evaluator import load_evaluator

    maps = load_evaluator().image_feature_maps
    torch.testing.assert_close(evaluator_distance()(a, b), MapDistance(maps)(a, b), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(map_distance([torch.ones(1, 2, 2, 2)], [torch.zeros(1, 2, 2, 2)]), torch.tensor([2.0]))


def test_lpips_is_the_packages_own_of_decodes_in_minus_one_to_one(tiny: Path, tmp_path: Path) -> None:
    """By a trunk as torchvision publishes it; of images in [0, 1], which LPIPS does not take, it would be another number."""
    from lpips import LPIPS
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    layers, file = make_layers(cfgs["D"], batch_norm=False), tmp_path / "vgg16.pth"
    stored = {f"features.{key}": value for key, value in layers.state_dict().items()}
    torch.save({**stored, "classifier.6.bias": torch.zeros(1000)}, file)
    theirs = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    with torch.no_grad():
        for mine, own in zip(theirs.net.parameters(), layers.parameters(), strict=True):
            mine.copy_(own)
    pipe, (x, y) = backbone(tiny), torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = Regression(of="lpips", trunk=str(file)).between(pipe)(x.requires_grad_(), y.requires_grad_())
    with torch.no_grad():
        a, b = pipe.decode(x, gradients=True), pipe.decode(y)
        assert float(b.min()) < -0.1 and float(b.max()) > 0.1
        torch.testing.assert_close(found.detach(), theirs(a, b).flatten())
        assert float((found - theirs((a + 1) / 2, (b + 1) / 2).flatten()).abs().min()) > 1e-2 * float(found.min())
    found.sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0 and y.grad is None


def test_lpips_needs_its_weights() -> None:
    with pytest.raises(ValueError, match=r"regression\.of is lpips and regression\.trunk is None: give the file of torchvision's VGG-16"):
        Regression(of="lpips")


@pytest.mark.slow
def test_a_file_of_other_weights_is_no_trunk(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="holds no weights of torchvision's VGG-16|the package is missing"):
        Regression(of="lpips", trunk=str(tmp_path / "vgg.pth")).between(None)


def test_a_student_of_one_step_is_asked_for_no_more(tiny: Path) -> None:
    deployment = build(ENTRY, tiny).deployment
    assert deployment.steps == (1,) and deployment.grid(1).times.tolist() == [999, -1]
    with pytest.raises(ValueError, match=r"^the student is made for one step: further ones begin at latents"):
        deployment.grid(4)


def test_a_real_score_that_its_pairs_contradict_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"^scores\.guidance = 1 moves the student elsewhere than its pairs, whose guidance is 2: "):
        build(ENTRY, tiny, scores={"guidance": 1.0})
    assert build(ENTRY, tiny, scores={"guidance": 2.0}).scores.guidance == 2
    assert build(ENTRY, tiny, scores={"guidance": 1.0}, regression={"weight": 0.0}).scores.guidance == 1
