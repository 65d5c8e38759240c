"""What discriminators read of a network of diffusers, and the convolutions that they read it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Enough(Exception):
    """Ends a network's forward once the features are there."""


def watched(
    forward: Callable[[], Tensor], asked: Mapping[str, nn.Module], no_further: bool = False, part: int = 0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output of a `forward`, and what leaves each of the blocks `asked` on the way, in their order.

    `no_further`: the last of them ends it, and there is no output. `part`: which of its answers is meant of a block with several.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, out: Any) -> None:
        kept[name] = out[part] if isinstance(out, tuple) else out  # a down block of a U-Net also returns what its skips carry
        if no_further and len(kept) == len(asked):
            raise _Enough  # the one way out of diffusers' forward that does not repeat its first half here

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in asked.items()]
    out = Tensor()
    try:
        with suppress(_Enough):
            out = forward()
    finally:
        for handle in handles:
            handle.remove()
    return out, tuple(kept[name] for name in asked)


class Head(nn.Sequential):
    """Convolutions that end in one place at the size that they are made for. What is smaller is repeated at its edges up to that, and of
    what is larger the logits of all places are averaged, so that each layer has one voice at any size."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 1, 1, 1] of features [B, F, h, w]."""
        least = 1 << sum(isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) for layer in self)
        down, right = (max(least - side, 0) for side in x.shape[2:])
        if down or right:
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")
        return super().forward(x).mean((2, 3), keepdim=True)


def convolutions(width: int, side: int, groups: int, inner: int | None = None) -> Head:
    """DMD2's head for features [B, width, side, side]: convolutions of stride 2, norms of `groups`, SiLU; `inner` channels after the first
    layer, which then is a projection."""
    layers: list[nn.Module] = []
    if inner is not None and inner < width:
        layers, width = [nn.Conv2d(width, inner, 1)], inner
    while side > 1:
        layers += [nn.Conv2d(width, width, 4, 2, 1), nn.GroupNorm(groups, width), nn.SiLU()]
        side //= 2
    made: Any = Head(*layers, nn.Conv2d(width, 1, 1))
    return made.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]
