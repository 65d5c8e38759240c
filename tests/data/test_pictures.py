"""Pictures as people have them: turned, deep, transparent, of few colours, torn; and the square that a network sees."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddil_lightning.data.pictures import check_size, read_picture, read_pictures, square
from ddil_lightning.texts import shown

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
RAMP = np.tile(np.linspace(0, 1, 256), (4, 1))


def halves(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: what Pillow reads and does not write."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    crc = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(crc)


def close(a: Any, b: tuple[int, int, int], levels: int = 8) -> bool:
    return all(abs(x - y) <= levels for x, y in zip(a, b, strict=True))


# What is read ---------------------------------------------------------------------------------------------------------------------

LEFT_BY_ORIENTATION = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", LEFT_BY_ORIENTATION)
def test_photographs_are_upright(orientation: int, kind: str) -> None:
    """The red left half comes to where a viewer shows it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read_picture(saved(halves(), kind, exif=exif))
    w, h = got.size
    assert (w, h) == ((48, 32) if orientation < 5 else (32, 48)) and got.mode == "RGB"
    places = {"left": (2, h // 2), "right": (w - 3, h // 2), "top": (w // 2, 2), "bottom": (w // 2, h - 3)}
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    red = LEFT_BY_ORIENTATION[orientation]
    assert close(got.getpixel(places[red]), RED) and close(got.getpixel(places[opposite[red]]), BLUE)


DEEP: dict[str, tuple[np.ndarray, str]] = {
    "16-bit PNG": ((RAMP * 65535).astype(np.uint16), "PNG"),
    "16-bit TIFF, big end first": ((RAMP * 65535).astype(">u2"), "TIFF"),
    "32-bit whole numbers": ((RAMP * 65535).astype(np.int32), "TIFF"),
    "floats to 1": (RAMP.astype(np.float32), "TIFF"),
    "floats a little over": (RAMP.astype(np.float32) * 1.004 - 0.002, "TIFF"),
    "floats to 255": (RAMP.astype(np.float32) * 255, "TIFF"),
    "floats to 65535": (RAMP.astype(np.float32) * 65535, "TIFF"),
}


@pytest.mark.parametrize("case", DEEP)
def test_a_deep_ramp_goes_from_black_to_white(case: str) -> None:
    values, kind = DEEP[case]
    got = np.asarray(read_picture(saved(Image.fromarray(values), kind))).astype(int)
    assert got.shape == (4, 256, 3) and abs(got - np.arange(256)[None, :, None]).max() <= 1


def test_a_dark_deep_picture_stays_dark() -> None:
    """The range of 16 bits is fixed: a picture is not stretched to its own maximum."""
    dark = read_picture(saved(Image.fromarray(np.full((4, 4), 200, np.uint16))))
    half = read_picture(saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"))
    assert dark.getpixel((0, 0)) == (1, 1, 1) and close(half.getpixel((0, 0)), (128, 128, 128), 1)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([0.0, np.nan], "it holds NaN or infinity"),
        ([0.0, np.inf], "it holds NaN or infinity"),
        ([-1.0, 1.0], "its values reach from -1 to 1: scale them to 0..1"),
        ([0.0, 1e6], "its values reach from 0 to 1e+06: scale them"),
    ],
)
def test_floats_without_a_range_are_refused(values: list[float], why: str, tmp_path: Path) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'x.tiff'}: not a readable image ({why}")):
        read_picture(tmp_path / "x.tiff")


def clear(mode: str) -> bytes:
    """Left half opaque red (light grey 255 in modes of grey), the rest transparent over a hidden magenta."""
    image = Image.new("RGBA", (40, 40), (255, 0, 255, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 40))
    if mode == "P":
        return saved(image.quantize(8), "PNG")
    if mode == "P, one colour":
        return saved(image.convert("RGB").quantize(8), "PNG", transparency=image.convert("RGB").quantize(8).getpixel((30, 5)))
    if mode == "RGB, one colour":
        return saved(image.convert("RGB"), "PNG", transparency=(255, 0, 255))
    if mode == "GIF":
        return saved(image, "GIF")
    if mode == "RGB of 16 bits, one colour":
        row = b"\0" + struct.pack(">3H", 65535, 0, 0) * 20 + struct.pack(">3H", 65535, 300, 65535) * 20
        return png((40, 40), 16, 2, row * 40, (b"tRNS", struct.pack(">3H", 65535, 300, 65535)))
    return saved(image, mode)


@pytest.mark.parametrize("mode", ["PNG", "WEBP", "TIFF", "P", "P, one colour", "GIF", "RGB, one colour", "RGB of 16 bits, one colour"])
def test_transparency_lies_on_white(mode: str) -> None:
    got = read_picture(clear(mode))
    assert got.mode == "RGB" and close(got.getpixel((5, 5)), RED) and close(got.getpixel((35, 5)), WHITE)


def test_grey_transparency_lies_on_white() -> None:
    half = Image.new("LA", (4, 4), (0, 128))
    assert close(read_picture(saved(half)).getpixel((0, 0)), (127, 127, 127), 1)  # half black, half white
    deep = png((2, 1), 16, 0, b"\0" + struct.pack(">HH", 1000, 257 * 60), (b"tRNS", struct.pack(">H", 1000)))
    assert [read_picture(deep).getpixel((x, 0)) for x in (0, 1)] == [WHITE, (60, 60, 60)]


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "YCbCr"])
def test_colours_are_kept(mode: str) -> None:
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    got = read_picture(saved(halves().convert(mode), kind, **({"quality": 95} if kind == "JPEG" else {})))
    assert got.mode == "RGB" and close(got.getpixel((2, 2)), RED) and close(got.getpixel((45, 2)), BLUE)


