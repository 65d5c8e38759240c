"""Where kept images lie, and what is written beside them: a plain folder, and what the scripts of GenEval and of DPG-Bench read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_lightning.data.folders import table_rows
from ddil_lightning.evaluation.drawing import Pass
from ddil_lightning.texts import caption_text, parse_json, place, read_text, shown

COLUMNS = ("prompt", "text", "caption")
IDS = ("item_id", "id")
ACROSS = 2
"""Samples beside each other in a picture of DPG-Bench, whose script cuts it at `--resolution` from the left and from the top."""

Notes = Mapping[str, Sequence[Mapping[str, Any]]]
"""What the file of the prompts says of them besides: by prompt, in the order of the file."""


class Folder:
    """`00000.png`, `00001.png`, ... and `metadata.jsonl`, which `datasets.load_dataset("imagefolder", ...)` reads."""

    def __init__(self, part: Pass, notes: Notes) -> None:
        self.part, self.per_file = part, 1
        seen: dict[str, int] = {}
        self.notes: list[Mapping[str, Any]] = []
        for prompt in part.asked[:: part.seeds]:
            known = notes.get(prompt, [{"prompt": prompt}])
            self.notes.append(known[min(seen.get(prompt, 0), len(known) - 1)])
            seen[prompt] = seen.get(prompt, 0) + 1

    def file(self, number: int) -> str:
        """The picture `number` below the folder of the pass."""
        return f"{number:05d}.png"

    def texts(self) -> Iterator[tuple[str, str]]:
        """The other files below the folder of the row, by name, once all pictures are there."""
        part, lines = self.part, []
        for i, prompt in enumerate(part.asked):
            lines.append({"file_name": self.file(i), "text": prompt, "prompt": i // part.seeds, "seed": part.seed + i})
        yield f"{part.name}/metadata.jsonl", _lines(lines)


class GenEval(Folder):
    """A folder a prompt, `00000/samples/0000.png` and its `metadata.jsonl`, the line of GenEval's `evaluation_metadata.jsonl`."""

    def file(self, number: int) -> str:
        """The picture `number` below the folder of the pass."""
        return f"{number // self.part.seeds:05d}/samples/{number % self.part.seeds:04d}.png"

    def texts(self) -> Iterator[tuple[str, str]]:
        """The line of each prompt in its folder."""
        for k, note in enumerate(self.notes):
            yield f"{self.part.name}/{k:05d}/metadata.jsonl", _lines([note])


class DPGBench(Folder):
    """A picture a prompt, `ID.png`, with its samples in a grid two across; the ids are those of DPG-Bench's prompts."""

    def __init__(self, part: Pass, notes: Notes) -> None:
        super().__init__(part, notes)
        self.per_file = part.seeds
        if part.seeds > ACROSS**2:
            raise ValueError(f"{part.seeds} images of a prompt: a picture of DPG-Bench holds at most {ACROSS**2}, give fewer by --samples")
        self.ids = [str(next((note[key] for key in IDS if key in note), f"{k:05d}")) for k, note in enumerate(self.notes)]
        wrong = next((name for name in self.ids if not re.fullmatch(r"\w[\w-]*", name)), None)  # its script cuts names at their first dot
        twice = len(set(self.ids)) < len(self.ids)
        if wrong is not None or twice:
            what = "two prompts have the same id" if wrong is None else f"the id {wrong!r} is no name of a file"
            raise ValueError(f"{what}, and DPG-Bench knows a picture by it: give every prompt an id of letters and digits")

    def file(self, number: int) -> str:
        """The picture `number` below the folder of the pass."""
        return f"{self.ids[number]}.png"

    def texts(self) -> Iterator[tuple[str, str]]:
        """Nothing but pictures may lie beside these: what they are of stands one folder higher."""
        part = self.part
        lines = [
            {"file_name": f"{part.name}/{self.file(k)}", "text": prompt, "seed": part.seed + k * part.seeds, "samples": part.seeds}
            for k, prompt in enumerate(part.asked[:: part.seeds])
        ]
        yield "metadata.jsonl", _lines(lines)


LAYOUTS: dict[str, type[Folder]] = {"folder": Folder, "geneval": GenEval, "dpg": DPGBench}
"""By the names that the command line takes."""


def laid_out(name: str, part: Pass, notes: Notes) -> Folder:
    """The layout `name` of the images of a pass. The foreign ones are of prompts: probes lie in a plain folder beside them."""
    return LAYOUTS[name if part.name == "prompts" else "folder"](part, notes)


def grid(images: Tensor) -> Tensor:
    """A picture [3, R H, C W] of up to four images [K, 3, H, W], row by row, black where there is none."""
    k, channels, height, width = images.shape
    across = min(ACROSS, k)
    down = -(-k // across)
    whole = torch.cat([images, images.new_zeros(down * across - k, channels, height, width)])
    return whole.reshape(down, across, channels, height, width).permute(2, 0, 3, 1, 4).reshape(channels, down * height, across * width)


def ungrid(picture: np.ndarray, k: int) -> Tensor:
    """The `k` images [K, 3, H, W], uint8, of a picture [R H, C W, 3] that `grid` has made."""
    across = min(ACROSS, k)
    down = -(-k // across)
    height, width = picture.shape[0] // down, picture.shape[1] // across
    tiles = torch.from_numpy(picture).reshape(down, height, across, width, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(down * across, 3, height, width)[:k]


def read_notes(source: str | Path) -> Notes:
    """What a file of prompts says of each: the lines of a .jsonl, .csv or .parquet (column prompt, text or caption), the names of the .txt
    files in a folder, as DPG-Bench has them, or a JSON object of prompts by id. {} for anything else."""
    path, found = place(source), []
    if path.is_dir():
        found = [{"item_id": file.stem, "prompt": read_text(file)} for file in sorted(path.glob("*.txt"))]
    elif path.suffix in (".jsonl", ".csv", ".parquet"):
        found = table_rows(path)
    elif path.suffix == ".json":
        table = parse_json(read_text(path), shown(path))
        if isinstance(table, dict) and all(isinstance(text, str) for text in table.values()):
            found = [{"item_id": key, "prompt": text} for key, text in table.items()]
    notes: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        text = next((row[key] for key in COLUMNS if isinstance(row.get(key), str)), None)
        if text is not None:
            prompt = caption_text(text)
            notes.setdefault(prompt, []).append({**row, "prompt": prompt})
    return notes


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    try:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise ValueError(f"what is said of a prompt cannot be written as JSON: {error}") from error
