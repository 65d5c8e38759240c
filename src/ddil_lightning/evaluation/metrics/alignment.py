"""Does the image show what the caption says, and do the images of one caption show everything that it leaves open?

For data with a judge, which measures pictures exactly (the miniature's): attribute accuracy, the share of images with everything
right, and the mode coverage of prompts that leave attributes open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from ddil_lightning.evaluation.metrics.base import as_saved


def attribute_accuracy(verdicts: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"attribute_accuracy", "all_right", "per_attribute"} of verdicts [N] per attribute: share right in [0, 1], NaN not asked.

    The accuracy is the mean over images of the mean over what was asked of the image; an image is all right if everything asked
    is 1. Images of which nothing was asked do not count; a value is None where nothing was asked at all.
    """
    return _summary(list(verdicts), *_counts(list(verdicts), verdicts))


class AttributeAccuracy(Metric):
    """`update(verdicts)` as `attribute_accuracy`, over named attributes; sums add up over processes."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    per: Tensor
    whole: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        self.add_state("per", torch.zeros(2, len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("whole", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, verdicts: Mapping[str, Tensor]) -> None:
        """Verdicts [B] of every declared attribute. Raises ValueError when one is missing or outside [0, 1]."""
        per, whole = _counts(self.names, verdicts)
        self.per += per.to(self.per.device)
        self.whole += whole.to(self.whole.device)

    def compute(self) -> dict[str, Any]:
        """As `attribute_accuracy`."""
        return _summary(self.names, self.per, self.whole)


class ModeCoverage(Metric):
    """`coverage(images, captions) -> float` of the images of `prompts` that leave something open, from all processes together.

    `update(images, index)`: images [B, 3, H, W] in [-1, 1] and the number [B] of the prompt of each. Images are kept as 8-bit
    values in float32; meant for the small ones of the miniature, whose judge reads them at the end.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    images: list[Tensor]
    index: list[Tensor]

    def __init__(self, prompts: Sequence[str], coverage: Callable[[Tensor, Sequence[str]], float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prompts = list(prompts)
        self.__dict__["coverage"] = coverage
        self.add_state("images", [], dist_reduce_fx="cat")
        self.add_state("index", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, index: Tensor) -> None:
        """Add images. Raises ValueError where `index` is not one number of a prompt per image."""
        if index.shape != (len(images),) or not ((index >= 0) & (index < len(self.prompts))).all():
            raise ValueError(f"ModeCoverage: index {tuple(index.shape)} of {len(images)} images; one number below {len(self.prompts)} each")
        self.images.append(as_saved(images).to(self.device))
        self.index.append(index.to(self.device))

    def compute(self) -> Tensor:
        """Scalar. Raises ValueError before any update."""
        if not len(self.images):
            raise ValueError("ModeCoverage: no image was added")
        captions = [self.prompts[i] for i in dim_zero_cat(self.index).tolist()]
        return torch.tensor(self.__dict__["coverage"](dim_zero_cat(self.images).cpu(), captions), dtype=torch.float64)


def _counts(names: list[str], verdicts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """[2, A] sums right and asked per attribute; [3] sum of the images' accuracies, images all right, images asked about."""
    if set(names) != set(verdicts):
        raise ValueError(f"attribute accuracy: verdicts on {sorted(verdicts)}, expected {sorted(names)}")
    table = torch.stack([verdicts[n].double().cpu() for n in names], 1)
    asked = ~table.isnan()
    right = table.nan_to_num(0)
    if not ((right >= 0) & (right <= 1)).all():
        raise ValueError("attribute accuracy: a verdict is a share right in [0, 1], or NaN where nothing was asked")
    images = asked.any(1)
    accuracy = (right.sum(1) / asked.sum(1).clamp(min=1))[images].sum()
    perfect = ((right == 1) | ~asked).all(1)[images].sum()
    return torch.stack([right.sum(0), asked.sum(0)]), torch.stack([accuracy, perfect, images.sum()]).double()


def _summary(names: list[str], per: Tensor, whole: Tensor) -> dict[str, Any]:
    def ratio(a: float, b: float) -> float | None:
        return a / b if b else None

    right, asked = per.tolist()
    accuracy, perfect, images = whole.tolist()
    shares = {n: ratio(r, a) for n, r, a in zip(names, right, asked, strict=True)}
    return {"attribute_accuracy": ratio(accuracy, images), "all_right": ratio(perfect, images), "per_attribute": shares}
