"""Folders of pictures and lists of picture files, whatever they are called: what training and evaluation read when there is no data set.

`datasets` guesses splits from names (`test`, `validation`) and takes brackets for patterns; here a name is only a name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ddil_lightning.counting import in_threads
from ddil_lightning.texts import file_text, parse_json, read_lines, read_text, reason

T = TypeVar("T")
IMAGES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
LISTS = (".json", ".jsonl", ".csv")
END, LOOKED_INTO = 2**16, 1024
"""How much of a file tells it from others of its size, and into how many of many files is looked for it."""
ASKED = 256
"""How many files a thread asks for at a time."""


class Row(NamedTuple):
    """A picture file and its caption as they are written down: whether they can be used is said where they are used."""

    file: Any  # a path, joined with its folder; something else where the cell holds no text
    caption: Any  # a text, several, something else, or the ValueError of a text file that cannot be read
    where: str


def list_folder(folder: Path, images: Sequence[str], captions: Sequence[str], pictures: Path | None = None, hint: str = "") -> list[Row]:
    """The pictures of a folder and of those in it that have a caption, in a fixed order.

    Captions stand in a `metadata.jsonl`, `.csv` or `.parquet` at the top or in folders below, each about files named from its own folder
    (or the same one below `pictures`), in the order of its rows; where there is none, in a `name.txt` beside each `name.jpg`, sorted, one
    a line. Pictures without a caption are left out, and so is what is hidden (`.name`) unless a row names it. `images`, `captions`: names
    of the columns, of which a row's first counts. Raises ValueError for what cannot be read or holds nothing; `hint` ends the message
    about a missing column.
    """
    places = list(walk(folder))
    rows: list[Row] = []
    listed = False
    for place, names in places:
        metadata = [name for name in METADATA if name in names]
        if len(metadata) > 1:
            raise ValueError(f"{place} holds {' and '.join(metadata)}: keep one")
        if metadata:
            listed = True
            base = place if pictures is None else pictures / place.relative_to(folder)
            rows += read_rows(place / metadata[0], images, captions, base, hint)
    if not listed:
        rows = _sidecars(folder, places)
    if not rows:
        n = sum(Path(name).suffix.lower() in IMAGES for _, names in places for name in names)
        raise ValueError(
            f"{folder}: no image with a caption was found among {n} picture files: give a metadata.jsonl with file_name and a caption "
            "in each line, or a name.txt beside each name.jpg"
        )
    return rows


def read_rows(file: Path, images: Sequence[str], captions: Sequence[str], base: Path, hint: str = "") -> list[Row]:
    """The rows of a json, jsonl, csv or parquet file, without names of `captions` pictures alone; paths count from `base`. Otherwise as
    `list_folder`."""
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for where, cells in _cells(file):
        columns.update(dict.fromkeys(cells))
        name, text = (next((cells[k] for k in keys if k in cells), None) for keys in (images, captions))
        rows.append(Row(_joined(base, name), text, where))
    missing = sorted(keys[0] for keys in (images, captions) if keys and not columns.keys() & set(keys))
    if missing:
        raise ValueError(f"{file} has no column {' or '.join(missing)}: it has {', '.join(columns) or 'none'}{hint}")
    return rows


def read_column(file: Path, column: str) -> Iterator[Any]:
    """What stands in one column of a json, jsonl, csv or parquet file; None where a row leaves it out. Raises ValueError if all do."""
    columns: dict[str, None] = {}
    for _, cells in _parquet(file, column) if file.suffix.lower() == ".parquet" else _cells(file):
        columns.update(dict.fromkeys(cells))
        yield cells.get(column)
    if column not in columns:
        raise ValueError(f"{file} has no column {column}: it has {', '.join(columns) or 'none'}; name another with caption=")


def columns_of(file: Path) -> list[str]:
    """The columns that at least one row of a json, jsonl, csv or parquet file has, in the order of their first. Raises as `read_rows`."""
    return list(dict.fromkeys(name for _, cells in _cells(file) for name in cells))


class Listing:
    """Picture files and their captions by row. `root`: the folder that they were listed from."""

    def __init__(self, rows: Sequence[Row], root: Path) -> None:
        self._root, self._files, self._captions = root, Cells(row.file for row in rows), Cells(row.caption for row in rows)

    def __len__(self) -> int:
        return len(self._files)

    def captions(self, index: Iterable[int]) -> list[Any]:
        """What stands as a caption in the rows `index`."""
        return [self._captions[i] for i in index]

    def pictures(self, index: Iterable[int]) -> list[tuple[bytes | None, Any]]:
        """Bytes, of which a list has none, and the file of the rows `index`."""
        return [(None, self._files[i]) for i in index]

    def heads(self, index: Iterable[int]) -> list[tuple[Any, Any]]:
        """As `pictures`: a file is read as far as is asked for."""
        return self.pictures(index)

    def missing(self) -> list[tuple[int, str]]:
        """Rows whose file is not there; what is no name of a file is found when the row is read."""
        gone = _of_rows(lambda i: (i, self._files[i]) if _is_gone(self._files[i]) else None, len(self), "looking for the pictures")
        return [found for found in gone if found is not None]

    def stamps(self, times: bool = True) -> Iterator[Any]:
        """What changes with any caption, any picture file and the order; without `times` what a copy of the folder has as well."""
        traces = _of_rows(lambda i: trace_of(self._files[i], i, len(self), times), len(self), "sizes and times of the pictures")
        for file, caption, trace in zip(self._files, self._captions, traces, strict=True):
            yield caption
            if isinstance(file, str):
                yield os.path.relpath(file, self._root) if "://" not in file and "\0" not in file else file
            yield trace


class Cells:
    """A column in one string of bytes, and what is no text aside: a list of Python's strings, a million of them, would be copied into every
    worker of a loader, for reading one counts its references and thereby writes to its page. Lists of texts are kept as JSON."""

    def __init__(self, values: Iterable[Any]) -> None:
        parts: list[bytes] = []
        several: list[bool] = []
        self._odd: dict[int, Any] = {}
        for i, value in enumerate(values):
            several.append(isinstance(value, list) and all(isinstance(text, str) for text in value))
            text = json.dumps(value) if several[-1] else value
            if not isinstance(text, str):
                self._odd[i] = value
            parts.append(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b"")  # names of files may hold surrogates
        self._ends, self._bytes, self._several = torch.tensor([0, *map(len, parts)]).cumsum(0), b"".join(parts), torch.tensor(several)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Any:
        if i in self._odd:
            return self._odd[i]
        start, end = self._ends[i : i + 2].tolist()
        text = self._bytes[start:end].decode("utf-8", "surrogatepass")
        return json.loads(text) if self._several[i] else text


def table_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl, .json, .csv or .parquet file by column. Raises ValueError that names the first that is none."""
    return [cells for _, cells in _cells(file)]


