"""Captioned images: the built-in sets, Hugging Face datasets, folders and archives, and prompts alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.bounds import within
from ddil_lightning.data import tables
from ddil_lightning.data.archives import Archives, said_of
from ddil_lightning.data.base import Captions as Captions
from ddil_lightning.data.buckets import Buckets, Group, Size, Sorting, sizes_of
from ddil_lightning.data.folders import Cells, bytes_of
from ddil_lightning.data.pictures import in_range, picture_size, read_pictures
from ddil_lightning.data.raw import RawBatch as RawBatch
from ddil_lightning.data.raw import digest
from ddil_lightning.data.visits import Visit
from ddil_lightning.processes import Processes
from ddil_lightning.records import take
from ddil_lightning.texts import caption_texts, file_text, shown


class Shapes(Captions):
    """The built-in coloured shapes, drawn when they are asked for.

    Args:
        n: how many scenes.
        seed: of the scenes and of their captions, from 1 on: those of 0 are held out.
    """

    def __init__(self, n: int = 8192, seed: int = 1) -> None:
        from ddil_lightning.miniature import shapes
        from ddil_lightning.miniature.sources import HELD_OUT

        within(1, 10**7, n=n)
        within(1, HELD_OUT - 1, seed=seed)
        self._scenes = shapes.draw_scenes(n, seed)
        self._captions = shapes.captions(self._scenes, seed)

    def __len__(self) -> int:
        return len(self._captions)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`."""
        return [self._captions[i] for i in index]

    def pixels(self, index: Sequence[int]) -> Tensor:
        """The images of the rows `index`."""
        from ddil_lightning.miniature.shapes import render

        return render(take(self._scenes, list(index)))


class Digits(Shapes):
    """scikit-learn's handwritten digits with captions ("a handwritten seven"): the training split of real data that needs no download."""

    def __init__(self) -> None:
        from ddil_lightning.miniature import digits

        self._images, labels = digits.split("train")
        self._captions = [digits.caption(int(k)) for k in labels]

    def pixels(self, index: Sequence[int]) -> Tensor:
        """The images of the rows `index`."""
        return self._images[list(index)]


