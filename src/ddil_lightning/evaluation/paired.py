"""Two samplers from the same prompts and noise: how much better one is, image by image, which tells more than two means do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ddil_lightning.evaluation.intervals import interval
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.records import wide

Row = Mapping[str, Any]
Values = Mapping[str, Tensor]
"""A row's values of each image by the key of the number that they are of, NaN for an image of which nothing was asked."""


def each(metrics: Sequence[Metric]) -> dict[str, Tensor]:
    """The values [N] of each image that metrics over all prompts have, by their keys. For the `look` of `Suite.score`."""
    found: dict[str, Tensor] = {}
    for metric in (m for m in metrics if m.over == "prompts"):
        found |= metric.each()
    return found


def every(metrics: Sequence[Metric]) -> dict[str, Tensor]:
    """What `each` has, and values of numbers that are no means over images but move with them (`Metric.linear`): of a distance, too."""
    found = each(metrics)
    for metric in (m for m in metrics if m.over == "prompts"):
        found |= metric.linear()
    return found


def grouped(metrics: Sequence[Metric]) -> Tensor | None:
    """The `groups` [N] of the images that `each` and `every` have the values of; None where each image is a group of its own."""
    return next((metric.groups for metric in metrics if metric.over == "prompts"), None)


def difference(mine: Tensor, theirs: Tensor, groups: Tensor | None = None) -> dict[str, Any] | None:
    """The mean of `mine` less `theirs`, [N] each of the same images, and its 95 % interval by resampling the pairs; None without a pair.

    `groups` [N]: as for `interval`, for images of one prompt are no pairs that are independent. The mean is that over images whatever
    their groups, so that it is the gap of the two rows. Raises ValueError for another number of images.
    """
    if mine.shape != theirs.shape:
        raise ValueError(f"paired difference: {tuple(mine.shape)} and {tuple(theirs.shape)}; the images must be paired")
    apart = wide(mine) - wide(theirs)
    both = apart.isfinite()
    groups = None if groups is None else groups.to(both.device)[both]
    apart = apart[both]
    return {"mean": float(apart.mean()), "interval": interval(apart, groups), "n": len(apart)} if len(apart) else None


def paired_distance(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of images [N, 3, H, W] that two samplers made from the same noise. Raises ValueError for unequal shapes."""
    if a.shape != b.shape or not len(a):
        raise ValueError(f"paired_distance: {tuple(a.shape)} and {tuple(b.shape)}; the images must be paired")
    return float((a.cpu().double() - b.cpu().double()).square().mean())


def partner(row: Row, firsts: Sequence[Row]) -> Row | None:
    """The row of the first entry that another is set against: in as many steps, else in its most; None where no stamp is the same."""
    alike = [first for first in firsts if first["protocol"].get("stamp") == row["protocol"].get("stamp")]
    same = [first for first in alike if first["steps"] == row["steps"]]
    return same[0] if same else max(alike, key=lambda first: first["steps"], default=None)


def against(
    rows: Sequence[Row], first: str, values: Mapping[str, Values], groups: Mapping[str, Tensor | None] | None = None
) -> list[dict[str, Any]]:
    """The paired differences of every row from its `partner` among those of the entry `first`, by the rows' names.

    `values`, and the `groups` of the images, of each row by its name. An entry's rows are those whose name begins with it and an @; those
    of the first are left out.
    """
    firsts = [row for row in rows if _entry(row) == first]
    found = []
    for row in rows:
        other = None if _entry(row) == first else partner(row, firsts)
        mine, theirs = values.get(row["name"], {}), values.get(other["name"], {}) if other else {}
        own = (groups or {}).get(row["name"])
        paired = {key: difference(mine[key], theirs[key], own) for key in mine if key in theirs}
        paired = {key: value for key, value in paired.items() if value is not None}
        if other is not None and paired:
            found.append({"name": row["name"], "against": other["name"], "differences": paired})
    return found


def _entry(row: Row) -> str:
    return str(row["name"]).rpartition("@")[0]
