"""Distances, diversity and tones against closed forms and other libraries; intervals; the two ways in which a FID resizes."""

from __future__ import annotations

import colorsys
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from PIL import Image
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor, nn
from torchmetrics.image.kid import poly_mmd
from torchvision.transforms.functional import center_crop

from ddil_lightning.diffusion.gaussians import frechet_distance
from ddil_lightning.evaluation.batches import Batch, as_saved
from ddil_lightning.evaluation.given import Given, Reference, View
from ddil_lightning.evaluation.intervals import interval, means
from ddil_lightning.evaluation.kernels import Gaussian, cubic, squared_mmd
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.evaluation.metrics.cmmd import Cmmd, cmmd
from ddil_lightning.evaluation.metrics.kid import Kid
from ddil_lightning.evaluation.metrics.patches import PatchFrechet
from ddil_lightning.evaluation.metrics.prdc import DensityCoverage, density_coverage, precision_recall
from ddil_lightning.evaluation.metrics.tones import Tones
from ddil_lightning.evaluation.metrics.vendi import Vendi, spread
from ddil_lightning.evaluation.networks import INCEPTION, LAYERS, Networks, clean, inception_features
from ddil_lightning.evaluation.suite import Probes, Suite
from ddil_lightning.evaluation.views import Crops, tones


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return as_saved(torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1)


def flat(images: Tensor) -> Tensor:
    return images.flatten(1)


def measured(metric: Metric, images: Tensor, given: Given, size: int = 5, seeds: int = 1) -> dict:
    for rows in torch.arange(len(images)).split(size):
        metric.update(Batch(images[rows], rows, ["x"] * len(images), given, seeds))
    return metric.compute()


# Kernels: KID and CMMD


@pytest.mark.parametrize("chunk", [7, 1024])
def test_kid_is_that_of_all_pairs_in_torchmetrics(chunk: int) -> None:
    """Whose formula needs sets of one size."""
    x, y = randn(60, 9) + 3, 1.2 * randn(60, 9, seed=1) + 3
    assert squared_mmd(cubic, x, y, chunk=chunk) == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)
    few = y[:17]
    pairs = [(i, j) for i in range(17) for j in range(17) if i != j]
    within = sum(float(cubic(few[i : i + 1], few[j : j + 1])) for i, j in pairs) / len(pairs)
    across = float(cubic(x, few).mean())
    own = (float(cubic(x, x).sum()) - float(cubic(x, x).trace())) / (60 * 59)
    assert squared_mmd(cubic, x, few, chunk=chunk) == pytest.approx(own + within - 2 * across, rel=1e-9)


def test_kid_of_gaussians() -> None:
    """In one dimension (x y + 1)^3 compares the first three moments: 3 (m1 - m1')^2 + 3 (m2 - m2')^2 + (m3 - m3')^2."""
    mu = 0.4
    exact = 3 * mu**2 + 3 * mu**4 + (mu**3 + 3 * mu) ** 2
    for expected, shift in ((exact, mu), (0.0, 0.0)):
        found = torch.tensor([squared_mmd(cubic, randn(150, 1, seed=s), randn(100, 1, seed=99 + s) + shift) for s in range(60)])
        assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / 60**0.5
    assert (
        float(torch.tensor([squared_mmd(cubic, randn(150, 1, seed=s), randn(100, 1, seed=99 + s), unbiased=False) for s in range(9)]).min())
        > 0
    )


def test_kid_of_a_set_with_itself() -> None:
    """2/n times what a pair of different points has less than a point with itself, below 0: a fresh set would be farther away."""
    x = pictures(11, 3, 2, 2)
    f = flat(x).double()
    k = (f @ f.T / 12 + 1) ** 3
    off = (k.sum() - k.trace()) / (11 * 10)
    found = measured(Kid(), x, Given(Networks(flat), Reference({"features": flat(x)})))
    assert found == {"kid": pytest.approx(2 / 11 * float(off - k.trace() / 11), rel=1e-9)} and found["kid"] < 0
    with pytest.raises(ValueError, match=r"kernel distance: features \(1, 3\) and \(5, 3\); both must be \[N >= 2, D\]"):
        squared_mmd(cubic, torch.zeros(1, 3), torch.zeros(5, 3))


