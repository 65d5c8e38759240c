"""The Fréchet distance of Gaussians: closed forms, the libraries that have it too, and its two users."""

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.gaussians import frechet_distance, gaussian_distance, influences, moments
from ddil_lightning.imitation.shift import frechet_pooled


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_frechet_of_gaussians_closed_form():
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2 in their common eigenbasis."""
    q = torch.linalg.qr(randn(5, 5).double()).Q
    s1, s2 = torch.tensor([0.1, 1.0, 2.0, 3.0, 0.0]).double(), torch.tensor([1.0, 0.5, 2.0, 0.0, 4.0]).double()
    m1, m2 = randn(5, seed=1), randn(5, seed=2)
    got = gaussian_distance(m1, q * s1.square() @ q.T, m2, q * s2.square() @ q.T)
    expected = (m1 - m2).double().square().sum() + (s1 - s2).square().sum()
    assert float(got) == pytest.approx(float(expected), rel=1e-7)


def test_frechet_of_affine_copies_is_exact():
    """Y = 3 X + b has mean 3 m + b and covariance 9 C, so the distance is |2 m + b|^2 + 4 tr C without sampling error."""
    x, b = randn(200, 6).double() * torch.arange(1, 7), randn(6, seed=3).double()
    expected = (2 * x.mean(0) + b).square().sum() + 4 * x.T.cov().trace()
    assert frechet_distance(x, 3 * x + b) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("n", [4, 300])
def test_frechet_of_a_set_with_itself_is_zero(n):
    """Also with fewer images than features, where the covariance is singular."""
    x = randn(n, 32) @ randn(32, 32, seed=1) + 5
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)


def test_frechet_equals_scipy_and_torchmetrics():
    import scipy.linalg
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = randn(120, 6) @ randn(6, 6, seed=1), randn(90, 6, seed=2) * 1.3 + 0.4
    ca, cb = a.double().T.cov().numpy(), b.double().T.cov().numpy()
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = float((a.double().mean(0) - b.double().mean(0)).square().sum()) + (ca + cb - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)

    stock = FrechetInceptionDistance(feature=WithSize())
    stock.update(a, real=True)
    stock.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(stock.compute()), rel=1e-5)


class WithSize(nn.Identity):
    num_features = 6


def test_a_covariance_needs_two():
    with pytest.raises(ValueError, match="N >= 2"):
        frechet_distance(randn(1, 4), randn(9, 4))
    mean, cov = moments(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    assert mean.tolist() == [1.0, 3.0] and cov.tolist() == [[2.0, 4.0], [4.0, 8.0]]


def test_the_shift_of_latents_is_measured_by_the_same_formula():
    x, y = randn(40, 3), randn(50, 3, seed=1) + 1
    assert frechet_pooled(x, y) == frechet_distance(x.double(), y.double())
    small = randn(40, 2, 4, 4), randn(40, 2, 4, 4, seed=1)
    assert frechet_pooled(*small) == frechet_distance(*(z.flatten(1).double() for z in small))


def test_the_influence_of_samples_has_the_spread_of_the_distance():
    """Of the difference of two paired sets, beside the distances of 200 draws themselves; it is a derivative, by finite differences."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 9).double() ** -0.7
    mean, cov = moments(torch.randn(4000, 8, generator=rng).double() * scale)
    apart, told = [], []
    for _ in range(200):
        z, own = (torch.randn(128, 8, generator=rng).double() * scale for _ in "ab")
        pair = z + 0.2, 0.9 * z + 0.3 * own
        values = [influences(mean, cov, x) for x in pair]
        apart.append(float(values[0].mean() - values[1].mean()))
        told.append(float((values[0] - values[1]).std() / 128**0.5))
    assert sum(told) / 200 == pytest.approx(float(torch.tensor(apart).std()), rel=0.15)
    x = torch.randn(5000, 8, generator=rng).double() * scale + 0.2
    values, again = influences(mean, cov, x), torch.cat([x, x[:5]])  # five that weigh twice as much
    moved = float(gaussian_distance(mean, cov, *moments(again)) - gaussian_distance(mean, cov, *moments(x)))
    assert moved == pytest.approx(float((values[:5] - values.mean()).sum()) / 5005, rel=0.02)
