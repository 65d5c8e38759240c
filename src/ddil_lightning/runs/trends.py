"""What the paper's tables show as the teacher gets more, and whether a sweep of ddil-probe shows it: by its two ends, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ddil_lightning.evaluation.metrics.frechet import PER_FEATURE
from ddil_lightning.evaluation.paired import Values, difference
from ddil_lightning.evaluation.table import cell, values_of

Row = Mapping[str, Any]
Trend = dict[str, Any]
"""Of one number: its `key`, the `difference` of the ends (`evaluation.paired.difference`, or None), the `verdict`, and all in a `text`."""

UNKNOWN = {"frechet": f"of which no spread is known: it takes {PER_FEATURE} images a feature"}
SHOWS, NOT, UNTOLD = "it shows", "it does not show", "it cannot be told"
CLAIMS = {
    "clip": "the CLIP score rises in the paper",
    "frechet": "the Fréchet distance rises in the paper",
    "all_right": "the share that is all right, which the paper has not, would rise as its CLIP score does",
}


def trends(rows: Sequence[Row], values: Sequence[Values], groups: Tensor | None = None) -> dict[str, list[Trend]]:
    """What is said of the sweeps among `rows`: `mixing`, and who acts first, `teacher` or `student`. Nothing is asserted of it.

    `values` of every row's images by key (`paired.every`), and their `groups`, the same in all rows (`paired.grouped`): a claim is judged
    by the paired 95 % interval of the mean by which the end with most of the teacher lies above that with least. Of a mixture the ends are
    the paper's, of which both have a part: either alone is another sampler, whose own weaknesses would be compared. Without values nothing
    can be told of a number.
    """
    # Whoever acts first has more where the switch is later, at a smaller t.
    more = {"mixing": lambda row: row["p_teacher"], "teacher": lambda row: -row["at"], "student": lambda row: row["at"]}
    made: dict[str, list[Trend]] = {}
    for sweep, share in more.items():
        own = [pair for pair in zip(rows, values, strict=True) if pair[0].get("first", "mixing") == sweep]
        own = [(row, x) for row, x in own if 0 < row.get("p_teacher", 0.5) < 1]
        own.sort(key=lambda pair: float(share(pair[0])))
        keys = [key for key in CLAIMS if sweep != "student" or key != "frechet"]  # where it is first, the paper's FID goes down and up
        made[sweep] = [trend for trend in (_trend([row for row, _ in own], [x for _, x in own], key, groups) for key in keys) if trend]
    made["student"] += _turns(rows, values, groups)
    return made


def _trend(rows: Sequence[Row], values: Sequence[Values], key: str, groups: Tensor | None) -> Trend | None:
    numbers = [values_of(row).get(key) for row in rows]
    if len(numbers) < 2 or None in numbers:
        return None
    first, last = (f"{cell(number, 4)} at {_where(row)}" for number, row in ((numbers[0], rows[0]), (numbers[-1], rows[-1])))
    said = f"with more teacher {CLAIMS[key]}; here it goes from {first} to {last}"
    apart = _apart(values[-1], values[0], key, groups)
    if apart is None:
        return _told(key, f"{said}, {UNKNOWN.get(key, 'of which no spread is known')}", UNTOLD)
    between = "without an interval" if apart["interval"] is None else "[{:+.4f}, {:+.4f}]".format(*apart["interval"])
    verdict = {1: SHOWS, -1: NOT, 0: UNTOLD}[_side(apart)]
    return _told(key, f"{said}, by {apart['mean']:+.4f} {between} over {apart['n']} pairs of images", verdict, apart)


def _where(row: Row) -> str:
    return f"p = {row['p_teacher']:g}" if "p_teacher" in row else f"t = {row['at']}"


def _apart(mine: Values, theirs: Values, key: str, groups: Tensor | None) -> dict[str, Any] | None:
    """The paired difference of two rows, None where the values of one are not known."""
    return difference(mine[key], theirs[key], groups) if key in mine and key in theirs else None


def _side(apart: Mapping[str, Any] | None) -> int:
    """On which side of 0 the interval of a difference lies, 0 where it holds 0 or there is none."""
    low, high = (apart or {}).get("interval") or (0, 0)
    return (low > 0) - (high < 0)


def _turns(rows: Sequence[Row], values: Sequence[Values], groups: Tensor | None) -> list[Trend]:
    """Who had better be first, in the paper and here; none without the Fréchet distances of both at every node."""
    at = {(row["first"], row["at"]): (values_of(row).get("frechet"), x) for row, x in zip(rows, values, strict=True) if "first" in row}
    pairs = [(mine, at.get(("teacher", t), (None, {}))) for (who, t), mine in at.items() if who == "student"]
    if not pairs or any(a is None or b is None for (a, _), (b, _) in pairs):
        return []
    lower = sum(a < b for (a, _), (b, _) in pairs)  # type: ignore[operator]
    said = "with the student first the Fréchet distance is lower in the paper, at every node, than with the teacher first; here"
    apart = [_apart(mine, theirs, "frechet", groups) for (_, mine), (_, theirs) in pairs]
    if None in apart:
        return [_told("frechet", f"{said} at {lower} of {len(pairs)} nodes, {UNKNOWN['frechet']}", UNTOLD)]
    sides = [_side(one) for one in apart]
    verdict = NOT if 1 in sides else SHOWS if set(sides) == {-1} else UNTOLD
    return [_told("frechet", f"{said} at {lower} of {len(pairs)} nodes, by its interval at {sides.count(-1)}", verdict)]


def _told(key: str, said: str, verdict: str, apart: Mapping[str, Any] | None = None) -> Trend:
    return {"key": key, "difference": apart, "verdict": verdict, "text": f"{said}: {verdict}"}