def test_cmmd_is_the_authors_formula_on_unit_embeddings() -> None:
    x, y = pictures(23, 3, 2, 2), pictures(14, 3, 2, 2, seed=1) * 0.5
    a, b = (flat(z).double().numpy() for z in (x, y))
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    expected = 1000 * (
        rbf_kernel(a, gamma=1 / 200).mean() + rbf_kernel(b, gamma=1 / 200).mean() - 2 * rbf_kernel(a, b, gamma=1 / 200).mean()
    )
    made = Given(Networks(embed=flat))
    given = Given(made.networks, Reference(made.rows_of([x[:20], x[20:]])))
    assert measured(Cmmd(), y, given) == {"cmmd": pytest.approx(expected, rel=1e-4)}
    assert measured(Cmmd(), x, given) == {"cmmd": pytest.approx(0, abs=1e-5)} and cmmd(torch.tensor(a), torch.tensor(b)) > 0


def test_gaussian_kernel_of_gaussians() -> None:
    """E k of N(0, s^2 I) and N(m, s^2 I): (sigma^2 / v)^(D/2) exp(-|m|^2 / 2v), v = sigma^2 + 2 s^2."""
    d, sigma, s, m = 3, 1.5, 0.7, torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
    v = sigma**2 + 2 * s**2
    exact = 2 * (sigma**2 / v) ** (d / 2) * (1 - math.exp(-float(m.square().sum()) / (2 * v)))
    found = torch.tensor([squared_mmd(Gaussian(sigma), s * randn(120, d, seed=i), m + s * randn(90, d, seed=99 + i)) for i in range(60)])
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / 60**0.5 and exact > 0.05


# Precision and recall


@pytest.mark.parametrize("chunk", [7, 1024])
def test_precision_and_recall_are_the_definition(chunk: int) -> None:
    real, fake = randn(60, 3) + 50, 0.8 * randn(40, 3, seed=1) + 51
    within = [np.sort(pairwise_distances(z), axis=1)[:, 5] for z in (real, fake)]  # the point itself comes first
    apart = pairwise_distances(real, fake)
    expected = (apart < within[0][:, None]).any(0).mean(), (apart < within[1][None]).any(1).mean()
    assert precision_recall(real, fake, chunk=chunk) == pytest.approx(expected) and 0.2 < expected[0] < expected[1] < 1
    given = Given(Networks(flat), Reference({"features": real}))
    found = measured(DensityCoverage(), fake[..., None, None], given)
    assert (found["precision"], found["recall"]) == pytest.approx(expected)
    assert (found["density"], found["coverage"]) == density_coverage(real, fake)
    low, high = found["intervals"]["precision"]
    assert low < found["precision"] < high and set(found["intervals"]) == {"precision", "density"}


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [10.0], [12.0]])  # k = 1: radii 1, 1, 2, 2
    fake = torch.tensor([[0.5], [0.7], [50.0]])  # 0.2, 0.2, 49.3: the outlier's ball has 1, 10 and 12 in it and not 0
    assert precision_recall(real, fake, k=1) == (2 / 3, 3 / 4)
    assert precision_recall(real, torch.zeros(3, 1), k=1) == (1.0, 0.0)  # equal images have no ball
    assert precision_recall(real, real, k=1) == (1.0, 1.0) and precision_recall(real, fake[:1], k=1) == (1.0, None)


# Patches and the teacher


