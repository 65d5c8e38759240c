"""What lies where in tar files: read once from the heads of their members, and kept for the next start and for other processes."""

from __future__ import annotations

import errno
import os
import random
import re
import tarfile
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddil_lightning.counting import in_threads
from ddil_lightning.data.folders import IMAGES, mark_of, stat_of
from ddil_lightning.data.raw import digest
from ddil_lightning.data.shards import about_shard, packed, read_shard, unpacked, write_shard
from ddil_lightning.errors import check_exhausted
from ddil_lightning.files import cache_folder, mark_used, tidy
from ddil_lightning.texts import reason

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""The name of a member: its sample up to the first dot of the file's name, and what it is of it."""


class Part(NamedTuple):
    """A member of an archive: where its bytes begin, how many they are, and its name."""

    begin: int
    size: int
    name: str


ABSENT = Part(0, -1, "")
Sample = tuple[Part, Part, Part]
"""Picture, json and text."""


class Index(NamedTuple):
    """The samples of an archive in its order. A damaged one has those before the damage, but for the last: a member of it may be lost."""

    places: Tensor  # [n, 6] begin and size of picture, json and text
    names: list[str]  # of the picture, or of the text where there is none
    damage: str = ""  # why there may be more
    note: str = ""  # what is left out of it
    kept: bool = False  # whether it was known


def index_all(files: Sequence[Path], image: str, limit: int | None = None) -> list[Index]:
    """The indexes of archives; with a `limit` of the first ones that have so many samples.

    Several threads read: of files on a network each waits for its answer. Processes that index the same archives at the same time share
    them without knowing of each other: each goes through them in an order of its own, and takes what another has kept meanwhile.
    """
    order = list(range(len(files)))
    if limit is None:
        random.SystemRandom().shuffle(order)
    found: dict[int, Index] = {}
    count, read = 0, in_threads(lambda i: indexed(files[i], image), order, "the heads of the archives", _speaks())
    with closing(read):
        for i, index in zip(order, read, strict=True):
            found[i], count = index, count + len(index.names)
            if limit is not None and count >= limit:
                break
    if not all(index.kept for index in found.values()):
        tidy(_folder())
    return [found[i] for i in sorted(found)]


def indexed(file: Path, image: str) -> Index:
    """The index of an archive: what is kept of one of this name, size, time and end, or else read from its heads, and kept.

    A copy that keeps the time (`cp -p`, `rsync -t`) is known by that on another disk, such as each job makes on its node's. Captions that
    were corrected may leave size and end as they were, not the time.
    """
    name = str(file.resolve())
    mark, about = mark_of(name), {"of": list(stat_of(name) or ())}
    kept = _folder() / f"{digest([file.name, mark, image])[:32]}.safetensors"
    with suppress(KeyError, ValueError):  # none is kept, or it is cut short
        told = about_shard(kept)
        if mark is not None and told["of"][-2:] == about["of"]:
            columns = read_shard(kept)
            mark_used(kept)
            return Index(columns["places"], unpacked(columns), note=told["note"], kept=True)
    made = read_heads(file, image)
    if not made.damage:  # of which a longer file may be on its way
        with suppress(OSError, UnicodeError):  # a cache that cannot be written; names that are no UTF-8
            write_shard(kept, {"places": made.places, **packed(made.names)}, {**about, "note": made.note})
    return made


def read_heads(file: Path, image: str) -> Index:
    """The index of an archive, from the heads of its members. Raises ValueError for one that the system does not read: a network that was
    away for a moment has damaged no archive, and other processes may have read it whole."""
    samples: dict[str, dict[str, Part]] = {}
    last, damage = "", ""
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                named = MEMBER.fullmatch(member.name)
                if named and member.isreg():
                    part, last = Part(member.offset_data, member.size, member.name), named[1]
                    if samples.setdefault(last, {}).setdefault(named[2].lower(), part) is not part:
                        raise ValueError(f"it holds {member.name} twice")
                archive.members = []  # type: ignore[attr-defined]  # it keeps them all otherwise
    except (tarfile.TarError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a head's own nonsense asks for: a place before the file
            check_exhausted(error, str(file))
            raise ValueError(f"{file} cannot be read: {reason(error)}") from error
        damage = f"{file.name} cannot be read as a tar file: {reason(error)}"
        samples.pop(last, None)
    found, lost = _sorted(samples, image)
    note = ""
    if lost:
        said = f"{len(lost)} pictures are left out, the first {lost[0]}: a sample is called after its name up to the first dot"
        note = f"{said}, as in WebDataset, and {image} or a known suffix is to follow it"
    places = torch.tensor([[n for part in parts for n in part[:2]] for parts in found], dtype=torch.int64).reshape(-1, 6)
    return Index(places, [picture.name or text.name for picture, _, text in found], damage, note)


def _sorted(samples: dict[str, dict[str, Part]], image: str) -> tuple[list[Sample], list[str]]:
    """The members of each sample that has a picture or a caption, and the names of pictures that are in none."""
    found, lost = [], []
    for parts in samples.values():
        pictures = [part for kind, part in parts.items() if kind == image.lower()]
        pictures += [part for kind, part in parts.items() if f".{kind}" in IMAGES]
        sample = (pictures[0] if pictures else ABSENT, parts.get("json", ABSENT), parts.get("txt", ABSENT))
        if sample[0].size >= 0 or sample[2].size >= 0:
            found.append(sample)
        else:
            lost += [part.name for part in parts.values() if Path(part.name).suffix.lower() in IMAGES]
    return found, lost


def _folder() -> Path:
    """Where indexes are kept."""
    return cache_folder() / "archives"


def _speaks() -> bool:
    """Whether this process, which may not have met the others yet, is the first of those that a launcher has started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
