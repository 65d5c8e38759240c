"""CLIP of open_clip: cosines of images and prompts, and embeddings of images alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.evaluation.networks.kinds import Features, Named, Scorer, Unpackaged, paired, said
from ddil_lightning.evaluation.networks.weights import PICKLED, given_file, hub_file, told, url_file
from ddil_lightning.records import wide


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine [B], float64, of paired embeddings [B, D]. Raises ValueError for other shapes."""
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"cosine: embeddings {tuple(a.shape)} and {tuple(b.shape)}; they must be paired [B, D]")
    return torch.nn.functional.cosine_similarity(wide(a), wide(b), dim=1)


class ClipNet(NamedTuple):
    """A pair of encoders. `image`: [B, 3, H, W] in [-1, 1] to [B, D]; `text`: B strings to [B, D]; `prefix` stands before each.

    A prefix moves the score ("A photo depicts" in the DMD2 evaluator), so it is stored with the network and off by default.
    """

    image: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Tensor]
    prefix: str = ""

    @property
    def about(self) -> str | None:
        """What a protocol calls its scores."""
        return said(self.image)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str], chunk: int = 64) -> Tensor:
        """Cosine per pair, [B] float64 on the CPU. Raises ValueError when the numbers of images and prompts differ."""
        texts = [f"{self.prefix} {p}" if self.prefix else p for p in paired(images, prompts, "CLIP score")]
        out = [torch.empty(0, dtype=torch.float64)]
        for i in range(0, len(texts), chunk):
            out.append(cosine(self.image(images[i : i + chunk]).cpu(), self.text(texts[i : i + chunk]).cpu()))
        return torch.cat(out)


def open_clip_net(
    name: str = "ViT-g-14",
    pretrained: str = "laion2b_s12b_b42k",
    prefix: str = "",
    device: str | torch.device = "cpu",
    resize: str | None = None,
) -> ClipNet:
    """An OpenCLIP model by architecture and weights: a tag (downloaded once) or a local checkpoint file.

    Own code because torchmetrics' CLIPScore fails with transformers 5. Images are rounded to 8 bits and go through the model's own PIL
    preprocessing, as in public evaluators; `resize`: its way with what is no square (open_clip's shortest, longest, squash), None for the
    model's. Weights of a tag that says so (OpenAI's, MetaCLIP's, DFN's) get the QuickGELU that they were trained with, as the architecture
    `name`-quickgelu has it; a file says nothing of it, and is read by the architecture as it is named. Raises Absent without open_clip or
    where a tag's weights cannot be had, ValueError for an architecture, a tag or a file that is none.
    """
    try:
        import open_clip
        from torchvision.transforms.functional import to_pil_image
    except ModuleNotFoundError as e:
        raise Unpackaged("CLIP needs open_clip: pip install open_clip_torch") from e
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}: choose one of open_clip.list_models()")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    path = _tagged(tag) if tag else _checkpoint(pretrained, name)
    quick = bool(tag.get("quick_gelu"))
    sees: dict[str, Any] = {f"image_{key}": tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if tag.get(key)}
    try:
        model, preprocess = open_clip.create_model_from_pretrained(
            name, str(path), device=device, force_quick_gelu=quick, **sees | ({"image_resize_mode": resize} if resize else {})
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, UnpicklingError) as e:
        raise ValueError(f"{path} holds no weights of OpenCLIP {name}: {' '.join(str(e).split())[:160]}") from e
    model = model.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def image(images: Tensor) -> Tensor:
        return model.encode_image(torch.stack([preprocess(to_pil_image(x)) for x in to_uint8(images)]).to(device)).float()

    @torch.no_grad()
    def text(prompts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(prompts).to(device)).float()

    suffix = "-quickgelu" if quick and not name.endswith("-quickgelu") else ""  # the same network by either name, and by one in a protocol
    about = f"OpenCLIP {name}{suffix} {pretrained}" if tag else told(f"OpenCLIP {name}", path)
    return ClipNet(Named(about + (f", prefix {prefix!r}" if prefix else ""), image), text, prefix)


def _tagged(tag: dict[str, Any]) -> Path:
    """The file of one of open_clip's tags: of the hub where it is there, as open_clip looks for it, else of an address."""
    repository, _, name = tag.get("hf_hub", "").rpartition("/")
    if repository:
        return hub_file(repository, *([name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]))
    return url_file(tag["url"])


def _checkpoint(pretrained: str, name: str) -> Path:
    """A user's file. Raises ValueError for what is neither a file nor one of open_clip's tags."""
    if Path(pretrained).suffix in (*PICKLED, ".safetensors") or Path(pretrained).exists():
        return given_file(pretrained, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    import open_clip

    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
    raise ValueError(f"open_clip knows no weights {pretrained!r} of {name}: give a file, or one of {tags or 'nothing, it has none'}")


def clip_scores(
    path: str | None, device: str | torch.device, model: str = "ViT-g-14", pretrained: str = "laion2b_s12b_b42k", prefix: str = ""
) -> Scorer:
    """The cosines of `open_clip_net` as a suite names it: `path` is a file in the place of the tag `pretrained`."""
    return open_clip_net(model, path or pretrained, prefix, device).score


def clip_features(
    path: str | None, device: str | torch.device, model: str = "ViT-L-14-336-quickgelu", pretrained: str = "openai"
) -> Features:
    """The embeddings of images of `open_clip_net` as a suite names it."""
    return open_clip_net(model, path or pretrained, device=device).image
