"""Inception-v3 with the weights that every FID is of: torch-fidelity's port of TensorFlow's, under either of two resizes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.evaluation.networks.kinds import Features, Named, Unpackaged
from ddil_lightning.evaluation.networks.weights import given_file, read, told, url_file

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
INCEPTION = "Inception-v3 pool3 (TensorFlow FID weights, torch-fidelity)"
RESIZES = {
    "torch-fidelity": "torch-fidelity: TensorFlow 1's bilinear to 299, not antialiased",
    "clean-fid": "clean-fid: antialiased bicubic in float to 299",
}
"""How saved images are brought to the size that Inception reads, by the package whose numbers it gives, as a protocol says it."""
LAYERS = (
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b Mixed_5c Mixed_5d "
    "Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c AvgPool"
)
"""The parts of torch-fidelity's Inception up to pool3, in their order."""


def clean(images: Tensor, side: int = 299) -> Tensor:
    """Images [B, 3, H, W], uint8, as float in [0, 255] of `side` pixels, by clean-fid's resizing (Parmar et al. 2022).

    That is Pillow's antialiased bicubic channel by channel in float, not rounded afterwards; torch's kernel is the same one.
    """
    return torch.nn.functional.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 255)


def inception_features(path: str | None = None, device: str | torch.device = "cpu", resizing: str = "torch-fidelity") -> Features:
    """Inception-v3 pool3 features [B, 2048] with the ported TensorFlow FID weights (torch-fidelity), of images in [-1, 1].

    The images are rounded to 8 bits and resized to 299 by one of RESIZES: the network's own TensorFlow-1 bilinear, or clean-fid's.
    `path`: a local file instead of the download. Raises Absent without torch-fidelity or weights, ValueError for another `resizing`.
    """
    if resizing not in RESIZES:
        raise ValueError(f"inception_features: resizing={resizing!r}; choose {' or '.join(RESIZES)}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as e:
        raise Unpackaged("the Inception features of a Frechet distance need torch-fidelity: pip install 'ddil-lightning[eval]'") from e
    given = None if path is None else given_file(path, Path(URL).name)
    file = given or url_file(URL)
    with BytesIO() as weights:  # it reads pickles alone, or downloads without a limit
        torch.save(read(file), weights)
        weights.seek(0)
        try:
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights).eval().to(device)
        except RuntimeError as e:
            raise ValueError(f"{file} holds no weights of Inception-v3 as torch-fidelity has it: {' '.join(str(e).split())[:160]}") from e

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = to_uint8(images).to(device)
        if resizing == "torch-fidelity":
            return net(x)[0].flatten(1)
        x = (clean(x) - 128) / 128  # the network's own forward takes 8 bits alone
        for name in LAYERS.split():
            x = getattr(net, name)(x)
        return x.flatten(1)

    return Named(told(INCEPTION, given), features, RESIZES[resizing])


def clean_fid_features(path: str | None = None, device: str | torch.device = "cpu") -> Features:
    """`inception_features` after clean-fid's resizing."""
    return inception_features(path, device, "clean-fid")
