"""DINO and DINOv2 of transformers: what an image shows, learned without captions or classes, for diversity and distances in features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.evaluation.networks.kinds import Features, Named
from ddil_lightning.evaluation.networks.transformer import SETTINGS, folder_model, pictures
from ddil_lightning.evaluation.networks.weights import beside, given_file, hub_folder, told

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DINO, DINOV2 = "facebook/dino-vits16", "facebook/dinov2-large"


def dino_features(path: str | None, device: str | torch.device) -> Features:
    """The class token [B, D] of DINO (Caron et al. 2021), ViT-S/16; `path`: a folder of transformers' ViTModel."""
    return _class_token(path, device, "DINO", DINO)


def dinov2_features(path: str | None, device: str | torch.device) -> Features:
    """The class token [B, D] of DINOv2 (Oquab et al. 2024), ViT-L/14 as in FD-DINOv2; `path`: a folder of transformers' Dinov2Model."""
    return _class_token(path, device, "DINOv2", DINOV2)


def _class_token(path: str | None, device: str | torch.device, name: str, repository: str) -> Features:
    """Images are rounded to 8 bits and go through the preprocessing that the folder names."""
    from transformers import Dinov2Model, ViTModel

    folder = Path(path).expanduser() if path else hub_folder(repository, "config.json", "preprocessor_config.json", WEIGHTS)
    given = given_file(path, *WEIGHTS) if path else None
    own: dict[str, Any] = {"add_pooling_layer": False} if name == "DINO" else {}
    model = folder_model(ViTModel if name == "DINO" else Dinov2Model, folder, name, **own).to(device)
    see = pictures(folder)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return model(pixel_values=see(images).to(device)).last_hidden_state[:, 0].float()

    about = told(name, given, beside(folder, *SETTINGS)) if given else f"{name} {repository}"
    return Named(about, features)
