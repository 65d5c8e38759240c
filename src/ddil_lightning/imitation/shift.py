"""How far a student's roll-outs have drifted from where it was trained: measures between two sets of latents at one node (METHODS 6).

All take `x` [N, ...] and `y` [M, ...] of the same shape per sample, latents [C, H, W] or points [D] (those of the toy's members are one
long vector), and answer with a float. The samples of the two sets must be independent: latents grown from the same noise bias every
pairwise measure downwards. Against forward latents a guided student shows the teacher's own distance too; the teacher's latents are the
other useful reference.

`paired`: sample i of both sets has the same prompt. Such a pair is no draw from both laws, which are mixtures over prompts, so it is left
out of every mean over pairs; and no prompt that a probe is fitted on is one that it is measured on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ddil_lightning.diffusion.gaussians import frechet_distance
from ddil_lightning.records import wide

POOL = 4
"""Side of the grid of channel means that stands for a latent in the Frechet distance and the probe."""


def frechet_pooled(x: Tensor, y: Tensor) -> float:
    """Frechet distance of 4 x 4 pooled channel means (points: of the vectors), as of features: biased upwards for few samples."""
    x, y = _pair(x, y)
    return frechet_distance(_pooled(x), _pooled(y))


def mmd_rbf(x: Tensor, y: Tensor, bandwidth: float | None = None, paired: bool = False) -> float:
    """Squared maximum mean discrepancy with the kernel exp(-d^2 / (2 h^2)), unbiased (Gretton et al. 2012, eq. 3), so also below 0.

    `bandwidth` h: by default the median distance over all pairs of the two sets together.
    """
    within_x, within_y, between = _distances(x, y, paired)
    h = float(torch.cat([within_x, within_y, between]).median()) if bandwidth is None else bandwidth
    scale = max(2 * h**2, 1e-30)
    k_x, k_y, k_xy = ((-d.square() / scale).exp().mean() for d in (within_x, within_y, between))
    return float(k_x + k_y - 2 * k_xy)


def energy_distance(x: Tensor, y: Tensor, paired: bool = False) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of the flattened samples as a U-statistic: unbiased, so also below 0 (Szekely & Rizzo 2013)."""
    within_x, within_y, between = _distances(x, y, paired)
    return float(2 * between.mean() - within_x.mean() - within_y.mean())


def probe_auc(x: Tensor, y: Tensor, seed: int = 0, paired: bool = False) -> float:
    """Area under the ROC curve of a logistic probe that tells x from y: 0.5 if it cannot, 1 if always.

    Fitted on one half and measured on the other. Features are pooled means and pooled mean squares (points: coordinates and their
    squares), so that a change of energy shows, not only a change of mean. `seed` of the split.
    """
    x, y = _pair(x, y)
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for z in (x, y):
        if paired:
            generator.manual_seed(seed)
        f = torch.cat([_pooled(z), _pooled(z.square())], 1)[torch.randperm(len(z), generator=generator).to(z.device)]
        train.append(f[: len(z) // 2])
        test.append(f[len(z) // 2 :])
    mean, std = torch.cat(train).mean(0), torch.cat(train).std(0).clamp(min=1e-12)
    w = _logistic((train[0] - mean) / std, (train[1] - mean) / std)
    a, b = ((f - mean) / std @ w for f in test)
    above = a[:, None] - b
    return float(wide(above > 0).mean() + wide(above == 0).mean() / 2)


def shift_report(
    student: Mapping[int, Tensor], reference: Mapping[int, Tensor], limit: int = 2000, paired: bool = False
) -> dict[int | str, dict[str, float]]:
    """All measures at every node of `student` {t: latents [N, ...]} against `reference` at the same t, and their mean over nodes ("mean").

    `energy` is the difference of the two mean squares. `limit`: samples per set in the measures over pairs, whose memory is quadratic.
    Raises ValueError for a node without reference.
    """
    missing = sorted(set(student) - set(reference))
    if missing or not student:
        raise ValueError(f"a shift report needs at least one node, and reference latents at every node: none at {missing}")
    report: dict[int | str, dict[str, float]] = {}
    for t, x in student.items():
        y = reference[t]
        report[t] = {
            "frechet": frechet_pooled(x, y),
            "mmd": mmd_rbf(x[:limit], y[:limit], paired=paired),
            "auc": probe_auc(x[:limit], y[:limit], paired=paired),
            "energy_distance": energy_distance(x[:limit], y[:limit], paired),
            "energy": _energy(x) - _energy(y),
        }
    rows = list(report.values())
    report["mean"] = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return report


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1:] != y.shape[1:] or x.ndim not in (2, 3, 4) or min(len(x), len(y)) < 4:
        got = f"got {tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(
            f"shift needs two sets of at least 4 latents [N, C, H, W] or points [N, D] (or [N, D, members]) of one shape, {got}"
        )
    return wide(x.detach()), wide(y.detach())


def _pooled(x: Tensor) -> Tensor:
    # A latent that is smaller than the pooled grid would only be repeated.
    return F.adaptive_avg_pool2d(x, (min(POOL, x.shape[2]), min(POOL, x.shape[3]))).flatten(1) if x.ndim == 4 else x.flatten(1)


def _distances(x: Tensor, y: Tensor, paired: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Euclidean distances of all pairs within x, within y and between, without those of a sample to itself, or to its partner."""
    a, b = (z.flatten(1) for z in _pair(x, y))
    between = torch.cdist(a, b)
    if not paired:
        return F.pdist(a), F.pdist(b), between.flatten()
    if len(a) != len(b):
        raise ValueError(f"paired sets have as many samples each, got {len(a)} and {len(b)}")
    return F.pdist(a), F.pdist(b), between[~torch.eye(len(a), dtype=torch.bool, device=a.device)]


def _energy(x: Tensor) -> float:
    return float(wide(x.detach()).square().mean())


def _logistic(a: Tensor, b: Tensor, steps: int = 200) -> Tensor:
    """[D] weights of a ridge logistic regression of a (1) against b (0).

    Newton's method with the curvature's upper bound X'X / 4 (Boehning & Lindsay 1988) never overshoots, also where the sets separate.
    """
    x = torch.cat([F.pad(a, (0, 1), value=1.0), F.pad(b, (0, 1), value=1.0)])  # the last feature is the intercept
    label = torch.cat([torch.ones_like(a[:, 0]), torch.zeros_like(b[:, 0])])
    ridge = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky(x.T @ x / 4 + ridge)
    w = torch.zeros_like(x[0])
    for _ in range(steps):
        slope = x.T @ (label - (x @ w).sigmoid()) - w
        w = w + torch.cholesky_solve(slope[:, None], factor)[:, 0]
    return w[:-1]
