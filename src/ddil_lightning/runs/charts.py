"""Line charts as inline SVG, for pages that must stand alone: no script, no font and no plotting library is loaded.

Colours are the CSS variables `--c1` ... `--c8` of `report.css`, so that a chart follows the reader's light or dark theme.
Every drawn point carries a `<title>`, which browsers show on hover.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from ddil_lightning.evaluation.columns import number

WIDTH, HEIGHT = 460, 236
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40
STRIP = 12
"""The height of what is drawn between the horizontal axis and its numbers."""
MAX_POINTS = 120
"""Points that can be hovered, per line; a longer series is drawn as the means of that many equal bins."""

TAME, FLAT = 1e100, 1e-9
"""The largest absolute value that is drawn, and the range, relative to the values, below which a curve is flat."""

ROLE_COLOURS = {"student": 1, "teacher": 2, "forward": 3, "mixed": 4}
"""The number of each actor's colour, which is the same in every chart."""


class Series(NamedTuple):
    """One line: `x` and `y` of equal length, `x` ascending. Values that are not finite break the line.

    `colour`: its number, by default that of an actor of its name, or one that is free.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int | None = None

    @classmethod
    def of(cls, name: str, points: Iterable[tuple[float, float]], colour: int | None = None) -> Series:
        """The line of points (x, y) in any order."""
        ordered = sorted(points)
        return cls(name, [x for x, _ in ordered], [y for _, y in ordered], colour)


class Axis(NamedTuple):
    """Maps data from [lo, hi] to pixels [start, stop], linearly or in log10."""

    lo: float
    hi: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position in pixels of a value of the data; beyond start and stop for one beyond lo and hi."""
        lo, hi = (math.log10(self.lo), math.log10(self.hi)) if self.log else (self.lo, self.hi)
        share = ((math.log10(value) if self.log else value) - lo) / (hi - lo)
        return self.start + share * (self.stop - self.start)


def _step(lo: float, hi: float, count: int = 4) -> float:
    """The round distance (1, 2 or 5 times a power of ten) that divides [lo, hi] into `count` parts or a few less."""
    raw = (hi - lo) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))


def ticks(lo: float, hi: float, count: int = 4) -> list[float]:
    """The multiples of a round number within [lo, hi], about `count` of them."""
    step = _step(lo, hi, count)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(lo: float, hi: float) -> list[float]:
    """Powers of ten within [lo, hi], with their multiples 2 and 5 where the range is short."""
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    marks = (1, 2, 5) if math.log10(hi / lo) <= 2 else (1,)
    found = [m * 10.0**d for d in decades for m in marks if lo * (1 - 1e-9) <= m * 10.0**d <= hi * (1 + 1e-9)]
    return found[:: math.ceil(len(found) / 7)] if found else [lo, hi]


