"""What a run has written, read back: the rows of its results, its curves, and what they say; for the report and for tables.

Every reader tolerates a run that was cut short: a missing or half-written file is a note, not an error.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .charts import Series, number

CLOCK = "student_updates"
FAMILY_LINES = 5  # lines in one chart

Row = Mapping[str, Any]
"""One line of the results: name, steps, guidance, n, nfe, seconds_per_image, metrics {key: value}."""


class Metric(NamedTuple):
    """A column of the results: `better` is an arrow, or empty where neither direction is better by itself."""

    key: str
    label: str
    better: str
    meaning: str


METRICS = (
    Metric("frechet", "Fréchet distance", "↓", "distance between generated and held-out real images in the evaluator's features"),
    Metric("clip", "CLIP score", "↑", "similarity of image and prompt in the evaluator's joint space"),
    Metric("density", "Density", "↑", "how deep generated images lie in regions of real ones; may exceed 1"),
    Metric("coverage", "Coverage", "↑", "share of real images that have a generated one in their neighbourhood"),
    Metric("lpips_diversity", "LPIPS diversity", "", "mean perceptual distance between images of one prompt; compare with the teacher's"),
    Metric("attribute_accuracy", "Attributes right", "↑", "share of the attributes in the prompts that the judge finds in the images"),
    Metric("all_right", "All right", "↑", "share of images in which every attribute of the prompt is right"),
    Metric("mode_coverage", "Mode coverage", "↑", "how evenly the values that a partial prompt leaves open are produced; 1 is uniform"),
)
"""The metrics of a results row, in the order of the columns."""

POINTS = (
    Metric("energy_distance", "Energy distance", "↓", "between the samples and the true law, unbiased, so 0 or less for a perfect sampler"),
    Metric("energy_teacher", "to the teacher", "↓", "energy distance between the samples and the 32-step teacher's under guidance"),
    Metric("mode_kl", "Mode KL", "↓", "KL divergence of the modes' true weights from their shares of the samples; large where one is lost"),
    Metric("high_quality", "High quality", "↑", "share of samples within four standard deviations of a mode of their class"),
    Metric("shift", "Shift", "↓", "energy distance between the student's own latents at its nodes and the teacher's, mean over nodes"),
)
"""Further metrics of the analytic toy's rows."""

UNITS = (
    (r"^buffer/(size|ess|rejected)$", "states"),
    (r"age", "updates"),
    (r"^prior/|fraction|share|saturated", "share"),
    (r"seconds|time", "s"),
    (r"memory|_mib$", "MiB"),
)


def results_table(rows: Sequence[Row]) -> str:
    """The rows of summary.json or metrics.json as a Markdown table: the columns that at least one row has, arrows for what is better."""
    metrics = present(rows)
    head = ["", "NFE", *(f"{m.label} {m.better}".strip() for m in metrics), "s/image"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        values = [cell(values_of(row).get(m.key)) for m in metrics]
        lines.append([str(row.get("name")).replace("|", "\\|"), cell(row.get("nfe")), *values, cell(row.get("seconds_per_image"))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def present(rows: Sequence[Row]) -> list[Metric]:
    """The metrics that at least one row has."""
    return [m for m in (*METRICS, *POINTS) if any(values_of(row).get(m.key) is not None for row in rows)]


def values_of(row: Row) -> Mapping[str, Any]:
    """The metrics of a row, {} if it has none."""
    found = row.get("metrics")
    return found if isinstance(found, Mapping) else {}


def cell(value: Any) -> str:
    """A value as text for a table: three decimals (two from 10 on), whole numbers with separators, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, float) and math.isfinite(value) and value != int(value):
        return f"{value:.3f}" if 0.01 <= abs(value) < 10 else f"{value:.2f}" if 10 <= abs(value) < 1000 else number(value)
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def role(row: Row) -> str:
    """Who made the images of a row: teacher for a row named teacher@32."""
    return str(row.get("name")).split("@")[0]


def gap_closed(student: float, teacher: float, reference: float) -> float | None:
    """The share of the way from the teacher at the student's steps to the teacher at full steps that the student covers.

    1 = as good as the reference, 0 = no better than the teacher at equal steps. None where that way is shorter than a tenth
    of the reference's value: a ratio to it would be noise.
    """
    gap = teacher - reference
    return (teacher - student) / gap if abs(gap) >= 0.1 * abs(reference) and gap != 0 else None


def read_summary(path: Path) -> tuple[dict[str, Any], str]:
    """The content of summary.json and an empty text, or {} and the reason in words."""
    if not path.is_file():
        return {}, "summary.json is not there: the run has not finished, so there are no results yet."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, f"summary.json could not be read ({error}): it was not written completely."
    return (data, "") if isinstance(data, dict) else ({}, "summary.json holds no named values.")


def read_curves(path: Path) -> tuple[str, dict[str, Series]]:
    """The curves of a Lightning metrics.csv: (name of the horizontal axis, {column: Series}), x ascending.

    The axis is `student_updates`, or `step` where that is missing; a row without it takes the last one seen. Cells that are
    empty or no number are skipped, so a half-written last row counts as far as it goes. Where a resumed run wrote an update
    twice, both points are kept.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(line.replace("\0", "") for line in file))
    fields = [key for key in rows[0] if key] if rows else []
    axis = CLOCK if CLOCK in fields else "step"
    points: dict[str, list[tuple[float, float]]] = {}
    x = 0.0
    for row in rows:
        clock = _float(row.get(axis))
        x = x if clock is None or not math.isfinite(clock) else clock
        for key in fields:
            value = None if key in (axis, "step", "epoch") else _float(row.get(key))
            if value is not None:
                points.setdefault(key, []).append((x, value))
    ordered = {key: sorted(found, key=lambda p: p[0]) for key, found in points.items()}
    return axis, {key: Series(key, [p[0] for p in found], [p[1] for p in found]) for key, found in ordered.items()}


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
    """The unit of a logged column, empty if it has none or is not known."""
    return next((found for pattern, found in UNITS if re.search(pattern, name)), "")


def _float(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _kin(a: Series, b: Series) -> bool:
    """Whether two series can share a chart."""
    if "/" not in a.name or a.name.split("/")[0] != b.name.split("/")[0] or unit(a.name) != unit(b.name):
        return False
    if re.sub(r"\d+", "#", a.name) == re.sub(r"\d+", "#", b.name):  # shift/node_999 and shift/node_759: one quantity
        return True
    low, high = sorted(max((abs(v) for v in s.y if math.isfinite(v)), default=0.0) for s in (a, b))
    return unit(a.name) == "share" or high <= 20 * low
