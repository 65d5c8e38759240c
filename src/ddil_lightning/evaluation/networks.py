"""The networks that metrics look through, by name or given: each is made once, for all metrics, and no metric owns one.

Defaults are the paper's: Inception-v3 for the Fréchet distance, OpenCLIP ViT-g/14 for the CLIP score, LPIPS for diversity. Their packages
are loaded when they are asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8

Features = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] to features [B, D]. Brings its own weights and device."""
Scorer = Callable[[Tensor, Sequence[str]], Tensor]
"""Images [B, 3, H, W] in [-1, 1] and their B prompts to a number each, [B]."""


class Distance(Protocol):
    """A function of paired images that says how far they are apart; `embed`, where it has one, makes pairs cheap (`MapDistance`)."""

    def __call__(self, a: Tensor, b: Tensor, /) -> Tensor:
        """The distance [B] of each image of `a` from its partner in `b`, both [B, 3, H, W] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Networks:
    """What a suite looks through: a callable, the name of a default (`load` makes it), or None, which leaves its metrics None.

    `features`: of images. `clip`: cosines of images and prompts, or instead of it `text`: prompts to [B, D], compared with `features`.
    `distance`: of two images. `embed`: embeddings of images by another network, for CMMD and for diversity in features.
    Raises ValueError for `text` without `features`.
    """

    features: Features | str | None = None
    clip: Scorer | str | None = None
    distance: Distance | str | None = None
    text: Callable[[Sequence[str]], Tensor] | None = None
    embed: Features | str | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.features is None:
            raise ValueError("Networks: `text` is compared with `features`, which is None; give both, or `clip`")

    def load(self, device: str | torch.device = "cpu") -> Networks:
        """The same with a network in the place of every name, on `device`.

        Raises ValueError for a name that is not in DEFAULTS, or where its package is not installed.
        """
        asked = {field.name: getattr(self, field.name) for field in fields(self)}
        for given in (v for v in asked.values() if isinstance(v, str)):
            if given not in DEFAULTS:
                raise ValueError(f"no network {given!r}: choose {', '.join(DEFAULTS)}, pass a callable, or None to skip its metrics")
        return replace(self, **{k: DEFAULTS[v].make(device) for k, v in asked.items() if isinstance(v, str)})

    def about(self) -> dict[str, str | None]:
        """What each of the networks is, in words, as a protocol names it."""
        return {field.name: said(getattr(self, field.name)) for field in fields(self)}


class Default(NamedTuple):
    """A network by name: what a protocol calls it, and what makes it on a device."""

    about: str
    make: Callable[[Any], Any]


def said(net: Any) -> str | None:
    """A network in words: a default's own, else the names of its class or function; None for none."""
    if net is None or isinstance(net, str):
        return DEFAULTS[net].about if net in DEFAULTS else net
    owner = getattr(net, "__self__", None)
    if isinstance(owner, ClipNet):
        return said(owner.image)
    known = getattr(net, "about", None)
    if isinstance(known, str):
        return known
    if owner is not None:
        return f"{type(owner).__module__}.{type(owner).__name__}.{net.__name__}"
    named = net if hasattr(net, "__qualname__") else type(net)
    return f"{named.__module__}.{named.__qualname__}"


class Named:
    """A function with the name that a protocol gives it. `resizing`: how it brings images to its own size, where that has a name."""

    def __init__(self, about: str, call: Callable[..., Tensor], resizing: str | None = None) -> None:
        self.about, self.call, self.resizing = about, call, resizing

    def __call__(self, *args: Any) -> Tensor:
        """Call the function and answer what it does."""
        return self.call(*args)


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


