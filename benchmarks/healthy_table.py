"""The tables of benchmarks/healthy.py: how a run began, how it ended, and what its student is worth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tables import Columns, Part, Report

Record = Mapping[str, Any]
"""A case: its curves {measure: (clocks, values)} and the rows of its student {name: metrics}."""

CURVES = {
    "loss/forward": "loss on data",
    "loss/student": "on the student's",
    "loss/teacher": "on the teacher's",
    "denoising": "critic",
    "gan": "GAN",
    "reflect/saturated": "saturated",
    "shift/teacher": "shift to the teacher",
    "shift/loss_ratio": "loss ratio",
    "buffer/age": "age",
}
BUILTIN = {"frechet": "Fréchet ↓", "all_right": "all right ↑", "coverage": "coverage ↑", "mode_coverage": "modes ↑", "blur": "blur ↓"}
TOY = {"energy_distance": "energy ↓", "coverage": "coverage ↑", "density": "density ↑", "outside": "outside ↓", "shift": "shift"}


def course(record: Record, key: str) -> str | None:
    """ "begin → end" of a measure, each the mean of an eighth of its points; None where there is none."""
    values = record["curves"].get(key, ([], []))[1]
    if not values:
        return None
    part = max(1, len(values) // 8)
    return " → ".join(f"{statistics.fmean(some):.3g}" for some in (values[:part], values[-part:]))


def worth(record: Record, keys: Sequence[str]) -> dict[str, str | None]:
    """A measure in all step counts, "4 / 2 / 1 steps"."""
    rows = record["rows"].values()
    return {
        key: " / ".join(f"{row[key]:.3g}" for row in rows) if rows and all(row.get(key) is not None for row in rows) else None
        for key in keys
    }


def part(title: str, records: Sequence[Record], metrics: Mapping[str, str]) -> Part:
    """One table: a line a case; measures that no case has are left out."""
    lines = [
        {"case": r["case"], "updates": r["updates"], **{key: course(r, key) for key in CURVES}, **worth(r, list(metrics))} for r in records
    ]
    heads = {**CURVES, **metrics}
    columns: Columns = [("case", ""), ("updates", "updates"), *((k, heads[k]) for k in heads if any(line[k] for line in lines))]
    return {"title": title, "columns": columns, "rows": lines}


def report(records: Sequence[Record]) -> Report:
    """A table of the built-in pipeline, one of the toy, and the commands."""
    toy = [r for r in records if "toy2d/" in r["command"]]
    drawn = [r for r in records if r not in toy]
    parts = [part("The built-in pipeline", drawn, BUILTIN)] if drawn else []
    parts += [part("The toy", toy, TOY)] if toy else []
    return {
        "benchmark": "healthy",
        "columns": [("case", ""), ("updates", "updates"), ("seconds", "s"), ("command", "as"), ("failed", "failed")],
        "rows": [{key: r[key] for key in ("case", "updates", "seconds", "command", "failed")} for r in records],
        "parts": parts,
        "notes": ["a → b: the means of the first and the last eighth of a measure's points; a / b / c: the student in 4, 2 and 1 steps"],
    }
