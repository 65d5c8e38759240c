"""Captioned images: the built-in sets, Hugging Face datasets and folders, and prompts alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddil_lightning.bounds import seeds, within
from ddil_lightning.data import tables
from ddil_lightning.data.buckets import Buckets, Group, Size, Sorting, sizes_of
from ddil_lightning.data.folders import bytes_of
from ddil_lightning.data.pictures import picture_size, read_pictures
from ddil_lightning.data.raw import RawBatch as RawBatch
from ddil_lightning.data.raw import digest, joined
from ddil_lightning.texts import caption_text, file_text, read_lines, shown


class Captions(Dataset[Any]):
    """A map-style set of captioned images. A new one overrides `__len__`, `prompts` and `pixels` (None: a set without images).

    `on_error`: what happens to a row whose caption or picture raises ValueError or OSError: `stop` lets it, `skip` takes the next row that
    can be read in its place, so that a batch keeps its size, and says so in `RawBatch.skipped`.
    `sizes`: those that its pictures are made to, height and width; None where they come as they are.
    """

    on_error: Literal["stop", "skip"] = "stop"
    sizes: tuple[Size, ...] | None = None

    def __len__(self) -> int:
        """How many captions there are."""
        raise TypeError(f"{type(self).__name__} does not say its length")

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`."""
        raise TypeError(f"{type(self).__name__} has no captions")

    def pixels(self, index: Sequence[int]) -> Tensor | None:
        """The images of the rows `index`, [B, 3, H, W] in [-1, 1]."""
        return None

    def __getitem__(self, index: Sequence[int]) -> RawBatch:
        """A batch: the samplers of this library yield lists of rows."""
        rows = [int(i) for i in index]
        try:
            return self._raw_batch(rows)
        except (OSError, ValueError):
            if self.on_error == "stop":
                raise
        return joined([self._next_readable(row, self._peers(row)) for row in rows])

    def groups(self) -> list[Group]:
        """The rows by the shape of their pictures, for a batch is of one shape: all of them, where there is one."""
        return [Group(torch.arange(len(self)), "all")]

    def group_by(self, groups: list[Group]) -> None:
        """Hear what `groups` has found in another process."""

    def some(self, n: int) -> list[str]:
        """The first `n` captions, or so many as can be read."""
        rows = range(min(n, len(self)))
        try:
            return self.prompts(rows)  # no picture is opened for them
        except (OSError, ValueError):
            if self.on_error == "stop":
                raise
        return self[rows].prompts

    def content(self) -> str:
        """A digest of every caption and every picture, in order: a cache of another digest was made from other data."""
        return digest(self._content_parts())

    def stamp(self) -> str | None:
        """A digest that is as good as `content` while nothing changes, from what is known without reading pictures; None without such."""
        return None

    def _raw_batch(self, rows: list[int]) -> RawBatch:
        return RawBatch(self.pixels(rows), self.prompts(rows), torch.tensor(rows))

    def _peers(self, row: int) -> Sequence[int]:
        """The rows whose pictures are of the shape of that of `row`, ascending."""
        return range(len(self))

    def _next_readable(self, row: int, peers: Sequence[int]) -> RawBatch:
        """The batch of one row, or of the first of its `peers` after it (after the last comes the first) that can be read, and why the
        others cannot."""
        skipped: list[str] = []
        start = peers.index(row)
        for other in (*peers[start:], *peers[:start]):
            try:
                return self._raw_batch([other])._replace(skipped=tuple(skipped))
            except (OSError, ValueError) as error:
                skipped.append(str(error))
        return self._raw_batch([row])  # none can be: with the error of the row that was asked for

    def _content_parts(self) -> Iterator[Any]:
        for start in range(0, len(self), 64):
            raw = self[range(start, min(start + 64, len(self)))]
            yield from raw.prompts
            if raw.pixels is not None:
                yield tuple(raw.pixels.shape)
                yield raw.pixels.detach().float().cpu().contiguous().numpy().tobytes()


