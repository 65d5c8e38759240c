"""Does the image show what the caption says? For data with a judge, which measures pictures exactly (the miniature's)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.intervals import intervals
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.records import wide


def attribute_accuracy(verdicts: Mapping[str, Tensor], groups: Tensor | None = None) -> dict[str, Any]:
    """{"attribute_accuracy", "all_right", "per_attribute", "intervals"} of verdicts [N] by attribute: the share right, NaN if not asked.

    The accuracy is the mean over images of the mean over what was asked of the image; an image is all right if everything asked
    is 1. Images of which nothing was asked do not count; a value is None where nothing was asked at all. Raises ValueError for a verdict
    outside [0, 1]. `groups` [N]: as for `intervals.interval`.
    """
    asked, right, each = _by_image(verdicts)
    images = asked.any(1)
    accuracy, perfect = each["attribute_accuracy"][images], each["all_right"][images]
    shares = {n: _ratio(r, a) for n, r, a in zip(verdicts, right.sum(0).tolist(), asked.sum(0).tolist(), strict=True)}
    count = float(images.sum())
    found = {"attribute_accuracy": _ratio(float(accuracy.sum()), count), "all_right": _ratio(float(perfect.sum()), count)}
    spread = intervals(None if groups is None else groups[images], attribute_accuracy=accuracy, all_right=perfect)
    return {**found, "per_attribute": shares, "intervals": spread}


def _by_image(verdicts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Which attributes [N, A] were asked and are right, and both numbers of each image, NaN where nothing was asked of it."""
    table = torch.stack([wide(v.cpu()) for v in verdicts.values()], 1)
    asked = ~table.isnan()
    right = table.nan_to_num(0)
    if not ((right >= 0) & (right <= 1)).all():
        raise ValueError("attribute accuracy: a verdict is a share right in [0, 1], or NaN where nothing was asked")
    unasked = ~asked.any(1)
    accuracy = (right.sum(1) / asked.sum(1).clamp(min=1)).masked_fill(unasked, torch.nan)
    perfect = wide(((right == 1) | ~asked).all(1)).masked_fill(unasked, torch.nan)
    return asked, right, {"attribute_accuracy": accuracy, "all_right": perfect}


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


class Alignment(Metric):
    """`attribute_accuracy` of all images. Raises ValueError where the judge names other attributes than before."""

    columns = (
        Column(
            "attribute_accuracy",
            "Attributes right",
            "higher",
            "share of the attributes in the prompts that the judge finds in the images",
        ),
        Column(
            "all_right",
            "All right",
            "higher",
            "share of images in which every attribute of the prompt is right",
            short="all-right",
            span=(0.0, 1.0),
            headline=True,
        ),
    )
    details = {"per_attribute": {}}
    needs = ("verdict",)
    states = ("verdicts",)
    verdicts: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the judge's verdicts on the images, [B, attributes]."""
        correct = batch.verdict.correct
        names = self.held.setdefault("names", list(correct))
        if set(names) != set(correct):
            raise ValueError(f"attribute accuracy: verdicts on {sorted(correct)}, expected {sorted(names)}")
        self.verdicts.append(torch.stack([wide(correct[name].cpu()) for name in names], 1))

    def each(self) -> dict[str, Tensor]:
        """The share that is right and whether all is, of each image."""
        return _by_image(self._verdicts())[2]

    def compute(self) -> dict[str, Any]:
        """The shares that are right over all images, as `attribute_accuracy` answers them."""
        return attribute_accuracy(self._verdicts(), self.groups)

    def _verdicts(self) -> dict[str, Tensor]:
        return dict(zip(self.held["names"], self.all("verdicts").unbind(1), strict=True))
