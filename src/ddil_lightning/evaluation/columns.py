"""The columns of results: what each number is called, which way is better and how it is shown. No metric's code is loaded here."""

from __future__ import annotations

import math
from typing import NamedTuple

ARROWS = {"higher": "↑", "lower": "↓", "": ""}


class Column(NamedTuple):
    """One number of a row, wherever it is shown: in tables, in the report and its charts, in benchmarks.

    `key`: its name in `metrics`. `better`: higher, lower, or empty where neither is better by itself. `meaning`: a line for a legend.
    `short`: its name within a sentence. `decimals`: None for as many as its size asks for. `span`: the ends of its axis in a chart,
    None for those of the values. `shown`: False for a number of the files and of the report's table of all. `headline`: it gets a chart
    over the steps in the report, and a sentence on how much of the teacher's gap a student closes; the first also gets the tiles.
    """

    key: str
    label: str
    better: str
    meaning: str
    short: str = ""
    decimals: int | None = None
    span: tuple[float, float] | None = None
    shown: bool = True
    headline: bool = False

    @property
    def heading(self) -> str:
        """The label with an arrow up or down for the better direction, as tables show it."""
        return f"{self.label} {ARROWS[self.better]}".strip()


POINTS = (
    Column("energy_distance", "Energy distance", "lower", "to the true law, unbiased, so 0 or less for a perfect sampler"),
    Column("energy_class", "Energy per class", "lower", "the energy distance within a class, mean over classes", shown=False),
    Column("energy_teacher", "to the teacher", "lower", "energy distance between the samples and the 32-step teacher's under guidance"),
    Column(
        "mode_kl", "Mode KL", "lower", "KL divergence of the modes' true weights from their shares of the samples; large where one is lost"
    ),
    Column("high_quality", "High quality", "higher", "share of samples within four standard deviations of a mode of their class"),
    Column("teacher_rmse", "RMSE to teacher", "lower", "root of the mean squared distance to the teacher's, from one noise", shown=False),
    Column("shift", "Shift", "lower", "energy distance between the student's own latents at its nodes and the teacher's, mean over nodes"),
    Column("outside", "Outside", "lower", "share of samples that lie far beyond the outermost modes", shown=False),
)
"""What the analytic toy measures by itself, of points in the plane and not of images: no suite computes it."""


def number(value: float) -> str:
    """A number for an axis or a tooltip: four significant digits, thousands separated, no trailing zeros."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
