"""Saturation and contrast, and how far they have drifted from the real images': what strong guidance and long bootstraps do to colours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.intervals import means
from ddil_lightning.evaluation.metrics.base import Metric


class Tones(Metric):
    """The means over all images of `views.tones`, and these less the real images', None where there are none."""

    columns = (
        Column("saturation", "Saturation", "", "mean saturation of the pixels (HSV)", shown=False),
        Column("contrast", "Contrast", "", "standard deviation of an image's luminance, mean over images", shown=False),
        Column("saturation_drift", "Saturation drift", "", "mean saturation less that of the real images; 0 is best", shown=False),
        Column("contrast_drift", "Contrast drift", "", "mean contrast less that of the real images; 0 is best", shown=False),
    )
    needs = ("tones",)
    wants = ("real_tones",)
    states = ("tones",)
    tones: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append saturation and contrast [B, 2] of the images, and hold those of the real ones."""
        self.tones.append(batch.tones)
        self.held["real"] = batch.real_tones if batch.has("real_tones") else None

    def each(self) -> dict[str, Tensor]:
        """Saturation and contrast [N] of each image."""
        return dict(zip(("saturation", "contrast"), self.all("tones").unbind(1), strict=True))

    def compute(self) -> dict[str, Any]:
        """The four means. A drift's interval takes the real images as they are."""
        mine, real = self.all("tones"), self.held["real"]
        values = self.each()
        if real is not None:
            values |= dict(zip(("saturation_drift", "contrast_drift"), (mine - real.mean(0)).unbind(1), strict=True))
        return dict.fromkeys(("saturation_drift", "contrast_drift")) | means(self.groups, **values)
