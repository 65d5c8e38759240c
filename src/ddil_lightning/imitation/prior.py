"""Sampling priors (beta_frwd, beta_student, beta_teach of Eq. 2) and their schedules: pure functions of the clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ddil_lightning.bounds import above, at_least

Mix = Literal["trajectory", "interval"]
OWN = ("student", "mixed")
"""The sources of latents that the student has had a part in."""


@dataclass(frozen=True)
class SamplingPrior:
    """Where a latent comes from: shares that sum to 1 (DDIL Eq. 2); checked when made.

    Args:
        forward: the share of noised data.
        student: the share of the student's roll-outs.
        teacher: the share of the teacher's roll-outs.
        mix: who acts within a roll-out. `trajectory` gives a whole trajectory to one of them, `interval` tosses a coin of student /
            (student + teacher) at every interval of the student's grid (the paper's mixed roll-outs, METHODS 1.5).
    """

    forward: float = 1.0
    student: float = 0.0
    teacher: float = 0.0
    mix: Mix = "interval"

    def __post_init__(self) -> None:
        shares = {"forward": self.forward, "student": self.student, "teacher": self.teacher}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"the prior's share {name} = {share} is not between 0 and 1")
        if abs(sum(shares.values()) - 1) > 1e-6:
            said = " + ".join(f"{name} {share:g}" for name, share in shares.items())
            raise ValueError(f"the prior's shares sum to {sum(shares.values()):.9g}, not 1: {said}")
        if self.mix not in ("trajectory", "interval"):
            raise ValueError(f"the prior's mix is 'trajectory' or 'interval', not {self.mix!r}")

    @property
    def rollouts(self) -> float:
        """The share of roll-out latents, student and teacher together."""
        return self.student + self.teacher

    @property
    def p_student(self) -> float:
        """The student's share of the roll-outs (p_S), 0 without roll-outs."""
        return self.student / self.rollouts if self.rollouts > 0 else 0.0

    def towards(self, other: SamplingPrior, r: float) -> SamplingPrior:
        """The convex combination (1 - r) self + r other; on the simplex by construction.

        Its mix is that of the one of whose roll-outs both take a part. Raises ValueError for two of different mixes.
        """
        mixes = list(dict.fromkeys(prior.mix for prior in (self, other) if prior.student > 0 and prior.teacher > 0))
        if len(mixes) > 1:
            raise ValueError(
                f"a prior of mix {self.mix} moves to one of mix {other.mix}, and nothing lies between the two: give both the same mix, or "
                "take Piecewise"
            )
        student, teacher = ((1 - r) * a + r * b for a, b in ((self.student, other.student), (self.teacher, other.teacher)))
        # The forward share is the rest, so that rounding cannot leave the simplex.
        return SamplingPrior(max(1 - student - teacher, 0.0), student, teacher, mixes[0] if mixes else other.mix)


class Schedule:
    """A function clock -> SamplingPrior. The clock counts student updates of the current stage.

    One that depends on how the training goes sets `hears`, writes `hear`, and keeps what it remembers in a dict `state`.
    """

    hears: Literal["nothing", "updates", "measures"] = "nothing"
    """What it is told: the losses of every update, which costs a wait for the device, or the measures that callbacks publish."""
    unheard: str = ""
    """The name of what it waits for, until it has heard it; empty where there is no such thing."""

    def __call__(self, clock: int) -> SamplingPrior:
        """The prior at `clock` student updates."""
        raise TypeError(f"{type(self).__name__} is no schedule: give it a __call__(clock) -> SamplingPrior")

    def hear(self, clock: int, values: Mapping[str, float]) -> None:
        """What is heard of update number `clock`, over all processes; or the measures.

        Of an update these are the mean losses by source (forward, student, teacher, mixed), and as `drawn/share_<source>` how much of its
        latents each source had.
        """

    def begin(self) -> None:
        """A stage begins, whose clock is 0: forget what was heard in the one before."""

    def ahead(self, updates: int) -> list[SamplingPrior]:
        """Priors that it may give in a run of so many updates, its extremes among them, to be checked before it begins."""
        clocks = {round(k / 100 * updates) for k in range(101)} | set(getattr(self, "starts", []))
        return [self(clock) for clock in sorted(clocks)]

    @property
    def state(self) -> dict[str, int]:
        """What it remembers, for a checkpoint; nothing, where it is a function of the clock alone."""
        return {}

    @state.setter
    def state(self, state: Mapping[str, int]) -> None:
        pass


