"""FID-T: the Fréchet distance to the teacher's own images of the same prompts, which a suite holds as a second reference (`Suite.taught`).

It says how faithful a student is, not how good: data that the teacher misses do not count against it.
"""

from __future__ import annotations

from torch import Tensor

from ddil_lightning.diffusion.gaussians import frechet_distance
from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Metric


class FrechetTeacher(Metric):
    """The distance between generated features and the teacher's. Raises ValueError with fewer than two images on either side."""

    columns = (
        Column(
            "frechet_teacher",
            "Fréchet to teacher",
            "lower",
            "Fréchet distance between generated images and the teacher's of the same prompts from other noise (FID-T)",
            shown=False,
        ),
    )
    needs = ("features", "teacher")
    states = ("features",)
    features: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the features [B, D] of the images, and hold those of the teacher's."""
        self.features.append(batch.features)
        self.held["teacher"] = batch.teacher

    def compute(self) -> dict[str, float]:
        """The Fréchet distance between the features of all generated images and of the teacher's."""
        return {"frechet_teacher": frechet_distance(self.held["teacher"], self.all("features"))}
