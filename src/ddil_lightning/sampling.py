"""Prompts to images, by a policy of this library or by a diffusers pipeline, from the same noise. Previews, tests and checks all use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .denoiser import to_w
from .schedule import Grid
from .solver import Policy
from .streams import Streams

if TYPE_CHECKING:
    from .backbones import Backbone


def noise(n: int, shape: Sequence[int], seed: int) -> Tensor:
    """[n, *shape] float32 on the CPU; sample i depends on seed + i alone, so that every model and step count starts from the same noise."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed + i)) for i in range(n)])


def renoising(n: int, seed: int) -> list[torch.Generator]:
    """A generator for the re-noising of every sample: a function of seed + i as the noise that it starts from, and independent of that.

    So an image depends neither on the batch it is drawn in nor on the device.
    """
    return [Streams(seed + i, 0).local("renoise") for i in range(n)]


@torch.no_grad()
def latents(
    backbone: Backbone, policy: Policy, grid: Grid, prompts: Sequence[str], g: float | None, seed: int = 0, chunk: int = 128
) -> Tensor:
    """Final latents [N, C, h, w] of `prompts` at guidance `g` (None: unguided), `chunk` at a time."""
    out = []
    x_T, generators = noise(len(prompts), backbone.latent_shape, seed), renoising(len(prompts), seed)
    for start in range(0, len(prompts), chunk):
        part = slice(start, start + chunk)
        c = backbone.encode_text(prompts[part]).guided(None if g is None else to_w(g))
        out.append(policy.sample(x_T[part].to(backbone.device), grid, c, generators[part]))
    return torch.cat(out)


def images(
    backbone: Backbone, policy: Policy, grid: Grid, prompts: Sequence[str], g: float | None, seed: int = 0, chunk: int = 128
) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1], on the CPU."""
    return backbone.decode(latents(backbone, policy, grid, prompts, g, seed, chunk)).cpu()


@torch.no_grad()
def pipeline_latents(pipe: Any, prompts: Sequence[str], steps: int, g: float, seed: int = 0, chunk: int = 128) -> Tensor:
    """Final latents of a diffusers pipeline called as its users call it, from the same noise as `latents`."""
    out = []
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    x_T, generators = noise(len(prompts), shape, seed), renoising(len(prompts), seed)
    for start in range(0, len(prompts), chunk):
        part = slice(start, start + chunk)
        made = pipe(
            prompt=list(prompts[part]),
            num_inference_steps=steps,
            guidance_scale=g,
            latents=x_T[part].to(pipe.device, pipe.unet.dtype),
            generator=generators[part],
            output_type="latent",
        )
        out.append(made.images.float())
    return torch.cat(out)


def sheet(rows: Sequence[Tensor], labels: Sequence[str], captions: Sequence[str], scale: int = 3) -> Any:
    """A PIL picture: one labelled row of images [N, 3, H, W] per model, the prompts as a legend below."""
    from PIL import Image, ImageDraw

    count, (height, width) = len(rows[0]), rows[0].shape[-2:]
    h, w, left, line = height * scale, width * scale, 92, 14
    legend = [f"{i + 1}: {caption}" for i, caption in enumerate(captions[:count])]
    picture = Image.new("RGB", (left + count * (w + 4), len(rows) * (h + 4) + line * (len(legend) + 1)), "white")
    draw = ImageDraw.Draw(picture)
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        draw.text((6, r * (h + 4) + h // 2 - 6), label, fill="black")
        pixels = ((row.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for k in range(count):
            tile = Image.fromarray(pixels[k]).resize((w, h), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
            picture.paste(tile, (left + k * (w + 4), r * (h + 4)))
    for i, text in enumerate(legend):
        draw.text((6, len(rows) * (h + 4) + 4 + i * line), text, fill="black")
    return picture


def tiles(x: Tensor, scale: int, columns: int) -> Any:
    """A PIL picture of images [N, 3, H, W] in [-1, 1], `columns` a row, every pixel enlarged `scale` times."""
    from PIL import Image
    from torchvision.utils import make_grid

    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    large = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    whole = large[0] if len(large) == 1 else make_grid(large, nrow=columns, padding=4, pad_value=255)
    return Image.fromarray(whole.permute(1, 2, 0).numpy())
