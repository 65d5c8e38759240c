"""What a run has written, read back: the rows of its results, its curves, and what they say; for the report and for tables.

Every reader tolerates a run that was cut short: a missing or half-written file is a note, not an error.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ddil_lightning.files import write_text
from ddil_lightning.messages import number

CLOCK = "student_updates"

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


def table(rows: Sequence[Mapping[str, Any]], width: int = 160) -> str:
    """The rows as text for a terminal: the columns that at least one row has, arrows for what is better."""
    from rich.console import Console
    from rich.table import Table

    from ddil_lightning.evaluation.table import cell, present, values_of

    shown = present(rows)
    grid = Table("name", box=None, header_style="bold", pad_edge=False)
    for head in ("steps", "g", "NFE", *(f"{m.label} {m.better}".strip() for m in shown), "s/image"):
        grid.add_column(head, justify="right")
    for row in rows:
        cells = [row["steps"], row["guidance"], row["nfe"], *(values_of(row).get(m.key) for m in shown), row["seconds_per_image"]]
        grid.add_row(str(row["name"]), *map(cell, cells))
    console = Console(width=width, color_system=None, file=(text := io.StringIO()))
    console.print(grid)
    return text.getvalue()


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as JSON, whole or not at all; NaN and infinity, which JSON does not have, become null."""
    write_text(Path(path), json.dumps(_plain(rows), indent=2, allow_nan=False) + "\n")


def _plain(x: Any) -> Any:
    """`x` of JSON's types only."""
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, Tensor):
        return _plain(x.tolist())
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
