"""Data sets of Hugging Face `datasets`, read row by row from disk, and the choice between them and a list of picture files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ddil_lightning.data.archives import Archives, expanded
from ddil_lightning.data.folders import IMAGES, LISTS, METADATA, Listing, Row, list_folder, marks, read_column, read_rows, trace_of, walk
from ddil_lightning.data.streaming import Stream, open_stream
from ddil_lightning.texts import place, read_lines, reason

HINT = "; name them with image= and caption="
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
SHARDS = {".tar": "archives", ".parquet": "parquet"}
"""What a data set in several files, in a folder or by a pattern, may be made of."""
HELD_OUT = {"test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}
"""Names of splits, as `datasets` reads them, that nobody trains on without saying so."""


Rows = Any
"""A Listing, a Table, Archives or a Stream: rows of pictures and captions."""


class Table:
    """Two columns of a data set: pictures, their bytes or their paths from `folder`, and captions, None for pictures alone."""

    def __init__(
        self, rows: Any, path: str, image: str, caption: str | None, folder: Path, limit: int | None, split: str, files: Sequence[Path]
    ) -> None:
        missing = {image, caption or image} - set(rows.column_names)
        if missing:
            names = " or ".join(sorted(missing))
            raise ValueError(f"the data set {path} has no column {names}: it has {', '.join(rows.column_names)}{HINT}")
        self._image, self._caption, self._folder = image, caption, folder
        self._split, self._files = split, list(files)
        self._heads: Any = None
        self._rows = _undecoded(rows if limit is None else rows.select(range(min(limit, len(rows)))), image, path)

    def __len__(self) -> int:
        return len(self._rows)

    def captions(self, index: Sequence[int]) -> list[Any]:
        """What stands as a caption in the rows `index`."""
        return self._rows.select_columns([self._caption])[list(index)][self._caption]

    def pictures(self, index: Sequence[int]) -> list[tuple[bytes | None, Any]]:
        """Bytes and file of the rows `index`; a file without bytes counts from the folder of the data set."""
        cells = [cell or {} for cell in self._rows.select_columns([self._image])[list(index)][self._image]]
        return [(cell.get("bytes"), self._file(cell.get("path"), cell.get("bytes"))) for cell in cells]

    def heads(self, index: Sequence[int]) -> list[tuple[Any, Any]]:
        """As `pictures`, but that of each as much is read as is asked for: rows in a row are looked at where the disk has them."""
        import pyarrow as pa  # type: ignore[import-untyped]

        if self._heads is None:
            self._heads = self._rows.select_columns([self._image]).with_format("arrow")
        first, last = index[0], index[-1]
        found = self._heads[first : last + 1] if list(index) == list(range(first, last + 1)) else self._heads[list(index)]
        cells = [(cell["bytes"], cell["path"].as_py()) if cell.is_valid else (None, None) for cell in found[self._image]]
        heads = [(None if data is None or not data.is_valid else pa.BufferReader(data.as_buffer()), path) for data, path in cells]
        return [(head, self._file(path, b"" if head else None)) for head, path in heads]

    def missing(self) -> list[tuple[int, str]]:
        """Nothing: pictures are mostly inside, and a file that is not there is found when its row is read."""
        return []

    def stamps(self, times: bool = True) -> Iterator[Any]:
        """What changes with any caption, any picture and the order; without `times` what a copy of the data has as well.

        Parquet files are themselves asked, and not the copies that `datasets` makes of them, which are as old as its cache. A data set of
        the Hub has its revision in its fingerprint. Files that rows name, if they are there, belong to it.
        """
        if self._files:
            yield self._image, self._caption, self._split, len(self)
            yield from marks(self._files, times)
        else:
            yield self._rows._fingerprint
            if _is_saved(self._folder):
                yield from marks([file["filename"] for file in self._rows.cache_files], times)
        paths = self._rows.select_columns([self._image]).flatten().select_columns([f"{self._image}.path"])
        for start in range(0, len(self), 1024):
            for row, path in enumerate(paths[start : start + 1024][f"{self._image}.path"], start):
                found = trace_of(self._file(path, None), row, len(self), times)
                if found:
                    yield row, found

    def _file(self, path: str | None, data: bytes | None) -> str | None:
        return os.path.join(self._folder, path) if data is None and path and "://" not in path else path


def load(path: str, image: str, caption: str | None, split: str, limit: int | None, stream: bool = False, damaged: bool = False) -> Rows:
    """The pictures and captions of `path` (captions.Images), or without `caption` pictures alone.

    Raises ValueError for what cannot be read or is not there, and unless `damaged` for archives that can be read in part alone.
    """
    file = place(path)
    rows: Any = None
    try:
        kind, files = kind_of(file, path)
        if kind in ("list", "archives") and split != "train":
            raise ValueError(f"it has no split {split!r}, for a list of pictures is all train")
        if stream and kind not in ("parquet", "hub"):
            raise ValueError("stream is for parquet files and data sets of the Hub, and what this holds is read row by row as it is")
        if kind == "parquet" and files != [file]:
            files, split = _of_split(files, split), "train"  # to `datasets`, whatever is given is all train
        if kind in ("parquet", "hub", "saved"):
            rows = open_stream(path, files, split) if stream else _load_dataset(file, path, split, files)
        elif kind == "archives":
            rows = Archives(files, image, caption or "", limit, damaged)
    except (OSError, ValueError) as error:
        raise ValueError(f"the data set {path} could not be read: {reason(error)}") from error
    folder = files[0].parent if files else file
    if kind == "list":
        rows = Listing(_listed(file, image, caption)[:limit], file if file.is_dir() else file.parent)
    elif stream:
        rows = Stream(rows, path, image, caption or "", folder, limit)
    elif kind != "archives":
        rows = Table(rows, path, image, caption, folder, limit, split, files)
    if len(rows) == 0:
        raise ValueError(f"the data set {path} has no row")
    return rows


def load_captions(path: str, caption: str, split: str) -> Iterator[Any]:
    """What stands as a caption in each row: in the lines of text files, in one column of lists and of parquet files, whose others stay
    unread, or in whatever else Images reads. Raises ValueError for what cannot be read or has no such column."""
    file = place(path)
    try:
        files = _captions_alone(file, path, split)
        kind = "" if files else kind_of(file, path)[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"the data set {path} could not be read: {reason(error)}") from error
    for one in files:
        if one.suffix.lower() in (*LISTS, ".parquet"):
            yield from read_column(one, caption)
        else:
            yield from filter(None, read_lines(one))
    if kind in ("list", "archives"):
        rows = load(path, "image", caption, split, None)
        yield from rows.captions(range(len(rows)))
    elif kind:
        yield from _prompted(path, caption, split)[caption]


def _captions_alone(file: Path, path: str, split: str) -> list[Path]:
    """The text files, lists and parquet files at a path, of which captions can be read without pictures beside them; none of other data."""
    suffix, several = Path(path).suffix.lower(), any(c in path for c in "*?[{")
    if file.is_file() or (suffix in (".txt", *LISTS, *TABLES) and not several and not file.is_dir()):
        return [] if suffix in (".arrow", ".tar") else [file]
    if suffix in (".txt", *LISTS) and not file.is_dir():
        return expanded(path)
    kind, files = kind_of(file, path)
    return _of_split(files, split) if kind == "parquet" else []


def load_prompts(path: str, caption: str, split: str) -> tuple[list[Any], list[dict[str, Any]]]:
    """The cells of the column of captions of a data set that has no pictures, or whose pictures are not asked for, and of every row all
    cells but pictures and other bytes.

    Raises ValueError for what cannot be read, is no data set or has no such column.
    """
    rows = _prompted(path, caption, split)
    bulky = [name for name, kind in rows.features.items() if hasattr(kind, "decode_example") or "binary" in str(getattr(kind, "dtype", ""))]
    return list(rows[caption]), rows.remove_columns(bulky).to_list()


def _prompted(path: str, caption: str, split: str) -> Rows:
    """A data set of Hugging Face with a column of captions."""
    file = place(path)
    try:
        kind, files = kind_of(file, path)
        if kind in ("list", "archives"):
            raise ValueError("captions alone are read from parquet files, a folder of save_to_disk, or a data set of the Hub")
        if kind == "parquet" and files != [file]:
            files, split = _of_split(files, split), "train"
        rows = _load_dataset(file, path, split, files)
    except (OSError, ValueError) as error:
        raise ValueError(f"the data set {path} could not be read: {reason(error)}") from error
    if caption not in rows.column_names:
        raise ValueError(f"the data set {path} has no column {caption}: it has {', '.join(rows.column_names)}{HINT}")
    return rows


def kind_of(file: Path, path: str) -> tuple[str, list[Path]]:
    """What lies at a path, and in which files. Raises ValueError for a pattern that matches none, and for a file of no known kind."""
    if file.is_file():
        suffix = file.suffix.lower()
        kind = "list" if suffix in LISTS else "archives" if suffix == ".tar" else "parquet" if suffix in TABLES else ""
        if not kind:
            raise ValueError(f"it is no {', '.join([*TABLES, *LISTS, '.tar'])} file, no folder, and no data set of the Hub")
        return kind, [file]
    if file.is_dir():
        return ("saved", []) if _is_saved(file) else _inside(file)
    kind = next((kind for suffix, kind in SHARDS.items() if path.lower().endswith(suffix)), "")
    if kind and any(c in path for c in "*?[{"):
        return kind, expanded(path)
    if file.is_absolute() or path.startswith((".", "~")):
        raise ValueError("there is no such folder or file")
    return "hub", []


def _inside(folder: Path) -> tuple[str, list[Path]]:
    """A folder's archives or parquet files, or that it is a list: it holds pictures, or says which. Tables beside archives are theirs."""
    found: dict[str, list[Path]] = {kind: [] for kind in SHARDS.values()}
    for inner, names in walk(folder):
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in IMAGES or name in METADATA:
                return "list", []
            if suffix in SHARDS:
                found[SHARDS[suffix]].append(inner / name)
    return next(((kind, sorted(files)) for kind, files in found.items() if files), ("list", []))


