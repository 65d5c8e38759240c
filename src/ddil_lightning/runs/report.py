"""The page of a run: one self-contained HTML file, made from the files of a run folder, to look at or to send to a colleague.

It asks the network for nothing (images are embedded, and a content policy tells the browser so), runs no script but the slider's, and
follows the reader's light or dark theme. Whatever is missing in the folder is said on the page and skipped.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from ddil_lightning.evaluation.columns import number
from ddil_lightning.evaluation.registry import columns
from ddil_lightning.evaluation.stamps import comparable, note, protocols, remembered
from ddil_lightning.evaluation.table import (
    CLOCK,
    Row,
    cell,
    gap_closed,
    headings,
    measures,
    present,
    results_table,
    role,
    shown,
    tabulate,
    values_of,
)
from ddil_lightning.files import write_text
from ddil_lightning.runs.account import cost, duration, number_of, use
from ddil_lightning.runs.bands import Bands, bands, read_config
from ddil_lightning.runs.charts import ROLE_COLOURS, Series, line_chart
from ddil_lightning.runs.curves import families, read_curves, read_summary, unit
from ddil_lightning.runs.sheets import SCRIPT, gallery

__all__ = ["results_table", "write_report"]

COLUMNS = (("name", ""), ("steps", "Steps"), ("guidance", "Guidance"), ("nfe", "NFE"))
UPDATES = CLOCK.replace("_", " ")
BRIEFLY = ("name", "n", "prompts", "reference/source", "resize", "seeds/first")
"""What of a protocol stands right below the table."""
APART = "config config_name name rows seconds seconds_training network_evaluations peak_memory_gib planned_memory_gib best".split()
"""What of a summary stands elsewhere on the page than among the facts at its top."""


def write_report(run_dir: Path | str, summary: Mapping[str, Any] | None = None) -> Path:
    """Write `run_dir/report.html` from summary.json, metrics.csv, samples/*.png and config.yaml, each if it is there; answers its path.

    `summary`: what will stand in summary.json, which marks the end of a run and so is written after this. An older report stays until the
    new one is complete. Raises FileNotFoundError if `run_dir` is no folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run folder at {run_dir}: give the folder that ddil-fit made, for example runs/lcm_ddil/latest")
    summary, problem = read_summary(run_dir / "summary.json") if summary is None else (summary, "")
    found = summary.get("rows")
    rows = [row for row in found if isinstance(row, Mapping) and "name" in row] if isinstance(found, list) else []
    name = str(summary.get("config") or summary.get("config_name") or summary.get("name") or run_dir.resolve().name)
    config, curves = read_config(run_dir / "config.yaml"), run_dir / "metrics.csv"
    series = read_curves(curves) if curves.is_file() else {}
    ground = bands(config, series)
    body = [
        _header(name, summary),
        _tiles(rows),
        _results(rows, problem),
        gallery(run_dir / "samples"),
        use(run_dir),
        _curves(curves, series, ground),
        _shift(series, ground),
        cost(summary, config),
        _config(run_dir / "config.yaml"),
        f"<footer>ddil-lightning · {escape(run_dir.resolve().name)} · this page is one file and loads nothing</footer>",
    ]
    return write_page(run_dir / "report.html", name, body, SCRIPT)


def _header(name: str, summary: Mapping[str, Any]) -> str:
    lead = []
    if summary.get(CLOCK) is not None:
        lead.append(f"{cell(summary[CLOCK])} student updates")
    if number_of(summary.get("seconds")):
        lead.append(duration(summary["seconds"]))
    lead_line = f'<p class="lead">{escape(" in ".join(lead))}</p>' if lead else ""
    return f"<h1>{escape(name)}</h1>{lead_line}{_facts({k: v for k, v in summary.items() if k not in (CLOCK, *APART)})}"


def _tiles(rows: Sequence[Row]) -> str:
    """One tile per student row: its first headline metric, beside the teacher's at the same steps and at its most steps."""
    main = next(c for c in columns() if c.headline)
    by_name = {str(row["name"]): row for row in rows}
    teachers = [row for row in rows if role(row) == "teacher" and isinstance(row.get("steps"), int)]
    best = max(teachers, key=lambda row: row["steps"], default=None)
    tiles = []
    for row in (r for r in rows if role(r) == "student" and number_of(values_of(r).get(main.key))):
        same = by_name.get(f"teacher@{row.get('steps')}")
        text = [
            f"{escape(r['name'])} {shown(r, main.key)}"
            for r in (same, best)
            if r and comparable(row, r) and number_of(values_of(r).get(main.key))
        ]
        closed = _closed(row, same, best)
        steps = "1 step" if row.get("steps") == 1 else f"{cell(row.get('steps'))} steps"
        steps += "".join(f", {solver}" for solver in str(row["name"]).split()[1:])  # student@4 dpm++
        tiles.append(
            f'<div class="tile"><h3>Student, {escape(steps)}</h3>'
            f'<div class="big">{shown(row, main.key)}<small>{escape(main.label)}</small></div>'
            f"<p>{' · '.join(dict.fromkeys(text))}</p>{closed}</div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _closed(row: Row, same: Row | None, best: Row | None) -> str:
    """A sentence on the share of the teacher's gap between few and many steps that the student closes, or nothing."""
    if same is None or best is None or same is best or not comparable(row, same, best):
        return ""
    parts = []
    for column in (c for c in columns() if c.headline):
        values = [v for r in (row, same, best) if number_of(v := values_of(r).get(column.key))]
        share = gap_closed(*values) if len(values) == 3 else None
        if share is not None:
            parts.append(f"{min(share, 1):.0%} of the {column.short or column.label} gap" + (" and more" if share > 1 else ""))
    return f"<p>closes {', '.join(parts)}</p>" if parts else ""


def _results(rows: Sequence[Row], problem: str) -> str:
    if not rows:
        return f'<h2>Results</h2><p class="note">{escape(problem or "summary.json holds no rows of results.")}</p>'
    roles = [role(row) for row in rows]
    marks = ["cut" if before and mine != before else "" for before, mine in zip(["", *roles], roles, strict=False)]
    table = tabulate(rows, [*COLUMNS, *headings(rows), ("seconds_per_image", "s / image"), ("n", "Images")])
    page = table.html(marks, [ROLE_COLOURS.get(mine, 8) for mine in roles])
    meanings = "".join(f"<dt>{escape(c.heading)}</dt><dd>{escape(c.meaning)}</dd>" for c in present(rows, every=True))
    meanings += "<dt>NFE</dt><dd>network evaluations for one image; a guided step counts twice</dd>"
    legend = f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>"
    every = f"<details><summary>All measures, with 95 % intervals</summary>{measures(rows).html()}</details>"
    brief, protocol = _protocols(rows)
    return f"<h2>Results</h2>{page}{brief}{legend}{every}{protocol}{_quality(rows)}"


def _protocols(rows: Sequence[Row]) -> tuple[str, str]:
    """What the numbers must be quoted with: in brief, or a warning where the rows cannot be compared, and in full."""
    found, said = protocols(rows), note(rows)
    if len(found) == 1:
        brief = ((key.replace("/", " "), value) for key, value in _flat(found[0]).items() if key in BRIEFLY and value is not None)
        said = "; ".join(f"{key}: {cell(value)}" for key, value in brief)
    facts = "".join(_facts({k.replace("/", " "): v for k, v in _flat(p).items() if v is not None}) for p in found)
    text = f"<details><summary>How it was measured</summary>{facts}</details>" if found else ""
    return "".join(f'<p class="note">{escape(line)}</p>' for line in (said, remembered(rows)) if line), text


def _quality(rows: Sequence[Row]) -> str:
    """Quality against the number of steps, one line per role, for the metrics that say most."""
    charts, mixed = [], not comparable(*rows)
    for metric in (c for c in columns() if c.headline):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            value = values_of(row).get(metric.key)
            if number_of(value) and isinstance(row.get("steps"), int) and row["steps"] > 0:
                name = f"{role(row)} {(row.get('protocol') or {}).get('stamp', '')}".strip() if mixed else role(row)
                points.setdefault(name, []).append((row["steps"], value))
        series = [Series.of(name, found) for name, found in points.items()]
        if not any(len(s.x) > 1 for s in series):
            continue
        steps = sorted({x for s in series for x in s.x})
        charts.append(line_chart(series, title=metric.heading, x_label="sampling steps", log_x=True, x_ticks=steps, y_range=metric.span))
    return f'<div class="charts" style="margin-top:18px">{"".join(charts)}</div>' if charts else ""


def _curves(path: Path, series: Mapping[str, Series], ground: Bands) -> str:
    drawable = {k: s for k, s in series.items() if any(math.isfinite(v) for v in s.y)}
    charts = []
    for group in families({k: s for k, s in drawable.items() if "@" not in k}):
        first, values = group[0].name, [v for s in group for v in s.y if math.isfinite(v)]
        prefix = first.split("/")[0]
        title = first if len(group) == 1 else f"{prefix}, by part" if prefix in drawable else prefix
        title = re.sub(r"_\d+$", "", first) if prefix == "validation" else title
        wide = "loss" in first and min(values) > 0 and max(values) > 30 * min(values)
        y_range = (0.0, 1.0) if unit(first) == "share" and min(values) >= 0 and 0.3 < max(values) <= 1 else None
        charts.append(line_chart(group, title=title, unit=unit(first), x_label=UPDATES, log_y=wide, y_range=y_range, ground=ground))
    notes = [f"{k} has {n} values that are not finite." for k, s in series.items() if (n := sum(not math.isfinite(v) for v in s.y))]
    if not charts:
        notes.append(f"metrics.csv holds no curves over {CLOCK}." if path.is_file() else "metrics.csv is not there.")
    text = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    hint = '<p class="note">Thin: every logged value. Thick: running mean. Hover a line for its values.</p>' if charts else ""
    return f'<h2>Training</h2>{text}<div class="charts">{"".join(charts)}</div>{ground.legend() if charts else ""}{hint}'


SHIFTS = {
    "shift/teacher": "Distance to the teacher's latents",
    "shift/forward": "Distance to noised data",
    "shift/loss_ratio": "Loss on own latents / on the teacher's",
}
"""What a ShiftProbe measures at every node, in words."""


def _shift(series: Mapping[str, Series], ground: Bands) -> str:
    """The covariate shift at every node of the student: over updates, and over the nodes at the first, middle and last probe."""
    nodes: dict[str, dict[int, Series]] = {}
    for key, s in series.items():
        name, _, node = key.partition("@")
        if node.isdigit() and any(math.isfinite(v) for v in s.y):
            nodes.setdefault(name, {})[int(node)] = s
    charts = []
    for name, found in nodes.items():
        title, times = SHIFTS.get(name, name), sorted(found)
        lines = [Series(f"t = {t}", found[t].x, found[t].y) for t in reversed(times)]
        charts.append(line_chart(lines, title=title, x_label=UPDATES, ground=ground))
        clocks = sorted({x for s in found.values() for x in s.x})
        at = {t: dict(zip(s.x, s.y, strict=True)) for t, s in found.items()}
        chosen = list(dict.fromkeys([clocks[0], clocks[len(clocks) // 2], clocks[-1]]))
        rows = [Series(f"update {number(c)}", times, [at[t].get(c, math.nan) for t in times]) for c in chosen]
        rows = [row for row in rows if any(math.isfinite(v) for v in row.y)]
        if len(times) > 1 and rows:
            charts.append(line_chart(rows, title=f"{title}, by node", x_label="time t of the node", x_ticks=times))
    note = (
        "The student's own latents, node by node, by the energy distance (unbiased: also below 0 where there is none). Sampling goes from "
        "the largest t to the smallest."
    )
    if not charts:
        note = (
            "Not measured, for the run had no ShiftProbe: give ddil-fit a second --config of "
            "trainer: {callbacks: [{class_path: ShiftProbe}]}, or measure the finished student by ddil-probe."
        )
    return f'<h2>Covariate shift</h2><p class="note">{note}</p>' + (f'<div class="charts">{"".join(charts)}</div>' if charts else "")


def _config(path: Path) -> str:
    if not path.is_file():
        return '<h2>Configuration</h2><p class="note">config.yaml is not there.</p>'
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<h2>Configuration</h2><details><summary>config.yaml: everything needed to repeat this run</summary><pre>{text}</pre></details>"


def _facts(values: Mapping[str, Any]) -> str:
    """Small facts in a line; nested ones (versions) by their inner names."""
    flat = {k: v for k, v in _flat(values).items() if not isinstance(v, (list, tuple))}
    named = {k.rsplit("/", 1)[-1].replace("_", " "): cell(v) for k, v in flat.items()}
    spans = "".join(f"<span><b>{escape(k)}</b>{escape(v)}</span>" for k, v in named.items())
    return f'<p class="facts" style="max-width:none">{spans}</p>' if spans else ""


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table as a flat one with joined keys: {"a": {"b": 1}} as {"a/b": 1}."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        out.update(_flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return out


def write_page(path: Path, title: str, body: Sequence[str], script: str = "") -> Path:
    """Write the page; a full disk leaves the older one whole. No other script than this one can run in it, whatever the body holds."""
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    tail = f"<script>{script}</script>" if script else ""
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)} · ddil-lightning</title>'
        f'<link rel="icon" href="data:,"><style>{style}</style></head><body><main>{"".join(body)}</main>{tail}</body></html>'
    )
    write_text(path, page)
    return path
