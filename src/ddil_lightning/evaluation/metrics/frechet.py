"""Frechet distance of two Gaussians fitted to features (Heusel et al. 2017, FID): float64 moments that add up over processes.

FID is biased high for few images: compare numbers only at equal N, features and resizing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.evaluation.metrics.base import FeatureMetric, Features


def gaussian_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means [D] and covariances [D, D], in float64. Scalar, never negative.

    The trace of the root is taken of sqrt(C1) C2 sqrt(C1), which has the eigenvalues of C1 C2 and is symmetric: rank-deficient
    covariances (fewer images than features) need no ridge and give no complex numbers.
    """
    mean1, cov1, mean2, cov2 = (x.double() for x in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    half = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(half.T @ cov2 @ half).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root).clamp(min=0)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], float64. Raises ValueError for fewer than two."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: {tuple(features.shape)}; a covariance needs [N, D] with N >= 2")
    x = features.double()
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)


@torch.no_grad()
def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of features [N, D] and [M, D]."""
    return float(gaussian_distance(*moments(real), *moments(fake)))


class FrechetDistance(FeatureMetric):
    """`update(x, real)`: images with a `net`, else features [B, D]. Six float64 states, summed over processes.

    `keep_real`: `reset` forgets the generated images only, for one reference and many models.
    """

    higher_is_better = False
    sums: Tensor
    outers: Tensor
    counts: Tensor

    def __init__(self, dim: int, net: Features | None = None, keep_real: bool = False, **kwargs: Any) -> None:
        super().__init__(net=net, **kwargs)
        self.keep_real = keep_real
        self.add_state("sums", torch.zeros(2, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outers", torch.zeros(2, dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, real: bool) -> None:
        """Add images or features. Raises ValueError for another D than the metric's."""
        f = self.features(x).double()
        if f.shape[1] != self.sums.shape[1]:
            raise ValueError(f"FrechetDistance: {f.shape[1]} features where dim={self.sums.shape[1]} was declared")
        i = int(real)
        self.sums[i] += f.sum(0)
        self.outers[i] += f.T @ f
        self.counts[i] += len(f)

    def compute(self) -> Tensor:
        """Scalar. Raises ValueError with fewer than two images on either side."""
        if self.counts.min() < 2:
            raise ValueError(f"FrechetDistance: {int(self.counts[1])} real and {int(self.counts[0])} generated images; two of each needed")
        n = self.counts[:, None]
        mean = self.sums / n
        cov = (self.outers - n[..., None] * mean[:, :, None] * mean[:, None, :]) / (n[..., None] - 1)
        return gaussian_distance(mean[1], cov[1], mean[0], cov[0])

    def reset(self) -> None:
        """Forget everything, or with `keep_real` only the generated images."""
        kept = [s[1].clone() for s in (self.sums, self.outers, self.counts)] if self.keep_real else None
        super().reset()
        if kept is not None:
            for state, value in zip((self.sums, self.outers, self.counts), kept, strict=True):
                state[1] = value

    def set_dtype(self, dst_type: str | torch.dtype) -> FrechetDistance:
        """Stays in float64: the covariance is a difference of large numbers."""
        return self


def inception_features(weights: str | None = None, device: str | torch.device = "cpu") -> Features:
    """Inception-v3 pool3 features [B, 2048] with the ported TensorFlow FID weights (torch-fidelity), of images in [-1, 1].

    The images are rounded to 8 bits and resized to 299 by the network's own TensorFlow-1 bilinear. `weights`: a local file instead
    of the download. Raises ValueError without torch-fidelity.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as e:
        raise ValueError("the Inception features of a Frechet distance need torch-fidelity: pip install 'ddil-lightning[eval]'") from e
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights).eval().to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return net(to_uint8(images).to(device))[0].flatten(1)

    return features