class Constant(Schedule):
    """The same prior always.

    Args:
        prior: that one.
    """

    def __init__(self, prior: SamplingPrior) -> None:
        self.prior = prior

    def __call__(self, clock: int) -> SamplingPrior:
        """That prior, at every clock."""
        return self.prior


class Piecewise(Schedule):
    """One prior after the other (the paper's parts of a stage).

    Args:
        priors: the priors.
        starts: the clocks from which they hold, rising from 0, as many.
    """

    def __init__(self, priors: Sequence[SamplingPrior], starts: Sequence[int]) -> None:
        if len(priors) != len(starts) or not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
            raise ValueError(
                f"piecewise priors need as many starts as priors, rising from 0; got {len(priors)} priors and starts {list(starts)}"
            )
        self.priors, self.starts = list(priors), list(starts)

    def __call__(self, clock: int) -> SamplingPrior:
        """The prior of the part that holds `clock`."""
        return next(p for p, start in zip(reversed(self.priors), reversed(self.starts), strict=True) if clock >= start or start == 0)


class _Ramp(Schedule):
    """From `first` to `last` between the clocks `start` and `end`, along `shape(r)` with r from 0 to 1.

    Args:
        first: the prior up to `start`.
        last: the prior from `end` on.
        end: the student updates at which `last` is reached.
        start: the student updates at which `first` is left.
    """

    def __init__(self, first: SamplingPrior, last: SamplingPrior, end: int, start: int = 0) -> None:
        if end <= start or start < 0:
            raise ValueError(f"a schedule runs from start {start} to a later end, got {end}")
        first.towards(last, 0.0)  # two mixes are refused now, and not in training
        self.first, self.last, self.start, self.end = first, last, start, end

    def __call__(self, clock: int) -> SamplingPrior:
        """The interpolated prior; constant before `start` and after `end`."""
        r = min(max((clock - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.first.towards(self.last, self.shape(r))

    def shape(self, r: float) -> float:
        """The share of `last` when the share r in [0, 1] of the way from `start` to `end` is done."""
        return r


class Linear(_Ramp):
    """The shares go from `first` to `last` in a straight line."""


class Cosine(_Ramp):
    """Half a cosine: slow, fast, slow."""

    def shape(self, r: float) -> float:
        """(1 - cos pi r) / 2."""
        return (1 - math.cos(math.pi * r)) / 2


class Exponential(Schedule):
    """DAgger's p^k: the distance to `last` shrinks by a factor in every period.

    Args:
        first: the prior at clock 0.
        last: the prior that is approached.
        rate: the factor, between 0 and 1.
        every: student updates in a period.
    """

    def __init__(self, first: SamplingPrior, last: SamplingPrior, rate: float = 0.5, every: int = 100) -> None:
        if not 0 < rate < 1 or every < 1:
            raise ValueError(f"an exponential schedule needs 0 < rate < 1 and every >= 1, got {rate} and {every}")
        first.towards(last, 0.0)
        self.first, self.last, self.rate, self.every = first, last, rate, every

    def __call__(self, clock: int) -> SamplingPrior:
        """The prior at `clock`."""
        return self.first.towards(self.last, 1 - self.rate ** (clock / self.every))


class _Moves(Schedule):
    """Equal moves from `first` to `last`, each after `patience` numbers in a row that pass; `level` counts them in a stage."""

    def __init__(self, first: SamplingPrior, last: SamplingPrior, steps: int, patience: int) -> None:
        at_least(1, steps=steps, patience=patience)
        first.towards(last, 0.0)
        self.first, self.last, self.steps, self.patience = first, last, steps, patience
        self.level, self.passed = 0, 0

    def __call__(self, clock: int) -> SamplingPrior:
        """The prior at the present level."""
        return self.first.towards(self.last, self.level / self.steps)

    def begin(self) -> None:
        """The level is 0 again."""
        self.level, self.passed = 0, 0

    def ahead(self, updates: int) -> list[SamplingPrior]:
        """Its ends: where it comes to between them depends on the training."""
        return [self.first, self.last]

    @property
    def state(self) -> dict[str, int]:
        """The level of how many, and how many numbers in a row have passed."""
        return {"level": self.level, "steps": self.steps, "passed": self.passed}

    @state.setter
    def state(self, state: Mapping[str, int]) -> None:
        self._go_on(state)

    def _go_on(self, state: Mapping[str, int]) -> None:
        # A run may go on with other steps: at the share of the way that it has come, rounded down. Older states have no steps.
        self.level = min(state["level"] * self.steps // state.get("steps", self.steps), self.steps)
        self.passed = state["passed"]

    def tell(self, passes: bool) -> None:
        """One more number, which passes or does not; `patience` in a row that do raise the level."""
        self.passed = self.passed + 1 if passes else 0
        if self.passed >= self.patience and self.level < self.steps:
            self.level, self.passed = self.level + 1, 0


class Gated(_Moves):
    """Performance-gated: one move from `first` to `last` whenever the student does nearly as well on its own latents as on forward ones.

    Its own are those of roll-outs that it has had a part in. It hears the losses of every update; `level` is its memory.

    Args:
        first: the prior at the start, with a share of forward latents and one of the student's, which are compared.
        last: the prior after all moves.
        ratio: on-policy loss / forward loss below which an update passes.
        steps: in how many equal moves `last` is reached.
        patience: how many updates in a row have to pass for a move.
    """

    hears = "updates"

    def __init__(self, first: SamplingPrior, last: SamplingPrior, ratio: float = 1.25, steps: int = 10, patience: int = 20) -> None:
        super().__init__(first, last, steps, patience)
        above(0, ratio=ratio)
        for name in ("forward", "student"):
            if getattr(first, name) == 0:
                raise ValueError(
                    f"a gated schedule compares losses on latents of the student's making and on forward ones: give its first prior a "
                    f"{name} share, or take GatedBy, which follows a measure"
                )
        self.ratio = ratio

    def hear(self, clock: int, values: Mapping[str, float]) -> None:
        """Compare the mean of the student's own latents with forward latents; an update that lacks one of them says nothing."""
        own = mean_of_own(values)
        if own is not None and "forward" in values:
            self.observe(own, values["forward"])

    def observe(self, on_policy: float, forward: float) -> None:
        """One update's mean losses on the student's own and on forward latents."""
        self.tell(on_policy < self.ratio * forward)


class GatedBy(_Moves):
    """Gated by a measure: one move from `first` to `last` whenever a number that a callback publishes is small enough.

    ShiftProbe's `shift/loss_ratio` is the loss on the student's own latents over that on the teacher's; `shift/teacher` says how far
    apart these are. A measure that nobody publishes leaves the prior at `first`, which is told.

    Args:
        first: the prior at the start.
        last: the prior after all moves.
        measure: the name of the number, as loggers write it.
        below: the value below which it passes.
        steps: in how many equal moves `last` is reached.
        patience: how many times in a row it has to pass for a move.
    """

    hears = "measures"

    def __init__(self, first: SamplingPrior, last: SamplingPrior, measure: str, below: float, steps: int = 4, patience: int = 1) -> None:
        super().__init__(first, last, steps, patience)
        self.measure, self.below, self.unheard = measure, below, measure

    @property
    def state(self) -> dict[str, int]:
        """That of every such schedule, and whether it has heard any number."""
        return {**super().state, "heard": int(not self.unheard)}

    @state.setter
    def state(self, state: Mapping[str, int]) -> None:
        self._go_on(state)
        self.unheard = "" if state.get("heard", self.level or self.passed) else self.measure

    def hear(self, clock: int, values: Mapping[str, float]) -> None:
        """Look for the measure among what was published."""
        if self.measure in values:
            self.unheard = ""
            self.tell(values[self.measure] < self.below)


def mean_of_own(values: Mapping[str, float], named: str = "") -> float | None:
    """The mean loss on all roll-outs that the student has had a part in, weighted by their shares of what was drawn; None without any.

    `named`: what stands before the sources in the names of `values`.
    """
    parts = [(values.get(f"drawn/share_{name}", 1.0), values[named + name]) for name in OWN if named + name in values]
    shares = sum(share for share, _ in parts)
    return sum(share * loss for share, loss in parts) / shares if shares else None
