"""Which family a pipeline's network belongs to."""

from __future__ import annotations

from typing import Any

from ddil_lightning import plugins
from ddil_lightning.backbones import schedulers
from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.flux import Flux
from ddil_lightning.backbones.pixart import PixArt
from ddil_lightning.backbones.qwen import QwenImage
from ddil_lightning.backbones.repositories import DENOISERS, listed
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


RENAMED = ("Transformer2DModel",)
"""Classes under which published pipelines list a network that diffusers then loads as another one: PixArt's."""


def family_of(pipe: Any, path: str) -> Family:
    """The network of a pipeline in its family. Raises ValueError for a pipeline of no known one."""
    model = next(getattr(pipe, name) for name in DENOISERS if getattr(pipe, name, None) is not None)
    return _known(type(model).__name__, path)(model)


def check_listed(path: str) -> None:
    """Raises ValueError, as for the pipeline itself, where its model_index.json lists a network of no known family, or a scheduler whose
    class does not fit it: before its weights, which may be many gigabytes, are fetched and read."""
    index = listed(path)
    kind = next((index[name][1] for name in DENOISERS if name in index and index[name][1]), None)
    if kind is None or kind in RENAMED:  # what lacks a network is told with what else it lacks
        return
    family, scheduler = _known(kind, path), index.get("scheduler", (None, None))[1]
    if scheduler and schedulers.may_be_flow(scheduler) is (not family.flow):
        raise schedulers.unfit(scheduler, path, family)


def _known(name: str, path: str) -> type[Family]:
    if name not in FAMILIES:
        plugins.load()
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"the pipeline {path} denoises with a {name}: known are {known}; CONTRIBUTING.md adds one")
    return FAMILIES[name]
