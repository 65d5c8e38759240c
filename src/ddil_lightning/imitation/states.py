"""The states of roll-outs as the replay buffer keeps them and hands them out, and which of them it takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddil_lightning.records import Context, cat, take

BAND = (0.25, 4.0)
"""A state's mean square as a multiple of that of forward latents at its time; outside, a roll-out has left what the teacher can judge."""

DIMENSIONS = 32
"""Of a state, from which on `BAND` is asked: the mean square of fewer numbers leaves it by chance (one Gaussian in 1000 at 16)."""


class Sample(NamedTuple):
    """States drawn from the buffer, on the CPU."""

    x_t: Tensor  # [n, ...] float32
    t: Tensor  # [n]
    c: Context  # [n, ...]
    source: Tensor  # [n] tag of records.SOURCES
    actors: Tensor  # [n] bit i set: the student made transition i
    weight: Tensor  # [n] float32 importance weight, at most 1; all 1 without priorities
    slot: Tensor  # [n] to hand back to `update`
    age: Tensor  # [n] clock now - clock when collected
    noise: Tensor | None = None  # [n, ...] float32, the two ends of a state's trajectory
    end: Tensor | None = None  # [n, ...] float32
    whole: Tensor | None = None  # [n] who made it of the noise


class States(NamedTuple):
    """The states of one roll-out."""

    x_t: Tensor  # [m, ...] float16 or float32
    t: Tensor  # [m]
    row: Tensor  # [m] row of the chunk's context
    source: Tensor  # [m]
    actors: Tensor  # [m]
    u: Tensor  # [m] float64 relative loss in [U_MIN, U_MAX], 0 before the first measurement


class Kept(NamedTuple):
    """What was answered to the states of one roll-out (imitation.answers)."""

    known: Tensor  # [m] which of them have an answer
    fields: tuple[Tensor, ...]  # [m, ...] each, 0 where there is none yet


class Chunk(NamedTuple):
    """One roll-out. Its contexts are stored once and not per state: text is larger than latents."""

    states: States
    c: Context
    clock: int
    stage: int
    start: int  # slot of the first state
    answers: dict[str, Kept]  # by their kind
    noise: Tensor | None = None  # [R, ...] float32, by trajectory
    end: Tensor | None = None
    whole: Tensor | None = None  # [R]


def sizes(chunks: Collection[Chunk]) -> Tensor:
    """How many states every roll-out has."""
    return torch.tensor([len(k.states.t) for k in chunks], dtype=torch.long)


def per_state(values: list[int], chunks: Collection[Chunk]) -> Tensor:
    """A value of every roll-out for each of its states."""
    return torch.tensor(values, dtype=torch.long).repeat_interleave(sizes(chunks))


def gather(chunks: Sequence[Chunk], index: Tensor, weight: Tensor, clock: int) -> Sample:
    """The states `index` of some roll-outs, counted over all of them."""
    ends = sizes(chunks).cumsum(0)
    chunk = torch.searchsorted(ends, index, right=True)
    parts, places = [], []
    for k in chunk.unique().tolist() or [0]:  # one empty part where nothing was asked for
        place = (chunk == k).nonzero()[:, 0]
        part = chunks[k]
        local = index[place] - (ends[k] - len(part.states.t))
        s = take(part.states, local)
        age = torch.full_like(s.t, clock - part.clock)
        c = take(part.c, s.row)
        pair = (None if x is None else x[s.row] for x in (part.noise, part.end, part.whole))
        parts.append(Sample(s.x_t.float(), s.t, c, s.source, s.actors, weight[place], part.start + local, age, *pair))
        places.append(place)
    return take(cat(parts), torch.cat(places).argsort())


def sound(x: Tensor, expected: Tensor | None) -> Tensor:
    """[M] states that are finite as stored and, if `expected` is given, of plausible energy."""
    flat = x.flatten(1).float()
    keep = flat.isfinite().all(1)
    if expected is None or flat.shape[1] < DIMENSIONS:
        return keep
    ratio = flat.square().mean(1) / expected.detach().to("cpu", torch.float32)
    return keep & (ratio >= BAND[0]) & (ratio <= BAND[1])
