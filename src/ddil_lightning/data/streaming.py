"""Data sets that are read in order and never kept: parquet files and data sets of the Hub that are larger than the disk."""

from __future__ import annotations

import glob
import logging
import os
import time
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from ddil_lightning.counting import READERS
from ddil_lightning.data.folders import marks
from ddil_lightning.texts import reason

KEPT = 16
"""Rows before the last batch that stay: one that cannot be read is asked for again, and so are those after it."""
PAUSES = (1.0, 5.0)
"""Seconds after which a file that did not say its length is asked again."""


def open_stream(path: str, files: Sequence[Path], split: str) -> Any:
    """The rows of local parquet files, or of the data set `path` of the Hub, and who knows about them. Raises ValueError for no such."""
    from datasets import load_dataset_builder

    try:
        if files:
            kind = {".arrow": "arrow"}.get(files[0].suffix.lower(), "parquet")
            builder = load_dataset_builder(kind, data_files={split: [glob.escape(str(file)) for file in files]})
        else:
            builder = load_dataset_builder(path)
        return builder.as_streaming_dataset(split=split), builder, split
    except (OSError, ValueError) as error:
        raise ValueError(reason(error) if files else f"no such folder or file, and as a data set of the Hub: {reason(error)}") from error


class Stream:
    """Two columns of a stream, for who asks for rows in order: it is read once then. Who goes back makes it begin again. Parquet files of
    which no row is asked for are passed over: a process that has a part of the rows reads the files of that part.

    `opened`: what `open_stream` answers with. How many rows there are is what its card says, or its files; else it is read once to count.
    """

    def __init__(self, opened: Any, path: str, image: str, caption: str, folder: Path, limit: int | None) -> None:
        self._rows, self._builder, self._split = opened
        self._path, self._image, self._caption, self._folder = path, image, caption, folder
        self._rows = self._rows.decode(False)  # before the first row is looked at, whose picture may be broken
        try:
            first = next(iter(self._rows), None)
        except Exception as error:  # as in _read
            raise ValueError(f"the data set {path} could not be read: {reason(error)}") from error
        missing = {image, caption} - set(first or (image, caption))
        if missing:
            raise ValueError(
                f"the data set {path} has no column {' or '.join(sorted(missing))}: it has {', '.join(first or ())}; "
                "name them with image= and caption="
            )
        self._rows = self._rows.select_columns([image, caption])
        count = self._counted()
        self._count = count if limit is None else min(count, limit)
        self._begin(0)

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        """For a worker of a loader, which reads by itself."""
        return {**vars(self), "_iterator": None, "_window": deque(), "_start": 0, "_next": 0}

    def captions(self, index: Sequence[int]) -> list[Any]:
        """What stands as a caption in the rows `index`."""
        return [row[self._caption] for row in self._read(index)]

    def pictures(self, index: Sequence[int]) -> list[tuple[bytes | None, Any]]:
        """Bytes and file of the rows `index`; a file without bytes counts from the folder of the data set."""
        found: list[tuple[bytes | None, Any]] = []
        for row in self._read(index):
            cell = row[self._image]
            data, file = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
            if isinstance(data, str):
                data, file = None, data
            if data is None and isinstance(file, str) and "://" not in file:
                file = os.path.join(self._folder, file)
            found.append((data, file))
        return found

    def missing(self) -> list[tuple[int, str]]:
        """Nothing: what is not there is found when it is read."""
        return []

    def stamps(self, times: bool = True) -> Iterator[Any]:
        """What `tables.Table` says of local files, so that a cache is as good for both; of others their names, which hold a revision."""
        files = self._files()
        here = all(os.path.exists(file) for file in files)
        yield self._image, self._caption, self._split, len(self)
        yield from marks(files, times) if here else files

    def _files(self) -> list[str]:
        files = self._builder.config.data_files or {}
        return [str(file) for file in files.get(self._split, [])]

    def _counted(self) -> int:
        said = (self._builder.info.splits or {}).get(self._split)
        if said is not None and said.num_examples:
            return int(said.num_examples)
        files = self._files()
        if files and all(os.path.isfile(file) for file in files) and self._ends is not None:
            return self._ends[-1]
        return sum(1 for _ in self._rows)

    @cached_property
    def _ends(self) -> list[int] | None:
        """How many rows there are up to the end of each file, as parquet files say; None where others do not, or do not answer."""
        files = self._files()
        if not files or len(files) != self._rows.num_shards or not all(file.endswith(".parquet") for file in files):
            return None
        try:
            with ThreadPoolExecutor(READERS) as pool:
                return list(accumulate(pool.map(_rows_in, files)))
        except Exception as error:  # a connection's, a parser's: who reads the rows says what is wrong with them
            said = f"the files of the data set {self._path} do not say how many rows each has ({reason(error)})"
            logging.getLogger(__name__).warning(f"{said}: the rows before those that are asked for are read as well, which takes long")
            return None

    def _begin(self, row: int) -> None:
        self._iterator = self._from(row)
        self._reader = os.getpid()
        weakref.finalize(self, self._iterator.close)  # one that is open when Python ends finds its libraries gone
        self._window: deque[Any] = deque()
        self._start = self._next = row

    def _from(self, row: int) -> Any:
        """The rows from `row` on."""
        # Not by its __iter__, which gives the workers of a loader a part of the files each.
        if row == 0 or self._ends is None or row >= self._ends[-1]:
            return (self._rows.skip(row) if row else self._rows).iter(batch_size=1)
        return _joined(self._rows, *self._place(row, self._ends))

    @staticmethod
    def _place(row: int, ends: Sequence[int]) -> tuple[int, int]:
        """The file of a row, and how many rows are before it there."""
        file = bisect_right(ends, row)
        return file, row - (ends[file - 1] if file else 0)

    def _skips(self, row: int) -> bool:
        """Whether whole files lie between the next row and `row`, which need not be read."""
        if row <= self._next or self._ends is None:
            return False
        return self._place(row, self._ends)[0] > self._place(self._next, self._ends)[0]

    def _read(self, index: Sequence[int]) -> list[Any]:
        """The rows `index`. Raises ValueError where the stream breaks off."""
        low, high = min(index), max(index)
        forked = self._reader != os.getpid()  # it would share the place in the file
        if self._iterator is None or low < self._start or forked or self._skips(low):
            self._begin(low)
        while self._next <= high:
            try:
                self._window.append({column: cells[0] for column, cells in next(self._iterator).items()})
            except StopIteration:
                raise ValueError(f"the data set {self._path} ends before row {self._next} (from 0) of {self._count}") from None
            except Exception as error:  # a connection's, a decoder's
                self._iterator = None
                raise ValueError(f"the data set {self._path} breaks off at row {self._next} (from 0): {reason(error)}") from error
            self._next += 1
            while len(self._window) > 1 and self._start < low - KEPT:
                self._window.popleft()
                self._start += 1
        return [self._window[row - self._start] for row in index]


def _rows_in(file: str) -> int:
    """How many rows a parquet file has, here or behind an address, which is asked three times: one answer of thousands gets lost."""
    import fsspec  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    def told() -> int:
        with fsspec.open(file, "rb") as data:
            return int(pq.read_metadata(data).num_rows)

    for pause in PAUSES:
        with suppress(Exception):  # whatever a file system of an address raises
            return told()
        time.sleep(pause)
    return told()


def _joined(rows: Any, first: int, skip: int) -> Iterator[Any]:
    """The rows of the files from the number `first` on, without so many in that one."""
    for file in range(first, rows.num_shards):
        part = rows.shard(rows.num_shards, file)
        yield from (part.skip(skip) if file == first and skip else part).iter(batch_size=1)
