"""Images and scaled latents by a pipeline's autoencoder: in its own precision, and so many at a time that memory holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PIXELS = 4 * 512 * 512
"""How many pixels the autoencoder works on at a time: some 4 GB in float32, whatever the size of an image. A larger one is tiled."""


def factor(vae: Any) -> int:
    """How many times smaller latents are than images, by its configuration: every block but the last halves them."""
    return 1 << (len(vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels) - 1)


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, device: torch.device) -> Tensor:
    """Scaled latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]: the posterior mean, or its one answer (DC-AE), on `device`."""
    with _working(vae, device, pixels.shape[2] * pixels.shape[3]) as chunk:
        parts = [_answer(vae.encode(part.to(device, vae.dtype))).float() for part in pixels.split(chunk)]
    return ((torch.cat(parts) - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor).contiguous()


def _answer(encoded: Any) -> Tensor:
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent  # type: ignore[no-any-return]


def decode(vae: Any, latents: Tensor, device: torch.device, factor: int, gradients: bool = False) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] of scaled latents, `factor` times as large; with `gradients`, not clamped."""
    made = []
    with torch.set_grad_enabled(gradients), _working(vae, device, latents.shape[2] * latents.shape[3] * factor**2) as chunk:
        for part in latents.split(chunk):
            z = part.to(device, vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
            image = vae.decode(z, return_dict=False)[0].float()
            made.append(image if gradients else image.clamp(-1, 1))
    return torch.cat(made)


@contextmanager
def _working(vae: Any, device: torch.device, pixels: int) -> Iterator[int]:
    """Inside, the autoencoder works in full precision, whatever the trainer's is, and on an image that is too large in tiles.

    Yields how many images of so many `pixels` each it takes at a time.
    """
    tiled = pixels > PIXELS and hasattr(vae, "enable_tiling")
    if tiled:
        vae.enable_tiling()
    try:
        with torch.autocast(device.type, enabled=False):
            yield min(64, max(1, PIXELS // pixels))
    finally:
        if tiled:
            vae.disable_tiling()
