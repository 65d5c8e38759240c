"""What a config says of roll-outs and of what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ddil_lightning.bounds import above, at_least, within
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.feed import Wants
from ddil_lightning.imitation.answers import Storage

Granularity = Literal["sample", "step"]


@dataclass(frozen=True)
class Rollouts:
    """When roll-outs are made, and how a batch is mixed with them.

    Args:
        every: student updates between two roll-outs; the callback Cadence changes it while a run goes on.
        reuse: how often a state is to be drawn on average, which sets the batches between two roll-outs by the prior in force, in the
            place of `every`: twice the reuse is half the roll-outs, and with `buffer.answers` fewer questions to the teacher.
        trajectories: of one roll-out, whose interior states all go to the buffer; by default, and at most, `batch_size`.
        granularity: `sample` splits every batch by the shares of the prior, `step` gives each batch one source.
        pure_noise: forward latents at the first node carry no signal, as the first states of roll-outs; by default as the method asks.
        control: the same-timestep control: every roll-out is replaced by data noised to its times, without a network call.
    """

    every: int = 10
    reuse: float | None = None
    trajectories: int | None = None
    granularity: Granularity = "sample"
    pure_noise: bool | None = None
    control: bool = False

    def wanted(self, wants: Wants) -> Wants:
        """What a method `wants`, with what is said of it here."""
        return wants if self.pure_noise is None else replace(wants, pure_noise=self.pure_noise)

    def batches(self, share: float, batch: int, trajectories: int, grid: Grid) -> int:
        """Those between two roll-outs by the `reuse` u: u N R / (q B), rounded, where the share q of every batch of B is drawn from the N R
        states of R trajectories on N nodes (METHODS 1.7)."""
        assert self.reuse is not None
        nodes = sum(map(len, grid.rollouts)) / len(grid.rollouts)
        return max(1, round(self.reuse * nodes * trajectories / (share * batch)))

    def __post_init__(self) -> None:
        at_least(1, **{"rollouts.every": self.every, "rollouts.trajectories": self.trajectories})
        above(0, **{"rollouts.reuse": self.reuse})
        if self.reuse is not None and self.every != Rollouts.every:
            raise ValueError(f"rollouts.reuse = {self.reuse:g} and rollouts.every = {self.every} both set the cadence: give one of them")


@dataclass(frozen=True)
class Buffer:
    """The replay buffer of roll-outs, from which batches are drawn with replacement.

    Args:
        capacity: states kept per process; 0 keeps none, and rolls out afresh for every batch.
        max_age: student updates after which a state is forgotten; where no younger one is left, a roll-out is due whatever `rollouts` says.
        priority: the exponent by which states of a larger loss are drawn more often; 0 draws uniformly.
        answers: how the frozen teacher's answers to states are kept, so that it is asked once for each: `float32`, `float16` in half the
            memory, or `none`, which asks again whenever a state is drawn.
        saved: checkpoints hold the states, so that a run goes on to the bit; without them (false) they are smaller by the buffers of all
            processes, and a run that goes on rolls out anew.
    """

    capacity: int = 2048
    max_age: int = 500
    priority: float = 0.0
    answers: Storage = "float32"
    saved: bool = True

    def __post_init__(self) -> None:
        at_least(0, **{"buffer.capacity": self.capacity})
        at_least(1, **{"buffer.max_age": self.max_age})
        within(0, 10, **{"buffer.priority": self.priority})
