"""Metrics against closed forms, against the libraries they replace, and over two processes."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.gaussians import frechet_distance
from ddil_lightning.evaluation.batches import Batch, as_saved
from ddil_lightning.evaluation.given import Given, Judge, Reference, View, chunked
from ddil_lightning.evaluation.metrics.alignment import Alignment, attribute_accuracy
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.evaluation.metrics.diversity import Diversity, check_range, seed_diversity
from ddil_lightning.evaluation.metrics.frechet import Frechet
from ddil_lightning.evaluation.metrics.modes import ModeCoverage
from ddil_lightning.evaluation.metrics.prdc import density_coverage
from ddil_lightning.evaluation.networks import (
    ClipNet,
    MapDistance,
    Networks,
    cosine,
    inception_features,
    lpips_distance,
    said,
)
from ddil_lightning.evaluation.registry import metrics, unmeasured
from ddil_lightning.evaluation.stamps import notes
from ddil_lightning.evaluation.suite import Probes, Suite, make_row
from ddil_lightning.evaluation.views import Crops
from pair import Pair


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def net(seed: int = 0, d: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, d))


# images


def test_images_are_scored_as_a_file_would_hold_them():
    x = torch.tensor([-1.3, -1.0, 0.0, 0.003, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    levels = (as_saved(x)[0, 0, 0] + 1) * 127.5
    assert levels.tolist() == pytest.approx([0, 0, 128, 128, 255, 255], abs=1e-4)
    assert torch.equal(as_saved(as_saved(x)), as_saved(x))


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, 4, 4), torch.full((2, 3, 4, 4), math.nan)])
def test_unscorable_images_are_refused(bad):
    with pytest.raises(ValueError, match="images: "):
        as_saved(bad)


def test_chunks_do_not_change_features():
    f, x = net().eval(), pictures(7, 3, 8, 8)
    torch.testing.assert_close(chunked(f, x, 2), f(x).detach())
    with pytest.raises(ValueError, match="must return"):
        chunked(lambda x: x, x)


# Frechet


def test_frechet_in_batches_is_that_of_the_whole():
    real, fake = pictures(101, 3, 2, 2), pictures(77, 3, 2, 2, seed=1) * 0.5
    metric = measured(Frechet(), fake, given(real.flatten(1)), size=13)
    assert metric.compute() == {"frechet": frechet_distance(real.flatten(1), fake.flatten(1))}
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(ValueError, match="metric Frechet: nothing was measured"):
        metric.compute()


def test_inception_without_torch_fidelity_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"need torch-fidelity: pip install 'ddil-lightning\[eval\]'"):
        inception_features()


# density and coverage


def test_density_and_coverage_of_equal_laws():
    """Naeem et al.: E density = 1, E coverage = 1 - prod (N-j)/(M+N-j); any dimension, any continuous law."""
    values = torch.tensor([density_coverage(randn(200, 3, seed=s), randn(150, 3, seed=s + 1000)) for s in range(60)]).double()
    mean, error = values.mean(0), values.std(0) / len(values) ** 0.5
    expected = torch.tensor([1.0, 1 - math.prod((200 - j) / (150 + 200 - j) for j in range(1, 6))])
    assert ((mean - expected).abs() < 4 * error).all(), (mean, expected, error)


def test_density_and_coverage_of_a_set_with_itself():
    x = randn(80, 4)
    assert density_coverage(x, x, k=5) == (1.0, 1.0)


def test_density_and_coverage_by_hand():
    real = torch.tensor([[0.0], [1.0], [10.0], [12.0]])  # k = 1: radii 1, 1, 2, 2
    fake = torch.tensor([[0.5], [11.0], [50.0]])
    assert density_coverage(real, fake, k=1) == (4 / 3, 1.0)
    assert density_coverage(real, torch.tensor([[0.5]]), k=1) == (2.0, 0.5)  # one mode only: dense, half covered
    assert density_coverage(real, torch.tensor([[50.0]]), k=1) == (0.0, 0.0)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_density_and_coverage_chunks(chunk):
    real, fake = randn(50, 6) + 100, randn(33, 6, seed=1) + 100  # far from the origin: cancellation would show
    d2 = torch.cdist(real.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    radius = d2.sort(1).values[:, 5]
    within = torch.cdist(real.double(), fake.double(), compute_mode="donot_use_mm_for_euclid_dist") < radius[:, None]
    expected = (float(within.sum() / (5 * 33)), float(within.any(1).double().mean()))
    assert density_coverage(real, fake, chunk=chunk) == pytest.approx(expected, abs=1e-7)


def test_density_refuses_too_few():
    with pytest.raises(ValueError, match="k=5 needs more than k"):
        density_coverage(randn(5, 2), randn(5, 2))


# CLIP


def encoders(prefix: str = "") -> ClipNet:
    image = net(1).eval()
    words = randn(512, 8, seed=4)
    return ClipNet(image, lambda prompts: torch.stack([words[list(p.encode())].mean(0) for p in prompts]), prefix)


def test_cosine_closed_form():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    assert cosine(a, b).tolist() == pytest.approx([0.96, -1.0])


def test_clip_score_ignores_the_size_of_batches():
    x, prompts = pictures(9, 3, 8, 8), [f"a red {i}" for i in range(9)]
    whole = encoders().score(x, prompts)
    torch.testing.assert_close(encoders().score(x, prompts, chunk=2), whole)
    by_hand = [torch.cosine_similarity(encoders().image(x[i : i + 1]), encoders().text([p])) for i, p in enumerate(prompts)]
    torch.testing.assert_close(whole, torch.cat(by_hand).double(), rtol=1e-5, atol=1e-6)


def test_clip_prefix_is_prepended():
    x = pictures(2, 3, 8, 8)
    with_prefix = encoders("A photo depicts").score(x, ["a", "b"])
    torch.testing.assert_close(with_prefix, encoders().score(x, ["A photo depicts a", "A photo depicts b"]))


def test_clip_refuses_unpaired():
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        encoders().score(pictures(2, 3, 8, 8), ["a"])


# LPIPS diversity


def trunk(seed: int = 0):
    torch.manual_seed(seed)
    a, b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3, stride=2)
    return lambda x: [a(x).relu(), b(a(x).relu()).relu()]


def test_map_distance_is_unweighted_lpips_per_layer():
    """Against the LPIPS package on one random trunk: its `lpips=False` baseline sums the layers that ours averages."""
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net="alex", pnet_rand=True, lpips=False, verbose=False).eval()
    a, b = pictures(2, 3, 64, 64), pictures(2, 3, 64, 64, seed=1)
    ours = MapDistance(lambda x: list(model.net(model.scaling_layer(x))))
    with torch.no_grad():
        torch.testing.assert_close(5 * ours(a, b), model(a, b).flatten(), rtol=1e-4, atol=1e-6)


def test_lpips_of_equal_images_is_zero_and_fast_path_agrees():
    d = lpips_distance(random_trunk=True)
    x = pictures(1, 3, 3, 64, 64)
    assert float(d(x[0], x[0]).abs().max()) == 0
    assert float(seed_diversity(x[:, :1].expand(1, 3, 3, 64, 64), d)) == 0
    pairs = [float(d(x[0, i : i + 1], x[0, j : j + 1])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert float(seed_diversity(x, d, chunk=2)) == pytest.approx(sum(pairs) / 3, rel=1e-5)


def test_diversity_is_the_mean_over_pairs_then_prompts():
    """With |a - b|^2 of constant images: values v give pairs (v_i - v_j)^2."""
    values = torch.tensor([[0.0, 0.2, -0.4], [0.1, 0.1, 0.1]])
    images = values[:, :, None, None, None].expand(2, 3, 3, 4, 4)
    got = seed_diversity(images, lambda a, b: (a - b)[:, 0, 0, 0].square())
    assert got.tolist() == pytest.approx([(0.04 + 0.16 + 0.36) / 3, 0.0], abs=1e-7)
    x = pictures(3, 4, 3, 12, 12)
    explicit = seed_diversity(x, lambda a, b: MapDistance(trunk())(a, b))  # without `embed`: pair by pair
    m = measured(Diversity(), x.flatten(0, 1), Given(Networks(distance=MapDistance(trunk()))), size=4, seeds=4)
    assert m.compute() == {"lpips_diversity": pytest.approx(float(explicit.mean()), rel=1e-5), "intervals": {}}


def test_range_check():
    with pytest.raises(ValueError, match="uint8"):
        check_range(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"clamp them to \[-1, 1\]"):
        check_range(torch.tensor([0.0, 255.0]))
    with pytest.raises(ValueError, match=r"clamp them to \[-1, 1\]"):
        check_range(torch.tensor([math.nan]))
    with pytest.warns(UserWarning, match=r"not \[0, 1\]"):
        check_range(torch.rand(2, 3, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_range(pictures(2, 3, 4, 4))


# alignment


def test_attribute_accuracy_by_hand():
    """Mean over images of the mean over what was asked; the last image was asked nothing."""
    nan = math.nan
    v = {"colour": torch.tensor([1.0, 0.5, 1, nan]), "shape": torch.tensor([1.0, 1, nan, nan]), "size": torch.full((4,), nan)}
    out = attribute_accuracy(v)
    assert out["attribute_accuracy"] == pytest.approx((1 + 0.75 + 1) / 3) and out["all_right"] == pytest.approx(2 / 3)
    assert out["per_attribute"] == {"colour": pytest.approx(2.5 / 3), "shape": 1.0, "size": None}

    def judge(images: Tensor, prompts: list[str]) -> Verdict:
        rows = [int(p) for p in prompts]
        return Verdict({k: x[rows] for k, x in v.items()}, torch.zeros(len(rows)))

    m = measured(Alignment(), pictures(4, 3, 2, 2), Given(judge=Judge(judge)), prompts=["0", "1", "2", "3"], size=3)
    assert m.compute() == out
    with pytest.raises(ValueError, match=r"verdicts on \['colour'\], expected"):
        measured(m, pictures(1, 3, 2, 2), Given(judge=Judge(lambda x, p: Verdict({"colour": torch.ones(1)}, torch.zeros(1)))))
    with pytest.raises(ValueError, match="share right"):
        attribute_accuracy({"colour": torch.tensor([1.5])})
    assert attribute_accuracy({"size": v["size"]})["attribute_accuracy"] is None


def brightness(images: Tensor, captions) -> float:
    """A stand-in for a judge: depends on every image and on which caption it belongs to."""
    return float((images.mean((1, 2, 3)) * torch.tensor([len(c) for c in captions])).mean())


def test_mode_coverage_sees_all_images_and_their_prompts():
    x, prompts = as_saved(pictures(5, 3, 4, 4)), ["a", "a red", "a large", "a large", "a red"]
    m = measured(ModeCoverage(), x, Given(judge=Judge(modes=brightness)), prompts=prompts, size=2)
    assert m.compute() == {"mode_coverage": pytest.approx(brightness(x, prompts))}


# all of them


class Verdict(NamedTuple):
    correct: dict[str, Tensor]
    residual: Tensor


def given(real: Tensor) -> Given:
    """The pixels themselves as features."""
    return Given(Networks(lambda x: x.flatten(1)), Reference({"features": real}))


def measured(metric: Metric, images: Tensor, given: Given, prompts: list[str] | None = None, size: int = 100, seeds: int = 1) -> Metric:
    """A metric that has seen images in batches of `size`."""
    asked = prompts or ["x"] * len(images)
    for rows in torch.arange(len(images)).split(size) if len(images) else ():
        metric.update(Batch(images[rows], rows, asked, given, seeds))
    return metric


class Brightness(nn.Module):
    """A judge that is a network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, images: Tensor, prompts: list[str]) -> float:
        return brightness(images, prompts)


