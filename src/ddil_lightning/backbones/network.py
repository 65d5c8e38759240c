"""What a network is to the rest of the library, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddil_lightning.records import Context


class Network(nn.Module, ABC):
    """A network `(x_t, t, c) -> output`; nobody else asks what it is made of.

    `forward` must be written and is all that every method needs. The rest is for those who need it: `features` and `with_features` for
    discriminators, `head` for theirs, `blocks` for sharding, `recompute` for gradient checkpointing.
    """

    w_conditioned: bool = False
    """Whether it is told the guidance: it then reads `c.w`, and refuses a context without it by ValueError."""

    s_conditioned: bool = False
    """Whether it is told the time that is jumped to, `c.s`, without which it refuses a context as well."""

    norm_patch: int | None = None
    """The side of the patches of latents in which guidance keeps the norm of its conditional answer; None where it keeps none."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, C, H, W] in the space that the backbone `predicts`, of latents x_t [B, C, H, W].

        t [B] is what the backbone's schedule tells a network of its times (`NoiseSchedule.time`): whole times, or sigma T of a flow.
        """

    layers: Sequence[str] = ()
    """The names of its layers whose features can be asked for, in the order of its forward."""

    def named(self, layers: Sequence[str], usual: str) -> tuple[str, ...]:
        """`layers`, or the `usual` one of none. Raises ValueError for a name that is none of its layers, or is there twice."""
        wrong = next((name for i, name in enumerate(layers) if name not in self.layers or name in layers[:i]), None)
        if wrong is not None:
            raise ValueError(f"gan.layers has {wrong!r}: {type(self).__name__} has {', '.join(self.layers)}, and each is read once")
        return tuple(layers) or (usual,)

    def features(self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """The features [B, F, ...] of each of `layers`, by default of the usual one; written anew where the output can be left out."""
        return self.with_features(x_t, t, c, layers)[1]

    def with_features(self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output [B, C, H, W] and `features`, from one forward. Raises ValueError for a layer that it does not have."""
        raise NotImplementedError(f"{type(self).__name__} gives no features, which a discriminator reads: set gan.features to initial")

    def head(self, layers: Sequence[str] = ()) -> nn.Module:
        """A new discriminator's head: called with the features of `layers`, an argument each, it answers with logits [B, ...]."""
        raise NotImplementedError(f"{type(self).__name__} has no discriminator's head: set the discriminator's weights to 0")

    def widths(self, layers: Sequence[str] = ()) -> tuple[int, ...]:
        """The number F of channels of the features of each of `layers`, for a method that makes heads of its own."""
        raise NotImplementedError(f"{type(self).__name__} says no widths of its features, for which LADD makes heads: write widths(layers)")

    def blocks(self) -> Sequence[nn.Module]:
        """Parts that are gathered one at a time where weights are sharded: memory then holds one of them, not the whole network."""
        return ()

    def last_layer(self) -> nn.Parameter:
        """The trained weights of its last layer, by whose gradients losses are weighed: the last ones of two sides and more of its `tail`,
        or of the whole of it."""
        parts = (self.tail(), [self])
        found = ([p for part in several for p in part.parameters() if p.requires_grad and p.ndim > 1] for several in parts)
        return next(trained for trained in found if trained)[-1]

    def tail(self) -> Sequence[nn.Module]:
        """The parts that a latent passes last, in their order, where that is not the order of their names."""
        return ()

    def recompute(self, on: bool = True) -> None:
        """Compute activations again in the backward pass instead of keeping them, where that saves memory (gradient checkpointing)."""

    def compile_blocks(self) -> None:
        """Compile its `blocks`, or the whole of it where it names none, in place: weights keep their names. Copies are not compiled."""
        for part in self.blocks() or [self]:
            part.compile()


class Heads(nn.ModuleList):
    """Heads of several layers: their logits [B, ...] side by side."""

    def forward(self, *features: Tensor) -> Tensor:
        """Logits [B, N] of the layers' features, an argument each."""
        return torch.cat([head(x).flatten(1) for head, x in zip(self, features, strict=True)], 1)