def binned(series: Series, bins: int = MAX_POINTS) -> Series:
    """The series itself if it has at most `bins` points, else the means of `bins` runs of consecutive finite points."""
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if len(series.y) <= bins:
        return series
    edges = [round(i * len(points) / bins) for i in range(bins + 1)]
    groups = [points[a:b] for a, b in pairwise(edges) if b > a]
    means = [tuple(math.fsum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]
    return Series(series.name, [x for x, _ in means], [y for _, y in means])


def smoothed(series: Series) -> Series | None:
    """A centred running mean over a twelfth of the points, or None for a short series or one that is smooth already."""
    y = [v for v in series.y if math.isfinite(v)]
    if len(y) < 40 or len(y) != len(series.y):
        return None
    path = sum(abs(b - a) for a, b in pairwise(y))
    if path < 5 * (max(y) - min(y)):  # monotone curves have path = range; noise has many times that
        return None
    half = max(1, len(y) // 24)
    windows = (y[max(0, i - half) : i + half + 1] for i in range(len(y)))
    return Series(series.name, series.x, [math.fsum(w) / len(w) for w in windows])


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    unit: str = "",
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    y_range: tuple[float, float] | None = None,
    reference: tuple[str, float] | None = None,
    ground: Callable[[Axis], tuple[str, str]] | None = None,
) -> str:
    """A `<figure>` with title, legend (from two lines on) and an inline SVG of the lines.

    `unit` stands behind the title; `y_range` fixes the vertical axis; `reference` = (label, value) is a dashed horizontal line. `ground`
    answers, for the horizontal axis, with what is drawn behind the lines and what in the strip of STRIP pixels below them.
    A log axis is used only if all its values are positive. Raises ValueError if no series has a finite point.
    """
    series = [s._replace(x=[_tame(x) for x in s.x], y=[_tame(y) for y in s.y]) for s in series]
    finite = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        raise ValueError(f"the chart {title!r} has no finite value to draw")
    values = [y for _, y in finite] + ([reference[1]] if reference else [])
    x_axis = _x_axis([x for x, _ in finite], log_x)
    y_axis = _y_axis(list(y_range or values), log_y, fixed=y_range is not None)
    behind, below = ground(x_axis) if ground else ("", "")
    low = STRIP if below else 0
    body = behind + _grid(x_axis, y_axis, x_label, x_ticks, low) + below
    if reference:
        body += _reference(*reference, y_axis)
    colours = _colours(series)
    for s, colour in zip(series, colours, strict=True):
        body += _line(s, colour, x_axis, y_axis, x_label, unit)
    head = f"<b>{escape(title)}</b>" + (f" <span>{escape(unit)}</span>" if unit else "")
    return (
        f'<figure class="chart"><figcaption>{head}{_legend(series, colours)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + low}" role="img" aria-label="{escape(title)} over {escape(x_label)}">{body}</svg></figure>'
    )


def _tame(value: float) -> float:
    """A value whose differences and ratios to others are finite, and no axis can tell from the given one; NaN and infinity stay."""
    if not math.isfinite(value) or value == 0:
        return float(value)
    return math.copysign(min(abs(value), TAME), value) if abs(value) > 1 / TAME else 0.0


def _spread(values: list[float]) -> tuple[float, float]:
    """The least and the largest value; twice the same where they differ by rounding alone, which is no range to draw."""
    lo, hi = min(values), max(values)
    return (lo, hi) if hi - lo > FLAT * max(abs(lo), abs(hi)) else (hi, hi)


def _x_axis(values: list[float], log: bool) -> Axis:
    """The horizontal axis of `values`: from the least to the largest, or from 0 where the least is near it; a log axis with some room."""
    lo, hi = _spread(values)
    if log and lo > 0:
        room = (hi / lo) ** 0.04 if hi > lo else 2.0
        return Axis(lo / room, hi * room, LEFT, WIDTH - RIGHT, True)
    lo = 0.0 if 0 <= lo < 0.1 * hi else lo
    return Axis(lo, hi if hi > lo else lo + max(1.0, abs(lo)), LEFT, WIDTH - RIGHT)


def _y_axis(values: list[float], log: bool, fixed: bool) -> Axis:
    """The vertical axis of `values`, widened to round numbers, from 0 where that costs little room. A `fixed` range stays as it is."""
    lo, hi = _spread(values)
    if log and lo > 0:
        room = (hi / lo) ** 0.06 if hi > lo else 2.0
        return Axis(lo / room, hi * room, HEIGHT - BOTTOM, TOP, True)
    if not fixed or lo == hi:
        lo = 0.0 if 0 <= lo <= 0.6 * hi else lo
        pad = (hi - lo) or abs(hi) * 0.5 or 1.0
        lo, hi = (lo, hi) if hi > lo else (max(lo - pad, 0.0) if lo >= 0 else lo - pad, hi + pad)
        step = _step(lo, hi)
        lo, hi = math.floor(lo / step + 1e-9) * step, math.ceil(hi / step - 1e-9) * step
    return Axis(lo, hi, HEIGHT - BOTTOM, TOP)


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, x_ticks: Sequence[float] | None, low: int = 0) -> str:
    """Horizontal grid lines, both axes' numbers and the label of the horizontal axis, `low` pixels lower."""
    parts = []
    for v in log_ticks(y_axis.lo, y_axis.hi) if y_axis.log else ticks(y_axis.lo, y_axis.hi):
        y = y_axis(v)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(v)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    counts = log_ticks(x_axis.lo, x_axis.hi) if x_axis.log else ticks(x_axis.lo, x_axis.hi, 6)
    for v in x_ticks or [v for v in counts if v == int(v)]:  # there is no half an update
        parts.append(f'<text class="tick" x="{x_axis(v):.1f}" y="{base + 16 + low}" text-anchor="middle">{number(v)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6 + low}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _reference(label: str, value: float, y_axis: Axis) -> str:
    y = y_axis(value)
    line = f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    # Written above the line, or below it where the top of the chart is near.
    at = y - 5 if y > TOP + 16 else y + 14
    return f'{line}<text class="tick" x="{WIDTH - RIGHT}" y="{at:.1f}" text-anchor="end">{escape(label)}: {number(value)}</text>'


def _line(s: Series, colour: int, x_axis: Axis, y_axis: Axis, x_label: str, unit: str) -> str:
    """A series as SVG: its line and points; a noisy one is drawn twice, all its points faintly, and its running mean on top."""
    drawn, mean = binned(s), smoothed(s)
    if mean is not None:
        faint = f'<path class="faint" style="stroke:var(--c{colour})" d="{_path(binned(s, 4 * MAX_POINTS), x_axis, y_axis)}"/>'
        drawn = binned(mean)
    else:
        faint = ""
    points = [(x, y) for x, y in zip(drawn.x, drawn.y, strict=True) if math.isfinite(y)]
    radius, style = (4, f"fill:var(--c{colour})") if len(points) <= 12 else (6, "fill:transparent")
    what = f" {unit}" if unit else ""
    dots = "".join(
        f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="{radius}" style="{style}">'
        f"<title>{escape(s.name)}: {number(y)}{escape(what)} at {number(round(x))} {escape(x_label)}</title></circle>"
        for x, y in points
    )
    return f'{faint}<path class="line" style="stroke:var(--c{colour})" d="{_path(drawn, x_axis, y_axis)}"/>{dots}'


def _path(s: Series, x_axis: Axis, y_axis: Axis) -> str:
    """SVG path data; a value that is not finite starts a new piece."""
    parts, pen = [], "M"
    for x, y in zip(s.x, s.y, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x_axis(x):.1f} {y_axis(y):.1f}")
        pen = "L"
    return "".join(parts)


def _colours(series: Sequence[Series]) -> list[int]:
    """Colour numbers 1..8: a line's own, an actor's if the name ends in its name, else the next one that no actor of this chart uses."""
    roles = [s.colour or ROLE_COLOURS.get(re.split("[/_]", s.name)[-1]) for s in series]
    free = iter([c for c in range(1, 9) if c not in roles] * len(series))
    return [role or next(free, 8) for role in roles]


def short(name: str) -> str:
    """A curve's name without its group and prefix, for a legend: `student` for prior/student and buffer/share_student."""
    return name.rsplit("/", 1)[-1].removeprefix("share_").removeprefix("fraction_")


def _legend(series: Sequence[Series], colours: Sequence[int]) -> str:
    if len(series) < 2:
        return ""
    keys = (f'<i style="background:var(--c{c})"></i>{escape(short(s.name))} ' for s, c in zip(series, colours, strict=True))
    return f'<span class="legend">{"".join(f"<span>{key}</span>" for key in keys)}</span>'
