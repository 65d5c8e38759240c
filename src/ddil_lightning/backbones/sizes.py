"""Sizes of images: which of them a pipeline can make, what they are as latents, and what SDXL is told of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddil_lightning.bounds import at_least, lengths
from ddil_lightning.texts import by

if TYPE_CHECKING:
    from ddil_lightning.backbones.family import Family

CALLED = 8
"""What sides must be multiples of in a call of diffusers' pipelines, whatever their autoencoder."""


def pair(size: int | Sequence[int], name: str = "size") -> tuple[int, int]:
    """(height, width) of one number for both, or of two. Raises ValueError, naming the option `name`, for anything else."""
    if isinstance(size, int):
        size = (size, size)
    lengths(2, **{name: size})
    at_least(1, **{name: list(size)})
    return size[0], size[1]


def whole(size: tuple[int, int], n: int) -> Tensor:
    """[n, 6] sizes of images that are neither enlarged, reduced nor cropped: original, top and left of the crop, target."""
    return torch.tensor([*size, 0, 0, *size]).repeat(n, 1)


def check(size: Sequence[int], network: Family, scale: int, path: str) -> None:
    """Raises ValueError, with the nearest size that can be, for images [height, width] that autoencoder or network do not divide.

    `scale`: pixels to a place of the latents. The size that the network was made for always can be.
    """
    own = [side * scale for side in network.latent_shape[1:]]
    if list(size) == own:
        return
    if network.divisor is None:
        raise ValueError(f"{path} makes images of {by(own)} pixels alone, not of {by(size)}")
    step = math.lcm(network.divisor * scale, CALLED)
    if any(side < step or side % step for side in size):
        near = [max(step, round(side / step) * step) for side in size]
        raise ValueError(f"{path} makes images whose sides are multiples of {step} pixels, not of {by(size)}: the nearest is {by(near)}")


def latent_shape(size: int | Sequence[int], network: Family, scale: int, path: str) -> tuple[int, ...]:
    """[C, h, w] of the latents of images of a `size`. Raises as `check` does."""
    height, width = pair(size)
    check((height, width), network, scale, path)
    return network.latent_shape[0], height // scale, width // scale
