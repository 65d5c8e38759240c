"""How gradients are averaged over the processes under DDP: where they lie, when they are sent, and which of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy


def prepare(strategy: Any, takes_turns: bool) -> None:
    """Tell DDP, before it takes a method, what its user has not told it otherwise.

    Gradients lie in DDP's buckets, or it would hold each of them twice. Where a method `takes_turns`, DDP looks for what a step leaves
    without a gradient: not every batch of a method with two optimisers updates both.
    """
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)
        if takes_turns:
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


@contextmanager
def alone(strategy: Any) -> Iterator[None]:
    """Inside, a backward pass adds to the gradients of this process, and none are sent: another one of the same update follows."""
    if not isinstance(strategy, DDPStrategy):  # fsdp2 would hold them whole meanwhile
        yield
        return
    with strategy.block_backward_sync():
        yield
