"""A backbone of latents alone, for methods whose teachers are known exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.records import Context


class LatentsAlone(Backbone):
    """Neither texts nor images; a subclass gives `network` and, where it trains, `trainable`. On the CPU."""

    def trainable(self, w_conditioned: bool = False, name: str = "student") -> nn.Module:  # type: ignore[override]
        raise NotImplementedError

    def parts(self) -> list[nn.Module]:
        return [self.network()]

    def to(self, device: torch.device) -> Backbone:
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode_text(self, prompts: Sequence[str], truncate: bool = False, sizes: Tensor | None = None) -> Context:
        return Context(torch.zeros(len(prompts), 1, 1))

    def check_length(self, prompts: Sequence[str]) -> None:
        pass

    def encoders(self) -> str:
        return "none"

    def encode_images(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor, gradients: bool = False) -> Tensor:
        return latents