def _of_split(files: Sequence[Path], split: str) -> list[Path]:
    """Those of several files that are called after `split` (`train-00000-of-00002`, `train/0000`, `digits_train`).

    Where none is, all of them are train, but for files of which some are called after a split that is held out, or all after several.
    Raises ValueError for these, which would be trained on, and where no file is of another split.
    """
    # Older data sets of the Hub end in a checksum: train-00000-of-00001-6f24123afdb9a66c.
    called = {file: re.sub(r"-\d+-of-\d+(-[0-9a-f]{16})?$", "", file.stem) for file in files}
    mine = [file for file in files if split in (called[file], file.parent.name)]
    if mine:
        return mine
    words = {file: re.split(r"[\W\d_]+", name.lower()) for file, name in called.items()}
    held = {file: next((name for name in (*words[file], file.parent.name) if name in HELD_OUT), "") for file in files}
    mine = [file for file in files if split in words[file] and held[file] in ("", split)]
    if not mine and split != "train":
        raise ValueError(f"it has no split {split!r}: no file is called after it, as {split}-00000-of-00001.parquet is")
    if not mine and len(set(held.values())) > 1:
        names = ", ".join(sorted(set(held.values()) - {""}))
        raise ValueError(f"no file is called train, and some are called {names}: give split=, or a pattern of the files that are meant")
    return mine if mine and (split != "train" or any(held.values())) else list(files)


