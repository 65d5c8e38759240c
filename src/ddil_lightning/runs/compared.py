"""What ddil-test --compare has found: tables for a terminal and in Markdown, and one self-contained page with charts and images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.registry import columns
from ddil_lightning.evaluation.stamps import called, notes, protocols
from ddil_lightning.evaluation.table import (
    END,
    NAME,
    Row,
    Table,
    cell,
    decimals_of,
    headings,
    measures,
    present,
    presented,
    results_table,
    shown,
    table,
    tabulate,
    values_of,
)
from ddil_lightning.files import write_text
from ddil_lightning.messages import shorten
from ddil_lightning.runs.charts import Series, line_chart
from ddil_lightning.runs.comparison import Comparison, entry_of
from ddil_lightning.runs.report import write_page

COLUMNS = (NAME, ("steps", "Steps"), ("sampler", "Sampler"), ("guidance", "g"), ("nfe", "NFE"))
PAIRED = (
    "Differences image by image, from the same prompts and noise, with 95 % intervals of resampled pairs; * where the interval leaves "
    "out 0. A distance of distributions has no value of an image, and so no pair."
)
NFE = "network evaluations for one image; a guided step counts twice"


def text(found: Comparison) -> str:
    """Everything for a terminal."""
    parts = [table(found.rows)]
    paired = paired_table(found)
    if paired is not None:
        parts.append(f"Against the first, {found.entries[0]}\n{paired.text()}{PAIRED}\n")
    return "\n".join(parts) + "".join(f"{line}\n" for line in _said_besides(found))


def markdown(found: Comparison) -> str:
    """The same for a README or a paper's draft, with what was compared and by which protocol."""
    parts = [f"# {title(found)}", results_table(found.rows)]
    paired = paired_table(found)
    if paired is not None:
        parts += [f"## Against the first, {found.entries[0]}", paired.markdown(), PAIRED]
    parts += ["## Compared", _compared(found).markdown()]
    parts.append("Measured by " + ", ".join(called(p) for p in protocols(found.rows)) + f". NFE: {NFE}.")
    parts += _said_besides(found)
    return "\n\n".join(parts) + "\n"


def write_compared(found: Comparison) -> list[Path]:
    """Write Markdown and page beside the JSON; answers their paths."""
    text, page = found.out.with_suffix(".md"), found.out.with_suffix(".html")
    write_text(text, markdown(found))
    body = [_header(found), _results(found), _quality(found), _paired(found), _pictures(found), _about(found)]
    body.append("<footer>ddil-lightning · ddil-test --compare · this page is one file and loads nothing</footer>")
    return [text, write_page(page, title(found), body)]


def title(found: Comparison) -> str:
    """The names of all entries that have rows."""
    names = list(dict.fromkeys(entry_of(row) for row in found.rows))
    return ", ".join(names[:-1]) + (f" and {names[-1]}" if len(names) > 1 else names[-1])


def paired_table(found: Comparison, every: bool = False) -> Table | None:
    """The differences from the first entry, a row each, of the numbers that tables show, or of `every` one; None where there are none."""
    rows, order = found.against(), columns() if every else presented(columns(), found.rows)
    order = [c for c in order if any(c.key in row["differences"] for row in rows)]
    if not order:
        return None
    lines = [[row["name"], row["against"], *(_apart(row["differences"].get(c.key), c) for c in order)] for row in rows]
    return Table(["", "less", *(c.heading for c in order)], lines)


def _apart(value: Mapping[str, Any] | None, column: Column) -> str:
    if value is None:
        return "–"
    ends, decimals = value["interval"], decimals_of(column.key) or 3
    said = f"{value['mean']:+.{decimals}f}"
    if ends is None:
        return said
    mark = " *" if ends[0] > 0 or ends[1] < 0 else ""
    return f"{said} [{ends[0]:+.{decimals}f}, {ends[1]:+.{decimals}f}]{mark}"


def _compared(found: Comparison) -> Table:
    """What the entries are, a line each: where they come from, their LoRAs, samplers and weights."""
    lines: dict[str, list[str]] = {}
    for row in found.rows:
        about = row["generation"]
        lora = ", ".join(about.get("lora") or []) or "–"
        made = [entry_of(row), str(about.get("pipeline", "–")), lora, str(about.get("sampler", "–")), cell(row["guidance"])]
        lines.setdefault(entry_of(row), [*made, str(about.get("dtype", "–"))])
    return Table(["", "Pipeline", "LoRA", "Sampler", "g", "Precision"], list(lines.values()))


# The page --------------------------------------------------------------------------------------------------------------------------


def _header(found: Comparison) -> str:
    about = protocols(found.rows)
    facts = {"prompts": ", ".join(sorted({str(row["n"]) for row in found.rows})), "protocol": ", ".join(map(called, about))}
    spans = "".join(f"<span><b>{escape(key)}</b>{escape(value)}</span>" for key, value in facts.items())
    lead = f"{len(found.rows)} rows from the same prompts and noise"
    return f'<h1>{escape(title(found))}</h1><p class="lead">{lead}</p><p class="facts" style="max-width:none">{spans}</p>'


def _colours(found: Comparison) -> dict[str, int]:
    """The number of each entry's colour, the same in the table and in all charts."""
    return {name: 1 + i % 8 for i, name in enumerate(dict.fromkeys(entry_of(row) for row in found.rows))}


