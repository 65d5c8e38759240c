"""The user's own images and captions for an evaluation: a folder, a .jsonl or .csv, or COCO's captions file; and how images are read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.data.folders import Row, list_folder, read_rows
from ddil_lightning.data.pictures import square
from ddil_lightning.evaluation.galleries import Gallery, centre
from ddil_lightning.texts import caption_text, file_text, parse_json, place, read_text, shown

T = TypeVar("T")
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
        rows = [image.rows[0] for image in coco(source, parse_json(read_text(source), str(source)), pictures)]
    else:
        raise ValueError(f"{source}: cannot read {source.suffix or 'this'} files; give a folder, a .jsonl, or COCO's captions_*.json")
    if not rows:
        raise ValueError(f"{source}: no image with a caption was found")
    pairs = [_pair(row) for row in rows]
    check_there(source, [pair.image for pair in pairs], "; say where with images=")
    return pairs


def check_there(source: Path, files: Sequence[Path], advice: str = "") -> None:
    """Raises FileNotFoundError, naming `source` and the first, for picture files that are not there. `advice`: what the message ends in."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{source}: {len(missing)} of {len(files)} images are missing, first {shown(missing[0])}{advice}")


def choose(pairs: list[T], n: int | None, seed: int) -> list[T]:
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
    return torch.cat(list(Gallery.of_files(paths, skip=None).squares(size)))


def resize(images: Tensor, size: int | None) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] cut to their central square and resized as `load_images` does, through 8 bits."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    from PIL import Image

    return torch.stack([square(Image.fromarray(x.permute(1, 2, 0).numpy()), size) for x in to_uint8(images)])


def middle(images: Tensor, side: int) -> Tensor:
    """The squares of `side` pixels at the centre of images [N, 3, H, W] in [-1, 1], as `galleries.centre` takes them, through 8 bits."""
    if min(images.shape[-2:]) >= side:
        top, left = ((edge - side) // 2 for edge in images.shape[-2:])
        return images[..., top : top + side, left : left + side]
    from PIL import Image

    return torch.stack([centre(Image.fromarray(x.permute(1, 2, 0).numpy()), side) for x in to_uint8(images)])


def _pair(row: Row) -> Pair:
    for column, value, read in (("image", row.file, file_text), ("caption", row.caption, caption_text)):
        try:
            read(value)
        except ValueError as error:
            raise ValueError(f"{row.where}: the {column} is {error}; correct or remove the row") from error
    return Pair(Path(row.file), caption_text(row.caption))


class CocoImage(NamedTuple):
    """An image of COCO's captions file: its id, its file, and a row a caption."""

    id: int
    file: Path
    rows: list[Row]


def coco(path: Path, data: Any, pictures: Path | None = None, by_id: bool = True) -> list[CocoImage]:
    """The images of COCO's captions file by id, with their captions in the order of the annotations' ids, or else as they stand.

    `pictures`: their folder; by default the split's, beside that of the file. Images without a caption are left out. Raises ValueError for
    a file that is none.
    """
    beside = path.parent.parent / path.stem.rsplit("_", 1)[-1]
    folder = pictures or (beside if beside.is_dir() else path.parent)
    try:
        names = {image["id"]: folder / image["file_name"] for image in data["images"]}
        found: dict[int, list[Row]] = {}
        for note in sorted(data["annotations"], key=lambda a: a["id"]) if by_id else data["annotations"]:
            image = note["image_id"]
            row = Row(str(names[image]), note["caption"], f"{path}, annotation {note['id']}")
            found.setdefault(image, []).append(row)
        return [CocoImage(i, names[i], found[i]) for i in sorted(found)]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{path}: not a COCO captions file, which has "images" and "annotations" with "caption" ({e!r})') from e
