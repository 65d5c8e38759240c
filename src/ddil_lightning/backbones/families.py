"""Which family a pipeline's network belongs to."""

from __future__ import annotations

from typing import Any

from ddil_lightning import plugins
from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.flux import Flux
from ddil_lightning.backbones.pixart import PixArt
from ddil_lightning.backbones.qwen import QwenImage
from ddil_lightning.backbones.repositories import DENOISERS
from ddil_lightning.backbones.sana import Sana
from ddil_lightning.backbones.sd3 import SD3
from ddil_lightning.backbones.unet import UNet
from ddil_lightning.backbones.zimage import ZImage

FAMILIES: dict[str, type[Family]] = {
    "UNet2DConditionModel": UNet,
    "SD3Transformer2DModel": SD3,
    "PixArtTransformer2DModel": PixArt,
    "FluxTransformer2DModel": Flux,
    "SanaTransformer2DModel": Sana,
    "ZImageTransformer2DModel": ZImage,
    "QwenImageTransformer2DModel": QwenImage,
}
"""The family of a pipeline by the class of its network in diffusers. A third party's is an entry made where its file is imported."""


def family_of(pipe: Any, path: str) -> Family:
    """The network of a pipeline in its family. Raises ValueError for a pipeline of no known one."""
    name = next(name for name in DENOISERS if getattr(pipe, name, None) is not None)
    model = getattr(pipe, name)
    if type(model).__name__ not in FAMILIES:
        plugins.load()
    if type(model).__name__ not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"the pipeline {path} denoises with a {type(model).__name__}: known are {known}; CONTRIBUTING.md adds one")
    return FAMILIES[type(model).__name__](model)