def _results(found: Comparison) -> str:
    rows, colours = found.rows, _colours(found)
    names = [entry_of(row) for row in rows]
    marks = ["cut" if before and mine != before else "" for before, mine in zip(["", *names], names, strict=False)]

    def show(row: Row, key: str) -> str:
        return str(row["generation"].get(key, "–")).removesuffix("Scheduler") if key == "sampler" else shown(row, key)

    whole = tabulate(rows, [*COLUMNS, *headings(rows), (END[0], "s / image")], show).html(marks, [colours[name] for name in names])
    said = "".join(f'<p class="note">{escape(line)}</p>' for line in [*notes(rows), *_said_besides(found)])
    meanings = "".join(f"<dt>{escape(c.heading)}</dt><dd>{escape(c.meaning)}</dd>" for c in present(rows, every=True))
    meanings += f"<dt>NFE</dt><dd>{NFE}</dd><dt>s / image</dt><dd>seconds for one image once the pipeline is warm</dd>"
    legend = f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>"
    every = f"<details><summary>All measures, with 95 % intervals</summary>{measures(rows).html()}</details>"
    return f"<h2>Results</h2>{whole}{said}{legend}{every}"


def _said_besides(found: Comparison) -> list[str]:
    return [*found.notes, *(f"Left out: {name}, {why}." for name, why in found.left_out.items())]


def _quality(found: Comparison) -> str:
    """Each measure against network evaluations, a line an entry: those that say most, and the others below."""
    every = present(found.rows, every=True)
    main = [c for c in every if c.headline]
    main = main or [c for c in presented(every, found.rows) if c.better][:2]
    rest = [c for c in every if c not in main and c.better]
    charts, more = ("".join(_chart(found, column) for column in some) for some in (main, rest))
    below = f'<details><summary>More charts</summary><div class="charts">{more}</div></details>' if more else ""
    return f'<h2>Quality against network evaluations</h2><div class="charts">{charts}</div>{below}' if charts or more else ""


def _chart(found: Comparison, column: Column) -> str:
    """A line an entry, in its colour; of rows with another stamp a line of their own, which nothing joins to it."""
    colours, stamps = _colours(found), [p.get("stamp") for p in protocols(found.rows)]
    points: dict[tuple[str, Any], list[tuple[float, float]]] = {}
    for row in found.rows:
        value = values_of(row).get(column.key)
        if isinstance(value, (int, float)) and math.isfinite(value) and row["nfe"]:
            points.setdefault((entry_of(row), row["protocol"].get("stamp")), []).append((row["nfe"], value))
    if not points:
        return ""
    series = [Series.of(name if len(stamps) < 2 else f"{name} {stamp}", some, colours[name]) for (name, stamp), some in points.items()]
    values, marks = [y for s in series for y in s.y], sorted({x for s in series for x in s.x})
    wide = column.span is None and min(values) > 0 and max(values) > 20 * min(values)
    return line_chart(
        series,
        title=column.heading,
        x_label="network evaluations",
        log_x=True,
        log_y=wide,
        x_ticks=marks,
        y_range=column.span,
    )


def _paired(found: Comparison) -> str:
    paired = paired_table(found, every=True)
    if paired is None:
        return ""
    return f'<h2>Against the first, {escape(found.entries[0])}</h2>{paired.html()}<p class="note">{escape(PAIRED)}</p>'


def _pictures(found: Comparison) -> str:
    """A line of images for every row, of the same prompts and noise from left to right."""
    lines = []
    for row in found.rows:
        seen = found.seen(row["name"])
        if seen is not None:
            cells = "".join(f"<td>{_picture(x, row['name'], i, found.prompts)}</td>" for i, x in enumerate(seen.pictures))
            lines.append(f"<tr><td>{escape(row['name'])}</td>{cells}</tr>")
    if not lines:
        return ""
    head = "".join(f"<th>{i + 1}</th>" for i in range(len(found.prompts)))
    legend = "".join(f"<dt>{i + 1}</dt><dd>{escape(shorten(prompt, 300))}</dd>" for i, prompt in enumerate(found.prompts))
    grid = f'<div class="scroll"><table class="grid"><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'
    return f"<h2>Images from the same noise</h2>{grid}<dl>{legend}</dl>"


def _picture(x: Tensor, name: str, i: int, prompts: Sequence[str]) -> str:
    """An image [3, h, w], uint8, within the page; a small one is enlarged with sharp pixels."""
    from PIL import Image

    height, width = x.shape[1:]
    Image.fromarray(x.permute(1, 2, 0).to(torch.uint8).contiguous().numpy()).save(data := io.BytesIO(), format="PNG")
    sharp = ' class="pixels"' if max(height, width) < 96 else ""
    alt = escape(f"{name}: {shorten(prompts[i], 120)}" if i < len(prompts) else name)
    source = base64.b64encode(data.getvalue()).decode()
    return f'<img{sharp} width="{width}" height="{height}" alt="{alt}" title="{alt}" src="data:image/png;base64,{source}">'


def _about(found: Comparison) -> str:
    """What was compared, and by which protocols."""
    parts = []
    for protocol in protocols(found.rows):
        lines = [[str(key).replace("_", " "), _said(value)] for key, value in protocol.items() if value is not None]
        parts.append(
            f"<details><summary>How it was measured: {escape(called(protocol))}</summary>{Table(['', ''], lines).html()}</details>"
        )
    return f"<h2>Compared</h2>{_compared(found).html()}{''.join(parts)}"


def _said(value: Any) -> str:
    """A value of a protocol in words; a table as its pairs."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_said(inner)}" for key, inner in value.items() if inner is not None)
    return cell(value)
