"""What is looked at of an image beside the whole of it through a network: crops at full resolution, and its tones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_lightning.records import wide

LUMINANCE = (0.299, 0.587, 0.114)
"""The shares of red, green and blue in the luminance of a pixel (ITU-R BT.601)."""


@dataclass(frozen=True)
class Crops:
    """Squares at full resolution, through which a patch FID looks (Lin et al. 2024, SDXL-Lightning): a fixed grid, nothing is drawn.

    Args:
        side: edge of a square in pixels. 299 is what Inception reads, so that nothing is resized.
        at: edge of the images that are cut, to which others are resized before, real and generated alike; null for no resizing: each image
            is cut as large as it is, as DMD2's evaluator does it, and one that is smaller than a square is enlarged to it.
        grid: so many squares each way, evenly from border to border; 1 is the one at the centre.
    """

    side: int = 299
    at: int | None = 1024
    grid: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.side <= (self.side if self.at is None else self.at) or self.grid < 1:
            raise ValueError(f"Crops(side={self.side}, at={self.at}, grid={self.grid}): give 1 <= side <= at and grid >= 1")
        if self.at is None and self.grid > 1:
            raise ValueError(f"Crops(at=None, grid={self.grid}): of images of their own sizes the centre alone is cut; give grid=1")

    def __call__(self, images: Tensor) -> Tensor:
        """The crops [B * grid^2, 3, side, side] of images [B, 3, at, at], those of an image one after the other.

        Raises ValueError for images that are smaller than a crop.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.side:
            raise ValueError(f"crops of {self.side} pixels: the images have {height} x {width}; give smaller ones, or `at` to enlarge to")
        tops, lefts = self._starts(height), self._starts(width)
        cut = [images[:, :, y : y + self.side, x : x + self.side] for y in tops for x in lefts]
        return torch.stack(cut, 1).flatten(0, 1)

    def _starts(self, edge: int) -> list[int]:
        room, last = edge - self.side, self.grid - 1
        return [round(i * room / last) for i in range(self.grid)] if last else [room // 2]

    @property
    def about(self) -> str:
        """What a protocol calls them."""
        where = "the centre" if self.grid == 1 else f"a grid of {self.grid} x {self.grid}"
        return f"{where}, {self.side} pixels at full resolution" if self.at is None else f"{where}, {self.side} of {self.at} pixels"


def tones(images: Tensor) -> Tensor:
    """Saturation and contrast [B, 2], float64 in [0, 1], of images [B, 3, H, W] in [-1, 1].

    Saturation is the mean over pixels of (max - min) / max of their colours, 0 for black, as in HSV; contrast the standard deviation of
    luminance. Both rise under strong guidance (Sadat et al. 2024, adaptive projected guidance). Noise in dark pixels counts as saturation.
    """
    x = (wide(images) + 1) / 2
    high, low = x.amax(1), x.amin(1)
    saturation = (high - low) / high.clamp(min=1 / 512)  # below the darkest grey of 8 bits, so only black is held away from 0 / 0
    luminance = torch.tensordot(x, x.new_tensor(LUMINANCE), dims=([1], [0]))
    return torch.stack([saturation.mean((1, 2)), luminance.flatten(1).std(1, correction=0)], 1)
