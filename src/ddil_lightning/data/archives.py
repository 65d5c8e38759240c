"""WebDataset archives: pictures and captions in tar files, which are indexed once and then read row by row, in any order."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddil_lightning.data.folders import IMAGES, Cells, marks
from ddil_lightning.texts import parse_json, reason

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""The name of a member: its sample up to the first dot of the file's name, and what it is of it."""
BRACES = re.compile(r"\{([^{}]*)\}")


class Part(NamedTuple):
    """A member of an archive: where its bytes begin, how many they are, and its name."""

    begin: int
    size: int
    name: str


ABSENT = Part(0, -1, "")


class Archives:
    """Pictures and captions in tar files, as Listing has those in folders.

    The members of a sample have their name up to its first dot in common: a picture (`image` or else a known suffix, `key.jpg`), and
    `key.json` with the column `caption` or `key.txt` with a caption in each line. The index of a file is made of its heads alone.
    """

    def __init__(self, files: Sequence[Path], image: str, caption: str, limit: int | None = None) -> None:
        self._files, self._image, self._caption = list(files), image, caption
        places, names, count = [torch.zeros(0, 7, dtype=torch.int64)], [], 0
        for i, file in enumerate(self._files):
            samples = _samples(file, image)[: None if limit is None else limit - count]
            if samples:
                places.append(torch.tensor([[i, *(n for part in parts for n in part[:2])] for parts in samples]))
                names += [picture.name or text.name for picture, _, text in samples]
                count += len(samples)
        self._at, self._names = torch.cat(places), Cells(names)

    def __len__(self) -> int:
        return len(self._at)

    def captions(self, index: Sequence[int]) -> list[Any]:
        """What stands as a caption in the rows `index`: of key.json, if it has the column, else of key.txt."""
        found = []
        for row in index:
            i, _, _, *places = self._at[row].tolist()
            try:
                found.append(self._text(self._files[i], self._names[row], places))
            except ValueError as error:
                found.append(error)
        return found

    def pictures(self, index: Sequence[int]) -> list[tuple[bytes | None, Any]]:
        """Bytes of the rows `index`, and what a message calls them. Raises ValueError for what the archive no longer holds."""
        found: list[tuple[bytes | None, Any]] = []
        for row in index:
            i, begin, size, *_ = self._at[row].tolist()
            name = f"{self._files[i].name}:{self._names[row]}"
            found.append((_read(self._files[i], begin, size), name) if size >= 0 else (None, None))
        return found

    def missing(self) -> list[tuple[int, str]]:
        """Nothing: the archives were read when they were indexed."""
        return []

    def stamps(self, times: bool = True) -> Iterator[Any]:
        """What changes with any archive, their order and what is read of them; without `times` what copies of them have as well."""
        yield self._image, self._caption
        yield from marks(self._files, times)

    def _text(self, file: Path, name: str, places: Sequence[int]) -> Any:
        begin, size, text_begin, text_size = places
        if size >= 0:
            cells = parse_json(_decoded(_read(file, begin, size), f"{file}:{name}, its .json"), f"{file}:{name}, its .json")
            if isinstance(cells, dict) and self._caption in cells:
                return cells[self._caption]
        if text_size < 0:
            return None
        lines = [line.strip() for line in _decoded(_read(file, text_begin, text_size), f"{file}:{name}, its .txt").split("\n")]
        lines = [line for line in lines if line]
        return lines if len(lines) > 1 else "".join(lines)


def expanded(pattern: str) -> list[Path]:
    """The files of a pattern in its order: {00..12} and {a,b} written out, *, ? and [...] matched. Raises ValueError for none."""
    found: list[str] = []
    for name in _braces(os.path.expanduser(pattern)):
        matched = sorted(glob.glob(name)) if glob.has_magic(name) else [name] if os.path.isfile(name) else []
        if not matched:
            raise ValueError(f"no file is called {name}" + ("" if name == pattern else f", which {pattern} asks for"))
        found += matched
    return [Path(name) for name in dict.fromkeys(found)]


def _braces(pattern: str) -> list[str]:
    """A pattern without braces for each of what they stand for."""
    parts = BRACES.split(pattern)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if ends is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    return [f"{i:0{len(ends[1])}}" for i in range(int(ends[1]), int(ends[2]) + 1)]


def _samples(file: Path, image: str) -> list[tuple[Part, Part, Part]]:
    """Picture, json and text of every sample of an archive, in its order. Raises ValueError for what is no archive."""
    samples: dict[str, dict[str, Part]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                named = MEMBER.fullmatch(member.name)
                if named and member.isreg():
                    part = Part(member.offset_data, member.size, member.name)
                    if samples.setdefault(named[1], {}).setdefault(named[2].lower(), part) is not part:
                        raise ValueError(f"it holds {member.name} twice")
                archive.members = []  # type: ignore[attr-defined]  # it keeps them all otherwise
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a tar file: {reason(error)}; archives are read uncompressed and whole") from error
    found, lost = [], []
    for parts in samples.values():
        pictures = [part for kind, part in parts.items() if kind == image.lower()]
        pictures += [part for kind, part in parts.items() if f".{kind}" in IMAGES]
        sample = (pictures[0] if pictures else ABSENT, parts.get("json", ABSENT), parts.get("txt", ABSENT))
        if sample[0].size >= 0 or sample[2].size >= 0:
            found.append(sample)
        else:
            lost += [part.name for part in parts.values() if Path(part.name).suffix.lower() in IMAGES]
    if lost:
        said = f"{len(lost)} pictures of {file} are left out, the first {lost[0]}: a sample is called after its name up to the first dot"
        logging.getLogger(__name__).warning(f"{said}, as in WebDataset, and {image} or a known suffix is to follow it")
    return found


def _read(file: Path, begin: int, size: int) -> bytes:
    try:
        with file.open("rb") as archive:
            archive.seek(begin)
            data = archive.read(size)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {reason(error)}") from error
    if len(data) < size:
        raise ValueError(f"{file} is shorter than when it was indexed")
    return data


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte 0x{data[error.start]:02x} is not UTF-8") from error
