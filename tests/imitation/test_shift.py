"""Shift measures: closed forms, zero in expectation for equal laws, and larger for a larger shift."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddil_lightning.imitation.shift import energy_distance, frechet_pooled, mmd_rbf, probe_auc, shift_report

MEASURES = [frechet_pooled, mmd_rbf, energy_distance, probe_auc]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(x: Tensor) -> Tensor:
    """Exactly zero mean and unit covariance."""
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_closed_forms():
    x = whitened(noise(0, 200, 3))
    scale, mean = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    assert frechet_pooled(x, x * scale + mean) == pytest.approx(5 + 1 + 0.25, abs=1e-9)
    # Covariances that do not commute: A = I against B with eigenvalues b gives sum (1 - sqrt b)^2 in any basis; and A, B swapped agree.
    mix = torch.tensor([[1.0, 0.7, 0.0], [0.0, 1.2, -0.3], [0.0, 0.0, 0.6]], dtype=torch.float64)
    want = (1 - torch.linalg.svdvals(mix)).square().sum()
    assert frechet_pooled(x, x @ mix) == pytest.approx(float(want), abs=1e-9)
    assert frechet_pooled(x @ mix, x * scale) == pytest.approx(frechet_pooled(x * scale, x @ mix), abs=1e-9)
    flat = x * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)  # singular
    assert frechet_pooled(flat, x) == pytest.approx(2.0, abs=1e-7)


def test_frechet_pools_latents_to_four_by_four():
    x, y = noise(0, 50, 2, 8, 8), noise(1, 50, 2, 8, 8) + 0.3
    pooled = [z.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)).flatten(1) for z in (x, y)]
    assert frechet_pooled(x, y) == pytest.approx(frechet_pooled(*pooled), rel=1e-9)
    small = noise(2, 50, 3, 2, 2)
    assert frechet_pooled(small, small + 1) == pytest.approx(12.0, abs=1e-6)


def test_pairwise_measures_against_brute_force():
    x, y = noise(0, 7, 2), noise(1, 9, 2) + 1

    def u_statistic(f) -> float:
        xx = [f(x[i], x[j]) for i in range(7) for j in range(7) if i != j]
        yy = [f(y[i], y[j]) for i in range(9) for j in range(9) if i != j]
        xy = [f(a, b) for a in x for b in y]
        return sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)

    assert energy_distance(x, y) == pytest.approx(-u_statistic(lambda a, b: float((a - b).norm())), abs=1e-9)
    assert mmd_rbf(x, y, 0.8) == pytest.approx(u_statistic(lambda a, b: math.exp(-float((a - b).square().sum()) / 1.28)), abs=1e-9)
    pairs = torch.cat([x, y])
    median = torch.stack([(pairs[i] - pairs[j]).norm() for i in range(16) for j in range(i)]).median()
    assert mmd_rbf(x, y) == pytest.approx(mmd_rbf(x, y, float(median)), abs=1e-9)


def test_mmd_of_two_gaussians():
    # E k(x, y) for N(0, 1), N(m, 1) and bandwidth h: h / sqrt(h^2 + 2) exp(-m^2 / (2 (h^2 + 2))).
    h, m = 1.0, 1.5
    want = 2 * h / math.sqrt(h**2 + 2) * (1 - math.exp(-(m**2) / (2 * (h**2 + 2))))
    got = [mmd_rbf(noise(k, 300, 1), noise(100 + k, 300, 1) + m, h) for k in range(10)]
    assert sum(got) / 10 == pytest.approx(want, abs=0.03)


@pytest.mark.parametrize("measure", [mmd_rbf, energy_distance])
def test_unbiased_measures_average_to_zero_for_equal_laws(measure):
    draws = [(noise(k, 10, 2), noise(1000 + k, 14, 2)) for k in range(300)]
    got = torch.tensor([measure(x, y) for x, y in draws])
    error = float(got.std()) / 300**0.5
    assert abs(float(got.mean())) < 4 * error and float(got.min()) < 0
    # The test has the power to see the bias of a V-statistic, which counts each sample's distance 0 to itself.
    x, y = noise(0, 200, 2), noise(1, 200, 2)
    d = torch.pdist(torch.cat([x, y]))
    per_sample = d.mean() if measure is energy_distance else 1 - (-d.square() / (2 * d.median() ** 2)).exp().mean()
    assert 4 * error < float(per_sample) * (1 / 10 + 1 / 14) / 2


def test_the_probe_is_at_chance_for_equal_laws_and_perfect_for_separate_ones():
    got = torch.tensor([probe_auc(noise(k, 60, 2), noise(1000 + k, 60, 2)) for k in range(40)])
    assert float(got.mean()) == pytest.approx(0.5, abs=4 * float(got.std()) / 40**0.5)
    assert probe_auc(noise(0, 60, 2), noise(1, 60, 2) + 20) == 1.0
    assert probe_auc(noise(0, 60, 2) + 20, noise(1, 60, 2)) == 1.0
    constant = torch.ones(20, 2)
    assert probe_auc(constant, constant) == 0.5  # ties count half


def test_the_probe_has_the_area_of_the_best_linear_rule():
    # N(0, 1) against N(m, 1): the area is cdf(m / sqrt 2).
    got = probe_auc(noise(0, 3000, 1), noise(1, 3000, 1) + 1.0)
    assert got == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.03)


def test_the_probe_sees_a_change_of_energy():
    assert probe_auc(noise(0, 400, 2, 8, 8), 1.3 * noise(1, 400, 2, 8, 8)) > 0.95


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(2,), (2, 8, 8)], ids=["points", "latents"])
def test_a_growing_shift_grows_the_measure(measure, shape: tuple[int, ...]):
    # Without their own chance offsets, so that the shift put in is the shift there is.
    x, y = (z - z.mean(0) for z in (noise(0, 500, *shape), noise(1, 500, *shape)))
    values = [measure(x + shift, y) for shift in (0.0, 0.3, 0.6, 1.2)]
    # The probe reaches 1 on latents, where hundreds of entries move together.
    assert all(a < b or a == b == 1 for a, b in pairwise(values)), values
    scaled = [measure(x * s, y) for s in (1.0, 1.5, 2.5)]
    assert scaled[0] < scaled[1] <= scaled[2] and scaled[0] < scaled[2], scaled


def test_report_covers_every_node():
    student = {999: noise(0, 80, 2), 500: 2 * noise(1, 80, 2)}
    reference = {999: noise(2, 60, 2), 500: noise(3, 60, 2), 250: noise(4, 60, 2)}
    report = shift_report(student, reference)
    assert set(report) == {999, 500, "mean"} and set(report[999]) == {"frechet", "mmd", "auc", "energy_distance", "energy"}
    assert report[500]["frechet"] == frechet_pooled(student[500], reference[500])
    assert all(report[500][name] > report[999][name] for name in report[500])
    assert report["mean"]["energy"] == pytest.approx((report[999]["energy"] + report[500]["energy"]) / 2)
    cut = shift_report(student, reference, limit=40)
    assert cut[500]["mmd"] == mmd_rbf(student[500][:40], reference[500][:40]) and cut[500]["frechet"] == report[500]["frechet"]


def test_readable_errors():
    with pytest.raises(ValueError, match=r"none at \[250\]"):
        shift_report({250: noise(0, 9, 2)}, {500: noise(0, 9, 2)})
    with pytest.raises(ValueError, match="at least 4"):
        energy_distance(noise(0, 3, 2), noise(0, 9, 2))
    with pytest.raises(ValueError, match="one shape"):
        mmd_rbf(noise(0, 9, 2), noise(0, 9, 3))


@pytest.mark.parametrize("measure", [mmd_rbf, energy_distance, pytest.param(probe_auc, marks=pytest.mark.slow)])
def test_sets_of_the_same_prompts_are_compared_without_bias(measure):
    """Laws that differ from prompt to prompt, the same in both sets: nothing on average, where pairs of one prompt are known as such."""
    prompts = 3 * noise(7, 24, 2)
    draws = [(prompts + 0.3 * noise(k, 24, 2), prompts + 0.3 * noise(1000 + k, 24, 2)) for k in range(60)]
    right, wrong = (torch.tensor([measure(x, y, paired=known) for x, y in draws]) for known in (True, False))
    if measure is probe_auc:
        right, wrong = right - 0.5, wrong - 0.5
    assert abs(float(right.mean())) < 4 * float(right.std()) / 60**0.5
    assert float(wrong.mean()) < -4 * float(wrong.std()) / 60**0.5


def test_the_points_of_several_members_are_one_vector() -> None:
    """As the toy has them, [N, D, members]: its probes work while several seeds are trained at once."""
    x, y = torch.randn(2, 16, 2, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    for measure in (frechet_pooled, mmd_rbf, energy_distance, probe_auc):
        assert measure(x, y) == measure(x.flatten(1), y.flatten(1))
