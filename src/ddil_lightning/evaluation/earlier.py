"""Rows of results that a file has of before: those that no new row stands for stay in it, under `earlier`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddil_lightning.evaluation import stamps
from ddil_lightning.texts import from_json

Row = Mapping[str, Any]


def read(path: Path) -> list[Row]:
    """All rows of a file of results, the last measurement's first; none where it is not there or is no such file.

    A device or a pipe, which results may be written to, is not read: it may have no end.
    """
    if not path.is_file():
        return []
    try:
        found = from_json(path.read_text(encoding="utf-8"))
        rows = [*found["rows"], *found.get("earlier", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [row for row in rows if isinstance(row, Mapping) and isinstance(row.get("protocol"), Mapping)]


def staying(before: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Those of `before` that none of the new `rows` stands for: of other weights, another sampler or precision, or another protocol."""
    return [old for old in before if not any(_replaces(new, old) for new in rows)]


def _replaces(new: Row, old: Row) -> bool:
    return new["name"] == old.get("name") and _made(new) == _made(old) and stamps.covers(new, old["protocol"])


def _made(row: Row) -> tuple[Any, ...]:
    """What its images depend on beside the protocol, as far as a row says it."""
    said = row.get("generation") or {}
    return said.get("digest"), said.get("dtype")


def called(row: Row) -> str:
    """A row as a line names it: student@4 of update 400 by coco2017_5k 1a2b3c4d5e6f."""
    clock = (row.get("generation") or {}).get("student_updates")
    return f"{row.get('name')}{'' if clock is None else f' of update {clock}'} by {stamps.called(row['protocol'])}"
