"""What two processes send each other of their gradients, and that it changes nothing: gloo, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from pair import WORLD, Pair
from suite import BY_NAME, build, captions, equal, fit, state

UPDATES = 2


class Look(Callback):
    """Gradients of a step that lie in the buckets of DDP, and those that do not, in bytes."""

    def __init__(self) -> None:
        self.inside, self.beside = 0, 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for grad in grads:
            size = grad.numel() * grad.element_size()
            shared = grad.untyped_storage().nbytes() > size or len(grads) == 1
            self.inside, self.beside = self.inside + shared * size, self.beside + (not shared) * size


def trained(rank: int, name: str, tiny: Path, **told: Any) -> tuple[dict[str, Any], int, int]:
    """What a run of both leaves, and how much of its gradients lay where."""
    strategy, look = DDPStrategy(process_group_backend="gloo", **told), Look()
    given = {"strategy": strategy, "devices": WORLD, "num_nodes": 1}
    run = fit(build(BY_NAME[name], tiny, updates=UPDATES), captions(tiny), look, **given)
    return state(run), look.inside, look.beside


def with_and_without_views(rank: int, tiny: Path) -> tuple[Any, Any]:
    return trained(rank, "dmd2", tiny), trained(rank, "dmd2", tiny, gradient_as_bucket_view=False)


def test_gradients_lie_in_the_buckets_alone(pair: Pair, tiny: Path) -> None:
    """And not beside them, unless a config says so; weights and states are the same to the bit."""
    for (ours, inside, beside), (plain, none, all_of_them) in pair.run(with_and_without_views, tiny):
        assert beside == 0 and none == 0 and inside == all_of_them > 0
        assert equal(ours, plain)
