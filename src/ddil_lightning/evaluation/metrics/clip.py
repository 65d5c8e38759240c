"""CLIP score: mean cosine of image and caption embeddings (Hessel et al. 2021), not times 100 and not cut at zero.

Own code because torchmetrics' CLIPScore fails with transformers 5. The paper's scores use OpenCLIP ViT-g/14. A prompt prefix moves
the score ("A photo depicts" in the DMD2 evaluator), so it is stored with the network and off by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from ddil_lightning.backbones.sampling import to_uint8


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of paired embeddings [B, D], [B]. Raises ValueError for other shapes."""
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"cosine: embeddings {tuple(a.shape)} and {tuple(b.shape)}; they must be paired [B, D]")
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1)


class ClipNet(NamedTuple):
    """A pair of encoders. `image`: [B, 3, H, W] in [-1, 1] to [B, D]; `text`: B strings to [B, D]; `prefix` stands before each."""

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


class CLIPScore(Metric):
    """Mean of `scorer(images, prompts) -> [B]` over all updates: `ClipNet.score`, or an evaluator's own. Sums over processes."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, scorer: Callable[[Tensor, Sequence[str]], Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.__dict__["scorer"] = scorer  # a network here must not become a submodule
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Images [B, 3, H, W] in [-1, 1] and their B captions."""
        with torch.no_grad():
            scores = self.__dict__["scorer"](images, prompts)
        self.total += scores.double().sum().to(self.total.device)
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Scalar. Raises ValueError before any update."""
        if self.count == 0:
            raise ValueError("CLIPScore: no image was scored")
        return self.total / self.count


def open_clip_net(
    name: str = "ViT-g-14", pretrained: str = "laion2b_s12b_b42k", prefix: str = "", device: str | torch.device = "cpu"
) -> ClipNet:
    """An OpenCLIP model by architecture and weights: a tag (downloaded once) or a local checkpoint file.

    Images are rounded to 8 bits and go through the model's own PIL preprocessing, as in public evaluators. Raises
    ValueError without open_clip, FileNotFoundError for a checkpoint path that does not exist.
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

    return ClipNet(image, text, prefix)
