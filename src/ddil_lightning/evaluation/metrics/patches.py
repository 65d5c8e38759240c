"""Patch FID: the Fréchet distance of crops at full resolution, which sees the detail that resizing to 299 pixels removes.

After SDXL-Lightning (Lin et al. 2024) and the evaluator of DMD2: 299 pixels at the centre of 1024, nothing resized. Of images too small for
that the crops are a fraction, which the protocol states (`views.Crops`).
"""

from __future__ import annotations

from torch import Tensor

from ddil_lightning.diffusion.gaussians import gaussian_distance, moments
from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Metric


class PatchFrechet(Metric):
    """The distance of crops to those of the real images, and to those of the teacher's; None where a suite has not the one or the other."""

    columns = (
        Column("patch_frechet", "Patch Fréchet", "lower", "Fréchet distance of crops at full resolution to the real images'", shown=False),
        Column(
            "patch_frechet_teacher",
            "Patch Fréchet to teacher",
            "lower",
            "Fréchet distance of crops at full resolution to the teacher's",
            shown=False,
        ),
    )
    needs = ("patches",)
    wants = ("real_patch_moments", "teacher_patch_moments")
    least = 2
    states = ("patches",)
    patches: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the features [B * P, D] of the P crops of each image, and hold those that they are compared with."""
        self.patches.append(batch.patches)
        self.held["real"] = batch.real_patch_moments if batch.has("real_patch_moments") else None
        self.held["teacher"] = batch.teacher_patch_moments if batch.has("teacher_patch_moments") else None

    def compute(self) -> dict[str, float | None]:
        """The Fréchet distances between the features of all crops and of either reference's."""
        mine = moments(self.all("patches"))
        found = {name: of and float(gaussian_distance(of[0], of[1], *mine)) for name, of in self.held.items()}
        return {"patch_frechet": found["real"], "patch_frechet_teacher": found["teacher"]}
