"""What a method saves memory by: the precision of what is frozen, and activations that are computed twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Memory:
    """What memory is saved by. The student's weights are float32 in any case; `trainer.precision` says what it computes in.

    Args:
        teacher_dtype: of the weights of the frozen network and of the text encoders.
        vae_dtype: of the autoencoder that makes the latents of the training.
        gradient_checkpointing: compute activations of the networks in training a second time for the backward pass, rather than keep them.
    """

    teacher_dtype: Dtype = "float32"
    vae_dtype: Dtype = "float32"
    gradient_checkpointing: bool = False

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Those of the frozen network and of the autoencoder."""
        return getattr(torch, self.teacher_dtype), getattr(torch, self.vae_dtype)
