"""The squared maximum mean discrepancy of two samples (Gretton et al. 2012): how far their means lie apart in a kernel's space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddil_lightning.records import wide

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Points [A, D] and [B, D] to a number for each pair, [A, B]."""


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """(a.b / D + 1)^3, the kernel of KID."""
    return (a @ b.T / a.shape[1] + 1) ** 3


class Gaussian:
    """exp(-|a - b|^2 / (2 sigma^2))."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The kernel [A, B] of all pairs; float64 keeps the cancellation of the matmul form harmless."""
        squared = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)
        return (-squared / (2 * self.sigma**2)).exp()


@torch.no_grad()
def squared_mmd(kernel: Kernel, x: Tensor, y: Tensor, unbiased: bool = True, chunk: int = 1024) -> float:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) of samples [N, D] and [M, D], in float64, [chunk, max(N, M)] pairs at a time.

    `unbiased`: no point is paired with itself, so that equal laws have 0 on average, and less in about half of all cases; otherwise it is,
    and equal samples have 0. Raises ValueError for other shapes, and for fewer than two points on a side.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"kernel distance: features {tuple(x.shape)} and {tuple(y.shape)}; both must be [N >= 2, D]")
    x, y = wide(x), wide(y)
    across = sum(float(kernel(part, y).sum()) for part in x.split(chunk)) / (len(x) * len(y))
    return _within(kernel, x, unbiased, chunk) + _within(kernel, y, unbiased, chunk) - 2 * across


def _within(kernel: Kernel, x: Tensor, unbiased: bool, chunk: int) -> float:
    total = 0.0
    for start in range(0, len(x), chunk):
        part, rest = x[start : start + chunk], x[start + chunk :]
        own = kernel(part, part)
        total += float(own.sum()) + 2 * float(kernel(part, rest).sum())
        if unbiased:
            total -= float(own.diagonal().sum())
    return total / (len(x) * (len(x) - unbiased))