class Images(Captions):
    """A folder of pictures, a Hugging Face dataset (hub id, folder of `save_to_disk`, parquet files), WebDataset archives, or a json, jsonl
    or csv file of paths.

    A folder holds `metadata.jsonl`, `.csv` or `.parquet` (`file_name` and the caption), or a `name.txt` beside each `name.jpg`
    (`folders.list_folder`); or parquet files; or archives (`archives.Archives`). The image column holds pictures, their bytes, or paths
    from the folder of the file. Pictures are read as `pictures.read_picture` says.

    Args:
        path: the folder, the file, the hub id, or a pattern of .tar or .parquet files (`shards/{000..127}.tar`, `data/train-*.parquet`).
        size: what pictures are made to, in pixels: a side of squares, [height, width], a list of these, or Buckets (side, step, aspect).
            The largest part at the centre of a picture that has the aspect is resized; of several sizes that of the nearest aspect.
        image: the column of pictures.
        caption: the column of captions; of several captions of a picture training takes one by chance at each visit.
        split: of a Hugging Face dataset.
        limit: take the first rows alone; by default all of them.
        stream: read parquet files or a data set of the Hub in order, without a copy on the disk: for ddil-cache, and to encode it at once.
    """

    def __init__(
        self,
        path: str,
        size: int | Size | list[Size] | Buckets = 512,
        image: str = "image",
        caption: str = "text",
        split: str = "train",
        limit: int | None = None,
        stream: bool = False,
    ) -> None:
        self.sizes: tuple[Size, ...] = sizes_of(size)
        if limit is not None and limit < 1:
            raise ValueError(f"limit {limit}: at least one row, or none for all")
        if stream and len(self.sizes) > 1:
            raise ValueError("stream reads in order, and pictures of several sizes are taken size by size: give one size, or no stream")
        self._image, self._caption, self._path, self.stream = image, caption, path, stream
        self._rows = tables.load(path, image, caption, split, limit, stream, damaged=True)
        self._damaged = self._rows.damaged if isinstance(self._rows, Archives) else []
        self._complete = False
        self.sorting = Sorting(self.sizes)

    def __len__(self) -> int:
        return len(self._rows)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`, of several the first. Raises ValueError for a row without one."""
        return [texts[0] for texts in self.texts(index)]

    def texts(self, index: Sequence[int]) -> list[list[str]]:
        """All captions of the rows `index`. Raises ValueError for a row without one."""
        return _read_texts(index, self._rows.captions(index), self._where, self._caption)

    def pixels(self, index: Sequence[int]) -> Tensor:
        """The images of the rows `index`. Raises ValueError for one that cannot be read."""
        return in_range(read_pictures(self.sources(index), self._size(index)).pixels)

    def stamp(self) -> str:
        """From the captions and from size and time of every picture file, or the fingerprint of the data set."""
        return digest([self._shape(), *self._rows.stamps()])

    def likeness(self) -> str:
        """From the captions and from size and ends of files: what a copy of the data has as well, in another place and of another time."""
        return digest([self._shape(), *self._rows.stamps(times=False)])

    def _raw_batch(self, rows: Visit) -> RawBatch:
        if self.on_error == "stop" and not self._complete:  # at once, not after hours of training
            self._check_whole()
            self._complete = True
        prompts, counts = self._told(rows)
        pixels, sizes, enlarged = read_pictures(self.sources(rows), self._size(rows))
        return RawBatch(pixels, prompts, torch.tensor(rows), enlarged, sizes=sizes, counts=counts)

    def check_files(self, processes: Processes) -> None:
        """Pictures that are not there, and archives of which a part is lost: of these `skip` has the rows before the damage.

        Raises ValueError also where processes have found other rows: one number would mean another picture in each.
        """
        rows, damaged = processes.by_first(lambda: (len(self), self._damaged))
        processes.by_all(lambda: self._check_same(rows, damaged, processes.rank))
        if self.on_error == "stop" and not self._complete:
            processes.by_first(self._check_whole)
            self._complete = True
        elif self._damaged and processes.first:
            logging.getLogger(__name__).warning(f"{'; '.join(self._damaged)}: what is whole of such archives is used")

    def _check_same(self, rows: int, damaged: list[str], rank: int) -> None:
        """Raises ValueError where this process, of the number `rank`, has found others than the first, which has found these."""
        if (len(self), self._damaged) != (rows, damaged):
            found = [f"{n} rows" + (f" ({'; '.join(why)})" if why else "") for n, why in ((rows, damaged), (len(self), self._damaged))]
            raise ValueError(
                f"the data set {self._path} has {found[0]} for process 0 and {found[1]} for process {rank}: see that all of them find the "
                "same files, and start again"
            )

    def _check_whole(self) -> None:
        """Raises ValueError for archives that are damaged, and for pictures that are not there."""
        if self._damaged:
            raise ValueError(f"the data set {self._path} could not be read: {said_of(self._damaged)}, or in part by data.on_error=skip")
        if gone := self._rows.missing():
            row, file = gone[0]
            raise ValueError(f"{self._where(row, file)}: no such file; {len(gone)} of {len(self)} pictures are missing")

    def groups(self) -> list[Group]:
        """The rows by the size that their pictures get; those of several sizes are told apart by the heads of the files, once."""
        return self.sorting.groups(self.frames, len(self))

    def frames(self, rows: Sequence[int]) -> list[Size | None]:
        """Height and width of the pictures of `rows`; None for one that cannot be read and may be skipped."""
        try:
            return [_size_of(*head) for head in sources(self._rows.heads(rows), self._path, self._image, rows)]
        except (OSError, ValueError):
            if self.on_error == "stop":
                raise
            return [None] if len(rows) == 1 else [size for row in rows for size in self.frames([row])]

    def _others(self, row: int) -> Iterator[int]:
        self.sorting.find(self.frames, len(self))
        return self.sorting.others(row, len(self))

    def _size(self, rows: Sequence[int]) -> Size:
        """The one size of the pictures of `rows`. Raises ValueError where they have several."""
        self.sorting.find(self.frames, len(self))
        return self.sorting.size(rows)

    def _shape(self) -> Any:
        """The sizes, as digests know them: squares by their side."""
        (height, width), *others = self.sizes
        return self.sizes if others or height != width else height

    def sources(self, index: Sequence[int]) -> Iterator[tuple[bytes | str, str]]:
        """Pictures as bytes or files, and what a message calls them."""
        return sources(self._rows.pictures(index), self._path, self._image, index)

    def _where(self, row: int, file: str | None = None) -> str:
        return _named(self._path, row, file)

    def _content_parts(self) -> Iterator[Any]:
        """Bytes as they are stored: a picture that changes its file has changed, and none is decoded."""
        yield self._shape()
        for start in range(0, len(self), 64):
            index = range(start, min(start + 64, len(self)))
            for value, (data, file) in zip(self._rows.captions(index), self._rows.pictures(index), strict=True):
                yield value
                yield bytes_of(file) if data is None else data


class Prompts(Captions):
    """Captions without images: for data-free training (a prior without a forward share).

    Args:
        path: a text file with one caption a line, of which empty ones are left out; a json, jsonl, csv or parquet file; a pattern of these
            (`prompts-*.txt`); or what Images reads, without its pictures: a folder, archives, a hub id.
        caption: the column of captions, where there are columns; of several in a cell training takes one by chance at each visit.
        split: of parquet files by their names, and of a Hugging Face dataset.
    """

    def __init__(self, path: str, caption: str = "text", split: str = "train") -> None:
        self._path, self._caption = path, caption
        self._lines = Cells(tables.load_captions(path, caption, split))
        if not self._lines:
            raise ValueError(f"the prompt file {path} has no {'line' if path.lower().endswith('.txt') else 'row'}")

    def __len__(self) -> int:
        return len(self._lines)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions in the lines `index` of the file, of several the first. Raises ValueError for a row without one."""
        return [texts[0] for texts in self.texts(index)]

    def texts(self, index: Sequence[int]) -> list[list[str]]:
        """All captions of the rows `index`. Raises ValueError for a row without one."""
        return _read_texts(index, [self._lines[i] for i in index], lambda row: f"{self._path}, row {row} (from 0)", self._caption)

    def stamp(self) -> str:
        """As `content`: the lines are in memory."""
        return self.content()


def sources(pictures: Sequence[tuple[Any, Any]], path: str, image: str, index: Sequence[int]) -> Iterator[tuple[Any, str]]:
    """`pictures` or `heads` of rows (`tables.load`) as what is read, and what a message calls them. Raises ValueError for a row without
    one."""
    for row, (data, file) in zip(index, pictures, strict=True):
        if data is None:
            try:
                data = tables.fetch(file) if "://" in file_text(file) else None
            except ValueError as error:
                raise ValueError(f"{_named(path, row)}: {image} is {error}; correct or remove the row") from error
        yield file if data is None else data, _named(path, row, file)


def _size_of(head: Any, name: str) -> Size:
    """`picture_size`, after which a head of `heads` is closed."""
    with head if hasattr(head, "__exit__") else nullcontext(head) as source:
        return picture_size(source, name)


def _named(path: str, row: int, file: str | None = None) -> str:
    return f"the data set {path}, row {row} (from 0)" + (f", {shown(file)}" if file else "")


def _read_texts(index: Iterable[int], cells: Sequence[Any], where: Callable[[int], str], column: str) -> list[list[str]]:
    texts = []
    for row, value in zip(index, cells, strict=True):
        try:
            texts.append(caption_texts(value))
        except ValueError as error:
            raise ValueError(f"{where(row)}: {column} is {error}; correct or remove the row") from error
    return texts


def builtin(name: str) -> Captions:
    """The built-in set called `name` (shapes or digits)."""
    sets: dict[str, type[Captions]] = {"shapes": Shapes, "digits": Digits}
    if name not in sets:
        raise ValueError(f"no built-in data set is called {name!r}: known are {', '.join(sets)}; or give `captions` your own")
    return sets[name]()
