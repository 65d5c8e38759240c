"""What a run has written, read back: the summary and the curves of metrics.csv."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddil_lightning.evaluation.table import CLOCK
from ddil_lightning.runs.charts import Series
from ddil_lightning.texts import from_json

FAMILY_LINES = 5  # lines in one chart

UNITS = (
    (r"^buffer/(size|ess|rejected)$", "states"),
    (r"\bage\b", "updates"),
    (r"^prior/|\b(fraction|share|saturated|coverage)\b", "share"),
    (r"\b(seconds|time)\b", "s"),
    (r"\b(memory|mib)\b", "MiB"),
    (r"\bratio\b", "times"),
)
"""By the words of a column's name, which "/", "_" and "@" part: whole words, for an average has no age, an iteration no ratio."""


def read_summary(path: Path) -> tuple[dict[str, Any], str]:
    """The content of summary.json and an empty text, or {} and the reason in words."""
    if not path.is_file():
        return {}, "summary.json is not there: the run has not finished, so there are no results yet."
    try:
        data = from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, f"summary.json could not be read ({error}): it was not written completely."
    return (data, "") if isinstance(data, dict) else ({}, "summary.json holds no named values.")


def read_curves(path: Path) -> dict[str, Series]:
    """The curves of a metrics.csv over student updates: {column: Series}, x ascending; none of a file without that column.

    A row without its clock takes the last one seen. Cells that are empty or no number are skipped, so a half-written last row counts as far
    as it goes. Where a resumed run wrote an update twice, both points are kept.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(line.replace("\0", "") for line in file))
    fields = [key for key in rows[0] if key] if rows else []
    points: dict[str, list[tuple[float, float]]] = {}
    x = 0.0
    for row in rows if CLOCK in fields else []:
        clock = _float(row.get(CLOCK))
        x = x if clock is None or not math.isfinite(clock) else clock
        for key in fields:
            value = None if key in (CLOCK, "step", "epoch") else _float(row.get(key))
            if value is not None:
                points.setdefault(key, []).append((x, value))
    ordered = {key: sorted(found, key=lambda p: p[0]) for key, found in points.items()}
    return {key: Series(key, [p[0] for p in found], [p[1] for p in found]) for key, found in ordered.items()}


def families(series: Mapping[str, Series]) -> list[list[Series]]:
    """Series grouped for drawing: same prefix, same unit, ranges of like size, at most FAMILY_LINES in one chart.

    Two lines of different units never share an axis, nor do lines of which one would look flat beside the other.
    """
    groups: list[list[Series]] = []
    for s in series.values():
        group = next((g for g in groups if len(g) < FAMILY_LINES and _kin(g[0], s)), None)
        if group is None:
            groups.append([s])
        else:
            group.append(s)
    prefixes = [g[0].name.split("/")[0] for g in groups]
    order = sorted(range(len(groups)), key=lambda i: (prefixes[i] != "loss", "/" in groups[i][0].name, prefixes[i]))
    return [groups[i] for i in order]


def unit(name: str) -> str:
    """The unit of a logged column by its name (UNITS), empty for one without a unit or without an entry."""
    words = name.replace("_", " ")  # which is a letter to a pattern
    return next((found for pattern, found in UNITS if re.search(pattern, words)), "")


def _float(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _kin(a: Series, b: Series) -> bool:
    """Whether two series can share a chart: those of a Validation the step counts of one number alone."""
    if "/" not in a.name or a.name.split("/")[0] != b.name.split("/")[0] or unit(a.name) != unit(b.name):
        return False
    if re.sub(r"\d+", "#", a.name) == re.sub(r"\d+", "#", b.name):  # shift/node_999 and shift/node_759: one quantity
        return True
    if a.name.startswith("validation/"):
        return False
    low, high = sorted(max((abs(v) for v in s.y if math.isfinite(v)), default=0.0) for s in (a, b))
    return unit(a.name) == "share" or high <= 20 * low
