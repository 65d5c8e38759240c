"""How gradients are averaged over the processes under DDP: where they lie, when they are sent, and which of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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


class Reduction:
    """What a backward pass of one optimiser sends: under DDP, the gradients of that optimiser alone, once an update.

    DDP sends all that is trained in every backward pass, and zeros for what has no part in it: in a method of two networks the gradients of
    the one that is idle cost as much as those of the other.
    """

    def __init__(self) -> None:
        self._moved: set[int] = set()  # the weights of the optimiser that descends, by identity; none: DDP sends everything

    def begin(self, strategy: Any, takes_turns: bool) -> None:
        """Take over from DDP in a method that `takes_turns`, unless the strategy has been given a hook of its own."""
        if takes_turns and isinstance(strategy, DDPStrategy) and strategy._ddp_comm_hook is None:
            model: Any = strategy.model
            model.register_comm_hook(None, lambda _, bucket: self._averaged(bucket))

    @contextmanager
    def of(self, optimizer: Any, strategy: Any, last: bool) -> Iterator[None]:
        """Inside is a backward pass for `optimizer`; `last`: it completes the gradients of an update, which are sent."""
        if not isinstance(strategy, DDPStrategy):  # fsdp2 would hold gradients whole meanwhile
            yield
            return
        self._moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # A static graph counts on its first pass being sent.
        silent = not last and not strategy.model.static_graph  # type: ignore[union-attr]
        try:
            with strategy.block_backward_sync() if silent else nullcontext():
                yield
        finally:
            self._moved = set()

    def _averaged(self, bucket: Any) -> Any:
        """The future of a bucket's gradients: their mean over the processes or, of one that is idle in all of them alike, they themselves.

        Buckets follow the order of the weights. The few that hold some of two networks are averaged in the turns of both, which changes
        nothing: what an idle one has gathered of an update is averaged with the rest of it anyway.
        """
        from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        idle = self._moved and self._moved.isdisjoint(map(id, bucket.parameters()))
        return noop_hook(None, bucket) if idle else allreduce_hook(None, bucket)  # type: ignore[arg-type]
