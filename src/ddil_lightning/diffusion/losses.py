"""Losses as pure functions of tensors: per-sample values [B], so that every method can weigh them and the buffer can rank them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


def per_sample(x: Tensor) -> Tensor:
    """[B]: the mean over everything but the batch."""
    return x.flatten(1).mean(1)


def apart(a: Tensor, b: Tensor) -> Tensor:
    """a - b [B, ...], elementwise. Raises ValueError for tensors of two shapes, whose broadcasting would be the loss of other pairs."""
    if a.shape != b.shape:
        raise ValueError(
            f"a loss compares tensors of the shapes {list(a.shape)} and {list(b.shape)}: give both the same, [B, C, h, w], and values of a "
            "sample, [B], as x.view(-1, 1, 1, 1).expand_as(y)"
        )
    return a - b


def pseudo_huber(a: Tensor, b: Tensor, h: float = 1e-3) -> Tensor:
    """[B] mean of sqrt((a - b)^2 + h^2) - h, elementwise: |a - b| for h -> 0, (a - b)^2 / (2 h) for h -> inf (METHODS 3).

    Raises ValueError for tensors of two shapes.
    """
    return per_sample((apart(a, b).square() + h * h).sqrt() - h)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """[B] mean squared difference of a and b [B, ...], a sample each. Raises ValueError for tensors of two shapes."""
    return per_sample(apart(a, b).square())


@dataclass(frozen=True)
class Distance:
    """How far a tensor is from its target, per sample [B].

    Args:
        kind: `huber`, the pseudo-Huber distance, which asks for a median, or `mse`, which asks for a mean.
        width: of the pseudo-Huber distance, in units of the tensors: below it errors count by their squares, above by their size.
    """

    kind: Literal["huber", "mse"] = "huber"
    width: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in ("huber", "mse"):
            raise ValueError(f"distance.kind is 'huber' or 'mse', not {self.kind!r}")
        # Below, its square is nothing in float32, and the gradient at 0 no number; above, errors are lost in the rounding of the square.
        if not 1e-12 <= self.width <= 1e3:
            raise ValueError(
                f"distance.width of the pseudo-Huber loss is at most 1000 and, squared in float32, still above 0, got {self.width:g}"
            )

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """[B] the distance of a and b [B, ...]. Raises ValueError for tensors of two shapes."""
        return pseudo_huber(a, b, self.width) if self.kind == "huber" else mse(a, b)
