"""Algorithm 2 at its cadence: when a roll-out is due, and what the buffer then holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.feed import Wants
from ddil_lightning.imitation.buffer import ReplayBuffer
from ddil_lightning.imitation.collecting import Collecting
from ddil_lightning.imitation.options import Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.records import CaptionBatch, Context
from ddil_lightning.streams import Streams

SD = NoiseSchedule.scaled_linear()
SQUARE, WIDE = (4, 3, 3), (4, 3, 5)
STUDENT = SamplingPrior(0.0, 1.0, 0.0)


@dataclass
class Method:
    """What the collection asks of a method, at a clock that a test sets: a student that samples a Gaussian of mean square 1."""

    stage_updates: int = 0
    policies: Policies = field(default_factory=lambda: Policies(Policy(Denoiser(Gaussian(0.0, 1.0, SD), SD, "x0"), ddim)))
    grid: Grid = field(default_factory=lambda: Grid.named("linspace", 4))
    guidance: tuple[float, float] = (1.0, 1.0)
    wants: Wants = Wants()

    @property
    def student_updates(self) -> int:
        return self.stage_updates


def captions(n: int) -> CaptionBatch:
    return CaptionBatch(None, Context(torch.zeros(n, 1, 1)), torch.arange(n))


def collected(collecting: Collecting, buffer: ReplayBuffer, clock: int, shape: tuple[int, ...] = SQUARE, **others: Any) -> None:
    given: dict[str, Any] = {"rollouts": Rollouts(), "moment": 1.0, "together": lambda mine: mine} | others
    step = given.pop("step", clock)
    collecting.collect(captions(2), Method(clock), STUDENT, Streams(0, step), shape, buffer=buffer, **given)


def test_a_roll_out_is_due_at_its_cadence_and_for_a_shape_without_one() -> None:
    collecting, buffer = Collecting(), ReplayBuffer(100)
    assert collecting.due(SQUARE, 0, 5)
    collected(collecting, buffer, 0)
    assert len(buffer) == 2 * 4
    assert [collecting.due(SQUARE, now, 5) for now in (0, 4, 5, 9)] == [False, False, True, True]
    assert collecting.due(WIDE, 1, 5)  # two sizes of pictures: each is asked for
    collected(collecting, buffer, 1, WIDE)
    assert not collecting.due(SQUARE, 1, 5) and not collecting.due(WIDE, 1, 5)
    assert collecting.due(SQUARE, -1, 5)  # the clock of a new stage stands before
    collecting.forget()
    assert collecting.due(SQUARE, 1, 5)


def test_by_reuse_the_clock_counts_batches() -> None:
    collecting = Collecting()
    collected(collecting, ReplayBuffer(100), 3, step=12, rollouts=Rollouts(reuse=2.0))
    assert collecting.at == 12


def test_a_shape_whose_states_went_is_due_again_on_all_processes() -> None:
    """Room for one roll-out of each of two shapes less one state: the younger takes the place of the older."""
    collecting, buffer = Collecting(), ReplayBuffer(15)
    collected(collecting, buffer, 0)
    collected(collecting, buffer, 0, WIDE)
    assert collecting.due(SQUARE, 0, 5) and not collecting.due(WIDE, 0, 5)
    collecting, buffer = Collecting(), ReplayBuffer(100)
    collected(collecting, buffer, 0)
    asked = iter([True, False])  # its roll-out is finite on all, and another process has lost the first shape
    collected(collecting, buffer, 0, WIDE, together=lambda mine: mine and next(asked))
    assert collecting.due(SQUARE, 0, 5)


def test_the_buffer_refuses_states_by_the_moment_of_the_data() -> None:
    for moment, kept in ((1.0, 8), (None, 8), (1e12, 0)):
        buffer = ReplayBuffer(100)
        collected(Collecting(), buffer, 0, moment=moment)
        assert len(buffer) == kept


def test_what_is_too_old_goes_and_a_resumed_run_goes_on() -> None:
    collecting, buffer = Collecting(), ReplayBuffer(100, max_age=3)
    for clock in (0, 3, 7):
        collected(collecting, buffer, clock)
    assert len(buffer) == 8  # the one at 7 alone: those at 0 and 3 are older than 3 updates
    other = Collecting()
    other.load_state_dict(collecting.state_dict())
    assert [other.stale(SQUARE, now, 3) for now in (7, 10, 11)] == [False, False, True] and not other.stale(WIDE, 99, 3)
    assert [other.due(SQUARE, now, 5) for now in (7, 11, 12)] == [False, False, True] and other.due(WIDE, 7, 5)
