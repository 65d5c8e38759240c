"""A comparison on disk: its rows as JSON, written after each, and beside them a file a row of what the page and the pairs are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.evaluation.paired import against
from ddil_lightning.evaluation.stamps import covers
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.files import read_table, replacing

SIDE = 128
"""The longest side in pixels of a picture that is kept for the page."""

Row = dict[str, Any]


class Seen(NamedTuple):
    """Of a row: `pictures` [K, 3, h, w], uint8, of the first prompts, and `values` [N] of each image by the key of their number.

    `groups` [N]: the number of the prompt, or of the picture whose captions the prompts are, of each; None where each has its own.
    """

    pictures: Tensor
    values: Mapping[str, Tensor]
    groups: Tensor | None = None

    def whole(self, n: int) -> bool:
        """Whether its values are of each of `n` images: older files have those of each group, of which no row's gap can be made."""
        return all(len(value) == n for value in self.values.values())


class Comparison:
    """The rows of ddil-test --compare in `out`, and `seen` of each in the folder beside it.

    `entries`: the names of the entries in their order. `fresh`: what is there is measured anew. `left_out` are the rows that could not be
    measured, with the reasons, `notes` what else a reader must know, and `prompts` those of the pictures. Raises ValueError for a file that
    is there and holds no comparison.
    """

    def __init__(self, out: Path, entries: Sequence[str], fresh: bool = False) -> None:
        self.out, self.entries, self.folder = out, list(entries), out.with_suffix(".rows")
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        found = read_table(out)
        if out.is_file() and out.stat().st_size and not ("entries" in found and isinstance(found.get("rows"), list)):
            raise ValueError(f"{out} is there and holds no comparison: give another --out, or remove it")
        self.rows: list[Row] = [] if fresh else list(found.get("rows", []))
        self.prompts: list[str] = list(found.get("prompts", []))

    def kept(self, name: str, protocol: Mapping[str, Any], digest: str) -> bool:
        """Whether the row `name` has been measured of what has this digest, and has all that a suite's `protocol` asks for."""
        row = self._row(name)
        if row is None or not covers(row, protocol) or row["generation"].get("digest") != digest:
            return False
        seen = self.seen(name)
        return seen is not None and seen.whole(row["n"])

    def otherwise(self, names: Sequence[str], protocol: Mapping[str, Any]) -> list[Row]:
        """Those of the rows `names` that are there and were measured by another protocol, by their stamps."""
        return [row for row in self.rows if row["name"] in names and row["protocol"].get("stamp") != protocol["stamp"]]

    def others(self, names: Sequence[str]) -> list[str]:
        """The rows of an older comparison in the same file that are none of `names`: they stay."""
        return [row["name"] for row in self.rows if row["name"] not in names]

    def add(self, row: Row, seen: Seen) -> None:
        """Add a row, in the place of one of its name, and write everything.

        Of the same images by the same protocol, asked for other metrics before, it keeps the numbers that were not asked for now.
        """
        from safetensors.torch import save_file

        before, values = self._row(row["name"]), self.seen(row["name"])
        values = values if values is not None and values.whole(row["n"]) else None
        if before is not None and _of_one(before, row):
            row = _joined(before, row)
            seen = seen._replace(values={**(values.values if values else {}), **seen.values})
        tensors = {"pictures": seen.pictures} | {f"values.{key}": value for key, value in seen.values.items()}
        tensors |= {} if seen.groups is None else {"groups": seen.groups}
        with replacing(self._file(row["name"])) as temporary:
            save_file({key: value.contiguous().clone() for key, value in tensors.items()}, temporary)
        self.rows = [other for other in self.rows if other["name"] != row["name"]] + [row]
        self.left_out.pop(row["name"], None)
        self.write()

    def seen(self, name: str) -> Seen | None:
        """What was seen of a row; None where its file is missing or not whole."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(self._file(name))
            pictures, groups = found.pop("pictures"), found.pop("groups", None)
            return Seen(pictures, {key.removeprefix("values."): value for key, value in found.items()}, groups)
        except (OSError, KeyError, SafetensorError):
            return None

    def write(self) -> None:
        """Write the JSON: rows by entry, from few steps to many, what was left out and why, and the differences from the first entry."""
        place = {name: i for i, name in enumerate(self.entries)}
        self.rows.sort(key=lambda row: (place.get(entry_of(row), len(place)), entry_of(row), row["steps"]))
        found = {"rows": self.rows, "entries": self.entries, "left_out": self.left_out, "against_first": self.against()}
        found |= {"notes": self.notes, "prompts": self.prompts}
        if self.rows:
            found |= {"n": self.rows[0]["n"], "seed": self.rows[0]["protocol"]["seeds"]["first"]}
        write_rows(self.out, found)  # type: ignore[arg-type]

    def against(self) -> list[dict[str, Any]]:
        """The paired differences of every row from the first entry (`evaluation.paired.against`)."""
        every = {row["name"]: (self.seen(row["name"]), row["n"]) for row in self.rows}
        seen = {name: found for name, (found, n) in every.items() if found is not None and found.whole(n)}
        values, groups = ({name: getattr(found, part) for name, found in seen.items()} for part in ("values", "groups"))
        return against(self.rows, self.entries[0], values, groups)

    def _row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row["name"] == name), None)

    def _file(self, name: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-zA-Z0-9_@.-]+', '-', name)}.safetensors"


def entry_of(row: Mapping[str, Any]) -> str:
    """The name of the entry that a row is of: lcm for lcm@4."""
    return str(row["name"]).rpartition("@")[0]


def _of_one(a: Row, b: Row) -> bool:
    """Whether two rows are of the same images and differ at most in the metrics that were asked for."""
    digests = {row["generation"].get("digest") for row in (a, b)}
    return len(digests) == 1 and None not in digests and a["protocol"].get("stamp") == b["protocol"].get("stamp")


def _joined(before: Row, now: Row) -> Row:
    """A row with the numbers, details and intervals of an earlier one of the same images besides, and asked for what both were."""
    old, new = before["metrics"], now["metrics"]
    metrics = {**old, **{key: value for key, value in new.items() if value or not old.get(key)}}
    metrics["intervals"] = {**old.get("intervals", {}), **new.get("intervals", {})}
    had, asked = before["protocol"].get("metrics", ()), now["protocol"].get("metrics")
    both = None if had is None or asked is None else list(dict.fromkeys([*had, *asked]))
    sized = [row["generation"]["as_made"] for row in (before, now) if "as_made" in row["generation"]]
    generation = now["generation"] | ({"as_made": list(dict.fromkeys(chain(*sized)))} if sized else {})
    return {**now, "metrics": metrics, "protocol": now["protocol"] | {"metrics": both}, "generation": generation}


def small(images: Tensor, side: int = SIDE) -> Tensor:
    """Images [K, 3, H, W] in [-1, 1] as uint8 whose longer side has at most `side` pixels."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    made = []
    for x in to_uint8(images):
        picture = Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        made.append(pil_to_tensor(picture))
    return torch.stack(made)
