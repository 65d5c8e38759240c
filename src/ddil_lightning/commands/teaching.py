"""ddil-test --teacher: the pipeline whose own images of the prompts are a suite's second reference, for the distances to the teacher."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ddil_lightning.commands.arguments import SCALE, STEPS, check_prompts, guidance_scale, place
from ddil_lightning.errors import Refusal, one_line
from ddil_lightning.texts import json_digest

if TYPE_CHECKING:
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.backbones.source import Source
    from ddil_lightning.evaluation.generation import Generation
    from ddil_lightning.evaluation.protocols import Protocol
    from ddil_lightning.evaluation.suite import Suite

NUMBERS = ("frechet_teacher", "patch_frechet_teacher")
FULL = 32
"""The teacher's own step count where nothing is said of it."""

Take = Callable[["Source"], "Pipeline"]
"""Loads a pipeline, which is let go of when its images are drawn."""


class Asked(NamedTuple):
    """Which teacher is asked for. `guidance`: g at which the students were distilled, None where that is not one number; `spare`: whether
    the distances to it are left out where it cannot be had, as one that a card names, and not the user."""

    source: Source
    guidance: float | None
    spare: bool


class Teacher(NamedTuple):
    """The teacher of a test. `about`: what rows call it; `digest`: of all that decides on its images besides the suite."""

    take: Callable[[], Pipeline]
    steps: int
    scale: float
    about: str
    digest: str
    truncate: bool

    def awaited(self, suite: Suite) -> Suite:
        """The suite before the teacher's images are drawn. Of a protocol that asks for no distance to a teacher it is asked for these."""
        if suite.asked is not None and not {*NUMBERS} & {*suite.asked}:
            numbers = [key for key in NUMBERS if not key.startswith("patch") or "patches" in suite.given.has()]
            suite = replace(suite, asked=[*suite.asked, *numbers], changed={**suite.changed, "teacher": self.about})
        return suite.awaiting(self.about, self._content(suite))

    def taught(self, suite: Suite, how: Generation) -> Suite:
        """The suite with the teacher's images, drawn, or as their statistics were kept. Raises Refusal, naming it, for what cannot be."""
        from ddil_lightning.evaluation.rows import pipeline_source

        try:
            suite.for_pipeline(backbone := self.take())
            check_prompts(self.truncate, replace(suite, probes=suite.probes._replace(prompts=())), backbone)
            source = pipeline_source(backbone, self.steps, self.scale, batch=how.batch)._replace(name="the teacher")
            return how.taught(suite, source, self.about, self._content(suite))
        except ValueError as error:
            raise Refusal(f"{self.about}: {one_line(error)}") from error

    def _content(self, suite: Suite) -> str:
        """A digest of all that decides on its images of the suite's prompts."""
        return json_digest([self.digest, list(suite.prompts), suite.part("teacher").seed])


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ddil-test that name a teacher."""
    parser.add_argument(
        "--teacher",
        type=place,
        metavar="PIPELINE",
        help="measure the distance to its own images of the prompts, too: a folder, a hub id, a built-in name (default: none; the one that "
        "the student's card names, where the protocol's metrics ask for it)",
    )
    parser.add_argument("--teacher_steps", type=STEPS, help=f"of the teacher (default: {FULL})")
    parser.add_argument(
        "--teacher_guidance",
        type=SCALE,
        help="guidance g of the teacher (default: --guidance, else what the student was distilled at, else what the teacher recommends)",
    )


def named(args: argparse.Namespace, protocol: Protocol | None, cards: Sequence[Mapping[str, Any]]) -> Asked | None:
    """The pipeline that is the teacher: --teacher, or that of the students' `cards` where a protocol asks for distances to it; else None.

    Raises Refusal for cards that name several, and for the teacher's options where there is none.
    """
    from ddil_lightning.backbones.source import Source

    found: list[Source] = []
    for source in map(Source.of_card, cards):
        found += [source] if source is not None and source not in found else []
    at = {float(card["guidance"]) for card in cards if "method" in card and "guidance" in card}
    guidance = at.pop() if len(at) == 1 else None
    if args.teacher is not None:
        return Asked(Source(args.teacher), guidance, False)
    if found and protocol is not None and {*NUMBERS} & {*(protocol.metrics or ())}:
        if len(found) > 1:
            raise Refusal(f"the cards name several teachers, {', '.join(source.path for source in found)}: say which, by --teacher")
        return Asked(found[0], guidance, not args.strict)
    for option in ("teacher_steps", "teacher_guidance"):
        if getattr(args, option) is not None:
            raise Refusal(f"--{option} is of --teacher: name the pipeline by it")
    return None


def teacher_of(args: argparse.Namespace, asked: Asked | None, take: Take) -> Teacher | None:
    """The teacher that is asked for, loaded once to see what it is; None for none, and for one that is spared.

    Raises Refusal, naming it, for what cannot be sampled.
    """
    from ddil_lightning.evaluation.known import VERSION
    from ddil_lightning.evaluation.rows import pipeline_source

    if asked is None:
        return None
    source, steps = asked.source, args.teacher_steps or FULL
    try:
        backbone = take(source)
        backbone.check_steps(steps)
        said = next((g for g in (args.teacher_guidance, args.guidance, asked.guidance) if g is not None), None)
        scale = guidance_scale(backbone, args.teacher_guidance if backbone.baked else said)
        decides = {key: value for key, value in pipeline_source(backbone, steps, scale).about().items() if key != "name"}
    except (ValueError, OSError) as error:
        if asked.spare:
            print(f"left out: the distances to the teacher {source.path}, for {one_line(error)}; give one by --teacher", flush=True)
            return None
        raise Refusal(f"the teacher {source.path}: {one_line(error)}; give another by --teacher, or other --teacher_steps") from error
    digest = json_digest([VERSION, decides])
    told = "".join(f", {name} {value}" for name, value in sorted(source.options.items()))
    about = f"{source.path}{told} in {steps} steps, guidance_scale {scale:g}"
    return Teacher(lambda: take(source), steps, scale, about, digest, args.truncate)
