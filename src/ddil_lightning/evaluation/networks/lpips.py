"""Distances of two images by what a network sees in them: LPIPS, and its form without learned weights over any network's maps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddil_lightning.evaluation.networks.kinds import Distance, Named, Unpackaged, said
from ddil_lightning.evaluation.networks.weights import fit, given_file, read, told, url_file


class MapDistance:
    """LPIPS without learned weights over any network's feature maps.

    Each map is normalised to unit length over its channels; squared differences are summed over channels and averaged over positions
    and over maps (the `lpips=False` baseline of the LPIPS code divided by its number of layers). In [0, 4].
    `maps`: images [B, 3, H, W] in [-1, 1] to a list of [B, C, h, w].
    """

    def __init__(self, maps: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self.maps = maps

    @property
    def about(self) -> str:
        """What a protocol calls this distance."""
        return f"unweighted LPIPS of {said(self.maps)}"

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Vectors [B, F] of images, whose squared Euclidean distance is the distance, so that a pair costs no network call."""
        maps = self.maps(images)
        flat = [(f / (f.norm(dim=1, keepdim=True) + 1e-10) / (f[0, 0].numel() * len(maps)) ** 0.5).flatten(1) for f in maps]
        return torch.cat(flat, 1)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance [B] of each image of `a` from its partner in `b`."""
        return (self.embed(a) - self.embed(b)).square().sum(1)


TRUNKS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
"""The backbones of LPIPS, by torchvision's name of their weights."""


def lpips_distance(net: str = "alex", device: str | torch.device = "cpu", random_trunk: bool = False, trunk: str | None = None) -> Distance:
    """LPIPS v0.1 with backbone `net`, of TRUNKS: the package brings its learned weights, the trunk's are torchvision's of ImageNet.

    `trunk`: a local file of these in the place of a download. `random_trunk` needs none and means nothing perceptual: for tests.
    Raises Absent without lpips or weights, ValueError for another backbone.
    """
    if net not in TRUNKS:
        raise ValueError(f"lpips_distance: net={net!r}; choose {', '.join(TRUNKS)}")
    try:
        import torchvision
        from lpips import LPIPS
    except ModuleNotFoundError as e:
        raise Unpackaged("LPIPS needs the package lpips: pip install lpips") from e
    url = getattr(torchvision.models, TRUNKS[net]).IMAGENET1K_V1.url
    given = None if trunk is None else given_file(trunk, Path(url).name)
    path = None if random_trunk else given or url_file(url)
    with warnings.catch_warnings():  # lpips calls torchvision by names of old
        warnings.filterwarnings("ignore", message=".*pretrained.*|.*weight enum.*", category=UserWarning)
        model = LPIPS(net=net, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    if path is not None:
        layers = {key.partition(".")[2]: key for key in model.net.state_dict()}  # slice2.3.weight is features.3.weight
        stored = {key.removeprefix("features."): value for key, value in read(path).items() if key.startswith("features.")}
        fit(model.net, {layers.get(key, key): value for key, value in stored.items()}, path, f"LPIPS's trunk {net}")
    model = model.to(device)

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return model(a.to(device), b.to(device)).flatten()

    return Named(told(f"LPIPS 0.1 {net}" + (" with a random trunk" if random_trunk else ""), given), distance)


def lpips_named(path: str | None, device: str | torch.device, net: str = "alex") -> Distance:
    """`lpips_distance` as a suite names it: `net` is the backbone, `path` a file of its trunk."""
    return lpips_distance(net, device, trunk=path)