def test_known_values_of_kinds_that_pillow_reads_and_does_not_write() -> None:
    """16 bits of each channel, with and without a transparent one; inks as they are printed, in files of both kinds."""
    deep = png((1, 1), 16, 2, b"\0" + struct.pack(">3H", 257 * 10, 257 * 128, 257 * 255))
    clear = png((2, 1), 16, 6, b"\0" + struct.pack(">4H", 0, 0, 0, 65535) + struct.pack(">4H", 0, 0, 0, 257 * 102))
    grey = png((2, 1), 16, 4, b"\0" + struct.pack(">2H", 257 * 77, 65535) + struct.pack(">2H", 0, 0))
    assert read_picture(deep).getpixel((0, 0)) == (10, 128, 255)
    assert [read_picture(clear).getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (153, 153, 153)]
    assert [read_picture(grey).getpixel((x, 0)) for x in (0, 1)] == [(77, 77, 77), WHITE]
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 51))  # cyan, and a fifth of black
    assert read_picture(saved(inks, "TIFF")).getpixel((4, 4)) == (0, 204, 204)
    assert close(read_picture(saved(inks, "JPEG", quality=95)).getpixel((4, 4)), (0, 204, 204), 3)


def test_a_turned_picture_of_16_bits_or_inks_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # by half
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert [read_picture(saved(deep, "PNG", exif=exif)).getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 0)]
    turned = read_picture(saved(halves().convert("CMYK"), "JPEG", quality=95, exif=exif))
    assert close(turned.getpixel((2, 2)), BLUE) and close(turned.getpixel((45, 2)), RED)


def test_greys_and_single_bits() -> None:
    assert read_picture(saved(Image.new("L", (4, 4), 128))).getpixel((0, 0)) == (128, 128, 128)
    bits = Image.new("1", (4, 4), 0)
    bits.putpixel((1, 0), 1)
    got = read_picture(saved(bits))
    assert got.getpixel((0, 0)) == (0, 0, 0) and got.getpixel((1, 0)) == WHITE


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_what_moves_the_first_frame(kind: str) -> None:
    moving = saved(Image.new("RGB", (8, 8), RED), kind, save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)])
    assert close(read_picture(moving).getpixel((0, 0)), RED)


# What cannot be read --------------------------------------------------------------------------------------------------------------

