"""Algorithms 1 and 2: where the latents of a training step come from.

`draw` mixes forward-diffused data with roll-outs by the shares of a prior; `roll` walks the student's grid with student, teacher or both.
Every decision that changes the sequence of network calls (source, grid, stop, actors) comes from a stateless generator that is the same on
every rank; noise, guidance and buffer picks are rank-local. Both are pure functions of (seed, stage, step), so a resumed run repeats them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddil_lightning.diffusion.denoiser import to_w
from ddil_lightning.diffusion.policy import Policies
from ddil_lightning.diffusion.schedule import Grid, NoiseSchedule
from ddil_lightning.feed import Feed
from ddil_lightning.imitation.buffer import ReplayBuffer
from ddil_lightning.imitation.options import Granularity
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.records import FORWARD, MIXED, STUDENT, TEACHER, CaptionBatch, Context, LatentBatch, cat, take, to
from ddil_lightning.streams import Streams


class Learner(Protocol):
    """What the draw and the DataModule ask of a method. Every method has it; the DataModule imports no method."""

    feed: Feed
    """The data, which hands itself over when training begins."""

    @property
    def backbone(self) -> Any:
        """The pipeline: it encodes captions and images, and knows the shape of the latents."""
        ...

    @property
    def student_updates(self) -> int:
        """The clock of the run."""
        ...

    @property
    def stage(self) -> int:
        """The number of the present stage, from 0."""
        ...

    @property
    def stage_updates(self) -> int:
        """The clock of the present stage, that of cadence and age."""
        ...

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1."""
        ...

    @property
    def policies(self) -> Policies:
        """The student and the teacher as they act at inference."""
        ...

    @property
    def grid(self) -> Grid:
        """The times the student trains on, with the grids that inference walks."""
        ...

    @property
    def guidance(self) -> tuple[float, float]:
        """The range of guidance g = 1 + w from which every sample's w is drawn, uniform."""
        ...


class Rollout(NamedTuple):
    """All interior states of R trajectories over N nodes: M = N R states, nodes in order of time."""

    x_t: Tensor  # [M, C, H, W]
    t: Tensor  # [M]
    row: Tensor  # [M] the trajectory, a row of `c`
    source: Tensor  # [M]
    actors: Tensor  # [M] bit i is set where the student took transition i
    c: Context  # [R]


def plan(prior: SamplingPrior, grid: Grid, rng: random.Random) -> tuple[Grid, list[bool]]:
    """One roll-out: the inference grid it walks, and for every interval whether the student acts (else the teacher)."""
    walk, p = grid.rollout(rng), prior.p_student
    if prior.mix == "trajectory":
        return walk, [rng.random() < p] * len(walk)
    return walk, [rng.random() < p for _ in range(len(walk))]


@torch.no_grad()
def roll(
    policies: Policies,
    walk: Grid,
    actors: Sequence[bool],
    c: Context,
    shape: Sequence[int],
    generator: torch.Generator,
    upto: int | None = None,
) -> Rollout:
    """Algorithm 2: from pure noise down `walk`, every state recorded before its transition.

    `c` [R] with guidance; `shape`: of one latent; `upto`: the last node recorded (default: the last of the grid). Node 0, pure noise, is
    recorded too: it is what the deployed student sees, while forward latents at T still hold some signal.
    """
    last = len(walk) - 1 if upto is None else upto
    device, count = c.text.device, len(c.text)
    x = torch.randn((count, *shape), generator=generator, device=device)
    times = walk.times.tolist()
    states, bits = [x], [0]
    for i in range(last):
        actor = policies.student if actors[i] else policies.teacher
        if actor is None:
            raise ValueError(
                "the prior gives roll-outs to a teacher, but this method has no teacher policy: give that share to the student"
            )
        x = actor(x, times[i], times[i + 1], c, generator)
        states.append(x)
        bits.append(bits[-1] | (int(actors[i]) << i))
    tags = [_tag(actors[: max(i, 1)]) for i in range(last + 1)]

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device).repeat_interleave(count)

    rows = torch.arange(count, device=device).repeat(last + 1)
    return Rollout(torch.cat(states), column(times[: last + 1]), rows, column(tags), column(bits), c)


