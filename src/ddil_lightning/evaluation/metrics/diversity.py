"""LPIPS diversity: mean perceptual distance of all pairs of images of one prompt from different noise, then the mean over prompts.

The paper's protocol is 50 COCO prompts x 10 seeds (45 pairs each). LPIPS (Zhang et al. 2018) expects [-1, 1]; its value at [0, 1]
is another number, so the range is checked.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.intervals import means
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.evaluation.networks import Distance
from ddil_lightning.records import wide


def check_range(images: Tensor, who: str = "LPIPS") -> Tensor:
    """`images`, if they can be in [-1, 1]. Raises ValueError for integers and for values outside.

    Images in [0, 1] are inside too and cannot be told from bright ones: a set without a single negative value gets a warning.
    """
    if not images.is_floating_point():
        raise ValueError(f"{who}: {images.dtype} images; pass floats in [-1, 1]")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"{who}: images in [{low:.3g}, {high:.3g}]; rescale or clamp them to [-1, 1]")
    if low >= 0:
        warnings.warn(f"{who}: no value below 0 in {len(images)} images; it expects [-1, 1], not [0, 1]", stacklevel=2)
    return images


@torch.no_grad()
def seed_diversity(images: Tensor, distance: Distance, chunk: int = 32) -> Tensor:
    """Mean pairwise distance [P] over the S images of each of P prompts, images [P, S, 3, H, W] in [-1, 1].

    Raises ValueError with S < 2, another shape or another range.
    """
    if images.ndim != 5 or images.shape[1] < 2:
        raise ValueError(f"diversity: images {tuple(images.shape)}; pass [prompts, seeds >= 2, 3, H, W]")
    check_range(images.flatten(0, 1), "diversity")
    embed = getattr(distance, "embed", None)
    out = []
    for group in images:
        i, j = torch.triu_indices(len(group), len(group), offset=1)
        if embed is not None:
            e = torch.cat([embed(x) for x in group.split(chunk)])
            pairs = torch.cat([(e[a] - e[b]).square().sum(1) for a, b in zip(i.split(chunk), j.split(chunk), strict=True)])
        else:
            pairs = torch.cat([distance(group[a], group[b]).flatten() for a, b in zip(i.split(chunk), j.split(chunk), strict=True)])
        out.append(wide(pairs).mean().cpu())
    return torch.stack(out)


class Diversity(Metric):
    """The mean over the probes of the mean over pairs of their images. Raises ValueError as `seed_diversity` does."""

    columns = (
        Column(
            "lpips_diversity", "LPIPS diversity", "", "mean perceptual distance between images of one prompt; compare with the teacher's"
        ),
    )
    needs = ("distance",)
    over = "probes"
    least = 2
    states = ("per_prompt",)
    per_prompt: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the mean distance between the images of each prompt; a batch holds whole prompts."""
        self.per_prompt.append(seed_diversity(batch.images.unflatten(0, (-1, batch.seeds)), batch.distance))

    def compute(self) -> dict[str, Any]:
        """The mean over all prompts of the mean distance between the images of one."""
        return means(lpips_diversity=self.all("per_prompt"))
