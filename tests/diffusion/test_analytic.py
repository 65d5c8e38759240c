"""Exact denoisers against numerical integration, brute force and the limits where naive formulas are 0 / 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddil_lightning.diffusion.analytic import Corrupted, Gaussian, Mixture, PointMass, UniformBox
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import END, Context

SD = NoiseSchedule.scaled_linear()
ZERO = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
FLOW = NoiseSchedule.flow()
TIMES = (0, 19, 250, 500, 749, 999)


def context(n: int, cls: list[int] | None = None, classes: int = 2) -> Context:
    text = torch.zeros(n, 1, classes)
    if cls is not None:
        text[torch.arange(n), 0, torch.tensor(cls)] = 1
    return Context(text)


def ts(*t: int) -> Tensor:
    return torch.tensor(t)


def posterior_by_quadrature(log_prior, x: float, alpha: float, sigma: float, lo: float, hi: float) -> float:
    """E[x0 | x] by integrating prior times likelihood: 12 Gauss-Legendre nodes on each of 4000 panels of [lo, hi]."""
    u, w = np.polynomial.legendre.leggauss(12)
    edges = np.linspace(lo, hi, 4001)
    y = ((edges[:-1] + edges[1:])[:, None] + (edges[1] - edges[0]) * u).ravel() / 2
    log_p = log_prior(y) - (x - alpha * y) ** 2 / (2 * sigma**2)
    return float(np.average(y, weights=np.tile(w, 4000) * np.exp(log_p - log_p.max())))


def test_point_mass_is_constant_and_keeps_a_graph():
    net = PointMass(torch.tensor([1.0, -2.0]), ZERO)
    x = torch.randn(3, 2, requires_grad=True)
    out = net(x, ts(999, 500, END), context(3))
    assert torch.equal(out, torch.tensor([[1.0, -2.0]]).expand(3, 2))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros(3, 2))


@pytest.mark.parametrize("schedule", [SD, ZERO, FLOW], ids=["sd", "zero-snr", "flow"])
@pytest.mark.parametrize("t", TIMES)
def test_gaussian_matches_quadrature(schedule: NoiseSchedule, t: int):
    mu, std, x = 0.7, 0.4, 1.3
    alpha, sigma = float(schedule.alphas[t]), float(schedule.sigmas[t])
    want = posterior_by_quadrature(lambda y: -((y - mu) ** 2) / (2 * std**2), x, alpha, sigma, mu - 5, mu + 5)
    got = Gaussian(mu, std, schedule)(torch.tensor([[x]], dtype=torch.float64), ts(t), context(1))
    assert float(got) == pytest.approx(want, abs=1e-10)


def test_gaussian_per_dimension_and_ends():
    mu, std = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.0])
    net = Gaussian(mu, std, ZERO)
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    out = net(x, ts(999, END), context(2))
    assert torch.equal(out[0], mu)  # alpha = 0: nothing is known
    assert torch.allclose(out[1], torch.tensor([3.0, -1.0]))  # END: the point itself, but a dimension without width stays at its mean
    with pytest.raises(ValueError, match="negative"):
        Gaussian(0.0, -1.0, SD)


def test_laws_are_copied_and_answers_keep_the_type():
    mu = torch.zeros(2, dtype=torch.float64)
    net = Gaussian(mu, 1.0, SD)
    mu += 5
    x = torch.ones(1, 2)
    out = net(x, ts(999), context(1))
    assert float(out.max()) < 1 and out.dtype == torch.float32
    assert net(x.half(), ts(999), context(1)).dtype == torch.float32
    assert net(x.double(), ts(999), context(1)).dtype == torch.float64
    assert net.float()(x, ts(999), context(1)).dtype == torch.float32
    assert not list(net.parameters())


@pytest.mark.parametrize("schedule", [SD, ZERO, FLOW], ids=["sd", "zero-snr", "flow"])
def test_gaussian_flow_is_the_limit_of_ddim(schedule: NoiseSchedule):
    net = Gaussian(torch.tensor([0.7, -0.3]), torch.tensor([0.4, 1.5]), schedule)
    x = start = torch.tensor([[1.0, 2.0], [-0.5, 0.3]], dtype=torch.float64)
    for t in range(900, 100, -1):  # DDIM over neighbouring timesteps, the finest grid there is
        out = net(x, ts(t, t), context(2))
        p = schedule.from_x0(x, t, out)
        x = schedule.add_noise(p.x0, p.eps, t - 1)
    exact = net.flow(start, 900, 100)
    assert torch.allclose(x, exact, atol=4e-3)
    assert not torch.allclose(start, exact, atol=0.1)
    assert torch.allclose(net.flow(net.flow(start, ts(900, 900), ts(500, 400)), ts(500, 400), 100), exact, atol=1e-12)


def test_gaussian_flow_from_pure_noise_to_the_end_maps_the_law():
    net = Gaussian(torch.tensor([2.0]), torch.tensor([0.5]), ZERO)
    x = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    assert torch.allclose(net.flow(x, 999, END), 2.0 + 0.5 * x, atol=1e-12)
    assert net.flow(x.float(), 999, END).dtype == torch.float32


def mixture(schedule: NoiseSchedule = SD, **kwargs) -> Mixture:
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
    law = {"weights": [2.0, 1.0, 1.0], "means": means, "stds": [0.3, 0.5, 0.4], "classes": [0, 0, 1]}
    return Mixture(**law | kwargs, schedule=schedule)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("cls", [None, [0, 1, 0]])
def test_mixture_matches_brute_force(t: int, cls: list[int] | None):
    net, alpha, sigma = mixture(), float(SD.alphas[t]), float(SD.sigmas[t])
    x = torch.tensor([[0.3, 0.2], [1.0, 1.2], [-1.5, 2.0]], dtype=torch.float64)
    for row, point in enumerate(x):
        top, bottom = torch.zeros(2, dtype=torch.float64), 0.0
        for pi, mu, s, k in zip(net.weights, net.means, net.stds[:, 0], net.classes, strict=True):
            if cls is not None and k != cls[row]:
                continue
            var = alpha**2 * s**2 + sigma**2
            p = pi * torch.exp(-(point - alpha * mu).square().sum() / (2 * var)) / var
            top += p * (mu + alpha * s**2 / var * (point - alpha * mu))
            bottom += p
        got = net(x, ts(t, t, t), context(3, cls))[row]
        if bottom > 1e-250:
            assert torch.allclose(got, top / bottom, atol=1e-10)
        assert got.isfinite().all()


def test_mixture_matches_quadrature_in_one_dimension():
    net = Mixture([0.3, 0.7], torch.tensor([[-1.0], [1.5]]), [0.2, 0.6], [0, 0], SD)

    def log_prior(y):
        return np.log(0.3 / 0.2 * np.exp(-((y + 1) ** 2) / 0.08) + 0.7 / 0.6 * np.exp(-((y - 1.5) ** 2) / 0.72) + 1e-300)

    for t, x in ((250, 0.2), (500, -0.3), (999, 1.0)):
        want = posterior_by_quadrature(log_prior, x, float(SD.alphas[t]), float(SD.sigmas[t]), -6, 8)
        got = net(torch.tensor([[x]], dtype=torch.float64), ts(t), context(1, classes=1))
        assert float(got) == pytest.approx(want, abs=1e-10)


def test_mixture_is_stable_far_away_and_at_both_ends():
    net = mixture(ZERO)
    far = torch.tensor([[1e4, 1e4], [-1e4, 0.0]])
    r = net.responsibilities(far, ts(0, 0), context(2))
    assert torch.allclose(r.sum(1), torch.ones(2, dtype=r.dtype))
    assert net(far, ts(0, 999), context(2)).isfinite().all()
    prior = net(far, ts(999, 999), context(2))  # alpha = 0: the prior mean
    assert torch.allclose(prior, torch.tensor([[-0.5, 1.0]]).expand(2, 2), atol=1e-6)
    clean = torch.tensor([[-2.1, 0.1], [0.1, 3.0]])
    assert torch.allclose(net(clean, ts(END, END), context(2)), clean, atol=1e-6)


def test_mixture_of_points_answers_with_the_nearest_at_the_end():
    net = mixture(stds=0.0)
    x = torch.tensor([[-1.9, 0.1], [0.2, 2.8]])
    assert torch.equal(net(x, ts(END, END), context(2)), net.means[[0, 2]].float())


def test_mixture_of_images_agrees_with_its_flattened_points():
    g = torch.Generator().manual_seed(0)
    means, x = torch.randn(3, 2, 4, 4, generator=g), torch.randn(2, 2, 4, 4, generator=g)
    stds = torch.rand(3, 2, 4, 4, generator=g) + 0.5
    images = Mixture([1.0, 2.0, 1.0], means, stds, [0, 1, 1], SD)
    points = Mixture([1.0, 2.0, 1.0], means.flatten(1), stds.flatten(1), [0, 1, 1], SD)
    out = images(x, ts(749, 500), context(2, [1, 0]))
    assert out.shape == x.shape
    assert torch.allclose(out.flatten(1), points(x.flatten(1), ts(749, 500), context(2, [1, 0])), atol=1e-6)


def test_mixture_samples_its_classes():
    net = mixture()
    g = torch.Generator().manual_seed(0)
    x = net.sample(4000, None, g)
    nearest = torch.cdist(x, net.means.float()).argmin(1)
    share = torch.bincount(nearest, minlength=3) / 4000
    assert torch.allclose(share, torch.tensor([0.5, 0.25, 0.25]), atol=4 * math.sqrt(0.25 / 4000))
    assert x[nearest == 1].std(0).tolist() == pytest.approx([0.5, 0.5], abs=0.06)
    one = net.sample(200, torch.tensor([0, 1]).repeat(100), g)
    assert torch.equal(torch.cdist(one, net.means.float()).argmin(1) == 2, torch.tensor([False, True]).repeat(100))
    assert torch.equal(net.sample(5, 1, torch.Generator().manual_seed(3)), net.sample(5, 1, torch.Generator().manual_seed(3)))


def test_mixture_rejects_what_does_not_fit():
    with pytest.raises(ValueError, match="without a gap"):
        mixture(classes=[0, 2, 2])
    with pytest.raises(ValueError, match="needs means"):
        mixture(classes=[0, 1])
    with pytest.raises(ValueError, match="do not fit"):
        mixture(stds=torch.ones(3, 5))
    with pytest.raises(ValueError, match="positive"):
        mixture(weights=[1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"c\.text"):
        mixture()(torch.zeros(1, 2), ts(5), context(1, classes=3))
    with pytest.raises(ValueError, match="ranks differ"):
        mixture()(torch.zeros(1, 2, 1, 1), ts(5), context(1))
    with pytest.raises(ValueError, match="cannot sample"):
        mixture().sample(2, 7, torch.Generator())


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("x", [0.0, 0.01, 0.5, 0.99, 1.001, 1.2, 3.0])
@pytest.mark.parametrize("box", [(-1.0, 1.0), (-0.5, 4.5)], ids=["centred", "shifted"])
def test_uniform_box_matches_quadrature(t: int, x: float, box: tuple[float, float]):
    alpha, sigma = float(SD.alphas[t]), float(SD.sigmas[t])
    want = posterior_by_quadrature(lambda y: 0 * y, x, alpha, sigma, *box)
    got = UniformBox(*box, SD)(torch.tensor([[x]], dtype=torch.float64), ts(t), context(1))
    assert float(got) == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize(
    ("alpha", "sigma", "x"),
    [
        *((1e-6, 1.0, 0.8), (1e-3, 1.0, -2.0), (1e-3, 1e-2, 30.0)),  # nearly no signal; the last one far outside
        *((0.3, 0.95, 60.0), (0.4, 0.9, 15.9), (0.4, 0.9, 14.0), (0.55, 0.83, 0.6)),  # around the borders between the three forms
        *((0.9999, 0.01, 1.5), (1.0, 1e-4, 1.0)),  # nearly clean
    ],
)
def test_uniform_box_at_extreme_arguments(alpha: float, sigma: float, x: float):
    schedule = NoiseSchedule(torch.tensor([alpha], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64))
    got = float(UniformBox(-1.0, 1.0, schedule)(torch.tensor([[x]], dtype=torch.float64), ts(0), context(1)))
    width = min(2.0, 40 * sigma / alpha, 40 * sigma**2 / (alpha * max(abs(x) - alpha, 1e-30)))  # integrate only where the posterior lives
    sign = math.copysign(1, x)
    lo, hi = sorted((sign, sign - sign * width))
    want = posterior_by_quadrature(lambda y: 0 * y, x, alpha, sigma, lo, hi)
    assert 1 - abs(got) == pytest.approx(1 - abs(want), rel=1e-9)


def test_uniform_box_far_outside_decays_like_an_exponential_law():
    # The posterior falls off from the border with rate alpha (x - alpha) / sigma^2; the next term is 2 / z^2, 1e-11 here.
    alpha, sigma, x = 1e-3, 1e-4, 30.0
    schedule = NoiseSchedule(torch.tensor([alpha], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64))
    got = float(UniformBox(-1.0, 1.0, schedule)(torch.tensor([[x]], dtype=torch.float64), ts(0), context(1)))
    assert 1 - got == pytest.approx(sigma**2 / (alpha * (x - alpha)), rel=1e-8)


def test_uniform_box_is_continuous_across_its_regimes():
    x = torch.linspace(-40, 40, 20001, dtype=torch.float64)[:, None]
    for t in (0, 100, 400, 600, 800, 999):
        out = UniformBox(-1.0, 1.0, SD)(x, torch.full((len(x),), t), context(len(x)))
        assert out.isfinite().all() and float(out.abs().max()) <= 1
        assert float(out.diff(dim=0).min()) >= -1e-13  # a posterior mean never falls
        assert torch.allclose(out, -out.flip(0), atol=1e-14)


def test_uniform_box_slope_is_the_posterior_variance():
    # d E[x0|x] / dx = alpha / sigma^2 Var[x0|x] (Tweedie); also at the centre, where sign(0) would lose it.
    net, alpha, sigma = UniformBox(-1.0, 1.0, SD), float(SD.alphas[500]), float(SD.sigmas[500])
    for start in (0.0, 0.4, 2.0, 30.0):
        x = torch.tensor([[start]], dtype=torch.float64, requires_grad=True)
        slope = torch.autograd.grad(net(x, ts(500), context(1)), x)[0]
        y = np.linspace(-1, 1, 200001)
        log_p = -((start - alpha * y) ** 2) / (2 * sigma**2)
        p = np.exp(log_p - log_p.max())
        mean = np.average(y, weights=p)
        assert float(slope) == pytest.approx(alpha / sigma**2 * np.average((y - mean) ** 2, weights=p), rel=1e-4)


def test_uniform_box_at_both_ends_and_on_images():
    net = UniformBox(torch.tensor([-1.0, 0.0]).view(2, 1, 1), torch.tensor([1.0, 4.0]).view(2, 1, 1), ZERO)
    x = 3 * torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    out = net(x, ts(999, END), context(2))
    assert torch.allclose(out[0], torch.tensor([0.0, 2.0]).view(2, 1, 1).expand(2, 3, 3), atol=1e-7)
    assert torch.allclose(out[1, 0], x[1, 0].clamp(-1, 1)) and torch.allclose(out[1, 1], x[1, 1].clamp(0, 4))
    x.requires_grad_(True)
    assert torch.autograd.grad(net(x, ts(500, END), context(2)).sum(), x)[0].isfinite().all()
    with pytest.raises(ValueError, match="lo < hi"):
        UniformBox(1.0, 1.0, SD)


def test_corrupted_scales_and_shifts():
    net = Gaussian(0.5, 1.0, SD)
    x = torch.randn(2, 3)
    clean = net(x, ts(500, 250), context(2))
    assert torch.allclose(Corrupted(net, scale=1.1, bias=-0.2)(x, ts(500, 250), context(2)), 1.1 * clean - 0.2)
    assert torch.equal(Corrupted(net)(x, ts(500, 250), context(2)), clean)
