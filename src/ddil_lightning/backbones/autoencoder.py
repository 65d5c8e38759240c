"""Images and scaled latents by a pipeline's autoencoder: in its own precision, and so many at a time that memory holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.records import sent

PIXELS = 4 * 512 * 512
"""How many pixels the autoencoder works on at a time: some 4 GB in float32, whatever the size of an image. A larger one is tiled."""


def factor(vae: Any) -> int:
    """How many times smaller latents are than images, by its configuration: every block but the last halves them."""
    config = vae.config
    return 1 << (len(config.get("block_out_channels") or config.get("encoder_block_out_channels") or config.dim_mult) - 1)


def channels(vae: Any) -> int:
    """C of its latents."""
    return int(vae.config.z_dim if _of_frames(vae) else vae.config.latent_channels)


def scale(vae: Any) -> tuple[Any, Any]:
    """How its latents are scaled, by its configuration: a factor and a shift or None, or the channels' standard deviations and means."""
    config = vae.config
    return (config.scaling_factor, config.get("shift_factor")) if "scaling_factor" in config else (config.latents_std, config.latents_mean)


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, device: torch.device) -> Tensor:
    """Scaled latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]: the posterior mean, or its one answer (DC-AE), on `device`.

    Raises ValueError for what is no images, such as latents, packed or not.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(
            f"images are [B, 3, H, W] in [-1, 1], not {tuple(pixels.shape)}: latents, packed or not, are decoded to images first"
        )
    with _working(vae, device, pixels.shape[2] * pixels.shape[3]) as chunk:
        parts = [_answer(vae, sent(part, device).to(vae.dtype)).float() for part in pixels.split(chunk)]
    z = torch.cat(parts)
    times, shift = _affine(vae, z)
    return ((z - shift) * times).contiguous()


def check(latents: Tensor, channels: int) -> None:
    """Raises ValueError unless they are [B, C, h, w] of so many `channels`: pipelines that pack theirs hold them as [B, h w / 4, 4 C]."""
    if latents.ndim != 4 or latents.shape[1] != channels:
        packed = "; packed ones are made so by the network's unpacked(x, [C, h, w])" if latents.ndim == 3 else ""
        raise ValueError(f"latents are [B, {channels}, h, w], not {tuple(latents.shape)}{packed}")


def _answer(vae: Any, pixels: Tensor) -> Tensor:
    encoded = vae.encode(pixels.unsqueeze(2) if _of_frames(vae) else pixels)
    z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return z.squeeze(2) if _of_frames(vae) else z  # type: ignore[no-any-return]


def decode(vae: Any, latents: Tensor, device: torch.device, factor: int, gradients: bool = False) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] of scaled latents, `factor` times as large; with `gradients`, not clamped here (Qwen-Image's does).

    Raises ValueError for latents of another autoencoder, or packed ones.
    """
    check(latents, channels(vae))
    made = []
    with torch.set_grad_enabled(gradients), _working(vae, device, latents.shape[2] * latents.shape[3] * factor**2) as chunk:
        for part in latents.split(chunk):
            z = sent(part, device).to(vae.dtype)
            times, shift = _affine(vae, z)
            z = z / times + shift
            image = vae.decode(z.unsqueeze(2) if _of_frames(vae) else z, return_dict=False)[0].float()
            image = image.squeeze(2) if _of_frames(vae) else image
            made.append(image if gradients else image.clamp(-1, 1))
    return torch.cat(made)


def _of_frames(vae: Any) -> bool:
    """Whether it takes and answers films [B, C, frames, H, W], of which an image is one frame."""
    return "z_dim" in vae.config


def _affine(vae: Any, z: Tensor) -> tuple[Any, Any]:
    """What latents are multiplied by after the other is taken off: numbers, or [C, 1, 1] as `z` is."""
    by, shift = scale(vae)
    if isinstance(by, list | tuple):
        std, mean = (sent(torch.tensor(x), z.device).to(z.dtype).view(-1, 1, 1) for x in (by, shift))
        return 1 / std, mean
    return by, shift or 0.0


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
