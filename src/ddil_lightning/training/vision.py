"""Frozen networks through which a discriminator looks at images, which a config names, and heads that are told the caption."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_lightning.backbones.repositories import cached
from ddil_lightning.bounds import lengths, within
from ddil_lightning.records import Context
from ddil_lightning.servers import no_hub
from ddil_lightning.texts import reason


class Vision(nn.Module, ABC):
    """A frozen network of images [B, 3, H, W] in [-1, 1], differentiable in them; it belongs to no method and is in no checkpoint."""

    widths: Sequence[int]
    """The number of channels of each of its maps."""

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Its maps [B, F, h, w], one for each of `widths`."""


class BuiltinVision(Vision):
    """The built-in evaluator's, a small CLIP of the built-in data: its patch embedding and its three layers, four maps [B, 96, 8, 8]."""

    def __init__(self) -> None:
        from ddil_lightning.miniature.evaluator import CONFIG, load_evaluator

        super().__init__()
        self.evaluator = load_evaluator()
        tower = CONFIG["vision_cfg"]
        self.widths = [tower["width"]] * (1 + tower["layers"])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Four maps of unit length at every place."""
        return tuple(self.evaluator.image_feature_maps(images))


class Dino(Vision):
    """A vision transformer of transformers (DINO, DINOv2): the patch tokens that leave some of its blocks, as maps.

    Args:
        path: a folder with its config.json and weights, or a hub id: facebook/dino-vits16, facebook/dinov2-small.
        layers: the blocks, from 0 (those of StyleGAN-T and ADD, of a network of twelve).
        size: in pixels, to which images are resized, a multiple of the patch.
    """

    mean: Tensor
    std: Tensor
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, path: str, layers: tuple[int, ...] = (2, 5, 8, 11), size: int = 224) -> None:
        from transformers import AutoModel

        super().__init__()
        lengths(layers=layers)
        folder = Path(path).expanduser()
        try:
            why = None if folder.is_dir() else no_hub()
            place = folder if folder.is_dir() else path if why is None else cached(path, "config.json", why)
            self.model = AutoModel.from_pretrained(place).float()
        except (OSError, ValueError, KeyError) as error:
            why = reason(error)
            raise ValueError(f"model.vision.path {path} holds no vision transformer that transformers reads: {why}") from error
        config = self.model.config
        within(0, config.num_hidden_layers - 1, **{"vision.layers": layers})
        if size < 1 or size % config.patch_size:
            raise ValueError(f"vision.size = {size} is no multiple of the patch of {path}, {config.patch_size} pixels")
        self.layers, self.size, self.patch = tuple(layers), size, config.patch_size
        self.interpolates = {"interpolate_pos_encoding": True} if config.model_type == "vit" else {}
        self.widths = [config.hidden_size] * len(layers)
        self.register_buffer("mean", torch.tensor(self.MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps [B, F, size / patch, size / patch], without the class token and registers, which come first."""
        pixels = F.interpolate(images.float(), size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        pixels = ((pixels + 1) / 2 - self.mean) / self.std
        states = self.model(pixel_values=pixels, output_hidden_states=True, **self.interpolates).hidden_states
        side = self.size // self.patch
        return tuple(states[k + 1][:, -side * side :].transpose(1, 2).unflatten(2, (side, side)) for k in self.layers)


class ToldHead(nn.Module):
    """Logits [B, h w] of a map [B, F, h, w] and an embedding [B, D]: two convolutions, then psi(f) + <V e, f> (Miyato & Koyama 2018)."""

    def __init__(self, width: int, told: int, hidden: int = 64) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.GroupNorm(8, hidden), nn.SiLU())
        self.look = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1), nn.GroupNorm(8, hidden), nn.SiLU())
        self.psi, self.v = nn.Conv2d(hidden, 1, 1), nn.Linear(told, hidden)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """A logit for every place."""
        h = self.reduce(x)
        h = h + self.look(h)
        return (self.psi(h)[:, 0] + torch.einsum("bf,bfhw->bhw", self.v(told), h) / h.shape[1] ** 0.5).flatten(1)


class ToldHeads(nn.ModuleList):
    """A `ToldHead` for each map of a Vision; the last argument is the embedding that all of them are told."""

    def __init__(self, widths: Sequence[int], told: int) -> None:
        super().__init__([ToldHead(width, told) for width in widths])

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, h w] of each map: maps of different sizes have as many places, and each head one voice."""
        *maps, told = features
        return tuple(head(x, told) for head, x in zip(self, maps, strict=True))


def embedding(c: Context) -> Tensor:
    """[B, D] of a caption: the pooled text where there is one, else the mean of the text's states (those of `mask`)."""
    if c.pooled is not None:
        return c.pooled
    if c.mask is None:
        return c.text.mean(1)
    mask = c.mask.to(c.text)[..., None]
    return (c.text * mask).sum(1) / mask.sum(1).clamp(min=1)