class Shapes(Captions):
    """The built-in coloured shapes, drawn in memory.

    Args:
        n: how many scenes.
        seed: of the scenes and of their captions.
    """

    def __init__(self, n: int = 8192, seed: int = 1) -> None:
        from ddil_lightning.miniature import shapes

        within(1, 10**7, n=n)
        seeds(seed=seed)
        scenes = shapes.draw_scenes(n, seed)
        self._captions, self._images = shapes.captions(scenes, seed), shapes.render(scenes)

    def __len__(self) -> int:
        return len(self._captions)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`."""
        return [self._captions[i] for i in index]

    def pixels(self, index: Sequence[int]) -> Tensor:
        """The images of the rows `index`."""
        return self._images[list(index)]


class Digits(Shapes):
    """scikit-learn's handwritten digits with captions ("a handwritten seven"): the training split of real data that needs no download."""

    def __init__(self) -> None:
        from ddil_lightning.miniature import digits

        self._images, labels = digits.split("train")
        self._captions = [digits.caption(int(k)) for k in labels]


class Images(Captions):
    """A folder of pictures, a Hugging Face dataset (hub id, folder of `save_to_disk`, parquet file), or a json, jsonl or csv file of paths.

    A folder holds `metadata.jsonl`, `.csv` or `.parquet` (`file_name` and the caption), or a `name.txt` beside each `name.jpg`
    (`folders.list_folder`). The image column holds pictures, their bytes, or paths from the folder of the file. Pictures are read as
    `pictures.read_picture` says.

    Args:
        path: the folder, the file or the hub id.
        size: what pictures are made to, in pixels: a side of squares, [height, width], a list of these, or Buckets (side, step, aspect).
            The largest part at the centre of a picture that has the aspect is resized; of several sizes that of the nearest aspect.
        image: the column of pictures.
        caption: the column of captions; of several captions of a picture the first counts.
        split: of a Hugging Face dataset.
        limit: take the first rows alone; by default all of them.
    """

    def __init__(
        self,
        path: str,
        size: int | Size | list[Size] | Buckets = 512,
        image: str = "image",
        caption: str = "text",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.sizes: tuple[Size, ...] = sizes_of(size)
        if limit is not None and limit < 1:
            raise ValueError(f"limit {limit}: at least one row, or none for all")
        self._image, self._caption, self._path = image, caption, path
        self._rows = tables.load(path, image, caption, split, limit)
        self._complete = False
        self._sorting = Sorting(self.sizes)

    def __len__(self) -> int:
        return len(self._rows)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`. Raises ValueError for a row without one."""
        texts = []
        for row, value in zip(index, self._rows.captions(index), strict=True):
            try:
                texts.append(caption_text(value))
            except ValueError as error:
                raise ValueError(f"{self._where(row)}: {self._caption} is {error}; correct or remove the row") from error
        return texts

    def pixels(self, index: Sequence[int]) -> Tensor:
        """The images of the rows `index`. Raises ValueError for one that cannot be read."""
        return read_pictures(self._sources(index), self._size(index)).pixels

    def stamp(self) -> str:
        """From the captions and from size and time of every picture file, or the fingerprint of the data set."""
        return digest([self._shape(), *self._rows.stamps()])

    def _raw_batch(self, rows: list[int]) -> RawBatch:
        if self.on_error == "stop" and not self._complete:  # at once, not after hours of training
            gone = self._rows.missing()
            if gone:
                row, file = gone[0]
                raise ValueError(f"{self._where(row, file)}: no such file; {len(gone)} of {len(self)} pictures are missing")
            self._complete = True
        prompts = self.prompts(rows)
        pixels, sizes, enlarged = read_pictures(self._sources(rows), self._size(rows))
        return RawBatch(pixels, prompts, torch.tensor(rows), enlarged, sizes=sizes)

    def groups(self) -> list[Group]:
        """The rows by the size that their pictures get; those of several sizes are told apart by the heads of the files, once."""
        return self._sorting.groups(self._frames, len(self))

    def group_by(self, groups: list[Group]) -> None:
        """Hear what `groups` has found in another process."""
        self._sorting.hear(groups, len(self))

    def _frames(self, rows: Sequence[int]) -> list[Size | None]:
        """Height and width of the pictures of `rows`; None for one that cannot be read and may be skipped."""
        try:
            return [picture_size(*source) for source in self._sources(rows)]
        except (OSError, ValueError):
            if self.on_error == "stop":
                raise
            return [None] if len(rows) == 1 else [size for row in rows for size in self._frames([row])]

    def _peers(self, row: int) -> Sequence[int]:
        self.groups()
        return self._sorting.peers(row, len(self))

    def _size(self, rows: Sequence[int]) -> Size:
        """The one size of the pictures of `rows`. Raises ValueError where they have several."""
        self.groups()
        return self._sorting.size(rows)

    def _shape(self) -> Any:
        """The sizes, as digests know them: squares by their side."""
        (height, width), *others = self.sizes
        return self.sizes if others or height != width else height

    def _sources(self, index: Sequence[int]) -> Iterator[tuple[bytes | str, str]]:
        """Pictures as bytes or files, and what a message calls them."""
        for row, (data, file) in zip(index, self._rows.pictures(index), strict=True):
            if data is None:
                try:
                    data = tables.fetch(file) if "://" in file_text(file) else None
                except ValueError as error:
                    raise ValueError(f"{self._where(row)}: {self._image} is {error}; correct or remove the row") from error
            yield file if data is None else data, self._where(row, file)

    def _where(self, row: int, file: str | None = None) -> str:
        return f"the data set {self._path}, row {row} (from 0)" + (f", {shown(file)}" if file else "")

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
        path: a text file with one caption a line; empty lines are left out.
    """

    def __init__(self, path: str) -> None:
        self._lines = [line for line in read_lines(path) if line]
        if not self._lines:
            raise ValueError(f"the prompt file {path} has no line")

    def __len__(self) -> int:
        return len(self._lines)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions in the lines `index` of the file."""
        return [self._lines[i] for i in index]

    def stamp(self) -> str:
        """As `content`: the lines are in memory."""
        return self.content()


def builtin(name: str) -> Captions:
    """The built-in set called `name` (shapes or digits)."""
    sets: dict[str, type[Captions]] = {"shapes": Shapes, "digits": Digits}
    if name not in sets:
        raise ValueError(f"no built-in data set is called {name!r}: known are {', '.join(sets)}; or give `captions` your own")
    return sets[name]()
