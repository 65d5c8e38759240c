"""Galleries: real pictures by number, which are read when they are asked for, and what their bytes say they are."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddil_lightning.data.folders import IMAGES, walk
from ddil_lightning.data.pictures import fitted, read_picture, square
from ddil_lightning.evaluation.views import Crops
from ddil_lightning.texts import reason, shown

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Source = tuple[bytes | str | Path, str]
"""A picture as bytes or as a file, and what a message calls it."""

PIXELS = 64 * 512**2
"""Of a batch, whatever the size of its pictures: 200 MB. While the next one is read, whoever looks at it still has it."""

LEAVING = ", or leave such pictures out by --skip_unreadable (in a protocol references.skip_unreadable)"
"""Advice for those who may leave pictures out."""


class Gallery:
    """Pictures by number: `sources` answers those of the numbers that it is asked for, of which the gallery has `rows`.

    `skip`: leave out pictures that cannot be read and remember them in `unreadable`; otherwise the first of them is a ValueError, which
    says how such are left out, unless `skip` is None: where nobody can say that they may be.
    """

    def __init__(self, sources: Callable[[Sequence[int]], Iterable[Source]], rows: Sequence[int], skip: bool | None = False) -> None:
        self.sources, self.rows, self.skip = sources, list(rows), skip
        self.unreadable: dict[int, str] = {}

    @classmethod
    def of_files(cls, files: Sequence[Path], skip: bool | None = False) -> Gallery:
        """The pictures of these files."""
        return cls(lambda rows: [(files[i], shown(files[i])) for i in rows], range(len(files)), skip)

    @classmethod
    def of_folder(cls, folder: Path, skip: bool = False) -> Gallery:
        """All pictures of a folder and of those in it. Raises ValueError for a folder without any."""
        files = [place / name for place, names in walk(folder) for name in names if Path(name).suffix.lower() in IMAGES]
        if not files:
            raise ValueError(f"{folder} holds no picture: give a folder of images ({', '.join(sorted(IMAGES))})")
        return cls.of_files(files, skip)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int], skip: bool | None = None) -> Gallery:
        """The pictures at these places of the gallery, in this order, each once."""
        rows = dict.fromkeys(self.rows[i] for i in places)
        return Gallery(self.sources, list(rows), self.skip if skip is None else skip)

    def squares(self, size: int, batch: int = 64) -> Iterator[Tensor]:
        """The pictures as [B, 3, size, size] in [-1, 1], at most `batch` at a time: the central square of each, resized (Lanczos).

        How many had to be enlarged is logged once, at the end.
        """
        small = 0

        def look(picture: Picture) -> Tensor:
            nonlocal small
            small += min(picture.size) < size
            return square(picture, size)

        yield from self._seen(look, batch)
        if small:
            said = f"{small} of {len(self)} images are smaller than {size} pixels and were enlarged"
            logging.getLogger(__name__).warning(said)

    def whole(self, batch: int = 64) -> Iterator[Tensor]:
        """The central square of each picture as large as it is, [B, 3, s, s] in [-1, 1]: up to `batch` neighbours of one size."""
        return self._seen(lambda picture: centre(picture, min(picture.size)), batch)

    def crops(self, crops: Crops, batch: int = 64) -> Iterator[Tensor]:
        """What `crops` are cut out of: squares of `crops.at` pixels, or the centre of each picture as large as it is."""
        if crops.at is not None:
            yield from self.squares(crops.at, batch)
        else:
            yield from self._seen(lambda picture: centre(picture, crops.side), batch)

    def digest(self) -> tuple[str, int]:
        """What tells these pictures from others, wherever they lie and in whatever order, and how many of them are copies.

        A sha256 of the sorted sha256 of all pictures' bytes: names and times of files say nothing of what is in them.
        """
        each = sorted(_digest(source) for i in range(0, len(self), 256) for source, _ in self.sources(self.rows[i : i + 256]))
        return hashlib.sha256("".join(each).encode()).hexdigest(), len(each) - len(set(each))

    def _seen(self, look: Callable[[Picture], Tensor], batch: int) -> Iterator[Tensor]:
        """The pictures through `look`, neighbours of one size together: `batch` of them, or as many as have PIXELS."""
        held: list[Tensor] = []
        for one in self._looked(look):
            if held and one.shape != held[0].shape:
                yield _stacked(held)
            held.append(one)
            if len(held) == batch or len(held) * one[0].numel() >= PIXELS:
                yield _stacked(held)
        if held:
            yield _stacked(held)

    def _looked(self, look: Callable[[Picture], Tensor]) -> Iterator[Tensor]:
        """The pictures through `look`, without those that cannot be read where these are left out."""
        self.unreadable = {}
        for i in range(0, len(self), 64):
            rows = self.rows[i : i + 64]
            for row, (source, name) in zip(rows, self.sources(rows), strict=True):
                try:
                    seen = look(read_picture(source, name))
                except ValueError as error:
                    if not self.skip:
                        raise ValueError(f"{error}; repair or remove it{'' if self.skip is None else LEAVING}") from error
                    self.unreadable[row] = str(error)
                else:
                    yield seen
        if len(self.unreadable) == len(self):
            raise ValueError(f"none of {len(self)} pictures can be read, first {next(iter(self.unreadable.values()), 'none')}")
        if self.unreadable:
            said = f"{len(self.unreadable)} of {len(self)} pictures cannot be read and are left out, first "
            logging.getLogger(__name__).warning(said + next(iter(self.unreadable.values())))


def _stacked(held: list[Tensor]) -> Tensor:
    """Pictures as a batch, which are then held no more."""
    made = torch.stack(held) if len(held) > 1 else held[0][None]
    held.clear()
    return made


def centre(picture: Picture, side: int) -> Tensor:
    """The square of `side` pixels at the centre of a picture, [3, side, side] in [-1, 1]; of a smaller one all, enlarged."""
    from torchvision.transforms.functional import pil_to_tensor

    if min(picture.size) < side:
        return fitted(picture, (side, side))
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return pil_to_tensor(picture.crop((left, top, left + side, top + side))).float() / 127.5 - 1


def _digest(source: bytes | str | Path) -> str:
    """The sha256 of a picture's bytes. Raises ValueError for a file that cannot be read."""
    try:
        return hashlib.sha256(source if isinstance(source, bytes) else Path(source).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{shown(str(source))} cannot be read: {reason(error)}") from error
