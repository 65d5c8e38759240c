"""ddil-test --teacher: the pipeline whose own images of the prompts are a suite's second reference, for the distances to the teacher."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ddil_lightning.commands.arguments import STEPS, check_prompts, guidance_scale, place
from ddil_lightning.errors import Refusal, one_line

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
"""Loads a pipeline; nobody keeps it, for two large ones may not fit beside each other."""


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
        told = [self.digest, list(suite.prompts), suite.part("teacher").seed]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


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


def named(args: argparse.Namespace, protocol: Protocol | None, cards: Sequence[Mapping[str, Any]]) -> str | None:
    """The pipeline that is the teacher: --teacher, or that of the students' `cards` where a protocol asks for distances to it; else None.

    Raises Refusal for cards that name several, and for --teacher_steps where there is none.
    """
    found = list(dict.fromkeys(str(card["teacher"]) for card in cards if card.get("teacher")))
    if args.teacher is not None or protocol is None or not {*NUMBERS} & {*(protocol.metrics or ())}:
        found = []
    if len(found) > 1:
        raise Refusal(f"the cards name several teachers, {', '.join(found)}: say which, by --teacher")
    teacher = args.teacher or next(iter(found), None)
    if teacher is None and args.teacher_steps is not None:
        raise Refusal("--teacher_steps is of --teacher: name the pipeline by it")
    return teacher


def teacher_of(args: argparse.Namespace, path: str | None, take: Take) -> Teacher | None:
    """The teacher at `path`, loaded once to see what it is; None for none. Raises Refusal, naming it, for what cannot be sampled."""
    from ddil_lightning.backbones.source import Source
    from ddil_lightning.evaluation.rows import pipeline_source

    if path is None:
        return None
    try:
        steps, backbone = args.teacher_steps or FULL, take(Source(path))
        backbone.check_steps(steps)
        scale = guidance_scale(backbone, None if backbone.baked else args.guidance)
        decides = {key: value for key, value in pipeline_source(backbone, steps, scale).about().items() if key != "name"}
    except (ValueError, OSError) as error:
        raise Refusal(f"the teacher {path}: {one_line(error)}; give another by --teacher, or other --teacher_steps") from error
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    about = f"{path} in {steps} steps, guidance_scale {scale:g}"
    return Teacher(lambda: take(Source(path)), steps, scale, about, digest, args.truncate)