def _listed(file: Path, image: str, caption: str | None) -> list[Row]:
    captions = () if caption is None else (caption,)
    if file.is_dir():
        return list_folder(file, ("file_name", f"{image}_file_name", image), captions, hint=HINT)
    return read_rows(file, (image,), captions, file.parent, HINT)


def fetch(url: str) -> bytes:
    """The bytes behind an address, such as hf://... or zip://name::archive. Raises ValueError where it does not answer."""
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except Exception as error:  # every protocol has its own, and fsspec says ImportError for one whose package is not installed
        raise ValueError(f"{url}, which cannot be fetched: {reason(error)}") from error


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder: a data set or several splits of one."""
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))


def _load_dataset(file: Path, path: str, split: str, files: Sequence[Path]) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    if file.is_dir() and not files:
        loaded = load_from_disk(str(file))
        if isinstance(loaded, Dataset):
            return loaded
        if split not in loaded:
            raise ValueError(f"it has no split {split!r}, only {', '.join(loaded)}")
        return loaded[split]
    try:
        if not files:
            return load_dataset(path, split=split)
        names = [glob.escape(str(file)) for file in files]
        return load_dataset(TABLES[files[0].suffix.lower()], data_files=names, split=split)
    except DatasetGenerationError as error:  # says no more than that there was another
        raise ValueError(reason(error.__cause__ or error)) from error
    except (OSError, ValueError) as error:
        raise ValueError(reason(error) if files else f"no such folder or file, and as a data set of the Hub: {reason(error)}") from error


def _undecoded(rows: Any, column: str, path: str) -> Any:
    """The set with `column` as {bytes, path}, whether it holds pictures, bytes or paths. Raises ValueError for anything else."""
    from datasets import Image

    feature = rows.features[column]
    try:
        return rows.cast_column(column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the data set {path}: column {column} holds {feature} and no images; name another with image=") from error
