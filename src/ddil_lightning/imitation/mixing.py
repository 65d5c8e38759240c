"""Teacher and student take turns within one trajectory: who acts in which interval, and what comes out of it (appendix E; METHODS 6)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import noise, renoising
from ddil_lightning.bounds import within
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.records import Context, take
from ddil_lightning.streams import Streams


class Actor(NamedTuple):
    """A policy and what it is told of every sample: a student's guidance, or its text states, need not be its teacher's."""

    policy: Policy
    c: Context  # [B]


class Actors(NamedTuple):
    """The two who take turns, on the same samples. The teacher's `substeps` (or its `fine` grid) are its steps in an interval."""

    student: Actor
    teacher: Actor


class Mixing(ABC):
    """Who acts in which interval of a grid: a policy of policies."""

    @abstractmethod
    def by_student(self, grid: Grid, n: int, seed: int) -> Tensor:
        """[n, N] bools on the CPU: whether the student takes interval j of sample i, whose own seed is `seed` + i. Raises ValueError."""


@dataclass(frozen=True)
class Bernoulli(Mixing):
    """Every interval of every sample is the teacher's with probability `p_teacher`, by itself.

    One uniform number decides for all probabilities: with a higher one the teacher keeps what it had and gets more, so that a sweep over
    them has little noise of its own.
    """

    p_teacher: float

    def __post_init__(self) -> None:
        within(0, 1, p_teacher=self.p_teacher)

    def by_student(self, grid: Grid, n: int, seed: int) -> Tensor:
        """A draw for each sample, which its own seed decides."""
        drawn = [torch.rand(len(grid), generator=Streams(seed + i, 0).local("actors"), dtype=torch.float64) for i in range(n)]
        return torch.stack(drawn) >= self.p_teacher


@dataclass(frozen=True)
class Switch(Mixing):
    """`first` acts down to the time `at`, which the grid must have, and the other from there. At the first time that is the other alone."""

    first: Literal["student", "teacher"]
    at: int

    def by_student(self, grid: Grid, n: int, seed: int) -> Tensor:
        """The same for all samples."""
        times = grid.times.tolist()
        if self.at not in times:
            raise ValueError(f"a switch at {self.at}, which is none of the grid's times {times}: give one of them")
        return ((grid.nodes > self.at) == (self.first == "student")).expand(n, -1)


@dataclass(frozen=True)
class Pattern(Mixing):
    """The student takes interval j where bit j of `bits` is set, as in `Rollout.actors`."""

    bits: int

    def by_student(self, grid: Grid, n: int, seed: int) -> Tensor:
        """The same for all samples."""
        if not 0 <= self.bits < 2 ** len(grid):
            raise ValueError(f"the pattern {self.bits} is none of a grid of {len(grid)} intervals: give 0 to {2 ** len(grid) - 1}")
        return torch.tensor([bool(self.bits >> j & 1) for j in range(len(grid))]).expand(n, -1)


def mix_eval(actors: Actors, mixing: Mixing, grid: Grid, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Final latents [B, *shape] of trajectories down `grid` in which `mixing` says who acts; sample i depends on `seed` + i.

    The transition of an interval is its actor's own: a student that re-noises does, while the teacher goes by its own steps. Samples
    whose actor is the same are asked together, so each costs its own actor's evaluations; where it is one for all, these are, bit by
    bit, that policy's samples.
    """
    return mix_all(actors, [mixing], grid, shape, seed)[0]


@torch.no_grad()
def mix_all(
    actors: Actors,
    mixings: Sequence[Mixing],
    grid: Grid,
    shape: Sequence[int],
    seed: int = 0,
    walk: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """[K, B, *shape]: the samples of K mixtures, all from the same noise; whatever has begun alike is computed once.

    `walk`: the teacher's own from this noise, {time: [B, *shape]}, where it is known already.
    """
    n, device = len(actors.student.c.text), actors.student.c.text.device
    by_student = torch.stack([mixing.by_student(grid, n, seed) for mixing in mixings])  # [K, B, N]
    x, generators = noise(n, shape, seed).to(device), renoising(n, seed)
    sample = torch.arange(n)  # whose state each row of x is
    row = sample.expand(len(mixings), n)  # where in x each trajectory is
    walked = torch.full((n,), walk is not None)  # which rows of x are states of `walk`
    for j, (t, s) in enumerate(pairwise(grid.times.tolist())):
        going, row = (2 * row + by_student[:, :, j]).unique(return_inverse=True)
        before = going // 2
        x, sample = x[before.to(device)], sample[before]
        generators = [generators[i].clone_state() for i in before.tolist()]
        by, walked = going % 2 == 1, walked[before] & (going % 2 == 0)
        known = walk[s][sample[walked].to(walk[s].device)].to(x) if walk is not None else x[:0]
        x = _interval(actors, by, ~by & ~walked, x, sample, (t, s), generators, n)
        x[walked.to(device)] = known
    return x[row.to(device)]


def _interval(
    actors: Actors,
    by_student: Tensor,
    by_teacher: Tensor,
    x: Tensor,
    sample: Tensor,
    times: tuple[int, int],
    generators: Sequence[torch.Generator],
    most: int,
) -> Tensor:
    """x_s of x_t, each row by its own actor, told of its sample; `most` rows are asked together, and those of neither stay."""
    out = x
    for (policy, c), whose in ((actors.student, by_student), (actors.teacher, by_teacher)):
        mine = whose.nonzero().flatten()
        for rows in mine.split(most) if len(mine) else ():
            at, own = rows.to(x.device), [generators[i] for i in rows.tolist()]
            made = policy(x[at], *times, take(c, sample[rows].to(x.device)), own)
            out = made if len(rows) == len(x) else out.index_copy(0, at, made.to(out.dtype))
    return out
