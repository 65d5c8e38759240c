"""The report of a benchmark: what it writes as JSON, and the Markdown tables that it prints of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ddil_lightning.evaluation.table import cell as plain
from ddil_lightning.evaluation.table import tabulate

Columns = Sequence[tuple[str, str]]
"""(key, heading) of the columns of a table."""


class Target(TypedDict):
    """Something that a benchmark must show; `met` is None where there is no value."""

    name: str
    value: float | None
    limit: float
    at_most: bool
    met: bool | None


class Part(TypedDict):
    """A further table of a report."""

    title: str
    columns: Columns
    rows: Sequence[Mapping[str, Any]]


class Told(TypedDict, total=False):
    """What a report may hold beside its table: the first three are printed too, the rest is in the JSON alone."""

    parts: list[Part]
    targets: list[Target]
    notes: list[str]
    runs: list[dict[str, Any]]
    each: list[dict[str, Any]]
    seconds: float
    seconds_training: dict[str, float]
    settings: dict[str, Any]
    machine: dict[str, Any]


class Report(Told):
    """What a benchmark writes as JSON and prints. A row has its values itself, or in `metrics`, with their standard errors in `se`."""

    benchmark: str
    columns: Columns
    rows: Sequence[Mapping[str, Any]]


def mean_se(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and its standard error (None for one value); both None where a value is missing."""
    known = [float(v) for v in values if v is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), (statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None)


def target(name: str, value: float | None, limit: float, at_most: bool = False) -> Target:
    """One line of a report's `targets`."""
    met = None if value is None else bool(value <= limit if at_most else value >= limit)
    return {"name": name, "value": value, "limit": limit, "at_most": at_most, "met": met}


def cell(value: Any, se: float | None = None) -> str:
    """A value of a table, with its standard error if it has one."""
    if isinstance(value, Mapping):  # a measured mean, or a paired difference: {mean, se, paired: {mean, t, p}}
        t, mean = (value.get("paired") or value).get("t"), value["mean"]
        # a paired difference near nothing: as many decimals as the others have, not -9.446e-08
        text = f"{round(mean, 4) + 0.0:.4f}" if "t" in value and mean is not None and abs(mean) < 0.01 else cell(mean, value.get("se"))
        return text + ("" if t is None else f" [{t:+.1f}]")
    text = plain(value)
    if value is None or se is None:
        return text
    if "e" in text:
        return f"{text} ± {plain(se)}"
    decimals = len(text.partition(".")[2])  # those of the value: an error of 6e-07 behind 0.032 says no more than 0.000
    return f"{text} ± {se:.{decimals}f}"


def markdown(report: Report) -> str:
    """The report as text: its tables, whether the targets are met, the notes. It shows nothing that the JSON does not hold."""
    tables = [grid(report["columns"], report["rows"])] if report["rows"] else []
    tables += [f"{part['title']}\n\n{grid(part['columns'], part['rows'])}" for part in report.get("parts", [])]
    lines = []
    for t in report.get("targets", []):
        sign, word = "<=" if t["at_most"] else ">=", {True: "met", False: "missed", None: "not measured"}[t["met"]]
        lines.append(f"- {t['name']}: {cell(t['value'])} (target {sign} {cell(t['limit'])}): {word}")
    notes = [f"- {note}" for note in report.get("notes", [])]
    return "\n\n".join(filter(None, [*tables, "\n".join(lines), "\n".join(notes)]))


def grid(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of (key, heading) columns."""

    def show(row: Mapping[str, Any], key: str) -> str:
        value = row[key] if key in row else row.get("metrics", {}).get(key)
        return cell(value, (row.get("se") or {}).get(key))

    return tabulate(rows, columns, show).markdown()
