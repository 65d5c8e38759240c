"""WebDataset archives: pictures and captions in tar files, which are indexed once and then read row by row, in any order."""

from __future__ import annotations

import glob
import io
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ddil_lightning.data.folders import Cells, marks
from ddil_lightning.data.indexes import index_all
from ddil_lightning.errors import Refusal, check_exhausted
from ddil_lightning.texts import parse_json, reason

BRACES = re.compile(r"\{([^{}]*)\}")


class Archives:
    """Pictures and captions in tar files, as Listing has those in folders.

    The members of a sample have their name up to its first dot in common: a picture (`image` or else a known suffix, `key.jpg`), and
    `key.json` with the column `caption` or `key.txt` with a caption in each line. `damaged`: why some of the files may hold more rows.
    Raises ValueError for such files unless `damaged`, and where they leave no row.
    """

    def __init__(self, files: Sequence[Path], image: str, caption: str, limit: int | None = None, damaged: bool = False) -> None:
        self._files, self._image, self._caption = list(files), image, caption
        indexes = index_all(self._files, image, limit)
        for file, index in zip(self._files, indexes, strict=False):  # with a limit there may be fewer
            if index.note:
                logging.getLogger(__name__).warning(f"{file}: {index.note}")
        self.damaged = [index.damage for index in indexes if index.damage]
        places = [torch.nn.functional.pad(index.places, (1, 0), value=i) for i, index in enumerate(indexes)]
        self._at = torch.cat([torch.zeros(0, 7, dtype=torch.int64), *places])[:limit]
        self._names = Cells(itertools.islice((name for index in indexes for name in index.names), limit))
        if self.damaged and not (damaged and len(self)):
            raise ValueError(said_of(self.damaged))

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

    def heads(self, index: Sequence[int]) -> list[tuple[BinaryIO | None, Any]]:
        """As `pictures`, but that of each as much is read as is asked for: its archive is open from then on until who reads closes it."""
        found: list[tuple[BinaryIO | None, Any]] = []
        for row in index:
            i, begin, size, *_ = self._at[row].tolist()
            window = _Window(self._files[i], begin, size) if size >= 0 else None
            name = f"{self._files[i].name}:{self._names[row]}"
            found.append((None, None) if window is None else (cast(BinaryIO, io.BufferedReader(window)), name))
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


def said_of(damaged: Sequence[str]) -> str:
    """One line about all archives that cannot be read whole."""
    return f"{'; '.join(damaged)}; archives are read uncompressed and whole"


class _Window(io.RawIOBase):
    """A member of an archive as a file of its own, which is opened when it is first read: many are asked for at a time.

    Reading raises ValueError for an archive that cannot be opened.
    """

    def __init__(self, file: Path, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0
        self._archive: io.RawIOBase | None = None

    def close(self) -> None:
        """Also when nobody holds it any more."""
        if self._archive is not None:
            self._archive.close()
        super().close()

    def readable(self) -> bool:
        """As any file that is read."""
        return True

    def seekable(self) -> bool:
        """To any place of the member."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of a file that begins and ends with the member."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """What is left of the member, at most as much as the buffer takes."""
        if self._archive is None:
            self._archive = _opened(self._file)
        self._archive.seek(self._begin + self._at)
        got = self._archive.readinto(memoryview(buffer)[: max(0, self._size - self._at)]) or 0
        self._at += got
        return got


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


def _opened(file: Path) -> io.FileIO:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        check_exhausted(error, str(file))
        raise _away(file, error) from error


def _away(file: Path, error: OSError) -> Refusal:
    """Of an archive that the system does not read now: that says nothing of its rows, which nobody may pass over for it."""
    return Refusal(f"{file} cannot be read: {reason(error)}")


def _read(file: Path, begin: int, size: int) -> bytes:
    try:
        with io.BufferedReader(_opened(file)) as archive:
            archive.seek(begin)
            data = archive.read(size)
    except OSError as error:
        raise _away(file, error) from error
    if len(data) < size:
        raise ValueError(f"{file} is shorter than when it was indexed")
    return data


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte 0x{data[error.start]:02x} is not UTF-8") from error