def everything() -> Given:
    """All that a metric can need, networks among it."""

    def judge(images: Tensor, prompts: list[str]) -> Verdict:
        right = (torch.tensor([int(p.split()[-1]) for p in prompts]) % 3 > 0).float()
        return Verdict({"colour": right, "shape": 1 - right}, images.flatten(1).std(1))

    liked = {name: encoders(name).score for name in ("hps", "pickscore", "image_reward")}
    networks = Networks(net().eval(), encoders().score, MapDistance(trunk()), embed=net(5, 6).eval(), **liked)
    made = Given(networks, judge=Judge(judge, Brightness()), view=View(crops=Crops(6, 12, 2)))
    real, teacher = (Reference(made.rows_of([pictures(15, 3, 12, 12, seed=s)])) for s in (0, 3))
    return replace(made, reference=real, teacher=teacher)


def fill(rank: int, world: int) -> dict[str, Any]:
    """All metrics of every `world`-th image, or probe of three images, from `rank`: unequal shares."""
    images, prompts = pictures(13, 3, 12, 12, seed=1) * 0.8, [f"caption {i}" for i in range(13)]
    probed = pictures(15, 3, 12, 12, seed=2)
    out: dict[str, Any] = {"intervals": {}}
    for kind in metrics():
        metric = kind(sync_on_compute=True)
        if kind.over == "prompts":
            metric.update(Batch(images[rank::world], torch.arange(13)[rank::world], prompts, everything()))
        else:
            index = torch.arange(15).view(5, 3)[rank::world].flatten()
            asked = [f"probe {'x' * (i // 3)}" for i in range(15)]
            metric.update(Batch(probed[index], index, asked, everything(), seeds=3))
        found = metric.compute()
        out |= found | {"intervals": out["intervals"] | found.get("intervals", {})}
    return out


