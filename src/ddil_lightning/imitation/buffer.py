"""The replay buffer of collected states: DAgger's aggregation with states, which a frozen teacher labels whenever asked (METHODS 1.6).

What it has answered to a state is kept beside it (imitation.answers) and goes with it. Age makes states off-policy but never wrong; the age
limit bounds it.
Prioritised replay follows Schaul et al. (2016), with losses normalised per node: otherwise it becomes a sampler of the noisiest node.
The buffer lives on the CPU and belongs to one rank.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddil_lightning.imitation.answers import Answers, Storage, restored, saved
from ddil_lightning.imitation.states import Chunk, States, gather, per_state, sizes, sound
from ddil_lightning.imitation.states import Sample as Sample
from ddil_lightning.records import SOURCES, Context, Rollout, take, widest

FINE = 50
"""Below this time (and at END) sigma is so small that half precision would show: such states are kept in float32."""

U_MIN, U_MAX = 0.1, 10.0
ENDS = ("noise", "end", "whole")
WINDOW = 100
"""Losses per node after which their running mean forgets exponentially."""


class ReplayBuffer:
    """States of the last roll-outs, drawn with replacement, uniformly or by priority.

    `capacity` counts states (0 keeps nothing); whole roll-outs are evicted, oldest first. `max_age` in student updates.
    Latents of several shapes share the capacity, as `shares` of the batches say (equally where it is empty), and each has a roll-out while
    all of them fit. A batch is drawn from those of one shape.
    `priority` is the exponent a; `half_life` (updates), `uniform` (eta) and `beta0` only act where it is positive:
    P(j) = (1 - eta) p_j / sum p + eta / n,  p_j = clip(u_j, 0.1, 10)^a 2^(-age_j / half_life),  u_j = loss_j / running mean at its node.
    `storage`: "float16" (states below t = 50 stay float32) or "float32". `answers`: how those of a frozen network to the states are kept
    (imitation.answers). Raises ValueError for settings outside their range.
    """

    def __init__(
        self,
        capacity: int,
        max_age: int = 500,
        priority: float = 0.0,
        half_life: float = 200,
        uniform: float = 0.1,
        beta0: float = 0.4,
        storage: Literal["float16", "float32"] = "float16",
        answers: Storage = "float32",
    ) -> None:
        if capacity < 0 or max_age < 0 or priority < 0 or half_life <= 0 or not 0 <= uniform <= 1 or not 0 <= beta0 <= 1:
            raise ValueError("a replay buffer needs capacity, max_age, priority >= 0, half_life > 0 and uniform, beta0 in [0, 1]")
        if storage not in ("float16", "float32"):
            raise ValueError(f"a replay buffer's storage is 'float16' or 'float32', not {storage!r}")
        if answers not in get_args(Storage):
            raise ValueError(f"buffer.answers is {answers!r}: give one of {', '.join(get_args(Storage))}")
        self.capacity, self.max_age, self.storage = capacity, max_age, storage
        self.answers = Answers(answers, self._found, lambda: self._chunks)
        self.priority, self.half_life, self.uniform, self.beta0 = priority, half_life, uniform, beta0
        self.rejected = 0
        self.shares: Mapping[tuple[int, ...], float] = {}
        self._chunks: deque[Chunk] = deque()
        self._next = 0
        self._means: dict[int, tuple[float, int]] = {}  # per time: running mean of the loss, how many losses
        self._arriving: list[tuple[Tensor, Tensor, Tensor, Any]] = []  # losses on their way from the device: slot, loss, t, a CUDA event

    def __len__(self) -> int:
        return sum(len(chunk.states.t) for chunk in self._chunks)

    def held(self, shape: Sequence[int]) -> int:
        """How many states of latents of a `shape` there are."""
        return int(sizes(self._of(shape)).sum())

    def say_room(self, states: int) -> None:
        """Warn where a roll-out of so many `states` of each shape does not fit: then one of a shape that was evicted is made again."""
        shapes = sum(share > 0 for share in self.shares.values())
        if shapes * states > self.capacity:
            said = (
                f"data.buffer.capacity {self.capacity} holds {self.capacity // states} roll-outs of {states} states, and the data have "
                f"{shapes} sizes: one that has none is rolled out with its next batch, which is more often than data.rollouts says; raise "
                f"the capacity to {shapes * states}, or lower data.rollouts.trajectories"
            )
            logging.getLogger(__name__).warning(said)

    def shapes(self) -> set[tuple[int, ...]]:
        """The shapes of the latents that are kept."""
        return {_shape(chunk) for chunk in self._chunks}

    def _of(self, shape: Sequence[int] | None) -> list[Chunk]:
        """The roll-outs of a shape, oldest first; of all where it is None."""
        return [chunk for chunk in self._chunks if shape is None or _shape(chunk) == tuple(shape)]

    @torch.no_grad()
    def add(self, made: Rollout, clock: int, stage: int, expected: Tensor | None = None) -> Tensor:
        """Stores a roll-out and returns its slots [M], -1 for a state that was not kept.

        `clock`: student updates so far; `stage`: of the method. States that are not finite, or whose mean square leaves [0.25, 4] times
        `expected` [M] (that of forward latents; asked of 32 dimensions or more), are rejected and counted. Raises ValueError for lengths or
        shapes that do not fit, and for a roll-out larger than the capacity.
        """
        slots = torch.full((len(made.x_t),), -1)
        if self.capacity == 0:
            return slots
        self._check(made, expected)
        self.settle()
        fine = self.storage == "float32" or bool((made.t < FINE).any())
        stored = made.x_t.to("cpu", torch.float32 if fine else torch.float16, copy=True)
        keep = sound(stored, expected)
        self.rejected += int((~keep).sum())
        if not keep.any():
            return slots
        t, row, source, actors = (x.to("cpu", torch.long, copy=True) for x in (made.t, made.row, made.source, made.actors))
        states = take(States(stored, t, row, source, actors, torch.zeros(len(t), dtype=torch.float64)), keep)
        own = {name: x.to("cpu", copy=True) for name, x in made.c._asdict().items() if x is not None}
        noise, end = (None if x is None else x.to("cpu", torch.float32, copy=True) for x in (made.noise, made.end))
        whole = None if made.whole is None else made.whole.to("cpu", torch.long, copy=True)
        self._chunks.append(Chunk(states, Context(**own), int(clock), int(stage), self._next, {}, noise, end, whole))
        slots[keep] = self._next + torch.arange(len(states.t))
        self._next += len(states.t)
        self._evict()
        return slots

    def expire(self, clock: int, stage: int) -> None:
        """Drops roll-outs older than `max_age` at `clock`, or of another stage (whose running losses go too)."""
        held = [k for k in self._chunks if clock - k.clock <= self.max_age and k.stage == stage]
        if len(held) == len(self._chunks):  # asked before every batch, which need not wait for the device
            return
        self.settle()
        if any(k.stage != stage for k in self._chunks):
            self._means.clear()
        self._chunks = deque(held)

    def flush(self) -> None:
        """Drops all states and the running losses (at a stage change). Slots stay retired and the count of rejected states goes on."""
        self.settle()
        self._chunks.clear()
        self._means.clear()
        self.answers.restore(None)  # the question of the next stage is another

    def sample(self, n: int, clock: int, generator: torch.Generator, progress: float = 0.0, shape: Sequence[int] | None = None) -> Sample:
        """Draws n states with replacement; `progress` in [0, 1] anneals the exponent of the importance weights from beta0 to 1.

        Of latents of a `shape`, which may be left out where there is only one.

        Takes n float64 uniforms from the generator whatever the priorities, and without them picks floor(u * len): exactly plain replay.
        Raises ValueError from an empty buffer.
        """
        chunks = self._of(shape)
        size = int(sizes(chunks).sum())
        if size == 0:
            raise ValueError("the replay buffer is empty: collect a roll-out before sampling")
        u = torch.rand(n, generator=generator, device=generator.device, dtype=widest(generator.device)).cpu().double()
        if self.priority == 0:
            index, weight = (u * size).long().clamp(max=size - 1), torch.ones(n)
        else:
            p = self.probabilities(clock, shape)
            index = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=size - 1)
            weight = weights(p, self.beta0 + (1 - self.beta0) * progress)[index].float()
        return gather(chunks, index, weight, clock)

    def probabilities(self, clock: int, shape: Sequence[int] | None = None) -> Tensor:
        """[len] float64 probability of every state of a `shape`, oldest first. One without a loss so far counts as the largest present."""
        chunks = self._of(shape)
        size = int(sizes(chunks).sum())
        self.settle()
        if self.priority == 0 or size == 0:
            return torch.full((size,), 1 / max(size, 1), dtype=torch.float64)
        u = torch.cat([k.states.u for k in chunks])
        u = torch.where(u == 0, u.max() if bool(u.any()) else torch.ones_like(u), u)
        age = per_state([clock - k.clock for k in chunks], chunks)
        # Relative to the youngest, so that a long pause cannot underflow every priority to 0.
        p = u.clamp(U_MIN, U_MAX) ** self.priority * torch.exp2(-(age - age.min()).double() / self.half_life)
        return (1 - self.uniform) * p / p.sum() + self.uniform / size

    def update(self, slot: Tensor, loss: Tensor, t: Tensor) -> None:
        """Takes per-sample losses [n] (v space) of the states `slot` [n] at times t [n]; ignores dead slots, -1 and non-finite losses.

        `slot` and `t` are on the CPU. Losses of a GPU are not waited for, but by the next one who asks for priorities.
        """
        if not slot.shape == loss.shape == t.shape:
            raise ValueError(f"update needs a slot, a loss and a time per sample, got {[tuple(x.shape) for x in (slot, loss, t)]}")
        self.settle()
        there = loss.detach().to(widest(loss.device)).to("cpu", non_blocking=True)
        self._arriving.append((slot.contiguous(), there, t, torch.cuda.current_stream().record_event() if loss.is_cuda else None))
        if not loss.is_cuda:
            self.settle()

    def settle(self) -> None:
        """Take the losses that have arrived since."""
        arrived, self._arriving = self._arriving, []
        for slot, loss, t, there in arrived:
            if there is not None:
                there.synchronize()
            self._prefer(slot, loss.double(), t)

    def _prefer(self, slot: Tensor, loss: Tensor, t: Tensor) -> None:
        chunk, local = self._locate(slot)
        live = (chunk >= 0) & loss.isfinite()
        for time in t[live].unique().tolist():
            self._observe(time, loss[live & (t == time)])
        for k in chunk[live].unique().tolist():
            mine = live & (chunk == k)
            mean = torch.tensor([self._means[x][0] for x in t[mine].tolist()], dtype=torch.float64)
            relative = torch.where(mean > 0, loss[mine] / mean.clamp(min=torch.finfo(mean.dtype).tiny), torch.ones_like(mean))
            self._chunks[k].states.u[local[mine]] = relative.clamp(U_MIN, U_MAX)

    def stats(self, clock: int) -> dict[str, float]:
        """Size, mean age, effective sample size 1 / sum P^2, share per source (`share_<name>`) and states rejected so far."""
        size = len(self)
        source = torch.cat([k.states.source for k in self._chunks]) if size else torch.empty(0, dtype=torch.long)
        age = per_state([clock - k.clock for k in self._chunks], self._chunks)
        ess = 1 / float(self.probabilities(clock).square().sum()) if size else 0.0
        report = {"size": float(size), "age": float(age.double().mean()) if size else 0.0, "ess": ess, "rejected": float(self.rejected)}
        return report | {f"share_{name}": float((source == i).sum()) / max(size, 1) for i, name in enumerate(SOURCES)}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the settings, as tensors, numbers, lists and dicts of them (loads with weights_only=True)."""
        self.answers.settle()
        self.settle()
        chunks = [
            {
                # u is written in place later on; all other tensors never change.
                "states": k.states._asdict() | {"u": k.states.u.clone()},
                "c": {name: x for name, x in k.c._asdict().items() if x is not None},
                "at": [k.clock, k.stage, k.start],
                **{name: getattr(k, name) for name in ENDS if getattr(k, name) is not None},
                **({"answers": saved(k.answers)} if k.answers else {}),
            }
            for k in self._chunks
        ]
        means = [[time, mean, count] for time, (mean, count) in self._means.items()]
        kept = {"answers": self.answers.storage, "question": self.answers.question}
        return {"chunks": chunks, "means": means, "next": self._next, "rejected": self.rejected, **kept}

    def load_state_dict(self, state: dict[str, Any], ends: bool = True) -> None:
        """Continues from `state_dict()`; with a smaller capacity than it was saved with, the oldest roll-outs go.

        Answers that were kept in another way than this buffer's are left out: they are asked for again. Without `ends` those of
        trajectories are left out too, which a method of before may have asked for.
        """
        self._arriving = []
        alike = state.get("answers") == self.answers.storage
        own = lambda parts: {name: x.clone() for name, x in parts.items()}  # noqa: E731 (a mapped checkpoint is not held open by its latents)
        self._chunks = deque()
        for k in state["chunks"]:
            states, c, answers = States(**own(k["states"])), Context(**own(k["c"])), restored(k.get("answers", {})) if alike else {}
            its = {x: k[x].clone() for x in ENDS if x in k and ends}
            clock, stage, start = k["at"]
            self._chunks.append(Chunk(states, c, clock, stage, start, answers, **its))
        self.answers.restore(state.get("question"))
        self._means = {int(time): (float(mean), int(count)) for time, mean, count in state["means"]}
        self._next, self.rejected = int(state["next"]), int(state["rejected"])
        self._evict()

    def _check(self, made: Rollout, expected: Tensor | None) -> None:
        x_t, c, row = made.x_t, made.c, made.row
        if any(len(x) != len(x_t) for x in (row, made.t, made.source, made.actors, *([] if expected is None else [expected]))):
            raise ValueError(f"a roll-out of {len(x_t)} states needs as many t, row, source, actors and expected")
        if len(x_t) > self.capacity:
            what = f"a roll-out of {len(x_t)} states exceeds the replay buffer's capacity {self.capacity}"
            raise ValueError(f"{what}: raise the capacity, or use 0 for no buffer")
        if len(row) and not 0 <= int(row.min()) <= int(row.max()) < len(c.text):
            raise ValueError(f"row must name one of the {len(c.text)} rows of the context, got {int(row.min())} .. {int(row.max())}")
        if self._chunks:  # states of other shapes are kept beside; their captions are of one kind, and so are their ends
            last = (self._of(x_t.shape[1:]) or self._chunks)[-1]
            shapes = [tuple(None if y is None else y.shape[1:] for y in k) for k in (c, last.c)]
            if shapes[0] != shapes[1] or (made.noise is None) != (last.noise is None):
                raise ValueError(f"contexts {shapes[0]} do not fit those in the replay buffer {shapes[1]}: flush it first")

    def _evict(self) -> None:
        """Whole roll-outs, the oldest of the shape that has most beyond its share of the capacity; not the last one of a shape while others
        have several, nor the newest while there are others."""
        size = len(self)
        while size > self.capacity:
            old, held = list(self._chunks)[:-1] or list(self._chunks), Counter(map(_shape, self._chunks))
            beyond = {shape: self.held(shape) - self.shares.get(shape, 0.0) * self.capacity for shape in held}
            several = [chunk for chunk in old if held[_shape(chunk)] > 1]
            gone = max(several or old, key=lambda chunk: beyond[_shape(chunk)])  # of equal ones the first, which is the oldest
            self._chunks = deque(chunk for chunk in self._chunks if chunk is not gone)
            size -= len(gone.states.t)

    def _locate(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Chunk and row in it of every slot; chunk -1 for slots that are gone."""
        if not self._chunks:
            return torch.full_like(slot, -1), slot
        starts = torch.tensor([k.start for k in self._chunks])
        chunk = torch.searchsorted(starts, slot, right=True) - 1
        nearest = chunk.clamp(min=0)
        local = slot - starts[nearest]
        return torch.where((chunk >= 0) & (local < sizes(self._chunks)[nearest]), chunk, -1), local

    def _found(self, slot: Tensor) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
        """Of every roll-out that holds some of the states `slot` [n]: itself, which of the n [k], and their rows in it [k]."""
        chunk, local = self._locate(slot)
        for k in chunk[chunk >= 0].unique().tolist():
            rows = (chunk == k).nonzero()[:, 0]
            yield self._chunks[k], rows, local[rows]

    def _observe(self, time: int, loss: Tensor) -> None:
        mean, count = self._means.get(time, (0.0, 0))
        count += len(loss)
        # The plain mean at first, an exponential one later; a batch counts as its losses one by one would, up to order.
        rate = len(loss) / count if count <= WINDOW else 1 - (1 - 1 / WINDOW) ** len(loss)
        self._means[time] = (mean + rate * (float(loss.mean()) - mean), count)


def _shape(chunk: Chunk) -> tuple[int, ...]:
    """Of a latent."""
    return tuple(chunk.states.x_t.shape[1:])


def weights(p: Tensor, b: float) -> Tensor:
    """[n] importance weights (n P)^-b of states that are drawn with probabilities `p` [n], divided by their mean under P (1 for b = 1).

    So they are 1 on average over what is drawn, and roll-outs keep their share beside rows of weight 1 (METHODS 1.6).
    """
    # A state of probability 0 is never drawn, and adds nothing to the mean.
    raw = (len(p) * p.clamp(min=torch.finfo(p.dtype).tiny)) ** -b
    return raw / (p * raw).sum()
