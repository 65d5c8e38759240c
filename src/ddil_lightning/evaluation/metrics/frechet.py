"""Fréchet distance of two Gaussians fitted to features (Heusel et al. 2017, FID). The formula is `diffusion.gaussians`.

FID is biased high for few images: compare numbers only at equal N, features and resizing, which stand in a row's protocol.
"""

from __future__ import annotations

from torch import Tensor

from ddil_lightning.diffusion.gaussians import gaussian_distance, influences, moments
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Compared

PER_FEATURE = 4
"""Images a feature without which `linear` says nothing: with few the bias, which no resampling shows, can turn the sign of a difference."""


class Frechet(Compared):
    """The distance between generated and real features, of which mean and covariance will do.

    Raises ValueError with fewer than two images on either side, and for statistics of another number of features.
    """

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
    needs = ("features", "real_moments")
    least = 2

    def compute(self) -> dict[str, float]:
        """The Fréchet distance between the features of all generated images and of the real ones."""
        (mean, covariance), mine = self.pair
        return {"frechet": float(gaussian_distance(mean, covariance, *moments(mine)))}

    def linear(self) -> dict[str, Tensor]:
        """By how much every image moves the distance; nothing for fewer images than PER_FEATURE times the features."""
        (mean, covariance), mine = self.pair
        return {"frechet": influences(mean, covariance, mine)} if len(mine) >= PER_FEATURE * mine.shape[1] else {}
