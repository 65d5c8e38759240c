"""What the paper's tables show as the teacher gets more, and whether a sweep of ddil-probe shows it: by its two ends, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ddil_lightning.evaluation.paired import Values, difference
from ddil_lightning.evaluation.table import cell, values_of

Row = Mapping[str, Any]
Trend = dict[str, Any]
"""Of one number: its `key`, the `difference` of the ends (`evaluation.paired.difference`, or None), the `verdict`, and all in a `text`."""

SHOWS, NOT, UNTOLD = "it shows", "it does not show", "it cannot be told"
CLAIMS = {
    "clip": "the CLIP score rises in the paper",
    "frechet": "the Fréchet distance rises in the paper",
    "all_right": "the share that is all right, which the paper has not, would rise as its CLIP score does",
}


def trends(rows: Sequence[Row], values: Sequence[Values]) -> dict[str, list[Trend]]:
    """What is said of the sweeps among `rows`: `mixing`, and who acts first, `teacher` or `student`. Nothing is asserted of it.

    `values` of every row's images by key: a claim is judged by the paired 95 % interval of the mean by which the end with most of the
    teacher lies above that with least. A number without values of an image is judged by its ends and steps, and said to have no interval.
    """
    # Whoever acts first has more where the switch is later, at a smaller t.
    more = {"mixing": lambda row: row["p_teacher"], "teacher": lambda row: -row["at"], "student": lambda row: row["at"]}
    made: dict[str, list[Trend]] = {}
    for sweep, share in more.items():
        own = [pair for pair in zip(rows, values, strict=True) if pair[0].get("first", "mixing") == sweep]
        own.sort(key=lambda pair: float(share(pair[0])))
        keys = [key for key in CLAIMS if sweep != "student" or key != "frechet"]  # where it is first, the paper's FID goes down and up
        made[sweep] = [trend for trend in (_trend([row for row, _ in own], [x for _, x in own], key) for key in keys) if trend is not None]
    made["student"] += _turns(rows)
    return made


def _trend(rows: Sequence[Row], values: Sequence[Values], key: str) -> Trend | None:
    numbers = [values_of(row).get(key) for row in rows]
    if len(numbers) < 2 or None in numbers:
        return None
    said = f"with more teacher {CLAIMS[key]}; here it goes from {cell(numbers[0], 4)} to {cell(numbers[-1], 4)}"
    apart = difference(values[-1][key], values[0][key]) if key in values[0] and key in values[-1] else None
    if apart is None:
        ups = sum(b > a for a, b in pairwise(numbers))  # type: ignore[operator]
        shows = numbers[-1] > numbers[0] and 2 * ups > len(numbers) - 1  # type: ignore[operator]
        return _told(key, f"{said}, {ups} of {len(numbers) - 1} steps up", SHOWS if shows else NOT)
    ends = apart["interval"]
    verdict = UNTOLD if ends is None or ends[0] <= 0 <= ends[1] else SHOWS if ends[0] > 0 else NOT
    between = "without an interval" if ends is None else f"[{ends[0]:+.4f}, {ends[1]:+.4f}]"
    return _told(key, f"{said}, by {apart['mean']:+.4f} {between} over {apart['n']} pairs of images", verdict, apart)


def _turns(rows: Sequence[Row]) -> list[Trend]:
    """Who had better be first, in the paper and here; none without the Fréchet distances of both at every node."""
    at = {(row["first"], row["at"]): values_of(row).get("frechet") for row in rows if "first" in row}
    pairs = [(value, at.get(("teacher", t))) for (who, t), value in at.items() if who == "student"]
    if not pairs or any(a is None or b is None for a, b in pairs):
        return []
    lower = sum(a < b for a, b in pairs)  # type: ignore[operator]
    said = "with the student first the Fréchet distance is lower in the paper, at every node, than with the teacher first; here"
    return [_told("frechet", f"{said} at {lower} of {len(pairs)} nodes", SHOWS if lower == len(pairs) else NOT)]


def _told(key: str, said: str, verdict: str, apart: Mapping[str, Any] | None = None) -> Trend:
    text = f"{said}: {verdict}{'' if apart else ', without an interval'}"
    return {"key": key, "difference": apart, "verdict": verdict, "text": text}