def test_crops_are_where_they_should_be() -> None:
    x = torch.arange(100.0).view(1, 1, 10, 10).expand(2, 3, 10, 10)
    assert torch.equal(Crops(4, 10)(x), center_crop(x, [4, 4]))
    corners = Crops(4, 10, 3)(x)[:, 0, 0, 0].view(2, 9)
    assert corners.tolist() == [[0, 3, 6, 30, 33, 36, 60, 63, 66]] * 2
    assert Crops().about == "the centre, 299 of 1024 pixels" and Crops(16, 32, 2).about == "a grid of 2 x 2, 16 of 32 pixels"
    with pytest.raises(ValueError, match=r"Crops\(side=300, at=256, grid=1\): give 1 <= side <= at"):
        Crops(300, 256)


def moments(images: Tensor) -> Tensor:
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def test_patches_see_what_resizing_removes() -> None:
    """Noise in the pixels is gone in images of a quarter of their edge, and not in their crops."""
    smooth = pictures(30, 3, 1, 1).expand(-1, -1, 16, 16)
    noisy = as_saved(smooth + 0.3 * (2 * (torch.arange(16)[:, None] + torch.arange(16) & 1) - 1.0))  # black, white, black, white
    made = Given(Networks(moments), view=View(4, Crops(8, 16)))
    given = Given(made.networks, Reference(made.rows_of([smooth])), view=made.view)
    found = measured(PatchFrechet(), noisy, given)
    crops = [moments(center_crop(z, [8, 8])) for z in (smooth, noisy)]
    assert found == {"patch_frechet": pytest.approx(frechet_distance(*crops), rel=1e-6), "patch_frechet_teacher": None}
    small = [given.rows("features", z) for z in (smooth, noisy)]
    assert found["patch_frechet"] > 20 * frechet_distance(*small)


def test_the_teacher_is_a_second_reference_from_noise_of_its_own() -> None:
    seeds: list[int] = []

    def sampler(shift: float):
        def sample(prompts: list[str], seed: int) -> Tensor:
            seeds.append(seed)
            return (0.2 * randn(len(prompts), 3, seed=seed).float() + shift)[..., None, None].expand(-1, -1, 6, 6)

        return sample

    given = Given(Networks(moments), view=View(crops=Crops(3, 6)))
    suite = Suite("mine", ["a"] * 40, given, Probes(["b", "c"], 5), batch=16)
    taught = suite.taught(sampler(0.1), "teacher@32")
    own = seeds.copy()
    near, far = taught.score(sampler(0.1)), taught.score(sampler(0.5))
    assert own == [50, 66, 82] and not set(own) & set(seeds[3:])  # 40 prompts and 10 images of probes come before
    assert near["frechet_teacher"] < 0.05 and near["patch_frechet"] is None
    images = torch.cat([sampler(0.5)(["a"] * n, seed) for n, seed in ((16, 0), (16, 16), (8, 32))])
    assert far["frechet_teacher"] == pytest.approx(
        frechet_distance(taught.given.teacher.rows["features"], moments(as_saved(images))), rel=1e-5
    )
    assert far["patch_frechet_teacher"] == pytest.approx(far["frechet_teacher"], rel=1e-3) and far["frechet_teacher"] > 0.4
    assert taught.protocol["reference"]["teacher"] == "teacher@32" and suite.protocol["reference"]["teacher"] is None
    with pytest.raises(ValueError, match="suite none: a distance to the teacher is one of features, and there is no network for them"):
        Suite("none", ["a"]).taught(sampler(0), "teacher")


def test_a_reference_without_spaces_is_refused() -> None:
    for rows, said in ((torch.zeros(2, 3), "Tensor"), ({"depth": torch.zeros(2, 3)}, r"\['depth'\]")):
        with pytest.raises(ValueError, match=f"Reference: {said}; give rows by space, {{'features': "):
            Reference(rows)  # type: ignore[arg-type]


# Diversity in features


