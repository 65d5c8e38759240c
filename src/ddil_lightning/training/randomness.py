"""Torch's own random numbers, which dropout takes and nobody can hand it: borrowed for a step, and given back as they were."""

from __future__ import annotations

import torch
from torch import Tensor


class Borrowed:
    """`take` seeds them for a step, `give_back` restores what it found; without a seed neither does anything."""

    def __init__(self) -> None:
        self._found: tuple[Tensor, Tensor | None] | None = None
        self._device = torch.device("cpu")

    def take(self, seed: int | None, device: torch.device) -> None:
        """Numbers that follow from `seed` from now on, on the CPU and on `device`."""
        self.give_back()  # of a step that was broken off
        if seed is not None:
            self._device = device
            self._found = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            torch.manual_seed(seed)

    def give_back(self) -> None:
        """Torch's numbers go on as `take` found them."""
        if self._found is not None:
            cpu, cuda = self._found
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self._device)
            self._found = None
