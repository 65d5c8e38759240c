"""The user's own images and captions for an evaluation: a folder, a .jsonl or .csv, or COCO's captions file; and how images are read."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.data.folders import Row, list_folder, read_rows
from ddil_lightning.data.pictures import read_squares, square
from ddil_lightning.texts import caption_text, file_text, parse_json, place, read_text, shown

COLUMNS = ("file_name", "image"), ("text", "caption", "prompt")


class Pair(NamedTuple):
    """An image file and its caption."""

    image: Path
    caption: str


def read_pairs(source: str | Path, images: str | Path | None = None) -> list[Pair]:
    """Pairs in a fixed order, one per image, from one of

    * a folder with `metadata.jsonl`, `.csv` or `.parquet`, or a `name.txt` beside each `name.jpg` (`folders.list_folder`);
    * a `.jsonl` or `.csv` with `file_name` (or `image`) and `text` (or `caption`, `prompt`) per line, paths relative to `images` or to the
      file;
    * COCO's `captions_*.json`: images by id, of each the caption with the lowest annotation id; the pictures in `images`, or in the
      split's folder beside `annotations/`.

    Raises FileNotFoundError for what is missing and ValueError for what cannot be understood.
    """
    source = place(source)
    pictures = None if images is None else place(images)
    if source.is_dir():
        rows = list_folder(source, *COLUMNS, pictures)
    elif not source.is_file():
        raise FileNotFoundError(f"{source}: no such folder or file; give a folder of images, a .jsonl, or COCO's captions_*.json")
    elif source.suffix in (".jsonl", ".csv"):
        rows = read_rows(source, *COLUMNS, pictures or source.parent)
    elif source.suffix == ".json":
        beside = source.parent.parent / source.stem.rsplit("_", 1)[-1]
        rows = _coco(source, pictures or (beside if beside.is_dir() else source.parent))
    else:
        raise ValueError(f"{source}: cannot read {source.suffix or 'this'} files; give a folder, a .jsonl, or COCO's captions_*.json")
    if not rows:
        raise ValueError(f"{source}: no image with a caption was found")
    pairs = [_pair(row) for row in rows]
    missing = [p.image for p in pairs if not p.image.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {len(pairs)} images are missing, first {shown(missing[0])}; say where with images="
        )
    return pairs


def choose(pairs: list[Pair], n: int | None, seed: int) -> list[Pair]:
    """`n` of the pairs, a fixed selection for a seed in the order of the file, or all. Raises ValueError for more than there are."""
    if n is None or n == len(pairs):
        return pairs
    if not 2 <= n < len(pairs):
        raise ValueError(f"n={n}: choose 2 to {len(pairs)} of the {len(pairs)} images")
    return [pairs[i] for i in sorted(random.Random(seed).sample(range(len(pairs)), n))]


def load_images(paths: Sequence[Path], size: int) -> Tensor:
    """Image files as [N, 3, size, size] in [-1, 1]: the largest square at the centre of each, resized (Lanczos).

    Raises ValueError for one that cannot be read.
    """
    return torch.cat(list(image_batches(paths, size)))


def image_batches(paths: Sequence[Path], size: int, batch: int = 64) -> Iterator[Tensor]:
    """The images of `load_images`, `batch` in memory at a time; how many had to be enlarged is logged once, at the end."""
    enlarged = 0
    for i in range(0, len(paths), batch):
        images, small = read_squares(((path, shown(path)) for path in paths[i : i + batch]), size)
        enlarged += small
        yield images
    if enlarged:
        logging.getLogger(__name__).warning(f"{enlarged} of {len(paths)} images are smaller than {size} pixels and were enlarged")


def resize(images: Tensor, size: int | None) -> Tensor:
    """Square images [N, 3, H, H] in [-1, 1] resized as `load_images` does, through 8 bits. Raises ValueError if not square."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"resize: {images.shape[-2]}x{images.shape[-1]} images; the reference is square")
    from PIL import Image

    return torch.stack([square(Image.fromarray(x.permute(1, 2, 0).numpy()), size) for x in to_uint8(images)])


def _pair(row: Row) -> Pair:
    for column, value, read in (("image", row.file, file_text), ("caption", row.caption, caption_text)):
        try:
            read(value)
        except ValueError as error:
            raise ValueError(f"{row.where}: the {column} is {error}; correct or remove the row") from error
    return Pair(Path(row.file), caption_text(row.caption))


def _coco(path: Path, folder: Path) -> list[Row]:
    data = parse_json(read_text(path), str(path))
    try:
        names = {image["id"]: image["file_name"] for image in data["images"]}
        first: dict[int, Row] = {}
        for note in sorted(data["annotations"], key=lambda a: a["id"]):
            image = note["image_id"]
            first.setdefault(image, Row(str(folder / names[image]), note["caption"], f"{path}, annotation {note['id']}"))
        return [first[i] for i in sorted(first)]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{path}: not a COCO captions file, which has "images" and "annotations" with "caption" ({e!r})') from e