@torch.no_grad()
def stand_in(x0: Tensor, schedule: NoiseSchedule, walk: Grid, c: Context, generator: torch.Generator, upto: int | None = None) -> Rollout:
    """The same-timestep control of Algorithm 2: data x0 [R, ...] noised to the very nodes that `roll` would visit, independent noise each.

    Times, contexts, guidance, reuse and age are those of a roll-out; only the latents are the forward process's. What DDIL wins over it
    is the correction of the shift, what it wins by itself is the emphasis on these times (METHODS, preface 4).
    """
    last = len(walk) - 1 if upto is None else upto
    t = walk.nodes[: last + 1].to(x0.device).repeat_interleave(len(x0))
    clean = x0.repeat(last + 1, *(1,) * (x0.ndim - 1))
    noise = torch.randn(clean.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    rows = torch.arange(len(x0), device=x0.device).repeat(last + 1)
    return Rollout(schedule.add_noise(clean, noise, t), t, rows, torch.full_like(t, FORWARD), torch.zeros_like(t), c)


def _tag(actors: Sequence[bool]) -> int:
    """Whose latent it is by who acted so far; at node 0, by who will act first."""
    return STUDENT if all(actors) else MIXED if any(actors) else TEACHER


def guided(c: Context, guidance: tuple[float, float], generator: torch.Generator) -> Context:
    """`c` with w ~ U[g_min - 1, g_max - 1] per sample."""
    low, high = guidance
    u = torch.rand(len(c.text), generator=generator, device=generator.device)
    return c.guided((to_w(low) + (high - low) * u).to(c.text.device))


def counts(prior: SamplingPrior, batch: int, granularity: Granularity, rng: random.Random) -> int:
    """How many of a batch are roll-outs: a fixed share of every batch (`sample`) or all or none by a coin (`step`)."""
    if prior.rollouts == 0:
        return 0
    if granularity == "step":
        return batch if rng.random() < prior.rollouts else 0
    whole = prior.rollouts * batch
    # Rounding by a shared coin keeps the mean share right for small batches.
    return min(int(whole) + (rng.random() < whole - int(whole)), batch)


def forward(batch: CaptionBatch, learner: Learner, streams: Streams, pure_noise: bool = False) -> LatentBatch:
    """The forward source: data noised to uniform nodes, x_t = alpha x0 + sigma eps. `pure_noise`: node 0 is noise without signal (DMD2)."""
    if batch.latent is None:
        raise ValueError("the prior has a forward share but the data set has no images: give that share to the teacher, or give images")
    x0, grid, schedule = batch.latent, learner.grid, learner.policies.student.schedule
    device = x0.device
    node = grid.draw(len(x0), streams.local("node")).to(device)
    t, s = grid.times.to(device)[node], grid.times.to(device)[node + 1]
    eps = torch.randn(x0.shape, generator=streams.local("noise", device), device=device, dtype=x0.dtype)
    x_t = schedule.add_noise(x0, eps, t)
    if pure_noise:
        x_t = torch.where((node == 0).view(-1, *(1,) * (x0.ndim - 1)), eps, x_t)
    c = guided(batch.c, learner.guidance, streams.local("guidance"))
    tag = torch.full_like(t, FORWARD)
    return LatentBatch(x_t, t, s, node, c, x0, tag, torch.ones(len(t), device=device), torch.full_like(t, -1), batch.c)


def collect(
    batch: CaptionBatch, learner: Learner, prior: SamplingPrior, streams: Streams, shape: Sequence[int], control: bool = False
) -> Rollout:
    """One batch of trajectories for the buffer, by the batch's captions: all interior states of one roll-out (or its `stand_in`)."""
    walk, actors = plan(prior, learner.grid, streams.shared("rollout"))
    return _made(batch, learner, walk, actors, streams, shape, control)


def fresh(
    batch: CaptionBatch, learner: Learner, prior: SamplingPrior, streams: Streams, shape: Sequence[int], control: bool = False
) -> LatentBatch:
    """Roll-out latents made on the spot, all at one node: what a run without a buffer trains on."""
    rng = streams.shared("rollout")
    walk, actors = plan(prior, learner.grid, rng)
    stop = rng.randrange(len(walk))
    made = _made(batch, learner, walk, actors, streams, shape, control, upto=stop)
    final = slice(stop * len(batch.rows), None)
    slot = torch.full_like(made.t[final], -1)
    return _rolled(learner, made.x_t[final], made.t[final], made.c, made.source[final], torch.ones_like(slot, dtype=torch.float32), slot)


def _made(
    batch: CaptionBatch,
    learner: Learner,
    walk: Grid,
    actors: Sequence[bool],
    streams: Streams,
    shape: Sequence[int],
    control: bool,
    upto: int | None = None,
) -> Rollout:
    c = guided(batch.c, learner.guidance, streams.local("rollout-guidance"))
    generator = streams.local("rollout-noise", c.text.device)
    if not control:
        return roll(learner.policies, walk, actors, c, shape, generator, upto)
    if batch.latent is None:
        raise ValueError("the same-timestep control noises data, but the data set has no images: set data.rollouts.control to false")
    return stand_in(batch.latent, learner.policies.student.schedule, walk, c, generator, upto)


def _rolled(learner: Learner, x_t: Tensor, t: Tensor, c: Context, source: Tensor, weight: Tensor, slot: Tensor) -> LatentBatch:
    node = learner.grid.rows(t)
    return LatentBatch(x_t, t, learner.grid.times.to(t.device)[node + 1], node, c, None, source, weight, slot)


def draw(  # noqa: PLR0913 (a pure function of all that Algorithm 1 depends on)
    batch: CaptionBatch,
    learner: Learner,
    prior: SamplingPrior,
    streams: Streams,
    *,
    shape: Sequence[int],
    buffer: ReplayBuffer | None = None,
    clock: int = 0,
    granularity: Granularity = "sample",
    pure_noise: bool = False,
    progress: float = 0.0,
    control: bool = False,
) -> LatentBatch:
    """Algorithm 1: one training batch of latents.

    `batch` [B] encoded captions; `shape` of one latent; `buffer`: a filled replay buffer (None: roll out on the spot); `clock` and
    `progress` in [0, 1] date the buffer's priorities; `control`: see `stand_in`, for draws without a buffer.
    With `prior.forward == 1`, or while the buffer is empty, this is `forward`; a buffer that holds any state gives the whole share, because
    it is drawn from with replacement.
    """
    size = len(batch.rows)
    k = counts(prior, size, granularity, streams.shared("source"))
    if k > 0 and buffer is not None and len(buffer) == 0:
        if batch.latent is None:
            raise ValueError("the buffer is empty and there is no data in its place: collect a roll-out before the first draw")
        k = 0
    if k == 0:
        return forward(batch, learner, streams, pure_noise)
    if buffer is None:
        rolled = fresh(take(batch, slice(size - k, None)), learner, prior, streams, shape, control)
    else:
        got = buffer.sample(k, clock=clock, generator=streams.local("buffer"), progress=progress)
        # Looked up while still on the CPU: reading times back from a GPU would wait for it.
        rolled = to(_rolled(learner, got.x_t, got.t, got.c, got.source, got.weight, got.slot), batch.c.text.device)
    if k == size:
        return rolled._replace(real=batch.latent, real_c=batch.c)
    noised = forward(take(batch, slice(size - k)), learner, streams, pure_noise)
    return cat([noised._replace(real=None, real_c=None), rolled])._replace(real=batch.latent, real_c=batch.c)
