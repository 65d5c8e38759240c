"""Algorithms 1 and 2: where the latents of a training step come from.

`draw` mixes forward-diffused data with roll-outs by the shares of a prior; `roll` walks the student's grid with student, teacher or both.
Every decision that changes the sequence of network calls (source, grid, stop, actors) comes from a stateless generator that is the same on
every rank; noise, guidance and buffer picks are rank-local. Both are pure functions of (seed, stage, step), so a resumed run repeats them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddil_lightning.diffusion.denoiser import to_w
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.feed import Wants, without_images
from ddil_lightning.imitation.buffer import ReplayBuffer, Sample
from ddil_lightning.imitation.learner import Learner
from ddil_lightning.imitation.options import Granularity, Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.records import (
    FORWARD,
    MIXED,
    SOURCES,
    STUDENT,
    TEACHER,
    CaptionBatch,
    Context,
    LatentBatch,
    Origin,
    Rollout,
    cat,
    send,
    sent,
    take,
)
from ddil_lightning.streams import Streams


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
    ends: bool = False,
) -> Rollout:
    """Algorithm 2: from pure noise down `walk`, every state recorded before its transition.

    `c` [R] with guidance; `shape`: of one latent; `upto`: the last node recorded (default: the last of the grid). Node 0, pure noise, is
    recorded too: it is what the deployed student sees, while forward latents at T still hold some signal. `ends`: walk on to the end, for
    the pairs (noise, end) of the trajectories.
    """
    last = len(walk) - 1 if upto is None else upto
    device, count = c.text.device, len(c.text)
    x = torch.randn((count, *shape), generator=generator, device=device)
    times = walk.times.tolist()
    states, bits = [x], [0]
    for policy in policies:
        if policy is not None:
            policy.begin(x)
    for i in range(len(walk) if ends else last):
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
        return torch.tensor(values).repeat_interleave(count)

    rows = torch.arange(count).repeat(last + 1)
    made = Rollout(torch.cat(states[: last + 1]), column(times[: last + 1]), rows, column(tags), column(bits[: last + 1]), c)
    whole = torch.full((count,), _tag(actors))
    return made._replace(noise=states[0], end=x, whole=whole) if ends else made


@torch.no_grad()
def stand_in(
    x0: Tensor,
    schedule: NoiseSchedule,
    walk: Grid,
    c: Context,
    generator: torch.Generator,
    upto: int | None = None,
    pure_noise: bool = False,
) -> Rollout:
    """The same-timestep control of Algorithm 2: data x0 [R, ...] noised to the very nodes that `roll` would visit, independent noise each.

    Times, contexts, guidance, reuse and age are those of a roll-out; only the latents are the forward process's, with `pure_noise` at node
    0 for a method whose forward latents there carry no signal. What DDIL wins over it is the correction of the shift, what it wins by
    itself is the emphasis on these times (METHODS, preface 4).
    """
    last = len(walk) - 1 if upto is None else upto
    t = walk.nodes[: last + 1].repeat_interleave(len(x0))
    clean = x0.repeat(last + 1, *(1,) * (x0.ndim - 1))
    noise = torch.randn(clean.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    x_t = schedule.add_noise(clean, noise, sent(t, x0.device))
    if pure_noise:
        x_t[: len(x0)] = noise[: len(x0)]
    rows = torch.arange(len(x0)).repeat(last + 1)
    return Rollout(x_t, t, rows, torch.full_like(t, FORWARD), torch.zeros_like(t), c)


def _tag(actors: Sequence[bool]) -> int:
    """Whose latent it is by who acted so far; at node 0, by who will act first."""
    return STUDENT if all(actors) else MIXED if any(actors) else TEACHER


def guided(c: Context, guidance: tuple[float, float], generator: torch.Generator) -> Context:
    """`c` with w ~ U[g_min - 1, g_max - 1] per sample."""
    low, high = guidance
    u = torch.rand(len(c.text), generator=generator, device=generator.device)
    return c.guided(sent(to_w(low) + (high - low) * u, c.text.device))


def counts(prior: SamplingPrior, batch: int, granularity: Granularity, rng: random.Random) -> int:
    """How many of a batch are roll-outs: a fixed share of every batch (`sample`) or all or none by a coin (`step`)."""
    if prior.rollouts == 0:
        return 0
    if granularity == "step":
        return batch if rng.random() < prior.rollouts else 0
    whole = prior.rollouts * batch
    # Rounding by a shared coin keeps the mean share right for small batches.
    return min(int(whole) + (rng.random() < whole - int(whole)), batch)


def forward(
    batch: CaptionBatch, learner: Learner, streams: Streams, wants: Wants | None = None, shape: Sequence[int] | None = None
) -> LatentBatch:
    """The forward source: data noised to uniform nodes, x_t = alpha x0 + sigma eps.

    `wants` (default: the learner's): with its `pure_noise` node 0 is noise without signal, as in DMD2. Where it is the only node, no images
    are needed, and captions alone give noise of the latents' `shape`. With its `pairs` x0 and w are those of the batch's pairs; at node 0
    eps is a pair's too, elsewhere its end is noised anew: only there is x_t at its own noise level, for the two ends are not independent.
    With its `noise` every latent is its eps.
    """
    return _forward(batch, learner, streams, wants, shape)[0]


def _forward(
    batch: CaptionBatch, learner: Learner, streams: Streams, wants: Wants | None, shape: Sequence[int] | None
) -> tuple[LatentBatch, Origin]:
    grid, schedule = learner.grid, learner.policies.student.schedule
    wants = learner.wants if wants is None else wants
    pair = batch.pair if wants.pairs else None
    if wants.pairs and pair is None:
        raise ValueError("forward latents need pairs of the teacher's and the data bring none: set model.pairs.each to 1 or more")
    x0, device = batch.latent if pair is None else pair.end, batch.c.text.device
    if x0 is None and (shape is None or wants.images(len(grid))):
        raise without_images("the prior")
    size, dtype = ((len(batch.rows), *(shape or ())), torch.float32) if x0 is None else (x0.shape, x0.dtype)
    here = grid.draw(size[0], streams.local("node"))
    node = sent(here, device)
    t, s = grid.at(node), grid.at(node + 1)
    drawn = torch.randn(size, generator=streams.local("noise", device), device=device, dtype=dtype)
    eps, first = drawn if pair is None else pair.noise, (node == 0).view(-1, *(1,) * (len(size) - 1))
    x_t = eps if x0 is None else schedule.add_noise(x0, torch.where(first, eps, drawn), t)
    if wants.pure_noise or wants.noise:
        x_t = torch.where(first | wants.noise, eps, x_t)
    c = guided(batch.c, learner.guidance, streams.local("guidance")) if pair is None else batch.c.guided(pair.w)
    tag, weight = torch.full_like(t, FORWARD), torch.ones(len(t), device=device)
    ends = (eps, x0, tag) if wants.ends or wants.pairs else (eps if wants.noise else None, None, None)
    made = LatentBatch(x_t, t, s, node, c, batch.latent, tag, weight, torch.full_like(t, -1), batch.c, *ends)
    source, slot = (FORWARD,) * size[0], (-1,) * size[0]
    return made, Origin(source, tuple(here.tolist()), slot, None if made.whole is None else source)


def collect(
    batch: CaptionBatch, learner: Learner, prior: SamplingPrior, streams: Streams, shape: Sequence[int], rollouts: Rollouts = Rollouts()
) -> Rollout:
    """One batch of trajectories for the buffer, by the batch's captions: all interior states of one roll-out (or its `stand_in`)."""
    walk, actors = plan(prior, learner.grid, streams.shared("rollout"))
    return _made(batch, learner, walk, actors, streams, shape, rollouts)


def fresh(
    batch: CaptionBatch, learner: Learner, prior: SamplingPrior, streams: Streams, shape: Sequence[int], rollouts: Rollouts = Rollouts()
) -> LatentBatch:
    """Roll-out latents made on the spot, all at one node, for a run without a buffer; what says where they come from is on the CPU."""
    rng = streams.shared("rollout")
    walk, actors = plan(prior, learner.grid, rng)
    stop = rng.randrange(len(walk))
    made = _made(batch, learner, walk, actors, streams, shape, rollouts, upto=stop)
    final = slice(stop * len(batch.rows), None)
    t, slot = made.t[final], torch.full_like(made.t[final], -1)
    weight = torch.ones_like(slot, dtype=torch.float32)
    got = Sample(made.x_t[final], t, made.c, made.source[final], made.actors[final], weight, slot, slot, made.noise, made.end, made.whole)
    return _rolled(learner, got)


def _made(
    batch: CaptionBatch,
    learner: Learner,
    walk: Grid,
    actors: Sequence[bool],
    streams: Streams,
    shape: Sequence[int],
    rollouts: Rollouts,
    upto: int | None = None,
) -> Rollout:
    c = guided(batch.c, learner.guidance, streams.local("rollout-guidance"))
    generator = streams.local("rollout-noise", c.text.device)
    if not rollouts.control:
        made = roll(learner.policies, walk, actors, c, shape, generator, upto, learner.wants.ends)
        return made._replace(noise=made.x_t[: len(c.text)]) if learner.wants.noise else made  # node 0
    if batch.latent is None:
        raise ValueError("the same-timestep control noises data, but the data set has no images: set data.rollouts.control to false")
    if learner.wants.ends or learner.wants.noise:
        raise ValueError("the same-timestep control has no trajectories, whose ends this method needs: set data.rollouts.control to false")
    pure_noise = rollouts.wanted(learner.wants).pure_noise
    return stand_in(batch.latent, learner.policies.student.schedule, walk, c, generator, upto, pure_noise)


def check_finite(made: Rollout, together: Callable[[bool], bool], updates: int) -> None:
    """Raises FloatingPointError for a roll-out that is not finite, here or in another process: `together` asks all of them.

    All processes stop together: one that left alone would leave the others waiting for its gradients.
    """
    fine = all(bool(torch.isfinite(x).all()) for x in (made.x_t, made.end) if x is not None)
    if together(fine):
        return
    found = "a roll-out of another process is not finite"
    if not fine:
        broken = made.t[~torch.isfinite(made.x_t.flatten(1)).all(1)]
        at = int(broken.max()) if len(broken) else -1
        by = SOURCES[int(made.source[made.t == at][0])] if len(broken) else ""
        found = f"a roll-out by the {by} policy is not finite at t = {at}" if by else "the end of a roll-out is not finite"
    raise FloatingPointError(f"{found}, student update {updates}")


REJECTED = (
    "states of a roll-out were rejected: their mean square is not within a factor of 4 of forward latents'. "
    "While the buffer is empty, batches are forward latents alone; buffer/rejected counts on"
)
"""What is said once of a roll-out none of which the buffer has taken."""


def _rolled(learner: Learner, got: Sample) -> LatentBatch:
    """States of roll-outs as a batch."""
    node = learner.grid.rows(got.t)
    s = learner.grid.at(node + 1)
    return LatentBatch(got.x_t, got.t, s, node, got.c, None, got.source, got.weight, got.slot, None, got.noise, got.end, got.whole)


def draw(
    batch: CaptionBatch,
    learner: Learner,
    prior: SamplingPrior,
    streams: Streams,
    *,
    shape: Sequence[int],
    buffer: ReplayBuffer | None = None,
    rollouts: Rollouts = Rollouts(),
) -> LatentBatch:
    """Algorithm 1: one training batch of latents.

    `batch` [B] encoded captions; `shape` of one latent, where the batch has none; `buffer`: a filled replay buffer, whose
    priorities the learner's clock dates (None: roll out on the spot); `rollouts`: how the batch is mixed.
    With `prior.forward == 1`, or while the buffer holds no state of this shape, this is `forward`; one that holds any gives the whole
    share, because it is drawn from with replacement.
    """
    return drawn(batch, learner, prior, streams, shape=shape, buffer=buffer, rollouts=rollouts)[0]


def drawn(
    batch: CaptionBatch,
    learner: Learner,
    prior: SamplingPrior,
    streams: Streams,
    *,
    shape: Sequence[int],
    buffer: ReplayBuffer | None = None,
    rollouts: Rollouts = Rollouts(),
    size: int | None = None,
) -> tuple[LatentBatch, Origin]:
    """The batch of `draw`, and where its rows come from, which would have to be read back from the device.

    `size`: of what is drawn, where `batch` has its first rows alone: as many as are noised, for a method that reads no `real`.
    """
    size, wants = len(batch.rows) if size is None else size, rollouts.wanted(learner.wants)
    k = counts(prior, size, rollouts.granularity, streams.shared("source"))
    shape = shape if batch.latent is None else batch.latent.shape[1:]
    if k > 0 and buffer is not None and buffer.held(shape) == 0:
        if batch.latent is None:
            raise ValueError("the buffer is empty and there is no data in its place: collect a roll-out before the first draw")
        k = 0
    if k == 0:
        return _forward(batch, learner, streams, wants, shape)
    if buffer is None:
        here = fresh(take(batch, slice(size - k, None)), learner, prior, streams, shape, rollouts)
    else:
        got = buffer.sample(k, clock=learner.stage_updates, generator=streams.local("buffer"), progress=learner.progress, shape=shape)
        here = _rolled(learner, got)
    # Looked up while still on the CPU: reading times back from a GPU would wait for it.
    origin, rolled = Origin.of(here), send(here, batch.c.text.device)
    if k < size:
        noised, known = _forward(take(batch, slice(size - k)), learner, streams, wants, shape)
        origin, rolled = known.before(origin), cat([noised._replace(real=None, real_c=None), rolled])
    return (rolled._replace(real=batch.latent, real_c=batch.c) if wants.real else rolled), origin
