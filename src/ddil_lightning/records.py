"""The records that the parts of the library hand to each other: NamedTuples of tensors, a shape beside each field.

NamedTuples and not frozen dataclasses, because Lightning's collection utilities move and copy tuples and raise on frozen dataclasses.
`B` is the batch, `C, H, W` a latent, `L, D` the text states. Times are integer training timesteps; `END` is the clean end of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=tuple)

END = -1
"""The node after the last one: alpha = 1, sigma = 0. An index of -1 reads the last row of a schedule's table."""

FORWARD, STUDENT, TEACHER, MIXED = range(4)
SOURCES = ("forward", "student", "teacher", "mixed")
"""Names of the tags in `LatentBatch.source`."""


class Context(NamedTuple):
    """What a policy is told besides (x_t, t). Guidance lives here, so that every signature stays (x_t, t, c)."""

    text: Tensor  # [B, L, D] states of the text encoder (toy: one-hot class, L = 1)
    mask: Tensor | None = None  # [B, L] attention mask of the text
    pooled: Tensor | None = None  # [B, P] pooled text (SDXL)
    ids: Tensor | None = None  # [B, 6] original size, top and left of the crop, target size, in pixels (SDXL)
    w: Tensor | None = None  # [B] guidance in the convention out = out_c + w (out_c - out_u), so g = 1 + w
    s: Tensor | None = None  # [B] the time that a network which is told it jumps to (CTM); policies say it, no data do

    def guided(self, w: Tensor | float | None) -> Context:
        """The same context at guidance `w` ([B], a number for all, or None for unguided)."""
        if isinstance(w, int | float):
            w = torch.full((len(self.text),), float(w), device=self.text.device)
        return self._replace(w=w)

    def expand(self, n: int) -> Context:
        """A context of one sample repeated to `n` (the null context of guidance)."""
        return _map(lambda x: x.expand(n, *x.shape[1:]), self)


class Prediction(NamedTuple):
    """One network answer in all three spaces, consistent with alpha x0 + sigma eps = x_t. Made only by `NoiseSchedule`."""

    x0: Tensor  # [B, C, H, W]
    eps: Tensor  # [B, C, H, W]
    v: Tensor  # [B, C, H, W]


class Pair(NamedTuple):
    """Stored trajectories of the teacher by their two ends: its deterministic sampler takes `noise` to `end` at guidance w."""

    noise: Tensor  # [B, C, H, W] standard normal
    end: Tensor  # [B, C, H, W] clean latents
    w: Tensor  # [B] as in `Context`


class CaptionBatch(NamedTuple):
    """What a data set hands over: the data side of a step, encoded."""

    latent: Tensor | None  # [B, C, H, W] scaled latents of the images, None without data
    c: Context  # unguided (w is None)
    rows: Tensor  # [B] row of the data set
    pair: Pair | None = None  # of the captions, for a method that wants it


class LatentBatch(NamedTuple):
    """Latents drawn by Algorithm 1: what every feedback loss is given."""

    x_t: Tensor  # [B, C, H, W]
    t: Tensor  # [B] time of x_t
    s: Tensor  # [B] next node of the grid, END after the last
    node: Tensor  # [B] index of t in the grid
    c: Context  # the caption and guidance under which x_t was made
    real: Tensor | None  # [B, C, H, W] the batch's data latents; NOT the clean version of a rolled-out x_t
    source: Tensor  # [B] FORWARD, STUDENT, TEACHER or MIXED
    weight: Tensor  # [B] importance weight of the loss, 1 unless the buffer is prioritised
    slot: Tensor  # [B] where the buffer keeps the state (for priorities), -1 if it does not
    real_c: Context | None = None  # the captions of `real`, unguided; those of a rolled-out x_t are others
    # The two ends of the trajectory of x_t, for a method that wants them: pairs (x_T, x_0) coupled by the policies' flow or, of forward
    # latents, the pair that x_t was mixed from: independent noise and data, or a stored pair of the teacher's.
    noise: Tensor | None = None  # [B, C, H, W]
    end: Tensor | None = None  # [B, C, H, W]
    whole: Tensor | None = None  # [B] who made the end of the noise, a tag of SOURCES; FORWARD of forward latents


