"""A tiny CLIP for both built-in data sets: features for Fréchet and coverage measures, CLIP scores, perceptual feature maps.

Like its large relatives it is nearly blind to relations: judge alignment with judge.py, which is exact.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_lightning.miniature import weights_path
from ddil_lightning.miniature.digits import WORDS as DIGIT_WORDS
from ddil_lightning.miniature.shapes import WORDS as SHAPE_WORDS

VOCABULARY = ("<pad>", "<unknown>", "<start>", *dict.fromkeys(SHAPE_WORDS + DIGIT_WORDS), "<end>")
CONTEXT = 16
IMAGE = 32
CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE, "patch_size": 4, "layers": 3, "width": 96, "head_width": 32},
    # the end token has the largest id, so open_clip's default pooling (argmax of the ids) finds it
    "text_cfg": {"context_length": CONTEXT, "vocab_size": len(VOCABULARY), "width": 64, "heads": 2, "layers": 2},
}


def tokenise(captions: Sequence[str]) -> Tensor:
    """The token ids [N, 16] int64 of captions; words outside the vocabulary share one id, words past the 14th are dropped."""
    index = {word: i for i, word in enumerate(VOCABULARY)}
    ids = torch.zeros(len(captions), CONTEXT, dtype=torch.int64)
    for row, caption in zip(ids, captions, strict=True):
        words = caption.lower().replace(".", " ").replace(",", " ").split()[: CONTEXT - 2]
        known = [index["<start>"], *(index.get(word, 1) for word in words), index["<end>"]]
        row[: len(known)] = torch.tensor(known)
    return ids


class Evaluator(nn.Module):
    """open_clip's CLIP, 32x32 pixels in patches of 4, with its own word list; images of other sizes are resized."""

    def __init__(self) -> None:
        super().__init__()
        from open_clip.model import CLIP

        self.clip = CLIP(**CONFIG)
        self.num_features: int = CONFIG["embed_dim"]

    def _pixels(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"the evaluator needs images [N, 3, H, W] in [-1, 1], got {list(images.shape)}")
        images = images.to(self.clip.visual.conv1.weight)
        if images.shape[-2:] == (IMAGE, IMAGE):
            return images
        return F.interpolate(images, size=(IMAGE, IMAGE), mode="bilinear", align_corners=False, antialias=True)

    def image_features(self, images: Tensor) -> Tensor:
        """Embeddings [N, 64] of images [N, 3, H, W] in [-1, 1], not normalised: for Fréchet distances, density, coverage.

        Raises ValueError for another shape.
        """
        features: Tensor = self.clip.encode_image(self._pixels(images))
        return features

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [N, 64] of captions, not normalised."""
        features: Tensor = self.clip.encode_text(tokenise(captions).to(self.clip.visual.conv1.weight.device))
        return features

    def clip_score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of image and caption [N], in [-1, 1] (not times 100). Raises ValueError where their numbers differ."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images but {len(captions)} captions")
        return F.cosine_similarity(self.image_features(images), self.text_features(captions))

    def image_feature_maps(self, images: Tensor) -> list[Tensor]:
        """Patch maps after the embedding and after each layer: four of [N, 96, 8, 8], of unit length at every place.

        The mean squared difference of two images' maps is a perceptual distance in the manner of LPIPS.
        """
        tower, maps = self.clip.visual, []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            side = IMAGE // CONFIG["vision_cfg"]["patch_size"]
            maps.append(F.normalize(output[:, 1:].transpose(1, 2).unflatten(2, (side, side)), dim=1))

        hooks = [part.register_forward_hook(keep) for part in (tower.ln_pre, *tower.transformer.resblocks)]
        try:
            self.image_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """The same as `image_features`, so that torchmetrics' FID and KID accept the evaluator."""
        return self.image_features(images)

    def save(self, folder: str | Path) -> Path:
        """Write weights (half precision) and configuration to `folder`, which is answered."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.clip.state_dict().items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"clip": CONFIG, "vocabulary": VOCABULARY}, indent=2) + "\n")
        return path


def load_evaluator(path: str | Path = "builtin") -> Evaluator:
    """The evaluator that ships with the package, or one that `Evaluator.save` wrote; frozen, in evaluation mode, float32.

    Raises FileNotFoundError where there is none, and ValueError for one that was saved with another configuration or vocabulary.
    """
    from safetensors.torch import load_file

    folder = weights_path("evaluator") if str(path) == "builtin" else Path(path)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no evaluator in {folder}: model.safetensors is missing")
    saved = json.loads((folder / "config.json").read_text())
    if saved["vocabulary"] != list(VOCABULARY) or saved["clip"] != CONFIG:
        raise ValueError(f"the evaluator in {folder} was saved by another version: its configuration or vocabulary differs")
    evaluator = Evaluator()
    evaluator.clip.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return evaluator.requires_grad_(False).eval()
