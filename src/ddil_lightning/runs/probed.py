"""What ddil-probe has found, as tables for a terminal and as one self-contained page, beside the figures of the paper's appendix E."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ddil_lightning.evaluation.metrics.frechet import PER_FEATURE
from ddil_lightning.evaluation.registry import columns
from ddil_lightning.evaluation.table import Table, cell, headings, present, shown, values_of
from ddil_lightning.runs.charts import Series, line_chart
from ddil_lightning.runs.report import write_page

Row = Mapping[str, Any]

PAPER = {
    "mixing": {0.8: (23.14, 0.319), 0.6: (22.33, 0.317), 0.4: (21.95, 0.313), 0.2: (21.92, 0.307), 1.0: (22.5, 0.321)},
    "teacher": ((23.60, 0.309), (23.80, 0.317), (24.21, 0.320)),
    "student": ((21.64, 0.321), (21.16, 0.314), (22.05, 0.306)),
}
"""(FID, CLIP score) of appendix E, at the teacher's probability, and at the inner nodes 749, 500, 250 for who acts first (METHODS 6)."""

NOTE = (
    "paper: appendix E of arXiv 2410.11971, Stable Diffusion 1.5 with a 4-step DDIL student on 5 000 captions of COCO 2017, FID and CLIP "
    "score by its networks; compare trends with it, not values. Which of its switch tables is which was inferred from CLIP. A trend is "
    "judged by the two ends of its sweep, of mixtures by p = 0.2 and 0.8 as the paper has them, image by image, with the 95 % interval of "
    "resampled pairs: it cannot be told where that holds 0. An image's value of the Fréchet distance is how it moves the distance, to "
    "first order: its interval is without the bias of the two distances, which falls with the number of images and can "
    f"outweigh a small difference; nothing is told with fewer than {PER_FEATURE} images a feature."
)
MEASURES = {"frechet": "Fréchet", "mmd": "MMD", "auc": "probe AUC", "energy_distance": "energy distance", "energy": "energy"}
MEANING = {
    "Fréchet": "distance of 4 x 4 pooled channel means of the latents, biased upwards for few samples",
    "MMD": "squared, unbiased, so also below 0",
    "probe AUC": "of a logistic probe that tells the two sets apart: 0.5 if it cannot",
    "energy distance": "unbiased, so also below 0",
    "energy": "mean square of the student's latents minus the others'",
    "loss": "mean square of the student's answer minus the teacher's finer solution from the same latent: of where a deterministic step "
    "lands, or of x0 where the student re-noises; on the student's own latents, on the teacher's, and on forward ones",
    "recovery": "root mean square between the student's continuation and the teacher's, after one step of the student from the teacher's "
    "latents, and after one of the teacher (plain)",
}
FIRST = "At the first time both are pure noise: what stands there is the measures' own floor."


class Part(NamedTuple):
    """A table under its title, with what is said of it."""

    title: str
    table: Table
    notes: Sequence[str] = ()


def parts(found: Mapping[str, Any]) -> list[Part]:
    """The tables of what was found, in the order in which they are read."""
    made = []
    rows = found["nodes"]
    for name in rows[0]["shift"] if rows else ():
        head = ["t", *MEASURES.values()]
        lines = [[cell(row["t"]), *(cell(row["shift"][name][key], 4) for key in MEASURES)] for row in rows]
        who = {"teacher": "the teacher's own latents, of independent noise", "forward": "forward latents of the data"}[name]
        made.append(Part(f"The student's latents against {who}", Table(head, lines), (FIRST,) if name == "teacher" else ()))
    if rows:
        made.append(_losses(rows))
    said = {sweep: [trend["text"] for trend in told] for sweep, told in found["trends"].items()}
    mixing, switch = _sweeps(found)
    made += [_mixing(mixing, said["mixing"])] if mixing else []
    made += [_switch(switch, who, said[who]) for who in ("teacher", "student") if switch]
    return made