def test_vendi_score_of_known_sets() -> None:
    orthogonal, equal = torch.eye(6)[:4] * 3, torch.ones(4, 6)
    pairs = torch.eye(6)[[0, 0, 1, 1]]
    vendi, apart = spread(torch.stack([orthogonal, equal, pairs]))
    assert vendi.tolist() == pytest.approx([4, 1, 2]) and apart.tolist() == pytest.approx([1, 0, 4 / 6])
    x = randn(7, 3)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    shares = scipy.linalg.eigvalsh(unit @ unit.T / 7)
    one_by_one = [1 - unit[i] @ unit[j] for i in range(7) for j in range(i)]
    vendi, apart = spread(x[None])
    assert float(vendi) == pytest.approx(math.exp(scipy.stats.entropy(shares.clip(0)))) and float(apart) == pytest.approx(
        np.mean(one_by_one)
    )
    with pytest.raises(ValueError, match=r"embeddings \(2, 1, 3\); pass \[prompts, seeds >= 2, D\]"):
        spread(torch.ones(2, 1, 3))


def test_diversity_in_features_is_over_prompts() -> None:
    x = pictures(12, 3, 2, 2)
    found = measured(Vendi(), x, Given(Networks(embed=flat)), size=6, seeds=3)
    vendi, apart = spread(flat(x).view(4, 3, 12))
    assert found["vendi"] == pytest.approx(float(vendi.mean()), rel=1e-5) and found["feature_diversity"] == pytest.approx(
        float(apart.mean())
    )


# Tones


def test_tones_are_those_of_other_libraries() -> None:
    x = pictures(3, 3, 5, 4)
    x[2] = -1  # black
    levels = ((x + 1) * 127.5).round().byte()
    saturations = [[colorsys.rgb_to_hsv(*(v / 255 for v in p))[1] for p in y.flatten(1).T.tolist()] for y in levels]
    greys = [np.asarray(Image.fromarray(y.permute(1, 2, 0).numpy()).convert("L")) / 255 for y in levels]
    found = tones(x)
    assert found[:, 0].tolist() == pytest.approx([np.mean(s) for s in saturations])
    assert found[:, 1].tolist() == pytest.approx([np.std(g) for g in greys], abs=1 / 255) and found[2].tolist() == [0, 0]


def test_drift_is_what_was_done_to_the_colours() -> None:
    x = pictures(12, 3, 4, 4)
    given = Given(reference=Reference({"tones": tones(x)}))
    faded = as_saved((x + 1) / 2 - 1)  # half as bright: the same saturation, half the contrast
    found = measured(Tones(), faded, given)
    assert found["saturation_drift"] == pytest.approx(0, abs=0.01)
    assert found["contrast_drift"] == pytest.approx(-float(tones(x)[:, 1].mean()) / 2, abs=0.005)
    low, high = found["intervals"]["contrast_drift"]
    assert low < found["contrast_drift"] < high < 0
    alone = measured(Tones(), faded, Given())
    assert (
        alone["contrast"] == found["contrast"] and alone["contrast_drift"] is None and set(alone["intervals"]) == {"saturation", "contrast"}
    )


# Intervals


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    drawn = torch.rand(300, 80, generator=torch.Generator().manual_seed(0))
    found = [interval(x) for x in (drawn < 0.3).double()]
    assert 0.90 <= sum(low <= 0.3 <= high for low, high in found) / 300 <= 0.98


def test_an_interval_is_scipy_s_and_knows_no_order() -> None:
    x = randn(200).exp()
    scipys = scipy.stats.bootstrap((x.numpy(),), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(0))
    assert interval(x) == pytest.approx(list(scipys.confidence_interval), abs=0.03) and interval(x) == interval(x.flip(0))
    assert means(a=x, b=x[:9], c=torch.ones(50)) == {
        "a": float(x.mean()),
        "b": float(x[:9].mean()),
        "c": 1.0,
        "intervals": {"a": interval(x)},  # nine are too few, and equal ones say nothing of others
    }


