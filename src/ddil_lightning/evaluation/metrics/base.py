"""What the metrics share: 8-bit images, features in chunks, and a Metric that uses a network without owning it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ddil_lightning.backbones.sampling import to_uint8

Features = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] to features [B, D]. Brings its own weights and device."""


def as_saved(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] as an 8-bit file would hold them: clamped to [-1, 1], rounded to 256 levels, on the CPU, float32.

    Public FID numbers are of saved files, and a sampler without a threshold overshoots [-1, 1] a little; both ends are settled here.
    Raises ValueError for integers, another shape, or values that are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)}; pass floats [N, 3, H, W] in [-1, 1]")
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images).flatten(1).all(1)).sum()
        raise ValueError(f"images: {bad} of {len(images)} hold NaN or infinity; the sampler diverged, nothing can be scored")
    return to_uint8(images).float() / 127.5 - 1


@torch.no_grad()
def chunked(net: Features, images: Tensor, chunk: int = 128) -> Tensor:
    """`net` over images [B, ...] at most `chunk` at a time, as float32 [B, D] on the CPU. Raises ValueError for other shapes."""
    out = torch.cat([net(x).float().cpu() for x in images.split(chunk)]) if len(images) else torch.empty(0, 0)
    if out.ndim != 2 or len(out) != len(images):
        raise ValueError(f"feature network: {tuple(out.shape)} for {len(images)} images; it must return [B, D]")
    return out


class FeatureMetric(Metric):
    """A Metric over features. With `net` its updates take images, without it features [B, D].

    `net` sits in `__dict__`: as a submodule it would enter the state_dict, the optimiser and the checkpoint of the module that
    holds the metric, as torchmetrics' own FID does.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, net: Features | None = None, chunk: int = 128, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.__dict__["net"] = net
        self.chunk = chunk

    def features(self, x: Tensor) -> Tensor:
        """[B, D] on the metric's device."""
        if self.__dict__["net"] is not None:
            x = chunked(self.__dict__["net"], x, self.chunk)
        elif x.ndim != 2:
            raise ValueError(f"features: {tuple(x.shape)} instead of [B, D]; give the metric a `net` to pass images")
        return x.detach().to(self.device)
