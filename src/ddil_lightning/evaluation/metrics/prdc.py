"""Are generated images where real ones are, and the other way round? By balls around images, each to the k-th nearest other of its set.

Real balls of radius r_k(X_i), N real and M generated images (Naeem et al. 2020): density = 1/(k M) sum_ij 1[Y_j in ball i], coverage =
fraction of real balls that are hit. Equal laws: E density = 1 and E coverage = 1 - prod_{j=1..k} (N - j)/(M + N - j), about 1 - 2^-k for
M = N. Improved precision and recall (Kynkaanniemi et al. 2019): the fraction of generated images in some real ball, and of real ones in
some ball around a generated one, which a single outlier widens: density and coverage do without the latter. All with k = 5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.intervals import intervals
from ddil_lightning.evaluation.metrics.base import Compared
from ddil_lightning.records import wide


class Neighbours(NamedTuple):
    """Which images lie in whose balls: of each generated one in how many real balls [M], of each real one whether its own is hit [N], and
    whether it lies in the ball of a generated one [N], None where there are too few of these."""

    inside: Tensor
    hit: Tensor
    reached: Tensor | None


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [A, B]; float64 and centred inputs keep the cancellation of the matmul form harmless."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """The squared distance [N] of each of `x` [N, D] to its k-th nearest other."""
    found = []
    for start in range(0, len(x), chunk):
        own = _squared(x[start : start + chunk], x)
        own.diagonal(start).fill_(torch.inf)
        found.append(own.kthvalue(k, dim=1).values)
    return torch.cat(found)


@torch.no_grad()
def neighbours(real: Tensor, fake: Tensor, k: int = 5, chunk: int = 1024, recall: bool = True) -> Neighbours:
    """The balls of features [N, D] and [M, D]; [chunk, max(N, M)] distances at a time.

    A point on a ball's surface is outside, as in the code of density's authors, so a set scored against itself has density 1. `recall`:
    whether to look at the balls around generated images, too. Raises ValueError with N <= k real or no generated features.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"density_coverage: features {tuple(real.shape)} and {tuple(fake.shape)}; both must be [*, D]")
    if not 1 <= k < len(real) or not len(fake):
        raise ValueError(f"density_coverage: k={k} needs more than k real features, got {len(real)}, and some generated, got {len(fake)}")
    real, fake = wide(real), wide(fake)
    real, fake = real - real.mean(0), fake - real.mean(0)
    around_real = _radii(real, k, chunk)
    around_fake = _radii(fake, k, chunk) if recall and len(fake) > k else None
    inside, hit, reached = torch.zeros(len(fake), dtype=torch.int64, device=fake.device), [], []
    for x, radius in zip(real.split(chunk), around_real.split(chunk), strict=True):
        apart = _squared(x, fake)
        within = apart < radius[:, None]
        inside += within.sum(0)
        hit.append(within.any(1))
        if around_fake is not None:
            reached.append((apart < around_fake).any(1))
    return Neighbours(inside, torch.cat(hit), torch.cat(reached) if reached else None)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, chunk: int = 1024) -> tuple[float, float]:
    """(density, coverage) of features [N, D] and [M, D]. Raises ValueError as `neighbours` does."""
    inside, hit, _ = neighbours(real, fake, k, chunk, recall=False)
    return int(inside.sum()) / (k * len(fake)), int(hit.sum()) / len(real)


def precision_recall(real: Tensor, fake: Tensor, k: int = 5, chunk: int = 1024) -> tuple[float, float | None]:
    """(precision, recall) of features [N, D] and [M, D]; recall is None with M <= k. Raises ValueError as `neighbours` does."""
    inside, _, reached = neighbours(real, fake, k, chunk)
    return _share(inside > 0), None if reached is None else _share(reached)


def _share(which: Tensor) -> float:
    return int(which.sum()) / len(which)


class DensityCoverage(Compared):
    """Density, coverage, precision and recall of the features of all images. Raises ValueError as `neighbours` does."""

    columns = (
        Column("density", "Density", "higher", "how deep generated images lie in regions of real ones; may exceed 1"),
        Column("coverage", "Coverage", "higher", "share of real images that have a generated one in their neighbourhood"),
        Column("precision", "Precision", "higher", "share of generated images in the neighbourhood of a real one", shown=False),
        Column("recall", "Recall", "higher", "share of real images in the neighbourhood of a generated one", shown=False),
    )
    needs = ("features", "real")
    k = 5
    least_real = k + 1

    def compute(self) -> dict[str, object]:
        """The four of all generated images with respect to the real ones.

        Density and precision are means over generated images, and their intervals take the real ones as they are.
        """
        inside, hit, reached = neighbours(*self.pair, self.k)
        return {
            "density": int(inside.sum()) / (self.k * len(inside)),
            "coverage": _share(hit),
            "precision": _share(inside > 0),
            "recall": None if reached is None else _share(reached),
            "intervals": intervals(self.groups, density=inside / self.k, precision=inside > 0),
        }