def stat_of(file: Any) -> tuple[int, int] | None:
    """Size and time of change of a file; None where there is none."""
    try:
        stat = os.stat(file_text(file))
        return stat.st_size, stat.st_mtime_ns
    except (OSError, ValueError):
        return None


def mark_of(file: Any) -> tuple[int, str] | None:
    """Size and a digest of the end of a file, which a copy of it has too; None where there is none. A parquet file's table of contents
    is at its end."""
    try:
        with open(file_text(file), "rb") as data:
            size = data.seek(0, os.SEEK_END)
            data.seek(max(0, size - END))
            return size, hashlib.sha256(data.read()).hexdigest()
    except (OSError, ValueError):
        return None


def trace_of(file: Any, row: int, rows: int, times: bool) -> Any:
    """What is told of the picture file of a row: size and time, or without `times` its size and of some rows its mark."""
    if times:
        return stat_of(file)
    return mark_of(file) if row % max(1, rows // LOOKED_INTO) == 0 else (stat_of(file) or (None,))[0]


def marks(files: Iterable[str | Path], times: bool) -> Iterator[Any]:
    """What changes with any of several files that a data set is read from, and their order, wherever they lie."""
    for file in files:
        yield os.path.basename(file), stat_of(str(file)) if times else mark_of(str(file))


def bytes_of(file: Any) -> Any:
    """What stands in a file; where there is none, its name."""
    try:
        return Path(file_text(file)).read_bytes()
    except (OSError, ValueError):
        return file


def _of_rows(ask: Callable[[int], T], n: int, what: str) -> Iterator[T]:
    """`counting.in_threads` of 0 to n - 1, some at a time."""
    parts = [range(start, min(start + ASKED, n)) for start in range(0, n, ASKED)]
    return chain.from_iterable(in_threads(lambda part: [ask(i) for i in part], parts, what))


def _is_gone(file: Any) -> bool:
    try:
        return "://" not in file_text(file) and not os.path.isfile(file)
    except ValueError:
        return False


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names of their files, sorted and without the hidden ones; links are followed, once."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {reason(error)}") from error

    seen: set[str] = set()
    for place, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        if real not in seen:
            yield Path(place), sorted(name for name in files if not name.startswith("."))
        seen.add(real)


