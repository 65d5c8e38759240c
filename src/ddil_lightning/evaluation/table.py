"""Rows of results as tables for a terminal, for Markdown and for a page, what they say, and how they are written as JSON.

A row that lacks a number, a metric or its protocol, as those of older runs do, is shown without it.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ddil_lightning.evaluation.columns import POINTS, Column, number
from ddil_lightning.evaluation.registry import columns
from ddil_lightning.evaluation.stamps import notes
from ddil_lightning.files import write_text

CLOCK = "student_updates"

Row = Mapping[str, Any]
"""One line of the results: name, steps, guidance, n, nfe, seconds_per_image, metrics {key: value}, protocol (which rows of old
runs lack)."""

NAME, END = ("name", ""), ("seconds_per_image", "s/image")
SHORT = (NAME, ("nfe", "NFE"))
TERMINAL = (("name", "name"), ("steps", "steps"), ("guidance", "g"), ("nfe", "NFE"))


class Table(NamedTuple):
    """Cells as text, one renderer for all that shows them: the terminal, Markdown, and a page."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown, as a README or a benchmark shows it."""
        rule = ["---", *["---:"] * (len(self.head) - 1)]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in self.lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.head, rule, *lines))

    def html(self, marks: Sequence[str] = (), dots: Sequence[int] = ()) -> str:
        """The table in HTML, for a page. `marks`: a CSS class for each line; `dots`: the number of the colour in front of its name."""
        top = "".join(f"<th>{escape(h)}</th>" for h in self.head)
        rows = ""
        for line, mark, dot in zip_longest(self.lines, marks, dots):
            before = "" if dot is None else f'<i style="background:var(--c{dot})"></i>'
            rows += f'<tr class="{mark or ""}"><td>{before}' + "</td><td>".join(map(escape, line)) + "</td></tr>"
        return f'<div class="scroll"><table><tr>{top}</tr>{rows}</table></div>'

    def text(self, width: int = 160) -> str:
        """The table in aligned columns for a terminal of `width` letters, without colours."""
        from rich.console import Console
        from rich.table import Table as Rich

        grid = Rich(self.head[0], box=None, header_style="bold", pad_edge=False)
        for head in self.head[1:]:
            grid.add_column(head, justify="right")
        for line in self.lines:
            grid.add_row(*line)
        console = Console(width=width, color_system=None, file=(text := io.StringIO()))
        console.print(grid)
        return text.getvalue()


def tabulate(rows: Sequence[Row], columns: Sequence[Sequence[str]], show: Callable[[Row, str], str] | None = None) -> Table:
    """The rows under (key, heading) columns; `show`: a row's cell under a key, by default `shown`."""
    return Table([head for _, head in columns], [[(show or shown)(row, key) for key, _ in columns] for row in rows])


def headings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The metrics that at least one row has, as columns of `tabulate`."""
    return [(column.key, column.heading) for column in present(rows)]


def results_table(rows: Sequence[Row]) -> str:
    """The rows of summary.json or metrics.json as a Markdown table: the columns that at least one row has, arrows for what is better.

    Lines below say where they cannot be compared, and which were kept of an earlier measurement.
    """
    markdown = tabulate(rows, [*SHORT, *headings(rows), END]).markdown()
    return "\n\n".join([markdown, *notes(rows)])


def table(rows: Sequence[Row], width: int = 160) -> str:
    """The rows as text for a terminal of `width` letters, with steps and guidance besides, and `stamps.notes`."""
    text = tabulate(rows, [*TERMINAL, *headings(rows), END]).text(width)
    return text + "".join(f"{line}\n" for line in notes(rows))


def present(rows: Sequence[Row], every: bool = False) -> list[Column]:
    """The columns that tables show (`presented`) and at least one row has, of a suite's metrics and the toy's; `every`: the others, too."""
    found = [*columns(), *POINTS]
    return [c for c in (found if every else presented(found, rows)) if any(values_of(row).get(c.key) is not None for row in rows)]


def presented(found: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Those of the columns that tables of these rows show: those of every table, and what a protocol of the rows names."""
    told = [protocol for protocol in (row.get("protocol") for row in rows) if isinstance(protocol, Mapping)]
    named = {key for protocol in told for key in protocol.get("metrics") or ()}
    return [c for c in found if c.shown or c.key in named]


def measures(rows: Sequence[Row]) -> Table:
    """Every number of the rows, a line each, with the interval that it may have: more than a table with a line a row has room for."""
    names = [shown(row, "name") for row in rows]
    return Table(["", *names], [[c.heading, *(ranged(row, c.key) for row in rows)] for c in present(rows, every=True)])


def ranged(row: Row, key: str) -> str:
    """The value of a row under `key` as text, with the ends of its interval if it has one."""
    found = values_of(row).get("intervals")
    ends = found.get(key) if isinstance(found, Mapping) else None
    return shown(row, key) + (f" [{', '.join(cell(x, decimals_of(key)) for x in ends)}]" if ends else "")


def shown(row: Row, key: str) -> str:
    """The value of a row under `key`, its own or that among its metrics, as text; a dash where it has none."""
    if key in row:
        return cell(row[key])
    value = values_of(row).get(key)
    return "–" if value is None else cell(value, decimals_of(key))


def decimals_of(key: str) -> int | None:
    """How many decimals a metric asks for; None where it leaves that to its size, or is none that is known."""
    return next((c.decimals for c in (*columns(), *POINTS) if c.key == key), None)


def values_of(row: Row) -> Mapping[str, Any]:
    """The metrics of a row, {} if it has none."""
    found = row.get("metrics")
    return found if isinstance(found, Mapping) else {}


def cell(value: Any, decimals: int | None = None) -> str:
    """A value as text for a table: three decimals (two from 10 on) or so many, whole numbers with separators, a dash for nothing."""
    if value is None:
        return "–"
    if decimals is not None and isinstance(value, float) and math.isfinite(value):
        return f"{value:.{decimals}f}"
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


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as JSON, whole or not at all; NaN and infinity, which JSON does not have, become null."""
    write_text(Path(path), json.dumps(_plain(rows), indent=2, allow_nan=False) + "\n")


def _plain(x: Any) -> Any:
    """`x` in types that JSON has, with None for NaN and infinity."""
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, Tensor):
        return _plain(x.tolist())
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
