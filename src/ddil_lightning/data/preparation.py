"""What is done to a data set before training: which one it is, its rows after the frozen encoders, the box of its latents."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddil_lightning.backbones.resting import apart
from ddil_lightning.counting import counted
from ddil_lightning.data import manifest
from ddil_lightning.data.cachefile import cached
from ddil_lightning.data.cachefolder import CacheFolder, open_folder
from ddil_lightning.data.captions import Captions, builtin
from ddil_lightning.data.encoded import Encoded, encode
from ddil_lightning.data.notices import Notices
from ddil_lightning.data.sorting import sort_by_size
from ddil_lightning.data.visits import spread
from ddil_lightning.diffusion.reflection import estimate_box
from ddil_lightning.processes import Processes
from ddil_lightning.texts import by

ENCODED, UNENCODED, MOMENT = 5120, 512, 2048
"""Images that the box is estimated from, of those whose latents are there and of those that must be encoded for it; and the mean square."""


def own_captions(backbone: Any) -> Captions:
    """The data set that a pipeline itself names. Raises ValueError for one that names none."""
    name = backbone.about.get("dataset")
    if name is None:
        raise ValueError(
            f"the pipeline {backbone.path} names no data set of its own: give data.captions=Images data.captions.path=PATH, "
            "or Prompts, Shapes or Digits"
        )
    return builtin(name)


def is_encoded(captions: Captions | None, cache: bool | str) -> bool:
    """Whether nothing of a data set is left to be encoded before it is opened: what `encodes` says, of encoded data that are there."""
    there = isinstance(captions, Encoded) or (isinstance(cache, str) and Path(cache).exists())
    return there and not encodes(captions, cache)


def settle(backbone: Any, device: torch.device, encoded: bool) -> None:
    """Bring the frozen pipeline to the device; of one with memory of its own the network alone, where the data are `encoded`."""
    if encoded and apart(device):
        backbone.rest(device)
        backbone.network().to(device)
    else:
        backbone.to(device)


def prepared(
    captions: Captions | None,
    backbone: Any,
    cache: bool | str,
    truncate: bool,
    workers: int,
    on_error: Literal["stop", "skip"],
    notices: Notices,
    processes: Processes,
) -> tuple[Captions, Captions]:
    """A data set, the pipeline's own where there is none, and its rows after the frozen encoders.

    All at once in memory (`cache` true), in a file that is written once (its name), or from a folder that ddil-cache has made, which needs
    no data set besides; else the rows are the data set itself.
    """
    folder: CacheFolder | None = None
    if isinstance(captions, CacheFolder) and isinstance(cache, bool):
        cache = str(captions.file)
    if isinstance(cache, str) and Path(cache).is_dir():
        folder = open_folder(Path(cache), captions, backbone, truncate, on_error == "skip", processes)
        if processes.first:
            notices.recall(folder.manifest["skipped"]["count"])
    if captions is None:
        captions = own_captions(backbone) if folder is None else folder
    captions.on_error = on_error
    check_sizes(captions, backbone)
    if folder is not None:
        return captions, folder
    if not (isinstance(cache, str) and processes.by_first(Path(cache).is_file)):  # of which nothing is read but that
        captions.check_files(processes)
        sort_by_size(captions, processes)
    if cache is True and not isinstance(captions, Encoded):
        say_copies(captions, backbone, processes)
    if isinstance(cache, str):
        return captions, cached(Path(cache), captions, backbone, truncate, workers, notices, processes)
    if not cache and captions.stream:
        raise ValueError("data.captions.stream reads in order and training in any: leave data.cache at true, or use ddil-cache first")
    if cache and not isinstance(captions, Encoded):
        return captions, encode(captions, backbone, truncate, workers, notices, processes.first)
    return captions, captions


LARGE = 2**30
"""Bytes of encoded data from which on a copy of them in every process is told."""


def memory_of(captions: Captions, backbone: Any) -> int:
    """The bytes of all rows encoded in memory, in float32: their latents at the pipeline's size, and a text for each, which equal captions
    have in common."""
    text = sum(4 * x.numel() for x in backbone.null() if x is not None)
    return len(captions) * (4 * math.prod(backbone.latent_shape) + text)


def say_copies(captions: Captions, backbone: Any, processes: Processes) -> None:
    """Warn where every one of several processes is about to encode and to hold a large data set for itself, or to read a stream."""
    if processes.world == 1 or not processes.first:
        return
    size = memory_of(captions, backbone)
    if size > LARGE or captions.stream:
        does = "reads and encodes" if captions.stream else "encodes"
        said = (
            f"data.cache is true, so each of the {processes.world} processes {does} all {len(captions)} rows and holds up to "
            f"{size / 2**30:.1f} GiB of them: give data.cache=FILE, which they make and map together, or the folder of ddil-cache"
        )
        logging.getLogger(__name__).warning(said)


def encodes(captions: Captions | None, cache: bool | str) -> bool:
    """Whether batches of such data, prepared or yet to be, still go through a frozen encoder.

    Raises ValueError for a folder that is no cache.
    """
    if isinstance(captions, Encoded):
        return not captions.whole
    if isinstance(cache, str) and Path(cache).is_dir():
        return not manifest.read(Path(cache))["text"]
    return not cache


def latent_box(captions: Any, backbone: Any, processes: Processes) -> tuple[list[float], list[float]] | None:
    """The latent box of `captions` (reflection.estimate_box), from some hundred images if they are not encoded; None without images.

    They are spread over all rows of each shape. One process reads them, or encodes them, for all.
    """
    if isinstance(captions, Encoded):
        return None if captions.latents is None else processes.by_first(lambda: estimate_box(_by_shape(captions.some_latents(ENCODED))))
    if captions is None or captions[[0]].pixels is None:
        return None

    def estimated() -> tuple[list[float], list[float]]:
        parts: list[list[int]] = []
        for rows, _ in captions.groups():
            some = rows[spread(len(rows), math.ceil(UNENCODED * len(rows) / len(captions)))].tolist()
            parts += [some[i : i + 8] for i in range(0, len(some), 8)]
        told = counted(parts, len(parts), "the box of the latents")
        return estimate_box(_by_shape([backbone.encode_images(captions[part].images(backbone.device)).cpu() for part in told]))

    return processes.by_first(estimated)


def second_moment(captions: Any) -> float | None:
    """The mean square of some latents of `captions`, spread over all rows; None where they are not encoded, or without images."""
    if not isinstance(captions, Encoded) or captions.latents is None:
        return None
    some = captions.some_latents(MOMENT)
    return float(some[0].square().mean() if len(some) == 1 else torch.cat([x.flatten() for x in some]).square().mean())


def _by_shape(latents: Sequence[Tensor]) -> list[Tensor]:
    """Latents as one tensor for each of their shapes, in the order in which these come up."""
    shapes = dict.fromkeys(x.shape[1:] for x in latents)
    return [torch.cat([x for x in latents if x.shape[1:] == shape]) for shape in shapes]


def check_sizes(captions: Captions, backbone: Any) -> None:
    """Raises ValueError, before anything is encoded, for pictures that are made to a size which the pipeline cannot denoise.

    It also has to be trained at the size that it samples at, in previews, tests and by itself.
    """
    for size in captions.sizes or ():
        try:
            backbone.check_size(size)
        except ValueError as error:
            raise ValueError(f"data.captions.size: {error}") from error
    if captions.sizes and backbone.size not in captions.sizes:
        raise ValueError(
            f"data.captions.size is {', '.join(by(size) for size in captions.sizes)}, and {backbone.path} samples at {by(backbone.size)}: "
            "give that size too, or the pipeline one of these by model.pipeline.size"
        )


def check_latents(
    captions: Captions, backbone: Any, strict: bool, latent: Callable[[Tensor], Tensor | None]
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The rows of the size that the pipeline samples at, of the largest group where there are none, and the shape of each group's latents,
    the pipeline's own without images. `latent` encodes rows.

    Raises ValueError for latents that it cannot denoise, and if `strict` where none are of the size that it samples at.
    """
    groups = captions.groups()
    found, own = [latent(rows[:1]) for rows, _ in groups], tuple(backbone.latent_shape)
    shapes = [own if x is None else tuple(x.shape[1:]) for x in found]
    for x in found:
        if x is not None:
            backbone.check_latents(tuple(x.shape[1:]))
    if strict and own not in shapes:
        raise ValueError(
            f"the data's latents are {list(shapes[0])} and the pipeline {backbone.path} denoises {list(own)}: "
            "give images of the size that the pipeline was trained for"
        )
    rows = groups[shapes.index(own)].rows if own in shapes else max((rows for rows, _ in groups), key=len)
    return rows, shapes
