"""Random numbers as a function of where a run stands, for the draw and for the methods alike."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a batch, on its device, or one for every sample, on the CPU."""


class Streams(NamedTuple):
    """Random numbers as a function of (seed, stage, step, purpose): nothing to save, nothing to restore."""

    seed: int
    step: int
    stage: int = 0
    rank: int = 0

    def shared(self, purpose: str) -> random.Random:
        """The same on every rank: plans."""
        return random.Random(self._hash(purpose))

    def local(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Different on every rank: noise, guidance, picks."""
        return torch.Generator(device).manual_seed(self.number(purpose))

    def number(self, purpose: str) -> int:
        """The seed of `local`, for a generator that is already there."""
        return self._hash(purpose, self.rank)

    def _hash(self, *words: Any) -> int:
        text = ":".join(map(str, (self.seed, self.stage, self.step, *words)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def apart(seed: int) -> int:
    """A seed for numbers that are drawn from seed, seed + 1 and so on, one a sample: those of neighbouring seeds would be nearly the same
    ones. 0 stays 0. Every seed is below 2^32, for torch's generator on the CPU reads no more of it."""
    return seed * 0x9E3779B1 % 2**32


def normal(like: Tensor, generator: Generators | None) -> Tensor:
    """Standard normal numbers of the shape, type and device of `like` [B, ...].

    From a generator for every sample they depend on neither the batch nor the device, and are those of diffusers' `randn_tensor`.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return torch.stack([torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in generator]).to(like.device)
