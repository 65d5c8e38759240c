"""Pictures of known colours, as files and in tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image


def png(level: int) -> bytes:
    """A picture of one red."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def captioned_set(folder: Path) -> None:
    """Twenty pictures of colours of their own in `pictures`, and captions.jsonl, in which every second one is a two."""
    (folder / "pictures").mkdir(parents=True)
    rows = [{"file_name": f"{i}.png", "text": f"a handwritten {'two' if i % 2 else 'one'}"} for i in range(20)]
    for i in range(20):
        Image.new("RGB", (18, 16), (12 * i, 5 * i, 0)).save(folder / "pictures" / f"{i}.png")
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def parquet(folder: Path, parts: int = 2, rows: int = 10, **more: Any) -> Path:
    """Rows of red 10 i in several files, each with two captions."""
    from datasets import Dataset

    folder.mkdir(parents=True, exist_ok=True)
    for k in range(parts):
        mine = range(k * rows // parts, (k + 1) * rows // parts)
        cells = [{"image": png(10 * i), "text": [f"row {i}", f"again {i}"]} | {key: f(i) for key, f in more.items()} for i in mine]
        Dataset.from_list(cells).to_parquet(str(folder / f"train-{k:05d}-of-{parts:05d}.parquet"))
    return folder
