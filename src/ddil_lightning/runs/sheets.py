"""The preview sheets of a run for its page: all of them under one slider, as a strip where scripts are off."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ddil_lightning.evaluation.columns import number
from ddil_lightning.texts import from_json

SLIDES = 24
"""Sheets that are embedded, the first and the last one among them."""
WIDE = 1600
"""Pixels beyond which a sheet is embedded smaller, as a JPEG: eight pictures of 1024 pixels in six rows are some 70 MB."""
PNG = b"\x89PNG\r\n\x1a\n"
LABELS = "ddil"
"""The key in a sheet's PNG under which its rows and columns stand."""

SCRIPT = """
for (const player of document.querySelectorAll(".player")) {
  const frames = [...player.querySelectorAll(".frame")], range = player.querySelector("input"), said = player.querySelector("output");
  const show = () => {
    frames.forEach((frame, i) => frame.classList.toggle("now", i === +range.value));
    said.textContent = frames[+range.value].dataset.said;
    range.setAttribute("aria-valuetext", said.textContent);
  };
  range.addEventListener("input", show);
  player.classList.add("live");
  show();
}
"""
"""The page's one script. It reads nothing but the slider's place; a policy in the page tells the browser to run no other."""


class Sheet(NamedTuple):
    """A readable PNG of a run: its path, its bytes, and what its rows and columns are, each () where it does not say."""

    path: Path
    data: bytes
    rows: Sequence[str] = ()
    captions: Sequence[str] = ()

    @property
    def name(self) -> str:
        """What it is called on the page."""
        update = update_of(self.path)
        return self.path.stem if update is None else f"update {number(update)}"

    @property
    def size(self) -> tuple[int, int]:
        """Its width and height in pixels."""
        width, height = struct.unpack(">II", self.data[16:24])
        return width, height


def labelled(rows: Sequence[str], captions: Sequence[str]) -> Any:
    """What Pillow writes into a PNG, as its `pnginfo`, so that a sheet says what its rows and columns are."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(LABELS, json.dumps({"rows": list(rows), "captions": list(captions)}, ensure_ascii=False))
    return info


def update_of(path: Path) -> int | None:
    """The student update that a sheet's name begins with, None for another name."""
    found = re.match(r"\d+", path.stem)
    return int(found[0]) if found else None


def gallery(folder: Path) -> str:
    """The section of a page that shows the sheets in `folder`, and says what is missing there."""
    paths = sorted(folder.glob("*.png"), key=lambda p: (update_of(p) is None, update_of(p) or 0, p.name)) if folder.is_dir() else []
    sheets = [sheet for path in paths if (sheet := _read(path)) is not None]
    notes = [f"{len(paths) - len(sheets)} of {len(paths)} files in samples/ are no readable PNG."] if len(sheets) < len(paths) else []
    if not sheets:
        return f'<h2>Samples</h2><p class="note">{"".join(notes) or "There are no preview sheets in samples/."}</p>'
    chosen = sheets if len(sheets) <= SLIDES else [sheets[round(i * (len(sheets) - 1) / (SLIDES - 1))] for i in range(SLIDES)]
    if len(chosen) < len(sheets):
        notes.append(f"{len(chosen)} of the {len(sheets)} sheets are shown; all are in samples/.")
    frames = "".join(_frame(sheet, now=sheet is chosen[-1]) for sheet in chosen)
    ends = f"<span>{escape(chosen[0].name)}</span><span>{escape(chosen[-1].name)}</span>"
    slide = (
        f'<div class="slide"><output>{escape(chosen[-1].name)}</output><input type="range" min="0" max="{len(chosen) - 1}" '
        f'value="{len(chosen) - 1}" aria-label="student updates"><div class="ends">{ends}</div></div>'
    )
    player = f'<div class="player{"" if len(chosen) > 1 else " single"}">{slide}<div class="frames">{frames}</div></div>'
    return f"<h2>Samples</h2>{player}{_prompts(chosen[-1])}" + "".join(f'<p class="note">{note}</p>' for note in notes)


def _read(path: Path) -> Sheet | None:
    try:
        data = path.read_bytes()
    except OSError:  # a folder of that name, or a link to nowhere
        return None
    if not data.startswith(PNG) or len(data) <= 24:
        return None
    with suppress(ValueError, LookupError, TypeError, AttributeError):  # one that says nothing, or not in our words, is shown without
        said = from_json(_text(data, LABELS.encode()))
        return Sheet(path, data, *([str(text) for text in said[key]] for key in ("rows", "captions")))
    return Sheet(path, data)


def _text(png: bytes, key: bytes) -> str:
    """The international text under `key` in a PNG, uncompressed. Raises LookupError where there is none."""
    at = len(PNG)
    while at + 12 <= len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + length]
        if kind == b"iTXt" and body.startswith(key + b"\0\0\0"):
            return body[len(key) + 3 :].split(b"\0", 2)[2].decode("utf-8")
        at += 12 + length
    raise LookupError(key)


def _frame(sheet: Sheet, now: bool) -> str:
    """A sheet as an embedded image under its update; small ones are enlarged with sharp pixels."""
    width, height = sheet.size
    style = ' class="pixels"' if width < 600 else ""
    image = f'<img{style} width="{width}" height="{height}" alt="samples, {escape(sheet.name)}" src="{_source(sheet)}">'
    marks = "frame now" if now else "frame"
    return (
        f'<figure class="{marks}" data-said="{escape(sheet.name)}"><figcaption>{escape(sheet.name)}</figcaption>'
        f'<div class="pan">{image}</div></figure>'
    )


def _source(sheet: Sheet) -> str:
    if sheet.size[0] > WIDE:
        from PIL import Image

        with suppress(OSError, ValueError, Image.DecompressionBombError):  # what Pillow cannot read, a browser may
            small = Image.open(io.BytesIO(sheet.data)).convert("RGB")
            small.thumbnail((WIDE, 10**6))
            small.save(out := io.BytesIO(), format="JPEG", quality=88)
            return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    return f"data:image/png;base64,{base64.b64encode(sheet.data).decode()}"


def _prompts(sheet: Sheet) -> str:
    """The prompts of the columns and the rows' names, as text that can be copied."""
    if not sheet.captions:
        return ""
    items = "".join(f"<li>{escape(caption)}</li>" for caption in sheet.captions)
    rows = f'<p class="note">Rows: {escape(", ".join(sheet.rows))}. Columns: the prompts, and the same noise in every row.</p>'
    return f"{rows}<details><summary>The prompts</summary><ol>{items}</ol></details>"
