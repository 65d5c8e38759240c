"""Models of transformers from a folder, and images as their folder says that they see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8

SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json")
"""Files of a folder on which the numbers of its weights depend: what the model is, and what it sees of an image."""
WORDS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
"""Files of a folder on which it depends what a model reads of a text."""


def folder_model(cls: Any, folder: Path, what: str, **options: Any) -> Any:
    """A model of class `cls` with the weights of a folder, all of them, in float32, ready to be asked.

    transformers reads .safetensors, and pickles as tensors alone. It fills what a file lacks with random numbers, which is refused here.
    Raises ValueError, in a line, for a folder that holds another model.
    """
    try:
        model, found = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, dtype=torch.float32, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} holds no {what}, a {cls.__name__} of transformers: {' '.join(str(error).split())[:200]}") from error
    lacking = sorted([*found["missing_keys"], *(str(key) for key in found.get("mismatched_keys", ()))])
    if lacking:
        raise ValueError(f"{folder} holds no {what}, a {cls.__name__} of transformers: it lacks {lacking[0]} ({len(lacking)} such weights)")
    return model.eval().requires_grad_(False)


def pictures(folder: Path) -> Callable[[Tensor], Tensor]:
    """What turns images [B, 3, H, W] in [-1, 1], rounded to 8 bits, into the pixels that a folder's preprocessor_config.json names."""
    from torchvision.transforms.functional import to_pil_image
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")  # as published numbers were made
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no preprocessor_config.json that transformers reads: copy it beside the weights") from error

    def see(images: Tensor) -> Tensor:
        pixels: Tensor = processor([to_pil_image(x) for x in to_uint8(images).cpu()], return_tensors="pt")["pixel_values"]
        return pixels

    return see