def test_images_of_one_prompt_are_resampled_together() -> None:
    """Four alike images of a prompt tell no more than one: the interval is that of the prompts, and a suite's metrics have it."""
    x, g = torch.randn(50, generator=torch.Generator().manual_seed(2)), torch.arange(50).repeat_interleave(4)
    assert interval(x.repeat_interleave(4), g) == pytest.approx(interval(x), abs=1e-12)
    uneven, groups = torch.cat([x, x[:25]]), torch.cat([torch.arange(50), torch.arange(25)])
    twice = torch.where(torch.arange(50) < 25, 2.0, 1.0).double()
    rows = torch.randint(50, (4000, 50), generator=torch.Generator().manual_seed(3))
    ends = ((x * twice)[rows].sum(1) / twice[rows].sum(1)).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert interval(uneven, groups) == pytest.approx(ends, abs=0.03)
    with pytest.raises(ValueError, match="75 values and the groups of 50"):
        interval(uneven, g[:50])

    def alike(prompts: list[str], seed: int) -> Tensor:
        return torch.stack([torch.full((3, 4, 4), float(p) / 20 - 1) for p in prompts])

    def shade(images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))

    few = Suite("s", [str(i) for i in range(20)], Given(Networks(clip=shade)))
    ends = few.score(alike)["intervals"]["clip"]
    assert replace(few, samples=4).score(alike)["intervals"]["clip"] == pytest.approx(ends, abs=1e-6)
    assert all(metric.groups is not None and metric.held == {} for metric in replace(few, samples=4)._metrics())  # which is its own
    captions = replace(few, prompts=[str(i // 2) for i in range(40)], groups=[i // 2 for i in range(40)])
    assert captions.score(alike)["intervals"]["clip"] == pytest.approx(ends, abs=1e-6)


def test_a_suite_has_the_intervals_of_all_its_metrics() -> None:
    given = Given(Networks(flat, clip=lambda x, p: x.mean((1, 2, 3))), Reference({"features": flat(pictures(20, 3, 2, 2))}))
    found = Suite("mine", ["a"] * 30, given).score(lambda p, s: pictures(len(p), 3, 2, 2, seed=s))
    assert set(found["intervals"]) == {"clip", "density", "saturation", "contrast"} and found["precision"] == 1  # all are equal
    assert all(low <= found[key] <= high for key, (low, high) in found["intervals"].items())


# The two resizes of a FID


class Extractor(nn.Module):
    """Looks like torch-fidelity's: its forward takes 8 bits alone, and its parts can be called."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()
        for name in LAYERS.split():
            setattr(self, name, nn.AdaptiveAvgPool2d(1) if name == "AvgPool" else nn.Identity())

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        return (torch.full((len(x), 3), 7.0),)


def test_both_resizes_have_a_name_and_the_protocol_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    x = pictures(2, 3, 40, 40)
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    own, cleaned = (Networks(f"{name}:{tmp_path / 'w.pth'}").load().features for name in ("inception", "inception_clean_fid"))
    assert torch.equal(own(x), torch.full((2, 3), 7.0))
    expected = (clean((x * 127.5 + 127.5).round().byte()).mean((2, 3)) - 128) / 128
    torch.testing.assert_close(cleaned(x), expected, atol=1e-5, rtol=0)
    said = [Suite("x", ["a"], Given(Networks(net), view=View(256))).protocol for net in (own, cleaned)]
    assert [p["resize"].partition(", then ")[2].partition(":")[0] for p in said] == ["torch-fidelity", "clean-fid"]
    (about,) = {p["networks"]["features"] for p in said}
    assert about.startswith(f"{INCEPTION}, w.pth sha256 ")  # the file by its content, wherever it lies
    with pytest.raises(ValueError, match="resizing='pil'; choose torch-fidelity or clean-fid"):
        inception_features(resizing="pil")
