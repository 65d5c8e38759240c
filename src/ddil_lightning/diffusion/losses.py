"""Losses as pure functions of tensors: per-sample values [B], so that every method can weigh them and the buffer can rank them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Distance = Literal["huber", "mse"]


def per_sample(x: Tensor) -> Tensor:
    """[B]: the mean over everything but the batch."""
    return x.flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, h: float = 1e-3) -> Tensor:
    """[B] mean of sqrt((a - b)^2 + h^2) - h, elementwise: |a - b| for h -> 0, (a - b)^2 / (2 h) for h -> inf (METHODS 3)."""
    return per_sample(((a - b).square() + h * h).sqrt() - h)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """[B] mean squared difference."""
    return per_sample((a - b).square())


def check_distance(kind: str, h: float) -> None:
    """Raises ValueError for a distance that is not known, or whose width float32 cannot compute with."""
    if kind not in ("huber", "mse"):
        raise ValueError(f"a loss is 'huber' or 'mse', not {kind!r}")
    # Below, h^2 is nothing in float32, and the gradient at 0 no number; above, errors are lost in the rounding of h^2.
    if not 1e-12 <= h <= 1e3:
        raise ValueError(f"huber, the width of the pseudo-Huber loss, is at most 1000 and, squared in float32, still above 0, got {h:g}")


def distance(kind: Distance, a: Tensor, b: Tensor, h: float = 1e-3) -> Tensor:
    """[B] by name: `huber` (with its width h) or `mse`, as `check_distance` accepts them."""
    return pseudo_huber(a, b, h) if kind == "huber" else mse(a, b)
