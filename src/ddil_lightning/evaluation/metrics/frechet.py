"""Fréchet distance of two Gaussians fitted to features (Heusel et al. 2017, FID). The formula is `diffusion.gaussians`.

FID is biased high for few images: compare numbers only at equal N, features and resizing, which stand in a row's protocol.
"""

from __future__ import annotations

from torch import Tensor

from ddil_lightning.diffusion.gaussians import frechet_distance
from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Metric


class Frechet(Metric):
    """The distance between generated and real features. Raises ValueError with fewer than two images on either side."""

    columns = (
        Column(
            "frechet",
            "Fréchet distance",
            "lower",
            "distance between generated and held-out real images in the evaluator's features",
            short="Fréchet",
            headline=True,
        ),
    )
    needs = ("features", "real")
    states = ("features",)
    features: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the features [B, D] of the images, and hold those of the real ones."""
        self.features.append(batch.features)
        self.held["real"] = batch.real

    def compute(self) -> dict[str, float]:
        """The Fréchet distance between the features of all generated images and of the real ones."""
        return {"frechet": frechet_distance(self.held["real"], self.all("features"))}
