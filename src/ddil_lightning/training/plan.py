"""The stage plan of progressive distillation as plain data: what a YAML says, and what is wrong with it in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ddil_lightning.bounds import at_least, within
from ddil_lightning.diffusion.grid import Grid

Kind = Literal["eps_to_v", "guidance", "halve"]
RULES = ("trailing", "linspace")
"""Grid rules that start at the noisiest time and nest under halving."""

VELOCITIES = ("v", "flow")
"""What a network may predict so that its x0 is determined at pure noise too."""


@dataclass(frozen=True)
class Part:
    """A part of a stage with its own prior (DDIL: first mostly the teacher's transitions, then mostly the student's).

    Args:
        updates: student updates.
        forward: the share of forward latents.
        student: the share of the student's roll-outs.
        teacher: the share of the teacher's roll-outs.
    """

    updates: int
    forward: float = 1.0
    student: float = 0.0
    teacher: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One stage. Without parts, a halving is trained under the DataModule's prior and a preliminary stage on forward latents.

    Args:
        kind: `halve`, or a preliminary stage, `eps_to_v` or `guidance`, whose student is still a many-step network.
        steps: of a halving, the student's after it.
        updates: student updates, where there are no parts.
        parts: parts with priors of their own, whose updates add up to those of the stage.
        lr: the learning rate, by default the method's own.
        warmup: its warm-up in student updates, by default the method's own.
    """

    kind: Kind = "halve"
    steps: int | None = None
    updates: int | None = None
    parts: list[Part] = field(default_factory=list)
    lr: float | None = None
    warmup: int | None = None

    @property
    def length(self) -> int:
        """How many student updates the stage has."""
        return sum(part.updates for part in self.parts) if self.updates is None else self.updates

    @property
    def preliminary(self) -> bool:
        """Whether it makes a many-step network, on all times."""
        return self.kind != "halve"

    def __str__(self) -> str:
        return self.kind if self.steps is None else f"{self.kind} to {self.steps}"

    def part(self, clock: int) -> Part | None:
        """The part that holds `clock` updates of the stage, the last one also beyond its end; None without parts."""
        for part in self.parts:
            if clock < part.updates:
                return part
            clock -= part.updates
        return self.parts[-1] if self.parts else None


def check_plan(stages: Sequence[Stage], teacher_steps: int, rule: str, times: int, predicts: str) -> None:
    """Raises ValueError, naming the stage, for a plan that cannot be run on a schedule of `times` by a teacher that predicts `predicts`."""
    if rule not in RULES:
        raise ValueError(f"progressive distillation needs a grid that nests under halving: rule is {' or '.join(RULES)}, not {rule!r}")
    if not stages:
        raise ValueError("the plan has no stages: give model.stages a list such as [{steps: 4, updates: 500}, {steps: 2, updates: 500}]")
    if predicts not in VELOCITIES and stages[0].kind != "eps_to_v":
        raise ValueError(
            f"the teacher predicts {predicts} and the student of progressive distillation predicts v: "
            "begin the plan with a stage {kind: eps_to_v, updates: ...}"
        )
    if predicts in VELOCITIES and stages[0].kind == "eps_to_v":
        raise ValueError(f"the plan begins with eps_to_v, but the teacher predicts {predicts} already: leave that stage out")
    steps, before = teacher_steps, ""
    for i, stage in enumerate(stages, 1):
        where = f"stage {i} of the plan ({stage})"
        _check_updates(stage, where)
        if stage.preliminary:
            if stage.steps is not None:
                raise ValueError(f"{where} trains on all times: leave out its steps")
            if before == "halve" or before == stage.kind or (before, stage.kind) == ("guidance", "eps_to_v"):
                raise ValueError(f"{where} comes too late: a plan is eps_to_v, then guidance, then halvings; the first two are optional")
        else:
            steps = _check_halving(stage, steps, rule, times, where)
        before = stage.kind


def _check_updates(stage: Stage, where: str) -> None:
    if stage.updates is not None and stage.parts and stage.updates != sum(part.updates for part in stage.parts):
        raise ValueError(f"{where} has {stage.updates} updates and its parts have {sum(p.updates for p in stage.parts)}: leave out updates")
    if stage.length < 1 or any(part.updates < 1 for part in stage.parts):
        raise ValueError(f"{where} has {stage.length} updates{' in ' + str(len(stage.parts)) + ' parts' if stage.parts else ''}: "
                         "every stage and every part needs at least 1")  # fmt: skip
    at_least(0, **{f"warmup of {where}": stage.warmup})
    within(0, 10, **{f"lr of {where}": stage.lr})


def _check_halving(stage: Stage, steps: int, rule: str, times: int, where: str) -> int:
    """The student's steps after a halving from `steps`."""
    if stage.steps is None:
        raise ValueError(f"{where} does not say its student's steps: the teacher has {steps}, so write steps: {steps // 2}")
    if steps % 2 or stage.steps * 2 != steps:
        remedy = f"so write steps: {steps // 2}" if steps % 2 == 0 else "which cannot be halved: change teacher_steps"
        raise ValueError(f"{where} does not halve: its teacher has {steps} steps, {remedy}")
    coarse, fine = Grid.named(rule, stage.steps, times).times.tolist(), Grid.named(rule, steps, times).times.tolist()
    if coarse != fine[::2]:
        a, b = next((a, b) for a, b in zip(coarse, fine[::2], strict=True) if a != b)
        raise ValueError(
            f"{where} does not nest: by the rule {rule!r} the student's node {a} is not the teacher's, which is {b}; "
            "take a power of two as teacher_steps"
        )
    return stage.steps
