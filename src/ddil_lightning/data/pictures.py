"""Pictures of a user: the one way to read them, for training and for evaluation, and the part that a network sees."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.errors import check_exhausted
from ddil_lightning.texts import reason, shown

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

ORIENTATION = 0x0112  # the EXIF tag of how a camera was held
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

    Raises Refusal where the process may open no more files (`errors.check_exhausted`).

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
        check_exhausted(error, name)
        raise ValueError(f"{name}: not a readable image ({reason(error)})") from error


def picture_size(source: bytes | str | Path | BinaryIO, name: str = "") -> tuple[int, int]:
    """Height and width of a picture as `read_picture` would give it, from its head: no pixel is decoded, and of a file no more is read.

    Raises as that does.
    """
    from PIL import Image, UnidentifiedImageError

    name = name or shown(str(source))
    _trust_scans()
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            # A PNG that says nothing of EXIF in its head would be decoded whole in search of it. XMP may know an orientation too.
            silent = image.format == "PNG" and not {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"} & image.info.keys()
            turned = not silent and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            # Newer Pillows have turned a TIFF already.
            stored = image.tag_v2.get(256, image.width) if image.format == "TIFF" else image.width
            return (image.width, image.height) if turned and stored == image.width else (image.height, image.width)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a readable image (no kind that Pillow knows)") from error
    except Exception as error:  # as in read_picture
        check_exhausted(error, name)
        raise ValueError(f"{name}: not a readable image ({reason(error)})") from error


def cut(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest part of a picture [height, width], at its centre, that has the aspect of `size`."""
    scale = _scale(picture, size)
    height, width = (min(side, max(1, round(to / scale))) for side, to in zip(picture, size, strict=True))
    return (picture[0] - height) // 2, (picture[1] - width) // 2, height, width


def told(picture: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """What SDXL is told of a picture that was made to `size`: its own height and width, top and left of the crop in the resized picture,
    height and width of the target."""
    top, left, _, _ = cut(picture, size)
    scale = _scale(picture, size)
    return [*picture, round(top * scale), round(left * scale), *size]


def _scale(picture: tuple[int, int], size: tuple[int, int]) -> float:
    """By how much a picture is resized so that it just covers `size`."""
    return max(size[0] / picture[0], size[1] / picture[1])


def in_range(levels: Tensor) -> Tensor:
    """8 bits, 0 to 255, as float32 in [-1, 1], on whatever device they are."""
    # By a tensor of that device: by a number a GPU would multiply with its reciprocal, which rounds otherwise than a CPU.
    return levels.float() / torch.full((), 127.5, device=levels.device) - 1


def fitted(image: Picture, size: tuple[int, int]) -> Tensor:
    """An RGB picture as [3, *size] in [-1, 1], made to this size as `levels` does."""
    return in_range(levels(image, size))


def levels(image: Picture, size: tuple[int, int]) -> Tensor:
    """An RGB picture as [3, *size] uint8: the largest part of its centre that has this aspect, resized (Lanczos).

    One convention for training and for the real images of an evaluation. Cut first and resized then: a panorama is not enlarged to
    gigapixels of which all but the middle is thrown away.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    top, left, height, width = cut((image.height, image.width), size)
    part = image.crop((left, top, left + width, top + height))
    whole = part if (height, width) == tuple(size) else part.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return pil_to_tensor(whole)  # type: ignore[no-any-return]


def square(image: Picture, size: int) -> Tensor:
    """`fitted` to a square of `size`."""
    return fitted(image, (size, size))


class Pictures(NamedTuple):
    """Pictures of one size, as they were read."""

    pixels: Tensor  # [N, 3, h, w] uint8
    sizes: Tensor  # [N, 6] what SDXL is told of them (`told`)
    enlarged: int  # how many are smaller than the size


def read_pictures(sources: Iterable[tuple[bytes | str | Path, str]], size: tuple[int, int]) -> Pictures:
    """Pictures and their names (as for `read_picture`), made to `size`."""
    made, sizes, enlarged = [], [], 0
    for source, name in sources:
        image = read_picture(source, name)
        own = (image.height, image.width)
        enlarged += _scale(own, size) > 1
        made.append(levels(image, size))
        sizes.append(told(own, size))
    return Pictures(torch.stack(made), torch.tensor(sizes), enlarged)


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
