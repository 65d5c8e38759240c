"""Blur: how far an image is from the sharp drawing of what the judge reads in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.intervals import means
from ddil_lightning.evaluation.metrics.base import Metric


class Blur(Metric):
    """The mean over images of the residual of the judge's fit."""

    columns = (Column("blur", "Blur", "lower", "mean residual of the judge's fit: an image less its ideal drawing", shown=False),)
    needs = ("verdict",)
    states = ("residuals",)
    residuals: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the residual [B] of each image."""
        self.residuals.append(batch.verdict.residual.cpu().double())

    def each(self) -> dict[str, Tensor]:
        """The residuals [N] themselves."""
        return {"blur": self.all("residuals")}

    def compute(self) -> dict[str, Any]:
        """The mean residual over all images."""
        return means(self.groups, **self.each())
