"""Gaussians that are fitted to samples, and the Fréchet distance of two of them: of images' features (FID) and of latents alike.

The distance is biased upwards for few samples, by about their number of features over their number: compare at equal counts alone, and not
with fewer samples than a few times the features, where the bias, which other samples have another of, can outweigh a difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_lightning.records import wide


def gaussian_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means [D] and covariances [D, D], in float64. Scalar, never negative.

    The trace of the root is taken of sqrt(C1) C2 sqrt(C1), which has the eigenvalues of C1 C2 and is symmetric: rank-deficient
    covariances (fewer images than features) need no ridge and give no complex numbers.
    """
    mean1, cov1, mean2, cov2 = (wide(x) for x in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    half = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(half.T @ cov2 @ half).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root).clamp(min=0)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], float64. Raises ValueError for fewer than two."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: {tuple(features.shape)}; a covariance needs [N, D] with N >= 2")
    x = wide(features)
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)


@torch.no_grad()
def influences(mean: Tensor, cov: Tensor, features: Tensor) -> Tensor:
    """Values [N] of features [N, D] whose mean is their Fréchet distance to the Gaussian of `mean` [D] and `cov` [D, D], float64.

    They are its first-order change with the weight of each sample (the infinitesimal jackknife), of d |m|^2 and tr (I - T) dC with
    T = S (S C S)^(-1/2) S and S = sqrt(cov), on what the samples span. So the mean of resampled values moves as the distance itself does,
    for a thousandth of the price and without the bias of resamples, which hold fewer different samples. The bias of the distance itself
    stays in their mean, and no spread of theirs shows it: of two samplers it is not the same, and with fewer samples than a few times the
    features their difference can have the wrong sign. Raises ValueError as `moments`.
    """
    mean, cov, x = wide(mean), wide(cov), wide(features)
    mine, covariance = moments(x)
    values, vectors = torch.linalg.eigh(cov)
    half = vectors * values.clamp(min=0).sqrt()
    roots, turned = torch.linalg.eigh(half.T @ covariance @ half)
    floor = roots.max() * 1e-10
    inverse = torch.where(roots > floor, roots.clamp(min=floor).rsqrt(), 0)
    apart = x - mine
    moved = 2 * apart @ (mine - mean) + apart.square().sum(1) - ((apart @ half @ turned).square() * inverse).sum(1)
    distance = (mine - mean).square().sum() + cov.trace() + covariance.trace() - 2 * roots.clamp(min=0).sqrt().sum()
    return distance.clamp(min=0) + moved - moved.mean()


@torch.no_grad()
def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of features [N, D] and [M, D] (Heusel et al. 2017). Raises ValueError as `moments` does."""
    return float(gaussian_distance(*moments(real), *moments(fake)))