def flat(values: dict) -> dict[str, float]:
    return {f"{a}.{b}": v for a, x in values.items() for b, v in (x.items() if isinstance(x, dict) else [("", x)])}


def test_two_processes_equal_one(pair: Pair):
    one, both = flat(fill(0, 1)), [flat(found) for found in pair.run(fill, 2)]
    assert {k.split(".")[0] for k in one} == set(unmeasured()) and one["attribute_accuracy."] == 0.5 and None not in one.values()
    assert {"intervals.clip", "intervals.density", "intervals.saturation_drift"} < set(one) and "intervals.vendi" not in one  # 5 prompts
    for got in both:
        torch.testing.assert_close(got, one, rtol=1e-6, atol=1e-9)


def alone(rank: int) -> dict[str, object] | None:
    if rank:
        return None
    suite = Suite("alone", [f"caption {i}" for i in range(13)], everything(), Probes(["probe"], 3))
    return suite.score(lambda prompts, seed: pictures(len(prompts), 3, 12, 12, seed=seed))


def test_a_process_that_scores_waits_for_no_other(pair: Pair):
    """Several processes train, one of them scores: a metric that gathered over all of them would hang."""
    score, other = pair.run(alone, timeout=60)
    assert other is None
    assert set(score) == set(unmeasured()) and None not in score.values()


