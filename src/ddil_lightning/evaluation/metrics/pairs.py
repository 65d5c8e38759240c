"""The user's own images for an evaluation: COCO's captions file, a choice of many, and how pictures become tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.data.folders import Row
from ddil_lightning.data.pictures import square
from ddil_lightning.evaluation.galleries import Gallery, centre
from ddil_lightning.texts import shown

T = TypeVar("T")
COLUMNS = ("file_name", "image"), ("text", "caption", "prompt")


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
