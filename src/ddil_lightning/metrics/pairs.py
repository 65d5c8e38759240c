"""The user's own images and captions for an evaluation: a folder, a .jsonl, or COCO's captions file; and how images are read."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.metrics.base import to_uint8

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class Pair(NamedTuple):
    """An image file and its caption."""

    image: Path
    caption: str


def read_pairs(source: str | Path, images: str | Path | None = None) -> list[Pair]:
    """Pairs in a fixed order, one per image, from one of

    * a folder with `metadata.jsonl` (datasets' imagefolder layout) or a `name.txt` beside each `name.jpg`;
    * a `.jsonl` with `file_name` (or `image`) and `text` (or `caption`, `prompt`) per line, paths relative to `images` or to the file;
    * COCO's `captions_*.json`: images by id, of each the caption with the lowest annotation id; the pictures in `images`, or in the
      split's folder beside `annotations/`.

    Raises FileNotFoundError for what is missing and ValueError for what cannot be understood.
    """
    source = Path(source)
    folder = Path(images) if images is not None else source if source.is_dir() else source.parent
    if source.is_dir():
        listed = source / "metadata.jsonl"
        pairs = _jsonl(listed, folder) if listed.is_file() else _sidecars(source)
    elif not source.is_file():
        raise FileNotFoundError(f"{source}: no such folder or file; give a folder of images, a .jsonl, or COCO's captions_*.json")
    elif source.suffix == ".jsonl":
        pairs = _jsonl(source, folder)
    elif source.suffix == ".json":
        beside = source.parent.parent / source.stem.rsplit("_", 1)[-1]
        pairs = _coco(source, beside if images is None and beside.is_dir() else folder)
    else:
        raise ValueError(f"{source}: cannot read {source.suffix or 'this'} files; give a folder, a .jsonl, or COCO's captions_*.json")
    if not pairs:
        raise ValueError(f"{source}: no image with a caption was found")
    missing = [p.image for p in pairs if not p.image.is_file()]
    if missing:
        raise FileNotFoundError(f"{source}: {len(missing)} of {len(pairs)} images are missing, first {missing[0]}; say where with images=")
    return pairs


def choose(pairs: list[Pair], n: int | None, seed: int) -> list[Pair]:
    """`n` of the pairs, a fixed selection for a seed in the order of the file, or all. Raises ValueError for more than there are."""
    if n is None or n == len(pairs):
        return pairs
    if not 2 <= n < len(pairs):
        raise ValueError(f"n={n}: choose 2 to {len(pairs)} of the {len(pairs)} images")
    return [pairs[i] for i in sorted(random.Random(seed).sample(range(len(pairs)), n))]


def load_images(paths: Iterable[Path], size: int) -> Tensor:
    """Files as [N, 3, size, size] in [-1, 1]: the long edge centre-cropped, Lanczos. Needs Pillow."""
    from PIL import Image

    out = []
    for path in paths:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as e:
            raise ValueError(f"{path}: not a readable image ({e})") from e
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        out.append(_resized(image.crop((left, top, left + side, top + side)), size))
    return torch.stack(out)


def resize(images: Tensor, size: int | None) -> Tensor:
    """Square images [N, 3, H, H] in [-1, 1] resized as `load_images` does, through 8 bits. Raises ValueError if not square."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"resize: {images.shape[-2]}x{images.shape[-1]} images; the reference is square")
    from PIL import Image

    return torch.stack([_resized(Image.fromarray(x.permute(1, 2, 0).numpy()), size) for x in to_uint8(images)])


def _resized(image: Any, size: int) -> Tensor:
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    small = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)
    return pil_to_tensor(small).float() / 127.5 - 1


def _jsonl(path: Path, folder: Path) -> list[Pair]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image = next(row[k] for k in ("file_name", "image") if k in row)
            pairs.append(Pair(folder / image, next(row[k] for k in ("text", "caption", "prompt") if k in row).strip()))
        except (ValueError, TypeError, AttributeError, StopIteration) as e:
            raise ValueError(f'{path}, line {number}: needs {{"file_name": ..., "text": ...}}') from e
    return pairs


def _sidecars(folder: Path) -> list[Pair]:
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
    texts = [p.with_suffix(".txt") for p in images]
    return [Pair(p, t.read_text(encoding="utf-8").strip()) for p, t in zip(images, texts, strict=True) if t.is_file()]


def _coco(path: Path, folder: Path) -> list[Pair]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in data["images"]}
        first: dict[int, str] = {}
        for note in sorted(data["annotations"], key=lambda a: a["id"]):
            first.setdefault(note["image_id"], note["caption"].strip())
        return [Pair(folder / names[i], first[i]) for i in sorted(first)]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{path}: not a COCO captions file, which has "images" and "annotations" with "caption" ({e!r})') from e
