"""Sizes of images: which of them a pipeline can make, what they are as latents, and what SDXL is told of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddil_lightning.backbones.interface import Backbone
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
    if network.largest is not None and max(size) > network.largest * scale:
        raise ValueError(f"{path} has positions for sides of {network.largest * scale} pixels at most, not of {by(size)}")
    if any(side < step or side % step for side in size):
        near = [max(step, round(side / step) * step) for side in size]
        raise ValueError(f"{path} makes images whose sides are multiples of {step} pixels, not of {by(size)}: the nearest is {by(near)}")


def shaped(size: int | Sequence[int] | None, network: Family, scale: int, path: str) -> tuple[int, ...]:
    """[C, h, w] of latents of a size, the network's own where that is None. Raises ValueError for one that cannot be (`check`)."""
    if size is None:
        return tuple(network.latent_shape)
    height, width = pair(size)
    check((height, width), network, scale, path)
    return network.latent_shape[0], height // scale, width // scale


class Sized(Backbone):
    """A backbone of diffusers' pipelines: its images may be of other sizes than its network's own."""

    pipe: Any
    _network: Family

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that it samples."""
        height, width = self.latent_shape[1:]
        return height * self._scale, width * self._scale

    @property
    def resized(self) -> bool:
        """Whether that is another size than its network's own."""
        return self.latent_shape != self._network.latent_shape

    @property
    def says_size(self) -> bool:
        """Whether its users have to say the size: a plain call makes its network's own, or what its family says of all of them."""
        called = self._network.called_size
        return self.resized or (called is not None and called != self.size)

    @property
    def _scale(self) -> int:
        return int(self.pipe.vae_scale_factor)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError, with the nearest size that can be, for images [height, width] that autoencoder or network do not divide."""
        check(size, self._network, self._scale, self.path)

    def check_latents(self, shape: Sequence[int]) -> None:
        """Raises ValueError for latents [C, h, w] that it does not denoise."""
        if len(shape) != 3 or shape[0] != self.latent_shape[0]:
            super().check_latents(shape)
        self.check_size((shape[1] * self._scale, shape[2] * self._scale))