def test_no_metric_owns_a_network():
    holder, batch = nn.Module(), Batch(pictures(12, 3, 12, 12), torch.arange(12), [f"caption {i}" for i in range(12)], everything(), 3)
    for i, kind in enumerate(metrics()):
        metric = kind()
        metric.update(batch)
        setattr(holder, f"metric{i}", metric)
    assert not list(holder.parameters()) and not holder.state_dict()
    assert not any(isinstance(c, nn.Conv2d) for c in holder.modules())


def test_two_networks_of_one_name_have_two_stamps_or_are_said_to_be_unverified():
    """Rows by two closures of one factory, two partials of a function, or two modules of a class were compared in silence."""

    def scaled(images, prompts=None, by=1.0):
        return images.mean((1, 2, 3)) * by

    def factory(by):
        def scorer(images, prompts):
            return images.mean((1, 2, 3)) * by

        return scorer

    class Held:
        def __init__(self, by):
            self.by = by

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3)) * self.by

    def protocol(**networks):
        return Suite("s", ["a"] * 4, Given(Networks(**networks))).protocol

    def stamps(*nets, key="hps"):
        return len({protocol(**{key: x})["stamp"] for x in nets})

    torch.manual_seed(0)
    one, other = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    same = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    same.load_state_dict(one.state_dict())
    assert stamps(one, other, key="features") == 2 and stamps(one, same, key="features") == 1
    with torch.no_grad():
        same[1].bias[0] += 1
    assert stamps(one, same, key="features") == 2
    assert stamps(one.forward, other.forward, key="features") == 2
    assert stamps(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), key="features") == 2
    module = partial(brightness)
    assert stamps(partial(module, 2), partial(module, 3), partial(module, torch.ones(2)), partial(module, torch.zeros(2))) == 4
    assert "unverified" not in said(partial(brightness, by=2)) and "unverified" not in said(brightness)
    assert "unverified" in said(partial(brightness, object()))
    for net in (factory(1.0), Held(1.0), lambda x, p: x, Held(1.0).__call__, scaled, partial(factory(1.0), by=2)):
        words = said(net)
        assert "(unverified)" in words and words.startswith(("test_metrics.", f"{__name__}."))
        rows = [make_row(name, 4, 1.0, 4, 0.1, {}, protocol(hps=net)) for name in "ab"]
        assert notes(rows) == [f"Known by name alone, so that it may not be the same in all rows: {words}."]
        assert notes(rows[:1]) == []