def _sidecars(folder: Path, places: Iterable[tuple[Path, list[str]]]) -> list[Row]:
    rows = []
    for place, names in places:
        known = set(names)
        for name in names:
            file = place / name
            if file.suffix.lower() in IMAGES and file.with_suffix(".txt").name in known:
                rows.append(Row(str(file), _text(file.with_suffix(".txt")), str(file)))
    return sorted(rows, key=lambda row: Path(row.file).relative_to(folder).parts)


def _text(file: Path) -> str | list[str] | ValueError:
    """The caption in a text file, or those of its lines that are not empty where there are several."""
    try:
        lines = [line for line in read_lines(file) if line]
    except ValueError as error:
        return error
    return lines if len(lines) > 1 else "".join(lines)


def _joined(base: Path, name: Any) -> Any:
    """A cell as the path of a file: a text, or {path} as `datasets` writes it."""
    name = name.get("path") if isinstance(name, dict) else name
    return os.path.join(base, name) if isinstance(name, str) and name and "://" not in name else name


def _cells(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a row stands and its cells by column."""
    for where, cells in {".csv": _csv, ".parquet": _parquet}.get(file.suffix.lower(), _json)(file):
        if not isinstance(cells, dict):
            raise ValueError(f'{where}: no row such as {{"file_name": ..., "text": ...}}')
        yield where, cells


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(file)
    if text.lstrip().startswith("["):
        for i, cells in enumerate(parse_json(text, str(file))):
            yield f"{file}, row {i} (from 0)", cells
        return
    for number, line in enumerate(read_lines(file), 1):
        if line:
            yield f"{file}, line {number}", parse_json(line, f"{file}, line {number}")


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""))
    try:
        for cells in reader:
            where, more = f"{file}, line {reader.line_num}", cells.pop(None, None)  # type: ignore[call-overload]
            if more and any(more):  # an unquoted comma would cut a caption off; spreadsheets end lines in empty cells
                raise ValueError(f"{where}: more cells than the head names, first {more[0]!r}: put captions with commas in quotes")
            yield where, {column: value or None for column, value in cells.items()}  # how CSV writes that there is nothing
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.reader.line_num}: no CSV: {reason(error)}") from error


def _parquet(file: Path, column: str | None = None) -> Iterator[tuple[str, Any]]:
    """The rows, or one column of them where there is one of that name: pictures beside it are not read then."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(file) as parquet:
            columns = [column] if column in parquet.schema_arrow.names else None
            rows = (cells for batch in parquet.iter_batches(columns=columns) for cells in batch.to_pylist())
            for i, cells in enumerate(rows):
                yield f"{file}, row {i} (from 0)", cells
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {reason(error)}") from error
