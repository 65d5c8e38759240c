"""Which of several sizes every picture of a data set gets: found by all processes together, and kept for the next start."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ddil_lightning.data.buckets import UNREAD
from ddil_lightning.data.captions import Captions, Images
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.data.raw import digest
from ddil_lightning.data.shards import about_shard, read_shard, write_shard
from ddil_lightning.files import cache_folder, mark_used, tidy
from ddil_lightning.processes import Processes
from ddil_lightning.texts import by

ROUND = 2**20
"""Rows after which what is known is kept: a start that is killed goes on from there."""


def sort_by_size(captions: Captions, processes: Processes) -> None:
    """Find out once, by all processes for all, which of several sizes every picture gets, and say which of them none does."""
    if len(captions.sizes or ()) < 2 or isinstance(captions, Encoded):
        return
    if isinstance(captions, Images):
        captions.sorting.know(_numbers(captions, processes))
    else:
        captions.group_by(processes.by_first(captions.groups))
    names = [group.name for group in captions.groups()]
    empty = [by(size) for size in captions.sizes or () if by(size) not in names]
    if empty and processes.first:
        log = logging.getLogger(__name__)
        log.warning(f"no picture is nearest in aspect to {', '.join(empty)} of data.captions.size: the student is not trained at that")


def _numbers(images: Images, processes: Processes) -> Tensor:
    """[N] which size each picture gets: what is kept of data of this stamp, and else by the heads of the files, of which every process
    reads a share. Those that could not be read are asked for again at each start."""
    file, numbers = processes.by_first(lambda: _recalled(images))
    for rows in (numbers == UNREAD).nonzero()[:, 0].split(ROUND):
        mine = rows.tensor_split(processes.world)[processes.rank].tolist()
        every = processes.gathered(processes.by_all(lambda mine=mine: images.sorting.read(images.frames, mine, processes.first)))  # type: ignore[misc]
        numbers[rows] = torch.cat(every)
        if processes.first and file is not None:
            with suppress(OSError):  # a cache that cannot be written
                write_shard(file, {"numbers": numbers}, {"rows": len(numbers)})
                tidy(file.parent)
    return numbers


def _recalled(images: Images) -> tuple[Path | None, Tensor]:
    """Where the sizes of such data are kept, and what is there: UNREAD where nothing is. No file for data of a class without a stamp."""
    stamp, numbers = images.stamp(), torch.full((len(images),), UNREAD, dtype=torch.int16)
    if stamp is None:
        return None, numbers
    file = cache_folder() / "sizes" / f"{digest([stamp, images.sizes, len(images)])[:32]}.safetensors"
    with suppress(KeyError, ValueError):  # none is kept, or it is cut short
        if about_shard(file)["rows"] == len(images):
            numbers = read_shard(file)["numbers"].clone()
            mark_used(file)
    return file, numbers
