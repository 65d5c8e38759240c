"""What is done to a data set before training: which one it is, its rows after the frozen encoders, the box of its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddil_lightning.data.captions import Captions, builtin
from ddil_lightning.data.encoded import Encoded, Notices, cached, encode
from ddil_lightning.diffusion.reflection import estimate_box
from ddil_lightning.messages import counted
from ddil_lightning.processes import Processes

ENCODED, UNENCODED = 5120, 512
"""Images that the box is estimated from: of those whose latents are there, and of those that must be encoded for it."""


def own_captions(backbone: Any) -> Captions:
    """The data set that a pipeline itself names. Raises ValueError for one that names none."""
    name = backbone.about.get("dataset")
    if name is None:
        raise ValueError(
            f"the pipeline {backbone.path} names no data set of its own: give data.captions=Images data.captions.path=PATH, "
            "or Prompts, Shapes or Digits"
        )
    return builtin(name)


def prepared(
    captions: Captions, backbone: Any, cache: bool | str, truncate: bool, workers: int, notices: Notices, processes: Processes
) -> Captions:
    """`captions` after the frozen encoders: all at once in memory (`cache` true) or in a file (its name); else as they are."""
    if isinstance(cache, str):
        return cached(Path(cache), captions, backbone, truncate, workers, notices, processes)
    if cache and not isinstance(captions, Encoded):
        return encode(captions, backbone, truncate, workers, notices, processes.first)
    return captions


def latent_box(captions: Any, backbone: Any, processes: Processes) -> tuple[list[float], list[float]] | None:
    """The latent box of `captions` (reflection.estimate_box), from some hundred images if they are not encoded; None without images.

    One process encodes them for all.
    """
    if isinstance(captions, Encoded):
        return None if captions.latents is None else estimate_box(captions.latents[:ENCODED].float())
    if captions is None or captions[[0]].pixels is None:
        return None

    def estimated() -> tuple[list[float], list[float]]:
        rows = range(min(UNENCODED, len(captions)))
        parts = [rows[i : i + 8] for i in rows[::8]]
        found = [backbone.encode_images(captions[part].pixels).cpu() for part in counted(parts, len(parts), "the box of the latents")]
        return estimate_box(torch.cat(found))

    return processes.by_first(estimated)
