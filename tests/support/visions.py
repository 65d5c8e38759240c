"""A frozen network of images for pipelines of any size, for methods whose discriminator looks at images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddil_lightning.training.vision import Vision


class Patches(Vision):
    """A frozen network of images for the tiny pipeline: one map, 8 channels of its patches."""

    widths = (8,)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 3, 4, 4, generator=generator) / 7, requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (torch.nn.functional.conv2d(images, self.weight.to(images.dtype), stride=4).float(),)
