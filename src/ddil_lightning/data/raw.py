"""What a data set hands over before encoding, and what tells one data set from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.data.pictures import in_range
from ddil_lightning.records import sent


class RawBatch(NamedTuple):
    """Captions and images before encoding, as a loader hands them over."""

    pixels: Tensor | None  # [B, 3, H, W] in [-1, 1], or uint8 as files have them: `images` reads both
    prompts: list[str]  # one a row, or `counts` of each
    rows: Tensor  # [B], the rows that were read
    enlarged: int = 0  # how many pictures are smaller than the size that was asked for
    skipped: tuple[str, ...] = ()  # why rows that were asked for are not here (`Captions.on_error`)
    gone: tuple[int, ...] = ()  # which rows these are
    sizes: Tensor | None = None  # [B, 6] original size, top and left of the crop, target size; None: as `pixels` are, and whole
    counts: Tensor | None = None  # [B] how many of the prompts each row has, where all of them were asked for (`Visit.every`)
    latent: Tensor | None = None  # [B, C, h, w] in the place of `pixels`, where the images are encoded and the captions are not

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, encoded or not; () without images."""
        images = self.pixels if self.latent is None else self.latent
        return () if images is None else tuple(images.shape[1:])

    def images(self, device: torch.device | None = None) -> Tensor | None:
        """[B, 3, H, W] in [-1, 1], on `device` or where they are; None without images. 8 bits cross to a GPU as they are."""
        if self.pixels is None:
            return None
        there = self.pixels if device is None else sent(self.pixels, device)
        return in_range(there) if there.dtype == torch.uint8 else there

    def first(self, n: int) -> RawBatch:
        """The first `n` rows, one caption each."""
        pixels, sizes, latent = (None if part is None else part[:n] for part in (self.pixels, self.sizes, self.latent))
        return self._replace(pixels=pixels, prompts=self.prompts[:n], rows=self.rows[:n], sizes=sizes, latent=latent)


def joined(batches: Sequence[RawBatch]) -> RawBatch:
    """Batches one after the other as one."""
    pixels = [b.pixels for b in batches if b.pixels is not None]
    sizes = [b.sizes for b in batches if b.sizes is not None]
    counts = [b.counts for b in batches if b.counts is not None]
    return RawBatch(
        torch.cat(pixels) if pixels else None,
        [prompt for b in batches for prompt in b.prompts],
        torch.cat([b.rows for b in batches]),
        sum(b.enlarged for b in batches),
        tuple(dict.fromkeys(why for b in batches for why in b.skipped)),
        tuple(dict.fromkeys(row for b in batches for row in b.gone)),
        torch.cat(sizes) if sizes else None,
        torch.cat(counts) if counts else None,
    )


def digest(parts: Iterable[Any]) -> str:
    """Of bytes, and of what else is written down whole; each with its length, so that no two lists of parts look alike."""
    made = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "backslashreplace")
        made.update(f"{len(data)}:".encode())
        made.update(data)
    return made.hexdigest()
