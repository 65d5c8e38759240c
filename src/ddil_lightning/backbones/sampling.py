"""Prompts to images, by a policy of this library or by a diffusers pipeline, from the same noise. Previews, tests and checks all use it."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddil_lightning.diffusion.betas import is_flow
from ddil_lightning.diffusion.denoiser import to_w
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.errors import one_line
from ddil_lightning.streams import Streams

if TYPE_CHECKING:
    from ddil_lightning.backbones.interface import Backbone
    from ddil_lightning.backbones.pipeline import Pipeline


def noise(n: int, shape: Sequence[int], seed: int) -> Tensor:
    """[n, *shape] float32 on the CPU; sample i depends on seed + i alone, so that every model and step count starts from the same noise."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed + i)) for i in range(n)])


def renoising(n: int, seed: int) -> list[torch.Generator]:
    """A generator for the re-noising of every sample: a function of seed + i as the noise that it starts from, and independent of that.

    So an image depends neither on the batch it is drawn in nor on the device.
    """
    return [Streams(seed + i, 0).local("renoise") for i in range(n)]


POSITIONS = 128 * 16 * 16
"""How many places of latents a network works on at a time: 128 of 16 x 16, 8 of 64 x 64, 2 of 128 x 128."""


def batch(shape: Sequence[int]) -> int:
    """How many latents [C, h, w] of a `shape` are sampled at a time, so that memory does not grow with the resolution."""
    return max(1, min(128, POSITIONS // math.prod(shape[1:])))


@torch.no_grad()
def latents(
    backbone: Backbone,
    policy: Policy,
    grid: Grid,
    prompts: Sequence[str],
    g: float | None,
    seed: int = 0,
    chunk: int | None = None,
    rounded: torch.dtype = torch.float32,
) -> Tensor:
    """Final latents [N, C, h, w] of `prompts` at guidance `g` (None: unguided), `chunk` at a time (default: `batch`).

    `rounded`: the type that the noise at the beginning is rounded to. A prompt that is too long is cut, as every diffusers pipeline does:
    who takes prompts from a user asks `check_length` first.
    """
    out, chunk = [], chunk or batch(backbone.latent_shape)
    x_T, generators = noise(len(prompts), backbone.latent_shape, seed).to(rounded).float(), renoising(len(prompts), seed)
    for start in range(0, len(prompts), chunk):
        part = slice(start, start + chunk)
        c = backbone.encode_text(prompts[part], truncate=True).guided(None if g is None else to_w(g))
        out.append(policy.sample(x_T[part].to(backbone.device), grid, c, generators[part]))
    return torch.cat(out)


def images(
    backbone: Backbone, policy: Policy, grid: Grid, prompts: Sequence[str], g: float | None, seed: int = 0, chunk: int | None = None
) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] of `prompts`, on the CPU: the latents of `latents`, decoded."""
    return decoded(backbone, latents(backbone, policy, grid, prompts, g, seed, chunk))


def decoded(backbone: Backbone, made: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] of latents, on the CPU; the device holds a batch of them at most."""
    return torch.cat([backbone.decode(part).cpu() for part in made.split(batch(made.shape[1:]))])


@torch.no_grad()
def pipeline_latents(
    backbone: Pipeline,
    prompts: Sequence[str],
    steps: int,
    g: float,
    seed: int = 0,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    rounded: torch.dtype = torch.float32,
) -> Tensor:
    """Final latents [N, C, h, w] of a diffusers pipeline called as its users call it, from the same noise as `latents`.

    `g` is the guidance, which is mostly the guidance_scale of the call (`Family.asked`); `dtype` that of the latents it begins with, by
    default its network's, after the noise was `rounded` to another. With a `remedy`, which no scheduler of diffusers has, the policy that
    steps as its scheduler does is sampled. Raises ValueError where the scheduler fails for so many `steps`.
    """
    if backbone.remedy is not None:
        from ddil_lightning.backbones.samplers import grid_of, policy_of

        guided = backbone.network().w_conditioned or g > 1
        return latents(backbone, policy_of(backbone, g), grid_of(backbone, steps), prompts, g if guided else None, seed, chunk)
    out, shape, pipe, (height, width) = [], backbone.latent_shape, backbone.pipe, backbone.size
    network = backbone.network()
    chunk = chunk or batch(shape)
    x_T, generators = noise(len(prompts), shape, seed).to(rounded).float(), renoising(len(prompts), seed)
    for start in range(0, len(prompts), chunk):
        part = slice(start, start + chunk)
        with _refusing(backbone, steps), _drawing(backbone, generators[part]):
            made = pipe(
                prompt=list(prompts[part]),
                num_inference_steps=steps,
                height=height,
                width=width,
                latents=network.packed(x_T[part].to(backbone.device, dtype or network.model.dtype)),
                generator=generators[part],
                output_type="latent",
                **{**network.asked(g, len(prompts[part])), **backbone.called_with},
            )
        out.append(network.unpacked(made.images, shape).float())
    return torch.cat(out)


def check_finite(backbone: Pipeline, made: Tensor, steps: int) -> Tensor:
    """`made`, latents that its pipeline has sampled in so many `steps`. Raises ValueError where they are not finite."""
    if not bool(made.isfinite().all()):
        raise ValueError(_cannot(backbone, steps, "its latents are not finite"))
    return made


@contextmanager
def _drawing(backbone: Pipeline, generators: list[torch.Generator]) -> Iterator[None]:
    """Inside, a scheduler that re-noises draws by `generators`, where its pipeline hands it none, as Stable Diffusion 3's: from torch's
    global numbers an image would depend on the batch that it is drawn in. It steps in latents as they are, so that it draws them as a
    policy does, also where its pipeline packs them."""
    scheduler, network, shape = backbone.pipe.scheduler, backbone.network(), backbone.latent_shape
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters or not is_flow(scheduler):
        yield
        return

    @wraps(step)
    def drawn(out: Tensor, t: Any, x: Tensor, **kwargs: Any) -> Any:
        made, *rest = step(network.unpacked(out, shape), t, network.unpacked(x, shape), **{"generator": generators, **kwargs})
        return (network.packed(made), *rest)

    scheduler.step = drawn
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def _refusing(backbone: Pipeline, steps: int) -> Iterator[None]:
    """Inside, what a scheduler of diffusers fails with is a ValueError that names it and the step count.

    It is told by where it happens: in a scheduler, or in a pipeline that looks for more in a scheduler's answer than is there, as
    PixArt's does at one step. A network that fails is another thing, and so is what a pipeline itself says of how it was called.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise  # a matter of the device, wherever it happens
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        where = str(frame.f_globals.get("__name__"))
        unread = where.startswith("diffusers.pipelines.") and isinstance(error, IndexError)
        if not unread and not where.startswith("diffusers.schedulers."):
            raise
        raise ValueError(_cannot(backbone, steps, f"{type(error).__name__}: {one_line(error)}")) from error


def _cannot(backbone: Pipeline, steps: int, why: str) -> str:
    kind, count = type(backbone.pipe.scheduler).__name__, "1 step" if steps == 1 else f"{steps} steps"
    remedy = "give another number of steps, or the pipeline another scheduler"
    return f"{backbone.path} cannot be sampled in {count} by its {kind} ({why}): {remedy}"


def to_uint8(images: Tensor) -> Tensor:
    """Images [..., H, W] in [-1, 1] as uint8 on the CPU, rounded."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


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
        pixels = to_uint8(row).permute(0, 2, 3, 1).numpy()
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

    large = to_uint8(x).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    whole = large[0] if len(large) == 1 else make_grid(large, nrow=columns, padding=4, pad_value=255)
    return Image.fromarray(whole.permute(1, 2, 0).numpy())