def inception_features(weights: str | None = None, device: str | torch.device = "cpu", resizing: str = "torch-fidelity") -> Features:
    """Inception-v3 pool3 features [B, 2048] with the ported TensorFlow FID weights (torch-fidelity), of images in [-1, 1].

    The images are rounded to 8 bits and resized to 299 by one of RESIZES: the network's own TensorFlow-1 bilinear, or clean-fid's.
    `weights`: a local file instead of the download. Raises ValueError without torch-fidelity, and for another `resizing`.
    """
    if resizing not in RESIZES:
        raise ValueError(f"inception_features: resizing={resizing!r}; choose {' or '.join(RESIZES)}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as e:
        raise ValueError("the Inception features of a Frechet distance need torch-fidelity: pip install 'ddil-lightning[eval]'") from e
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights).eval().to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = to_uint8(images).to(device)
        if resizing == "torch-fidelity":
            return net(x)[0].flatten(1)
        x = (clean(x) - 128) / 128  # the network's own forward takes 8 bits alone
        for name in LAYERS.split():
            x = getattr(net, name)(x)
        return x.flatten(1)

    return Named(INCEPTION if weights is None else f"{INCEPTION}, {weights}", features, RESIZES[resizing])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine [B], float64, of paired embeddings [B, D]. Raises ValueError for other shapes."""
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"cosine: embeddings {tuple(a.shape)} and {tuple(b.shape)}; they must be paired [B, D]")
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1)


class ClipNet(NamedTuple):
    """A pair of encoders. `image`: [B, 3, H, W] in [-1, 1] to [B, D]; `text`: B strings to [B, D]; `prefix` stands before each.

    A prefix moves the score ("A photo depicts" in the DMD2 evaluator), so it is stored with the network and off by default.
    """

    image: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Tensor]
    prefix: str = ""

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str], chunk: int = 64) -> Tensor:
        """Cosine per pair, [B] float64 on the CPU. Raises ValueError when the numbers of images and prompts differ."""
        if len(images) != len(prompts):
            raise ValueError(f"CLIP score: {len(images)} images and {len(prompts)} prompts; they must be paired")
        texts = [f"{self.prefix} {p}" if self.prefix else p for p in prompts]
        out = [torch.empty(0, dtype=torch.float64)]
        for i in range(0, len(texts), chunk):
            out.append(cosine(self.image(images[i : i + chunk]).cpu(), self.text(texts[i : i + chunk]).cpu()))
        return torch.cat(out)


def open_clip_net(
    name: str = "ViT-g-14", pretrained: str = "laion2b_s12b_b42k", prefix: str = "", device: str | torch.device = "cpu"
) -> ClipNet:
    """An OpenCLIP model by architecture and weights: a tag (downloaded once) or a local checkpoint file.

    Own code because torchmetrics' CLIPScore fails with transformers 5. Images are rounded to 8 bits and go through the model's own PIL
    preprocessing, as in public evaluators. Raises ValueError without open_clip, FileNotFoundError for a checkpoint that does not exist.
    """
    try:
        import open_clip
        from torchvision.transforms.functional import to_pil_image
    except ModuleNotFoundError as e:
        raise ValueError("the CLIP score needs open_clip: pip install open_clip_torch") from e
    if Path(pretrained).suffix in {".pt", ".pth", ".bin", ".safetensors"} and not Path(pretrained).is_file():
        raise FileNotFoundError(f"open_clip_net: no checkpoint {pretrained}; give a file or a tag of open_clip.list_pretrained()")
    model, preprocess = open_clip.create_model_from_pretrained(name, pretrained, device=device)
    model = model.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def image(images: Tensor) -> Tensor:
        return model.encode_image(torch.stack([preprocess(to_pil_image(x)) for x in to_uint8(images)]).to(device)).float()

    @torch.no_grad()
    def text(prompts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(prompts).to(device)).float()

    about = f"OpenCLIP {name} {pretrained}" + (f", prefix {prefix!r}" if prefix else "")
    return ClipNet(Named(about, image), text, prefix)


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

    return Named(f"LPIPS 0.1 {net}" + (" with a random trunk" if random_trunk else ""), distance)


DEFAULTS = {
    "inception": Default(INCEPTION, lambda device: inception_features(device=device)),
    "inception_clean_fid": Default(INCEPTION, lambda device: inception_features(device=device, resizing="clean-fid")),
    "open_clip": Default("OpenCLIP ViT-g-14 laion2b_s12b_b42k", lambda device: open_clip_net(device=device).score),
    "clip_l14_336": Default(
        "OpenCLIP ViT-L-14-336-quickgelu openai", lambda device: open_clip_net("ViT-L-14-336-quickgelu", "openai", device=device).image
    ),
    "lpips": Default("LPIPS 0.1 alex", lambda device: lpips_distance(device=device)),
}
"""The networks that a suite of one's own images can name."""

PAPER = Networks("inception", "open_clip", "lpips")
"""The networks that the paper's tables were measured with."""
