"""Pictures of a user: the one way to read them, for training and for evaluation, and the square that a network sees."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddil_lightning.texts import reason, shown

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MAX_SIZE = 16384  # a side in pixels: beyond any network, and one picture of it holds 3 GB


def check_size(size: int) -> None:
    """Raises ValueError for a side that no picture can be given."""
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size {size}: give a side of 1 to {MAX_SIZE} pixels")


def read_picture(source: bytes | str | Path, name: str = "") -> Picture:
    """A picture as it is meant to be seen: upright, RGB, 8 bits. Raises ValueError of one line that begins with `name` (default: the path).

    An EXIF orientation is applied. Transparency lies on white, whatever colour is hidden under it. Of an animated file it is the first
    frame. Whole numbers of 16 bits are divided by 257. Floats reach to 1, else to 255, else to 65535: the first of these that holds the
    picture's maximum; NaN, infinity and values outside are refused, for they would come out black or white.

    A picture beyond Pillow's limit of 179 million pixels is refused. From half of that Pillow warns of an attack; such scans are read
    without a word, since whoever trains on a picture means it. That silence holds for the process (`_trust_scans`).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name, data = name or shown(str(source)), b""
    _trust_scans()
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except UnidentifiedImageError as error:
        what = f"it begins with {data[:20]!r}, as no kind that Pillow knows" if data else "it is empty"
        raise ValueError(f"{name}: not a readable image ({what})") from error
    except Exception as error:  # a decoder raises whatever it likes: SyntaxError, struct.error, an Exception of its own for bombs
        raise ValueError(f"{name}: not a readable image ({reason(error)})") from error


def square(image: Picture, size: int) -> Tensor:
    """An RGB picture as [3, size, size] in [-1, 1]: its largest square at the centre, resized (Lanczos).

    One convention for training and for the real images of an evaluation. Cut first and resized then: a panorama is not enlarged to
    gigapixels of which all but the middle is thrown away.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    return pil_to_tensor(cut if side == size else cut.resize((size, size), Image.Resampling.LANCZOS)).float() / 127.5 - 1


def read_squares(sources: Iterable[tuple[bytes | str | Path, str]], size: int) -> tuple[Tensor, int]:
    """Pictures and their names (as for `read_picture`) as [N, 3, size, size] in [-1, 1], and how many of them had to be enlarged."""
    squares, enlarged = [], 0
    for source, name in sources:
        image = read_picture(source, name)
        enlarged += min(image.size) < size
        squares.append(square(image, size))
    return torch.stack(squares), enlarged


def _rgb(image: Picture) -> Picture:
    from PIL import Image

    if min(image.size) < 1:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        key = image.info.get("transparency")
        if isinstance(key, tuple) and max(key) > 255:  # Pillow reads 16-bit colours as 8-bit ones, but not the one that is transparent
            image.info["transparency"] = tuple(k >> 8 for k in key)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Picture) -> Picture:
    """Whole numbers (modes I and I;16) and floats (mode F) as greys, which Pillow's own conversion cuts off at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    low, high = float(values.min()), float(values.max())
    level = 1 + 1 / 255  # what an interpolation overshoots, up to one level of 8 bits, is cut off
    top = next((t for t in ((1, 255, 65535) if image.mode == "F" else (65535,)) if high <= t * level), None)
    if top is None or low < top * (1 - level):
        raise ValueError(f"its values reach from {low:g} to {high:g}: scale them to 0..1 (floats) or 0..65535 (16 bits)")
    grey = Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    key = image.info.get("transparency")
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _trust_scans() -> None:
    """Silences Pillow's warning for pictures between its limits, once: `warnings.catch_warnings` around every picture would make Python
    forget which other warnings it has already given, so that these came again with every picture."""
    from PIL import Image

    if ("ignore", None, Image.DecompressionBombWarning, None, 0) not in warnings.filters:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
