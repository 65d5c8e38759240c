"""FID-T: the Fréchet distance to the teacher's own images of the same prompts, which a suite holds as a second reference (`Suite.taught`).

It says how faithful a student is, not how good: data that the teacher misses do not count against it.
"""

from __future__ import annotations

from ddil_lightning.diffusion.gaussians import frechet_distance
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Compared


class FrechetTeacher(Compared):
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
    least = 2

    def compute(self) -> dict[str, float]:
        """The Fréchet distance between the features of all generated images and of the teacher's."""
        return {"frechet_teacher": frechet_distance(*self.pair)}
