"""Random numbers as a function of where a run stands, for the draw and for the methods alike."""

from __future__ import annotations

import hashlib
import random
from typing import Any, NamedTuple

import torch


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
