"""The feed that rolls out: which batches are preceded by a roll-out, what is kept of roll-outs and of the answers to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddil_lightning.feed import MOVES, Answer, Ask, Feed, unmoved
from ddil_lightning.imitation.buffer import ReplayBuffer
from ddil_lightning.imitation.collecting import Collecting, Shape
from ddil_lightning.imitation.learner import Learner
from ddil_lightning.imitation.options import Buffer, Rollouts
from ddil_lightning.imitation.rollout import counts, drawn
from ddil_lightning.records import CaptionBatch, LatentBatch, Origin, take
from ddil_lightning.streams import Streams


class Replay(Feed):
    """Algorithm 1 between captions that are encoded and a method: without data, loader and Trainer, which the DataModule has.

    Whoever derives from it calls `remember` once, and says its `learner` and the `streams` of the next batch.
    """

    done: int = 0
    """Batches that were trained on."""
    buffer: ReplayBuffer | None = None
    """None where nothing is kept."""
    _drawn: tuple[LatentBatch, Origin] | None = None

    def remember(self, rollouts: Rollouts, buffer: Buffer, batch_size: int) -> None:
        """Take what a config says of roll-outs, and of what is kept of them."""
        self.rollouts, self.collect_every, self.batch_size = rollouts, rollouts.every, batch_size
        self.trajectories = min(rollouts.trajectories or batch_size, batch_size)
        settings = dict(vars(buffer))
        self._saves_buffer = settings.pop("saved")
        self.buffer = ReplayBuffer(**settings) if buffer.capacity else None
        self.collecting = Collecting()

    @property
    def learner(self) -> Learner:
        """The method in training."""
        raise TypeError(f"{type(self).__name__} does not say which method it feeds")

    @property
    def clock(self) -> int:
        """Student updates of the present stage, the clock of cadence and age."""
        return self.learner.stage_updates

    @property
    def streams(self) -> Streams:
        """The random streams of the next batch."""
        raise TypeError(f"{type(self).__name__} does not say by which streams it draws")

    @property
    def split(self) -> bool:
        """Whether all processes ask a network together, for it is sharded."""
        return False

    @property
    def _moment(self) -> float | None:
        """The mean square of the data's latents, by which the buffer refuses states; None where nobody knows it."""
        return None

    def needs_images(self, method: Learner) -> bool:
        """Whether a forward share of `method`'s prior needs images, on its present grid."""
        return self.rollouts.wanted(method.wants).images(len(method.grid))

    # A batch ---------------------------------------------------------------------------------------------------------------------

    def rolls(self, shape: Shape) -> bool:
        """Whether the next batch needs a roll-out: at the buffer's cadence, for a shape that it lacks or whose states are all too old; or
        always without one."""
        share, own = self.prior.rollouts, self.rollouts
        if share == 0 or self.buffer is None:
            return bool(share > 0)
        if self.collecting.stale(shape, self.clock, self.buffer.max_age):
            return True
        if own.reuse is None:
            return self.collecting.due(shape, self.clock, self.collect_every)
        # In batches, not in updates of the student.
        return self.collecting.due(shape, self.done, own.batches(share, self.batch_size, self.trajectories, self.learner.grid))

    def expire(self) -> None:
        """Forget what is too old for the next batch, before anything of it is asked for."""
        if self.buffer is not None:
            self.buffer.expire(self.clock, self.streams.stage)

    def needed(self, size: int, shape: Shape) -> int:
        """How many captions of a batch of `size`, the first ones, are noised or rolled out; all where no state takes the others' place."""
        if self.buffer is None or not self.buffer.held(shape):
            return size
        k = counts(self.prior, size, self.rollouts.granularity, self.streams.shared("source"))
        return max(size - k, self.trajectories if self.rolls(shape) else 1)

    def collect(self, batch: CaptionBatch, shape: Shape, together: Callable[[bool], bool]) -> None:
        """A roll-out by the first captions of a batch into the buffer (`Collecting.collect`); none without a buffer."""
        if self.buffer is not None:
            some, learner = take(batch, slice(self.trajectories)), self.learner
            self.collecting.collect(some, learner, self.prior, self.streams, shape, self.rollouts, self.buffer, self._moment, together)

    def draw(self, batch: CaptionBatch, shape: Shape, size: int) -> LatentBatch:
        """The mixed batch of `size` latents (`rollout.drawn`), whose rows the host knows as long as it is the last."""
        self._drawn = drawn(
            batch, self.learner, self.prior, self.streams, shape=shape, buffer=self.buffer, rollouts=self.rollouts, size=size
        )
        return self._drawn[0]

    def origin(self, batch: LatentBatch) -> Origin:
        """Where the rows of a batch come from: of the one that was drawn last the host knows it."""
        if self._drawn is not None and batch.source is self._drawn[0].source and batch.slot is self._drawn[0].slot:
            return self._drawn[1]
        return super().origin(batch)

    # What is kept ----------------------------------------------------------------------------------------------------------------

    def answered(self, batch: LatentBatch, ask: Ask, slot: Sequence[int] | None = None) -> Answer:
        """`ask(batch)`; states of the buffer that were answered before are not asked for again (imitation.answers).

        Raises ValueError for a question of two kinds, and for one to a network that moves: its answers go stale.
        """
        if self.buffer is None:
            return super().answered(batch, ask, slot)
        places = torch.tensor(self.origin(batch).slot if slot is None else slot)
        before = self.learner.asked_of_moving
        found = self.buffer.answers.of(batch, places, ask, not self.split, lambda: self.learner.question, self._drawn)
        if self.buffer.answers.storage != "none" and self.learner.asked_of_moving > before:
            raise ValueError(f"{type(self.learner).__name__} {MOVES}")
        return unmoved(found, ask)

    def observe(self, batch: LatentBatch, loss: Tensor) -> None:
        """Per-sample losses [B] of a batch: the buffer's priorities."""
        if self.buffer is not None and self.buffer.priority > 0:
            origin = self.origin(batch)
            self.buffer.update(torch.tensor(origin.slot), loss, self.learner.grid.times[list(origin.node)])

    def commit(self) -> None:
        """The step that used the last batch is complete. Called by the method's Clock callback, before checkpoints are written."""
        self.done += 1

    def statistics(self) -> dict[str, float]:
        """What the run's curves show of the prior and the buffer."""
        shares = {f"prior/{name}": getattr(self.prior, name) for name in ("forward", "student", "teacher")}
        # Of an empty buffer too, where the prior asks for roll-outs: what it has rejected is then the reason.
        shown = self.buffer is not None and (len(self.buffer) > 0 or self.buffer.rejected > 0 or self.prior.rollouts > 0)
        stats = self.buffer.stats(self.clock) if self.buffer is not None and shown else {}
        return shares | {f"buffer/{name}": value for name, value in stats.items()}

    @property
    def holds_rollouts(self) -> bool:
        """Whether the buffer of this process holds any state."""
        return self.buffer is not None and len(self.buffer) > 0

    def flush(self) -> None:
        """Forget every roll-out (a new stage)."""
        self.collecting.forget()
        if self.buffer is not None:
            self.buffer.flush()
