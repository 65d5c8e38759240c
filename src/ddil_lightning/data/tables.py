"""Data sets of Hugging Face `datasets`, read row by row from disk, and the choice between them and a list of picture files."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ddil_lightning.data.folders import LISTS, Listing, list_folder, read_rows, stat_of
from ddil_lightning.texts import place, reason

HINT = "; name them with image= and caption="
TABLES = {".parquet": "parquet", ".arrow": "arrow"}


class Table:
    """Two columns of a data set: pictures, their bytes or their paths from `folder`, and captions."""

    def __init__(self, rows: Any, path: str, image: str, caption: str, folder: Path, limit: int | None) -> None:
        missing = {image, caption} - set(rows.column_names)
        if missing:
            names = " or ".join(sorted(missing))
            raise ValueError(f"the data set {path} has no column {names}: it has {', '.join(rows.column_names)}{HINT}")
        self._image, self._caption, self._folder = image, caption, folder
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

    def missing(self) -> list[tuple[int, str]]:
        """Nothing: pictures are mostly inside, and a file that is not there is found when its row is read."""
        return []

    def stamps(self) -> Iterator[Any]:
        """What changes with any caption, any picture and the order: the set's fingerprint, its files, and those that the rows name."""
        yield self._rows._fingerprint
        for file in self._rows.cache_files:
            yield stat_of(file["filename"])
        paths = self._rows.select_columns([self._image]).flatten().select_columns([f"{self._image}.path"])
        for start in range(0, len(self), 1024):
            for path in paths[start : start + 1024][f"{self._image}.path"]:
                yield stat_of(self._file(path, None))

    def _file(self, path: str | None, data: bytes | None) -> str | None:
        return os.path.join(self._folder, path) if data is None and path and "://" not in path else path


def load(path: str, image: str, caption: str, split: str, limit: int | None) -> Listing | Table:
    """The pictures and captions of `path` (captions.Images). Raises ValueError for what cannot be read or is not there."""
    file = place(path)
    try:
        folder = file if file.is_dir() else file.parent
        listed = file.suffix.lower() in LISTS if file.is_file() else file.is_dir() and not _is_saved(file)
        if listed and split != "train":
            raise ValueError(f"it has no split {split!r}, for a list of pictures is all train")
        rows = None if listed else _load_dataset(file, path, split)
    except (OSError, ValueError) as error:
        raise ValueError(f"the data set {path} could not be read: {reason(error)}") from error
    found: Listing | Table
    if not listed:
        found = Table(rows, path, image, caption, folder, limit)
    elif file.is_dir():
        found = Listing(list_folder(file, ("file_name", f"{image}_file_name", image), (caption,), hint=HINT)[:limit], folder)
    else:
        found = Listing(read_rows(file, (image,), (caption,), folder, HINT)[:limit], folder)
    if len(found) == 0:
        raise ValueError(f"the data set {path} has no row")
    return found


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


def _load_dataset(file: Path, path: str, split: str) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    if file.is_dir():
        loaded = load_from_disk(str(file))
        if isinstance(loaded, Dataset):
            return loaded
        if split not in loaded:
            raise ValueError(f"it has no split {split!r}, only {', '.join(loaded)}")
        return loaded[split]
    if file.is_file() and file.suffix.lower() not in TABLES:
        raise ValueError(f"it is no {', '.join([*TABLES, *LISTS])} file, no folder, and no data set of the Hub")
    if not file.exists() and (file.is_absolute() or path.startswith((".", "~"))):
        raise ValueError("there is no such folder or file")
    try:
        if not file.exists():
            return load_dataset(path, split=split)
        return load_dataset(TABLES[file.suffix.lower()], data_files=glob.escape(str(file)), split=split)
    except DatasetGenerationError as error:  # says no more than that there was another
        raise ValueError(reason(error.__cause__ or error)) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            reason(error) if file.exists() else f"no such folder or file, and as a data set of the Hub: {reason(error)}"
        ) from error


def _undecoded(rows: Any, column: str, path: str) -> Any:
    """The set with `column` as {bytes, path}, whether it holds pictures, bytes or paths. Raises ValueError for anything else."""
    from datasets import Image

    feature = rows.features[column]
    try:
        return rows.cast_column(column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the data set {path}: column {column} holds {feature} and no images; name another with image=") from error
