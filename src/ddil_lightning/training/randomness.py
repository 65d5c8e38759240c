"""The random numbers of a step: those of a loss, and torch's own, which dropout takes and nobody can hand it: borrowed and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.streams import Streams


def numbers_of(method: Any) -> Streams:
    """What is random in the loss of a method's present micro-batch: it follows from seed and clocks, so that a resumed run repeats it.

    The clock is the one that moves with every update: where an `Adversary` takes turns its own, for the student's stands still meanwhile.
    """
    adversary = getattr(method, "adversary", None) if method.takes_turns else None  # a critic of one's own may have another clock
    clock, loss = (method.student_updates, "loss") if adversary is None else (adversary.updates, "critic_loss")
    step = clock * method.descent.accumulate + method.descent.micro.get(loss, 0)
    return Streams(method.feed.seed, step, method.stage, method.global_rank)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Afterwards the random numbers of the CPU and of `device` go on as before. Of all devices torch would warn where there are many."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


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
            own = {"cuda": lambda: torch.cuda.get_rng_state(device), "mps": torch.mps.get_rng_state}.get(device.type, lambda: None)
            self._found = torch.get_rng_state(), own()
            torch.default_generator.manual_seed(seed)  # torch.manual_seed costs as much as a small step, and seeds every device there is
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            elif device.type == "mps":
                torch.mps.manual_seed(seed)

    def give_back(self) -> None:
        """Torch's numbers go on as `take` found them."""
        if self._found is not None:
            cpu, own = self._found
            torch.set_rng_state(cpu)
            if own is not None:
                torch.get_device_module(self._device).set_rng_state(own, *([self._device] if self._device.type == "cuda" else []))
            self._found = None
