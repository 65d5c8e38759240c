"""What tells one pipeline's encoders from another's, so that a cache of latents and text states is used for those that made it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def digest(pipe: Any, network: str) -> str:
    """A digest of a pipeline's weights besides those of its component `network`, of its latents' scale and its vocabulary."""
    made = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module) and name != network:
            for key, value in sorted(part.state_dict().items()):
                data = value.detach().cpu().flatten().contiguous().view(torch.uint8)
                made.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode() + memoryview(data.numpy()))
        elif hasattr(part, "get_vocab"):
            made.update(json.dumps([name, part.model_max_length, sorted(part.get_vocab().items())]).encode())
    config = pipe.vae.config
    made.update(f"{config.scaling_factor} {config.get('shift_factor')}".encode())
    return made.hexdigest()
