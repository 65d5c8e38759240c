"""Captions and images after the frozen encoders: what training reads, in memory or from a cache file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .backbones import Backbone
from .captions import Captions, RawBatch
from .files import replacing
from .types import CaptionBatch, Context, cat, take, to


class Encoded(Captions):
    """Captions after the frozen encoders: latents [N, C, h, w] (None without images) and a context, in memory or from a cache file."""

    def __init__(self, latents: Tensor | None, c: Context) -> None:
        self.latents, self.c = latents, c

    def __len__(self) -> int:
        return len(self.c.text)

    def __getitem__(self, index: Sequence[int]) -> CaptionBatch:  # type: ignore[override]
        rows = torch.as_tensor(index)
        return CaptionBatch(None if self.latents is None else self.latents[rows], take(self.c, rows), rows)

    def save(self, path: Path) -> None:
        """One safetensors file with the latents and every part of the context, whole or not at all. Raises OSError on a full disk."""
        from safetensors.torch import save_file

        parts = {k: v.contiguous() for k, v in {"latents": self.latents, **self.c._asdict()}.items() if v is not None}
        with replacing(path) as temporary:
            save_file(parts, temporary, metadata={"rows": json.dumps(len(self))})

    @classmethod
    def load(cls, path: Path) -> Encoded:
        """Read what `save` wrote. Raises ValueError for a file that is damaged, or that something else wrote."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            parts = load_file(path)
            return cls(parts.pop("latents", None), Context(**parts))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"the cache {path} is damaged or none of ours ({error}): delete it, or give another data.cache") from error


@torch.no_grad()
def encode(captions: Captions, backbone: Backbone, chunk: int = 256, truncate: bool = False) -> Encoded:
    """Every caption and image through the frozen encoders once: an image's VAE costs more than a training step's U-Net forward."""
    latents: list[Tensor] = []
    contexts: list[Context] = []
    for start in range(0, len(captions), chunk):
        raw = captions[range(start, min(start + chunk, len(captions)))]
        batch = encode_batch(raw, backbone, truncate)
        contexts.append(to(batch.c, "cpu"))
        if batch.latent is not None:
            latents.append(batch.latent.cpu())
    return Encoded(torch.cat(latents) if latents else None, cat(contexts))


def reread(path: Path, captions: Captions, backbone: Backbone, truncate: bool = False) -> Encoded:
    """The cache file of `captions`. Raises ValueError when it was made from other captions, other images or another pipeline."""
    cached = Encoded.load(path)
    if isinstance(captions, Encoded):
        return cached
    rows = sorted({0, len(captions) // 2, len(captions) - 1})
    same = len(cached) == len(captions)
    if same:
        fresh, kept = encode_batch(captions[rows], backbone, truncate), cached[rows]
        same = _alike(fresh.c.text, kept.c.text) and _alike(fresh.latent, kept.latent)
    if not same:
        raise ValueError(f"the cache {path} was made from another data set or pipeline: delete it, or give another data.cache")
    return cached


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    # Loose enough for encoders in half precision, and for another machine's.
    return a.shape == b.shape and float((a.cpu() - b).abs().mean()) < 0.05


def encode_batch(raw: RawBatch, backbone: Backbone, truncate: bool = False) -> CaptionBatch:
    """One raw batch on the backbone's device."""
    latent = None if raw.pixels is None else backbone.encode_images(raw.pixels)
    return CaptionBatch(latent, backbone.encode_text(raw.prompts, truncate), raw.rows.to(backbone.device))
