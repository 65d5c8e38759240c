"""Patch FID: the Fréchet distance of crops at full resolution, which sees the detail that resizing to 299 pixels removes.

After SDXL-Lightning (Lin et al. 2024) and the evaluator of DMD2: 299 pixels at the centre of 1024, nothing resized. Of images too small for
that the crops are a fraction, which the protocol states (`views.Crops`).
"""

from __future__ import annotations

from torch import Tensor

from ddil_lightning.diffusion.gaussians import frechet_distance
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
    wants = ("real_patches", "teacher_patches")
    states = ("patches",)
    patches: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the features [B * P, D] of the P crops of each image, and hold those that they are compared with."""
        self.patches.append(batch.patches)
        self.held["real"] = batch.real_patches if batch.has("real_patches") else None
        self.held["teacher"] = batch.teacher_patches if batch.has("teacher_patches") else None

    def compute(self) -> dict[str, float | None]:
        """The Fréchet distances between the features of all crops and of either reference's."""
        mine = self.all("patches")
        found = {name: None if rows is None else frechet_distance(rows, mine) for name, rows in self.held.items()}
        return {"patch_frechet": found["real"], "patch_frechet_teacher": found["teacher"]}
