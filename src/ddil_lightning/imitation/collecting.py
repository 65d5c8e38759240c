"""Algorithm 2 into the replay buffer, at its cadence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ddil_lightning.imitation.buffer import ReplayBuffer
from ddil_lightning.imitation.learner import Learner
from ddil_lightning.imitation.options import Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import REJECTED, check_finite, collect
from ddil_lightning.records import CaptionBatch, home
from ddil_lightning.streams import Streams

Shape = tuple[int, ...]


class Collecting:
    """When the last roll-out was made, and at which clock of the stage that of each shape of latents, since they were last forgotten.

    Whether one is due is the same on all processes: the clock and the shapes of batches are, and what the buffer of one has lost, all hear.
    """

    def __init__(self) -> None:
        self.at: int | None = None
        self.shapes = dict[Shape, int]()
        self._warned = False

    def due(self, shape: Shape, now: int, every: int) -> bool:
        """Whether a batch of latents of a `shape` is preceded by a roll-out: `every` so often, and where that shape has none."""
        return self.at is None or shape not in self.shapes or not 0 <= now - self.at < every

    def stale(self, shape: Shape, clock: int, max_age: int) -> bool:
        """Whether the last roll-out of a `shape` is older than `max_age` at the stage's clock, so that no state of it may be drawn."""
        return shape in self.shapes and clock - self.shapes[shape] > max_age

    def collect(
        self,
        batch: CaptionBatch,
        learner: Learner,
        prior: SamplingPrior,
        streams: Streams,
        shape: Shape,
        rollouts: Rollouts,
        buffer: ReplayBuffer,
        moment: float | None,
        together: Callable[[bool], bool],
    ) -> None:
        """A roll-out by all captions of a `batch` into the `buffer`, at the stage's clock.

        `moment`: the mean square of the data's latents, by which the buffer refuses states; `together`: whether something holds in all
        processes. Raises FloatingPointError for a roll-out that is not finite.
        """
        made = home(collect(batch, learner, prior, streams, shape, rollouts))
        check_finite(made, together, learner.student_updates)
        if self.at is None and streams.rank == 0:
            buffer.say_room(len(made.t))
        held, clock = buffer.shapes(), learner.stage_updates
        buffer.expire(clock, streams.stage)
        schedule = learner.policies.student.schedule
        buffer.add(made, clock, streams.stage, None if moment is None else schedule.mean_square(made.t, moment).float())
        gone = held - buffer.shapes()  # whose next batch is rolled out again, on all processes if on one
        others = {known: at for known, at in sorted(self.shapes.items()) if known != shape and together(known not in gone)}
        self.shapes = {**others, shape: clock}
        if len(buffer) == 0 and not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(f"all {len(made.t)} {REJECTED}")
        self.at = streams.step if rollouts.reuse is not None else clock

    def forget(self) -> None:
        """The next batch is preceded by a roll-out, whatever its shape."""
        self.at, self.shapes = None, {}

    def state_dict(self) -> dict[str, Any]:
        """As numbers and lists."""
        return {"collected_at": self.at, "last_of": [[list(shape), at] for shape, at in sorted(self.shapes.items())]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; from one of before, which does not say how old the shapes are, by a roll-out of each."""
        self.at, self.shapes = state["collected_at"], {tuple(shape): at for shape, at in state.get("last_of", [])}