def _sweeps(found: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """The rows of both sweeps with the protocol that is theirs, which says what tables show."""

    def measured(sweep: str) -> list[Row]:
        return [{**row, "protocol": found["protocol"]} for row in found[sweep]]

    return measured("mixing"), measured("switch")


def _losses(rows: Sequence[Row]) -> Part:
    names = [name for name in ("on", "teacher", "forward") if name in rows[0]["loss"]]
    others = names[1:]
    said = {"on": "on its own", "teacher": "on the teacher's", "forward": "on forward"}
    head = ["t", *(f"loss {said[name]}" for name in names), *(f"own / {name}" for name in others), "recovery", "plain"]
    lines = []
    for row in rows:
        back = row["recovery"]
        values = [*(row["loss"][name] for name in names), *(row["ratio"][name] for name in others), back.get("injected"), back.get("plain")]
        lines.append([cell(row["t"]), *(cell(v, 4) for v in values)])
    return Part("What a step costs, and what is made good", Table(head, lines), (f"Of the first {rows[0]['asked']} samples.",))


def _mixing(rows: Sequence[Row], said: Sequence[str]) -> Part:
    paper = [PAPER["mixing"].get(row["p_teacher"]) for row in rows]  # type: ignore[attr-defined]
    names = [f"{row['p_teacher']:g}" for row in rows]
    return Part("Every interval the teacher's with probability p", _swept("p", names, rows, paper), said)


def _switch(rows: Sequence[Row], who: str, said: Sequence[str]) -> Part:
    mine = [row for row in rows if row["first"] == who]
    paper = list(PAPER[who]) if len(mine) == 3 else [None] * len(mine)
    other = "student" if who == "teacher" else "teacher"
    title = f"{who.capitalize()} first, from the time t on the {other}"
    return Part(title, _swept("t", [cell(row["at"]) for row in mine], mine, paper), said)


def _swept(head: str, names: Sequence[str], rows: Sequence[Row], paper: Sequence[Any]) -> Table:
    keys = headings(rows)
    lines = []
    for name, row, theirs in zip(names, rows, paper, strict=True):
        fid, clip = ("–", "–") if theirs is None else (f"{theirs[0]:.2f}", f"{theirs[1]:.3f}")
        lines.append([name, cell(row["nfe"]), *(shown(row, key) for key, _ in keys), fid, clip])
    return Table([head, "NFE", *(label for _, label in keys), "paper's FID", "paper's CLIP"], lines)


# Terminal and page -----------------------------------------------------------------------------------------------------------------


def text(found: Mapping[str, Any]) -> str:
    """Everything for a terminal."""
    made = parts(found)
    lines = [f"{part.title}\n{part.table.text()}{''.join(f'  {note}{chr(10)}' for note in part.notes)}" for part in made]
    paper = f"{NOTE}\n" if found["mixing"] or found["switch"] else ""
    return "\n".join(lines) + paper


def write_probe(path: Path, found: Mapping[str, Any]) -> Path:
    """Write the page, self-contained as `report.html` is; answers its path."""
    about = found["protocol"]
    name = f"{Path(str(about['student'])).name} against {Path(str(about['teacher'])).name}"
    said = {key: value for key, value in about.items() if not isinstance(value, (Mapping, list))} | {"times": about["times"]}
    facts = "".join(f"<span><b>{escape(key.replace('_', ' '))}</b>{escape(cell(value))}</span>" for key, value in said.items())
    body = [f'<h1>{escape(name)}</h1><p class="facts" style="max-width:none">{facts}</p>']
    for part in parts(found):
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in part.notes)
        body.append(f"<h2>{escape(part.title)}</h2>{part.table.html()}{notes}")
    charts, more = _node_charts(found["nodes"])
    for column in (c for c in columns() if c.key in ("frechet", "clip", "all_right")):
        charts += _sweep_charts(found, column.key, column.heading)
    body.append(f'<h2>Charts</h2><div class="charts">{"".join(charts)}</div>')
    body.append(f'<details><summary>More of the nodes</summary><div class="charts">{"".join(more)}</div></details>' if more else "")
    body.append(f'<p class="note">{escape(NOTE)}</p>' if found["mixing"] or found["switch"] else "")
    meanings = MEANING | {c.heading: c.meaning for c in present([row for rows in _sweeps(found) for row in rows])}
    terms = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in meanings.items())
    body.append(f"<details><summary>What the columns mean</summary><dl>{terms}</dl></details>")
    body.append("<footer>ddil-lightning · ddil-probe · this page is one file and loads nothing</footer>")
    return write_page(path, name, body)


def _node_charts(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Over the nodes: what is seen first, and what a fold holds besides."""
    rows = sorted(rows, key=lambda row: float(row["t"]))
    times = [row["t"] for row in rows]

    def drawn(title: str, lines: Mapping[str, Sequence[float | None]], **how: Any) -> list[str]:
        series = [Series(name, times, [math.nan if y is None else y for y in ys]) for name, ys in lines.items()]
        seen = any(math.isfinite(y) for line in series for y in line.y)
        return [line_chart(series, title=title, x_label="time t", x_ticks=times, **how)] if seen else []

    def under(key: str) -> dict[str, list[Any]]:
        return {name: [row[key][name] for row in rows] for name in (rows[0][key] if rows else ())}

    shift = under("shift")
    shifts = {key: drawn(said, {name: [y[key] for y in ys] for name, ys in shift.items()}) for key, said in MEASURES.items()}
    back = {f"step/{who}": [row["recovery"].get(key) for row in rows] for key, who in (("injected", "student"), ("plain", "teacher"))}
    first = [*shifts.pop("energy_distance"), *shifts.pop("auc")]
    first += drawn("Loss on whose latents", {"student" if name == "on" else name: ys for name, ys in under("loss").items()}, log_y=True)
    more = [chart for made in shifts.values() for chart in made]
    more += drawn("Loss on its own latents over that on others", under("ratio"), log_y=True, reference=("no more", 1.0))
    return first, more + drawn("Recovery after one step of whom", back)


def _sweep_charts(found: Mapping[str, Any], key: str, title: str) -> list[str]:
    made = []
    points = [(100 * row["p_teacher"], values_of(row)[key]) for row in found["mixing"] if values_of(row).get(key) is not None]
    if points:
        x, y = zip(*points, strict=True)
        made.append(line_chart([Series("mixed", x, y)], title=title, x_label="teacher's share, %", x_ticks=x))
    series = []
    for who in ("teacher", "student"):
        mine = [(row["at"], values_of(row)[key]) for row in found["switch"] if row["first"] == who and values_of(row).get(key) is not None]
        if mine:
            series.append(Series.of(f"first/{who}", mine))
    if series:
        made.append(line_chart(series, title=f"{title}, who acts first", x_label="time of the switch", x_ticks=sorted(series[0].x)))
    return made
