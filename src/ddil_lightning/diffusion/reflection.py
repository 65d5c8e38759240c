"""Reflection: thresholding of x0 estimates to the support of the data (METHODS 0.6; DDIL's "reflected diffusion").

Only an x0 estimate is ever thresholded, never the noisy state; eps and v are re-derived from it by the schedule. If the data lie in a
convex box, their posterior mean does too, and projecting an estimate on the box never takes it further from that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Mode = Literal["off", "static", "dynamic"]

BOX = 4.5
"""Half the width of the box where there are no data to take it from: latents are scaled to variance 1."""


class Reflection(nn.Module):
    """The operator R on x0 estimates [B, C, ...].

    `lo`, `hi`: the box, a number for every channel or a list of C numbers. `mode`: `static` clamps to the box; `dynamic` first scales a
    sample whose `quantile` of |x0 - centre| / half-width exceeds 1 back by that quantile (Saharia et al. 2022), `off` is the identity.
    Inside a regression loss the student's own prediction is not reflected at all: a saturated coordinate would never come back.
    """

    lo: Tensor
    hi: Tensor

    def __init__(
        self,
        lo: float | list[float] = -1.0,
        hi: float | list[float] = 1.0,
        mode: Mode = "static",
        quantile: float = 0.995,
    ) -> None:
        super().__init__()
        if mode not in ("off", "static", "dynamic"):
            raise ValueError(f"reflection mode is off, static or dynamic, not {mode!r}")
        low, high = torch.as_tensor(lo, dtype=torch.float32), torch.as_tensor(hi, dtype=torch.float32)
        if low.shape != high.shape or not bool((low < high).all()):
            raise ValueError(f"the reflection box needs lo < hi in every channel, got lo={lo}, hi={hi}")
        self.mode, self.quantile = mode, quantile
        # Persistent: a box estimated from data belongs to the checkpoint.
        self.register_buffer("lo", low)
        self.register_buffer("hi", high)

    def move(self, lo: Sequence[float], hi: Sequence[float]) -> None:
        """Another box, a number for every channel."""
        self.lo.copy_(torch.tensor(lo)), self.hi.copy_(torch.tensor(hi))

    def forward(self, x0: Tensor) -> Tensor:
        """The estimate inside the box; the shape of `x0`."""
        if self.mode == "off":
            return x0
        return self._reflect(x0)

    def through(self, x0: Tensor) -> Tensor:
        """The same with the gradient passed unchanged: for a student's output that feeds a marginal-matching loss."""
        # In this order the value is exactly the reflected one: x0 + (inside - x0) would round, and leave the box.
        return x0 if self.mode == "off" else self._reflect(x0.detach()) + (x0 - x0.detach())

    def saturation(self, x0: Tensor) -> Tensor:
        """[B] fraction of entries of every sample outside or on the edge of the box. A healthy run stays below 1 % for t < 500."""
        lo, hi = self._box(x0)
        return ((x0 <= lo) | (x0 >= hi)).float().flatten(1).mean(1)

    def _box(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (x0.ndim - 2)
        return self.lo.view(shape), self.hi.view(shape)

    def _reflect(self, x0: Tensor) -> Tensor:
        lo, hi = self._box(x0)
        if self.mode == "dynamic":
            centre, half = (lo + hi) / 2, (hi - lo) / 2
            unit = (x0 - centre) / half
            q = unit.flatten(1).abs().float().quantile(self.quantile, dim=1).clamp(min=1).view(-1, *(1,) * (x0.ndim - 1))
            return centre + half * unit.clamp(-q, q) / q
        return x0.clamp(lo, hi)


def estimate_box(
    latents: Tensor | Sequence[Tensor], tail: float = 0.0005, widen: float = 0.05, entries: int = 4096
) -> tuple[list[float], list[float]]:
    """Per-channel quantiles `tail` and 1 - `tail` of data latents [N, C, H, W], widened by `widen` of the range: the box (lo, hi).

    Latents of several shapes are a sequence of such tensors, one for each. A few thousand entries per channel and image are plenty, so at
    most `entries` random ones per image are read (fixed seed).
    """
    groups = [latents] if isinstance(latents, Tensor) else list(latents)
    for group in groups:
        if len(group) == 0 or group.ndim < 2:
            raise ValueError(f"a box is estimated from latents [N, C, ...], got shape {tuple(group.shape)}")
    generator = torch.Generator().manual_seed(0)
    # Of each image before they are joined: images of several shapes in one row would be read as one image.
    columns = torch.cat([_columns(group, entries, generator) for group in groups], 1)
    if columns.shape[1] > 2**24:  # torch.quantile's limit
        columns = columns[:, torch.randperm(columns.shape[1], generator=generator)[: 2**24]]
    last = columns.shape[1] - 1
    # Two order statistics, which need no order of all the others.
    lo, hi = (columns.kthvalue(round(share * last) + 1, dim=1).values for share in (tail, 1 - tail))
    margin = widen * (hi - lo) / 2
    return (lo - margin).tolist(), (hi + margin).tolist()


def _columns(latents: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """[C, n] values of latents [N, C, ...] by channel, of every image at most `entries`."""
    values = latents.flatten(2) if latents.ndim > 2 else latents[..., None]
    if values.shape[2] > entries:
        values = values[:, :, torch.randperm(values.shape[2], generator=generator)[:entries]]
    return values.transpose(0, 1).flatten(1).float()
