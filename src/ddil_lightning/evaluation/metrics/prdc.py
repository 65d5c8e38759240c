"""Density and coverage (Naeem et al. 2020): do generated images lie where real ones are, and is every real one approached?

Balls of radius r_k(X_i), the distance of real X_i to its k-th nearest other real. With N real and M generated images:
density = 1/(k M) sum_ij 1[Y_j in ball i], coverage = fraction of balls hit. Equal laws: E density = 1 and
E coverage = 1 - prod_{j=1..k} (N - j)/(M + N - j), about 1 - 2^-k for M = N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Metric


def expected_coverage(n: int, m: int, k: int = 5) -> float:
    """Coverage that `m` samples of the real law itself reach on average over `n` balls: the ceiling to read a value against."""
    out = 1.0
    for j in range(1, k + 1):
        out *= (n - j) / (m + n - j)
    return 1 - out


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [A, B]; float64 and centred inputs keep the cancellation of the matmul form harmless."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)


@torch.no_grad()
def density_coverage(real: Tensor, fake: Tensor, k: int = 5, chunk: int = 1024) -> tuple[float, float]:
    """(density, coverage) of features [N, D] and [M, D]; [chunk, max(N, M)] distances at a time.

    A point on a ball's surface is outside, as in the authors' code, so a set scored against itself has density 1. Raises ValueError
    with N <= k real or no generated features.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"density_coverage: features {tuple(real.shape)} and {tuple(fake.shape)}; both must be [*, D]")
    if not 1 <= k < len(real) or not len(fake):
        raise ValueError(f"density_coverage: k={k} needs more than k real features, got {len(real)}, and some generated, got {len(fake)}")
    real, fake = real.double(), fake.double()
    real, fake = real - real.mean(0), fake - real.mean(0)
    inside, hit = 0, 0
    for start in range(0, len(real), chunk):
        x = real[start : start + chunk]
        own = _squared(x, real)
        own[torch.arange(len(x)), torch.arange(start, start + len(x))] = torch.inf
        radius = own.kthvalue(k, dim=1).values
        within = _squared(x, fake) < radius[:, None]
        inside += int(within.sum())
        hit += int(within.any(1).sum())
    return inside / (k * len(fake)), hit / len(real)


class DensityCoverage(Metric):
    """Density and coverage of the features of all images. Raises ValueError as `density_coverage` does."""

    columns = (
        Column("density", "Density", "higher", "how deep generated images lie in regions of real ones; may exceed 1"),
        Column("coverage", "Coverage", "higher", "share of real images that have a generated one in their neighbourhood"),
    )
    needs = ("features", "real")
    states = ("features",)
    features: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the features [B, D] of the images, and hold those of the real ones."""
        self.features.append(batch.features)
        self.held["real"] = batch.real

    def compute(self) -> dict[str, float]:
        """Density and coverage of all generated images with respect to the real ones."""
        density, coverage = density_coverage(self.held["real"], self.all("features"))
        return {"density": density, "coverage": coverage}