WHOLE = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)), "JPEG")
BROKEN = {
    "torn JPEG": (WHOLE[:900], "image file is truncated"),
    "torn PNG": (saved(halves())[:60], ""),
    "head alone": (WHOLE[:4], "it begins with"),
    "page": (b"<html>not found</html>", "it begins with b'<html>not found</htm'"),
    "nothing": (b"", "it is empty"),
    "bomb": (png((60_000, 60_000), 8, 0, b""), "exceeds limit"),
    "text": (
        png((1, 1), 8, 0, b"\0\0", (b"zTXt", b"k\0\0" + zlib.compress(b"a" * 2_000_000))),
        "too large for PngImagePlugin.MAX_TEXT_CHUNK",
    ),
    "no width": (png((0, 4), 8, 0, b""), "it begins with"),
    "checksum": (saved(halves()).replace(b"IDAT", b"IDAU", 1), ""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read_is_one_line_with_its_name(kind: str, tmp_path: Path) -> None:
    data, why = BROKEN[kind]
    (tmp_path / "x.png").write_bytes(data)
    for source, name in ((tmp_path / "x.png", str(tmp_path / "x.png")), (data, "row 5")):
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: not a readable image \\(.*{re.escape(why)}.*\\)$") as error:
            read_picture(source, "" if isinstance(source, Path) else name)
        assert "\n" not in str(error.value) and "object at 0x" not in str(error.value)


def test_files_that_are_not_there_or_closed(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(saved(halves()))
    (tmp_path / "x.png").chmod(0)
    cases = [(tmp_path / "gone.png", "No such file or directory"), (tmp_path, "Is a directory"), ("a\0.png", "embedded null byte")]
    for path, why in [*cases, *([(tmp_path / "x.png", "Permission denied")] if os.geteuid() else [])]:
        with pytest.raises(ValueError, match=re.escape(f"{shown(path)}: not a readable image ({why})")):
            read_picture(path)


def test_a_large_scan_is_read_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between Pillow's two limits; and a warning that Python shows once is not shown again because of it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        read_picture(saved(halves()))
        for _ in range(3):
            warnings.warn("seen once", stacklevel=1)
            assert read_picture(saved(halves())).size == (48, 32)
    assert [str(w.message) for w in caught] == ["seen once"]
    with pytest.raises(ValueError, match="exceeds limit"):
        read_picture(saved(halves((96, 33))))


# The square -----------------------------------------------------------------------------------------------------------------------


def test_square_cuts_the_centre() -> None:
    """Left third red, middle third lime, right third blue: a wide picture keeps its middle, a high one too."""
    wide = Image.new("RGB", (30, 10), "lime")
    wide.paste("red", (0, 0, 10, 10)), wide.paste("blue", (20, 0, 30, 10))
    for picture in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        for size in (5, 10, 20):
            got = square(picture, size)
            assert got.shape == (3, size, size) and got.dtype == torch.float32
            assert torch.equal(got, torch.tensor([-1.0, 1, -1])[:, None, None].expand(-1, size, size))


@pytest.mark.parametrize("size", [(7, 9), (16, 16), (33, 50), (100, 8), (20_000, 2), (1, 1)])
def test_square_is_square_whatever_comes(size: tuple[int, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    got = square(noise, 16)
    assert got.shape == (3, 16, 16) and got.min() >= -1 and got.max() <= 1


def test_square_keeps_values() -> None:
    values = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = square(Image.fromarray(values.numpy()), 8)
    assert torch.equal(((got + 1) * 127.5).round(), values.permute(2, 0, 1).float())
    assert square(Image.new("RGB", (8, 8), "white"), 4).eq(1).all() and square(Image.new("RGB", (8, 8)), 4).eq(-1).all()


def test_pictures_that_were_enlarged_are_counted() -> None:
    sources = [(saved(halves(size)), "x") for size in ((48, 32), (48, 31), (200, 10), (32, 32))]
    made = read_pictures(iter(sources), (32, 32))
    assert made.pixels.shape == (4, 3, 32, 32) and made.enlarged == 2


def test_sides_that_no_picture_has() -> None:
    check_size(1), check_size(16384)
    for size in (0, -3, 16385):
        with pytest.raises(ValueError, match=f"^size {size}: give a side of 1 to 16384 pixels$"):
            check_size(size)
