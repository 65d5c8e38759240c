"""Stages and priors of a run, as bands behind and under its curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ddil_lightning.evaluation.columns import number
from ddil_lightning.runs.charts import BOTTOM, HEIGHT, MAX_POINTS, ROLE_COLOURS, STRIP, TOP, Axis, Series

ACTORS = ("forward", "student", "teacher")


class Span(NamedTuple):
    """A stage of a run, from one student update to another."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Bands:
    """The stages, and the shares of the prior over student updates: (update, (forward, student, teacher)), in force up to that update."""

    stages: Sequence[Span] = ()
    priors: Sequence[tuple[float, tuple[float, ...]]] = ()

    def __call__(self, x_axis: Axis) -> tuple[str, str]:
        """SVG behind a chart's lines and SVG for the strip below them, each empty where there is nothing to draw."""
        return self._behind(x_axis), self._below(x_axis)

    def _behind(self, x_axis: Axis) -> str:
        """Every second stage shaded, each with its name at the top where there is room."""
        parts = []
        for i, span in enumerate(self.stages):
            begin, end = (min(max(x_axis(v), x_axis.start), x_axis.stop) for v in (span.begin, span.end))
            if end - begin < 1:
                continue
            said = f"<title>stage {i + 1}, {escape(span.name)}: updates {number(span.begin)} to {number(span.end)}</title>"
            shade = "stage" if i % 2 else "stage even"
            parts.append(f'<rect class="{shade}" x="{begin:.1f}" y="{TOP}" width="{end - begin:.1f}" height="{HEIGHT - BOTTOM - TOP}">')
            parts.append(f"{said}</rect>")
            if end - begin > 6.2 * len(span.name):
                parts.append(f'<text class="label" x="{begin + 4:.1f}" y="{TOP - 3}">{escape(span.name)}</text>')
        return "".join(parts)

    def _below(self, x_axis: Axis) -> str:
        """The shares of the prior, stacked to the height of the strip."""
        top, height = HEIGHT - BOTTOM + 2, STRIP - 4
        edges = [(x_axis.lo, self.priors[0][1]), *self.priors] if self.priors else []
        steps = [((a, min(b, x_axis.hi)), shares) for (a, _), (b, shares) in pairwise(edges) if a < x_axis.hi and b > a]
        if not steps:
            return ""
        steps[-1] = ((steps[-1][0][0], x_axis.hi), steps[-1][1])
        parts, before = [], [0.0] * len(steps)
        for k, actor in enumerate(ACTORS):
            after = [low + shares[k] for low, (_, shares) in zip(before, steps, strict=True)]
            if max(shares[k] for _, shares in steps) > 0:
                upper = [f"{x_axis(x):.1f} {top + height * y:.1f}" for y, (ends, _) in zip(before, steps, strict=True) for x in ends]
                lower = [f"{x_axis(x):.1f} {top + height * y:.1f}" for y, (ends, _) in zip(after, steps, strict=True) for x in ends]
                said = f"<title>prior, {actor}: {_ranged([shares[k] for _, shares in steps])}</title>"
                path = f"M{'L'.join([*upper, *reversed(lower)])}Z"
                parts.append(f'<path class="share" style="fill:var(--c{ROLE_COLOURS[actor]})" d="{path}">{said}</path>')
            before = after
        return "".join(parts)

    def legend(self) -> str:
        """What the bands mean, in words with the colours beside them."""
        said = []
        actors = [actor for k, actor in enumerate(ACTORS) if any(shares[k] > 0 for _, shares in self.priors)]
        if actors:
            keys = "".join(f'<span><i style="background:var(--c{ROLE_COLOURS[actor]})"></i>{actor}</span>' for actor in actors)
            said.append(f'The strip under a chart is the prior, the shares of the sources of latents:<span class="legend in">{keys}</span>')
        if len(self.stages) > 1:
            said.append("Shaded behind the curves: the stages.")
        return f'<p class="note">{" ".join(said)}</p>' if said else ""


def bands(config: Mapping[str, Any], curves: Mapping[str, Series]) -> Bands:
    """The bands of a run by its config.yaml, as a table, and the curves of its metrics.csv."""
    ends = [s.x[-1] for s in curves.values() if len(s.x)]
    return Bands(_stages(config, max(ends, default=0.0)), _priors(curves))


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.yaml as a table; {} for one that is not there or cannot be read: the page shows its text in any case."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def table(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The table below some keys of a config, {} where there is none."""
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _stages(config: Mapping[str, Any], last: float) -> list[Span]:
    """The stages of the plan that a run has come to; the last one of the plan goes on to the run's end."""
    plan = table(config, "model", "init_args").get("stages")
    spans: list[Span] = []
    begin = 0.0
    for stage in plan if isinstance(plan, list) else []:
        parts = stage.get("parts") if isinstance(stage, Mapping) else None
        length = sum(_count(part) for part in parts) if isinstance(parts, list) and parts else _count(stage)
        if length <= 0 or begin >= last:
            break
        steps = stage.get("steps")
        spans.append(Span(str(stage.get("kind") or "halve") if steps is None else f"to {steps} steps", begin, min(begin + length, last)))
        begin += length
    return [*spans[:-1], spans[-1]._replace(end=last)] if spans and len(spans) == len(plan or ()) else spans


def _count(value: Any) -> float:
    found = value.get("updates") if isinstance(value, Mapping) else None
    return float(found) if isinstance(found, int) else 0.0


def _priors(curves: Mapping[str, Series]) -> list[tuple[float, tuple[float, ...]]]:
    """The shares at every logged update: points between two equal ones left out, and where many are left, thinned evenly."""
    found = [dict(zip(curves[key].x, curves[key].y, strict=True)) for key in (f"prior/{actor}" for actor in ACTORS) if key in curves]
    if len(found) < len(ACTORS):
        return []
    points = [(x, tuple(f.get(x, math.nan) for f in found)) for x in sorted(found[0])]
    points = [(x, shares) for x, shares in points if all(math.isfinite(v) and 0 <= v <= 1 for v in shares)]
    kept = [a for a, b in pairwise(points) if a[1] != b[1]] + points[-1:]
    return kept if len(kept) <= MAX_POINTS else [kept[round(i * (len(kept) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _ranged(values: Sequence[float]) -> str:
    lo, hi = min(values), max(values)
    return f"{lo:g}" if lo == hi else f"{values[0]:g} at first, {values[-1]:g} at last, {lo:g} to {hi:g}"