class Origin(NamedTuple):
    """Where the rows of a LatentBatch come from, as numbers on the host: who has drawn a batch knows it, and need not ask a device."""

    source: tuple[int, ...]  # [B] as in `LatentBatch`, and so are the others
    node: tuple[int, ...]
    slot: tuple[int, ...]
    whole: tuple[int, ...] | None = None

    @classmethod
    def of(cls, batch: LatentBatch) -> Origin:
        """Read from a batch: the host waits for the device that it lies on."""
        columns = [batch.source, batch.node, batch.slot, *([] if batch.whole is None else [batch.whole])]
        return cls(*map(tuple, torch.stack(columns).tolist()))

    @property
    def rolled(self) -> list[int]:
        """The rows that are no forward latents: so many in every process, whoever has made them."""
        return [row for row, source in enumerate(self.source) if source != FORWARD]

    @property
    def data(self) -> list[int]:
        """The rows whose x0 is `LatentBatch.real`: forward latents, but for what a same-timestep control has put in the buffer."""
        return [row for row, (source, slot) in enumerate(zip(self.source, self.slot, strict=True)) if source == FORWARD and slot < 0]

    def before(self, other: Origin) -> Origin:
        """Of the rows of this batch and then those of another, as `cat` joins them."""
        whole = None if self.whole is None or other.whole is None else self.whole + other.whole
        return Origin(self.source + other.source, self.node + other.node, self.slot + other.slot, whole)


class Rollout(NamedTuple):
    """All interior states of R trajectories over N nodes: M = N R states, nodes in order of time.

    What is known without the networks is on the CPU (t, row, source, actors, whole): the buffer and the grid ask for it there.
    """

    x_t: Tensor  # [M, C, H, W]
    t: Tensor  # [M]
    row: Tensor  # [M] the trajectory, a row of `c`
    source: Tensor  # [M]
    actors: Tensor  # [M] bit i is set where the student took transition i
    c: Context  # [R]
    noise: Tensor | None = None  # [R, C, H, W] x_T of every trajectory, for a method that wants its ends
    end: Tensor | None = None  # [R, C, H, W] what those who acted made of it: x0 on a grid to END, else the state at its last time
    whole: Tensor | None = None  # [R] the tag of all who acted until then


def _map(f: Callable[..., Tensor], *records: T) -> T:
    first = records[0]
    fields = []
    for column in zip(*records, strict=True):
        if any(x is None for x in column) and any(x is not None for x in column):
            raise ValueError(f"records of {type(first).__name__} cannot be joined: some have a field that others lack (None)")
        if isinstance(column[0], tuple):
            fields.append(_map(f, *column))
        else:
            fields.append(None if column[0] is None else f(*column))
    return type(first)(*fields)


def take(record: T, index: Tensor | slice | Sequence[int]) -> T:
    """The rows `index` of every tensor of a record."""
    return _map(lambda x: x[index], record)


def cat(records: Sequence[T]) -> T:
    """Records of the same fields, one after the other."""
    return records[0] if len(records) == 1 else _map(lambda *xs: torch.cat(xs), *records)


def to(record: T, *args: Any, **kwargs: Any) -> T:
    """Every floating tensor of a record through `Tensor.to`; integer tensors only change device."""

    def move(x: Tensor) -> Tensor:
        # A time must not pass through the float type on its way: bf16(999) is 1000.
        return x.to(*args, **kwargs) if x.is_floating_point() else x.to(torch.empty(0, device=x.device).to(*args, **kwargs).device)

    return _map(move, record)


def widest(device: torch.device) -> torch.dtype:
    """The type of the longest numbers that a device has: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """`x` in float64: where it lies or, if that device has none, on the CPU."""
    return (x if widest(x.device) == torch.float64 else x.cpu()).double()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`: from the CPU to a GPU out of pinned memory, so that the host goes on while it is copied."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def send(record: T, device: torch.device) -> T:
    """Every tensor of a record on `device` (`sent`)."""
    return _map(lambda x: sent(x, device), record)


def home(record: T) -> T:
    """Every tensor of a record on the CPU: all are copied before the host waits for them, once."""
    devices: set[torch.device] = set()

    def copied(x: Tensor) -> Tensor:
        devices.add(x.device)
        return x.to("cpu", non_blocking=x.is_cuda)

    made = _map(copied, record)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return made
