"""Diversity in features of the images of one prompt from different noise: the pairs that LPIPS diversity has, seen by another network.

The Vendi score (Friedman & Dieng 2023) of S images is the exponential of the entropy of the eigenvalues of K / S, K the cosines of their
embeddings: S for images that have nothing in common, 1 for equal ones, the effective number of different images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.intervals import means
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.records import wide


def spread(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Vendi score [P] and mean of 1 - cosine over all pairs [P] of S embeddings of each of P prompts, [P, S, D].

    Raises ValueError with S < 2 or another shape.
    """
    if embeddings.ndim != 3 or embeddings.shape[1] < 2:
        raise ValueError(f"diversity in features: embeddings {tuple(embeddings.shape)}; pass [prompts, seeds >= 2, D]")
    e, seeds = normalize(wide(embeddings), dim=2), embeddings.shape[1]
    cosines = e @ e.mT
    shares = torch.linalg.eigvalsh(cosines / seeds).clamp(min=0)
    entropy = -torch.special.xlogy(shares, shares).sum(1)
    apart = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return entropy.exp(), 1 - apart / (seeds * (seeds - 1))


class Vendi(Metric):
    """Both numbers, the mean over the probes. Raises ValueError as `spread` does."""

    columns = (
        Column("vendi", "Vendi score", "", "effective number of different images of one prompt; compare with the teacher's", shown=False),
        Column(
            "feature_diversity",
            "Feature diversity",
            "",
            "mean of 1 - cosine between images of one prompt; compare with the teacher's",
            shown=False,
        ),
    )
    needs = ("embeddings",)
    over = "probes"
    least = 2
    states = ("per_prompt",)
    per_prompt: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append both numbers of each prompt, [P, 2]; a batch holds whole prompts."""
        self.per_prompt.append(torch.stack(spread(batch.embeddings.unflatten(0, (-1, batch.seeds))), 1))

    def compute(self) -> dict[str, Any]:
        """The means over all prompts."""
        vendi, apart = self.all("per_prompt").unbind(1)
        return means(vendi=vendi, feature_diversity=apart)
