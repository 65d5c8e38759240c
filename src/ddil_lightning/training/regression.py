"""How far a student's output is from a given one: in latents, or by what a network sees in the two images, with gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddil_lightning.bounds import within
from ddil_lightning.diffusion.losses import Distance

Images = Callable[[Tensor, Tensor], Tensor]
"""The distance [B] of images [B, 3, H, W] in [-1, 1]."""


@dataclass(frozen=True)
class Regression:
    """The regression of a student's outputs on the teacher's.

    Args:
        weight: of it beside the method's other losses, for every sample that has an answer of the teacher's; 0 for none.
        of: what is compared: `latents`, the `features` that the built-in evaluator sees in the images, or `lpips`, as in the paper.
        distance: of latents.
        trunk: for `lpips` the file of torchvision's VGG-16 weights (vgg16-397923af.pth); its learned weights come with the package lpips.
    """

    weight: float = 0.25
    of: Literal["latents", "features", "lpips"] = "latents"
    distance: Distance = Distance("mse")
    trunk: str | None = None

    def __post_init__(self) -> None:
        within(0, 1000, **{"regression.weight": self.weight})
        if self.weight and self.of == "lpips" and not (self.trunk and Path(self.trunk).is_file()):
            raise ValueError(
                f"regression.of is lpips and regression.trunk is {self.trunk!r}: give the file of torchvision's VGG-16 weights, or compare "
                "`latents` (or `features`, of the built-in pipelines)"
            )

    def between(self, backbone: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The distance [B] of latents [B, C, h, w], the first of which gets the gradients."""
        if self.of == "latents":
            return self.distance
        images = evaluator_distance() if self.of == "features" else lpips_distance(Path(self.trunk or ""))

        def distance(x: Tensor, y: Tensor) -> Tensor:
            if backbone.device.type == "meta":  # a memory plan, which has no decoder: what decoding takes is not in it
                return self.distance(x, y)
            with torch.no_grad():
                target = backbone.decode(y)
            return images(backbone.decode(x, gradients=True), target)

        return distance


def map_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """[B] of feature maps, lists of [B, C, h, w]: squared differences, summed over channels, averaged over places and maps."""
    return torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]).mean(0)


def evaluator_distance() -> Images:
    """By the maps of the evaluator that comes with the package, which are of unit length at every place: in [0, 4]."""
    from ddil_lightning.miniature.evaluator import load_evaluator

    evaluator = load_evaluator()

    def distance(a: Tensor, b: Tensor) -> Tensor:
        evaluator.to(a.device)
        return map_distance(evaluator.image_feature_maps(a), evaluator.image_feature_maps(b))

    return distance


def lpips_distance(trunk: Path) -> Images:
    """LPIPS 0.1 on VGG-16 (Zhang et al. 2018). Raises ValueError without the package, and for a file of other weights."""
    try:
        from lpips import LPIPS
    except ModuleNotFoundError as error:
        raise ValueError("regression.of is lpips and the package is missing: pip install lpips, or compare `latents`") from error
    with warnings.catch_warnings():  # lpips calls torchvision by names of old
        warnings.simplefilter("ignore", UserWarning)
        model = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    stored = torch.load(trunk, map_location="cpu", weights_only=True)
    own = model.net.state_dict()  # slice2.5.weight is features.5.weight
    try:
        model.net.load_state_dict({key: stored[f"features.{key.partition('.')[2]}"] for key in own})
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"regression.trunk {trunk} holds no weights of torchvision's VGG-16") from error

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return model.to(a.device)(a, b).flatten()

    return distance
