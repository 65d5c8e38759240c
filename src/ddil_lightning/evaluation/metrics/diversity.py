"""LPIPS diversity: mean perceptual distance of all pairs of images of one prompt from different noise, then the mean over prompts.

The paper's protocol is 50 COCO prompts x 10 seeds (45 pairs each). LPIPS (Zhang et al. 2018) expects [-1, 1]; its value at [0, 1]
is another number, so the range is checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric


class Distance(Protocol):
    """Paired images [B, 3, H, W] in [-1, 1] to distances [B]."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The distances [B]."""
        ...


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


class MapDistance:
    """LPIPS without learned weights over any network's feature maps.

    Each map is normalised to unit length over its channels; squared differences are summed over channels and averaged over positions
    and over maps (the `lpips=False` baseline of the LPIPS code divided by its number of layers). In [0, 4].
    `maps`: images [B, 3, H, W] in [-1, 1] to a list of [B, C, h, w].
    """

    def __init__(self, maps: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self.maps = maps

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """[B, F] whose squared Euclidean distance is the distance, so that a pair costs no network call."""
        maps = self.maps(images)
        flat = [(f / (f.norm(dim=1, keepdim=True) + 1e-10) / (f[0, 0].numel() * len(maps)) ** 0.5).flatten(1) for f in maps]
        return torch.cat(flat, 1)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B]."""
        return (self.embed(a) - self.embed(b)).square().sum(1)


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
        out.append(pairs.double().mean().cpu())
    return torch.stack(out)


class LPIPSDiversity(Metric):
    """`update(images)`, [P, S, 3, H, W]: all seeds of P prompts in one call. Sums over prompts add up over processes."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    prompts: Tensor

    def __init__(self, distance: Distance, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.__dict__["distance"] = distance  # a network here must not become a submodule
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Add P prompts. Raises ValueError as `seed_diversity` does."""
        self.total += seed_diversity(images, self.__dict__["distance"]).sum().to(self.total.device)
        self.prompts += len(images)

    def compute(self) -> Tensor:
        """Scalar. Raises ValueError before any update."""
        if self.prompts == 0:
            raise ValueError("LPIPSDiversity: no prompt was scored")
        return self.total / self.prompts


def lpips_distance(net: str = "alex", device: str | torch.device = "cpu", random_trunk: bool = False) -> Distance:
    """LPIPS v0.1 with backbone `net` (alex, vgg, squeeze; the trunk's ImageNet weights are downloaded once).

    `random_trunk` needs no download and means nothing perceptual: for tests. Raises ValueError without lpips.
    """
    try:
        from lpips import LPIPS
    except ModuleNotFoundError as e:
        raise ValueError("LPIPS needs the package lpips: pip install lpips") from e
    with warnings.catch_warnings():  # lpips calls torchvision by names of old
        warnings.filterwarnings("ignore", message=".*pretrained.*|.*weight enum.*", category=UserWarning)
        model = LPIPS(net=net, pnet_rand=random_trunk, verbose=False).eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return model(a.to(device), b.to(device)).flatten()

    return distance