@pytest.mark.parametrize(("data", "judge"), [("shapes", "judge"), ("digits", "digits")])
def test_the_built_in_evaluator_is_named_as_in_published_rows(data, judge):
    """Its weights are the package's own; other words would part every row from those that are kept and published."""
    mine, read = "ddil_lightning.miniature.evaluator.Evaluator", f"ddil_lightning.miniature.{judge}"
    images = f"{mine}.image_features"
    assert Suite.builtin(data, 16, 0).protocol["networks"] == {
        "features": images,
        "clip": None,
        "distance": f"unweighted LPIPS of {mine}.image_feature_maps",
        "text": f"{mine}.text_features",
        "embed": images,
        "judge": f"{read}.judge",
        "modes": f"{read}.mode_coverage",
    }


def test_networks_are_named_in_words():
    assert Networks("inception", "open_clip", "lpips").about() == {
        "features": "Inception-v3 pool3 (TensorFlow FID weights, torch-fidelity)",
        "clip": "OpenCLIP ViT-g-14 laion2b_s12b_b42k",
        "distance": "LPIPS 0.1 alex",
        "text": None,
        "embed": None,
    }
    assert said(lpips_distance(random_trunk=True)) == "LPIPS 0.1 alex with a random trunk"
    assert str(said(net())).startswith("torch.nn.modules.container.Sequential ") and said(brightness) == f"{__name__}.brightness"
    assert said(MapDistance(encoders().score)).startswith("unweighted LPIPS of torch.nn")
    with pytest.raises(ValueError, match="no network 'dinov9': did you mean dinov2. choose inception, inception_clean_fid, open_clip, "):
        Networks(distance="dinov9").load()
    with pytest.raises(ValueError, match="Given: the network 'lpips' is named and not made; give Networks"):
        Given(Networks(distance="lpips"))
