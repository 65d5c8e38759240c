"""CLIP score: mean cosine of image and caption embeddings (Hessel et al. 2021), not times 100 and not cut at zero.

The paper's scores use OpenCLIP ViT-g/14 (`networks.open_clip_net`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.intervals import means
from ddil_lightning.evaluation.metrics.base import Metric


class ClipScore(Metric):
    """The mean cosine of an image and its prompt over all images."""

    columns = (Column("clip", "CLIP score", "higher", "similarity of image and prompt in the evaluator's joint space"),)
    needs = ("cosine",)
    states = ("cosines",)
    cosines: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the cosine [B] of each image and its prompt."""
        self.cosines.append(batch.cosine)

    def each(self) -> dict[str, Tensor]:
        """The cosines [N] themselves."""
        return {"clip": self.all("cosines")}

    def compute(self) -> dict[str, Any]:
        """The mean cosine over all images, in [-1, 1]."""
        return means(self.groups, **self.each())
