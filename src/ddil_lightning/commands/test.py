"""The command ddil-test: metrics of a run, a checkpoint or a pipeline folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_lightning.commands import comparing, generating, protocols, teaching
from ddil_lightning.commands.arguments import (
    SCALE,
    SEED,
    STEPS,
    Parser,
    baked,
    check_prompts,
    check_steps,
    device,
    guidance_scale,
    number,
    path,
    place,
)
from ddil_lightning.commands.launched import together
from ddil_lightning.commands.rack import Rack
from ddil_lightning.errors import Refusal
from ddil_lightning.files import check_writable
from ddil_lightning.runs.checkpoint import config_of

if TYPE_CHECKING:
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.commands.teaching import Teacher
    from ddil_lightning.evaluation.generation import Generation
    from ddil_lightning.evaluation.suite import Suite
    from ddil_lightning.processes import Processes


SHOWN = 6
"""Rows of before that a line names."""


def test(argv: list[str]) -> int:
    """Metrics of a run, a checkpoint or a pipeline folder, as a table and in metrics.json."""
    args = _parser().parse_args(argv)
    if args.save_reference:
        return protocols.save_reference(args, protocols.planned(args), device())
    if args.compare:
        generating.check_options(args)
        return comparing.compare(args)
    if args.fresh:
        raise Refusal("--fresh is of --compare: leave it out")
    if sum(x is not None for x in (args.run, args.ckpt_path, args.pipeline)) != 1:
        raise Refusal("give one of: a run folder, --ckpt_path FILE, --pipeline DIR")
    if args.images and args.protocol is None and args.data in (None, "shapes", "digits"):
        raise Refusal(f"--images {args.images} is the folder of a caption file's images: give that file too, by --data FILE")
    generating.check_options(args)
    home = Path(args.run) if args.run else config_of(args.ckpt_path).parent if args.ckpt_path else Path.cwd()
    out = args.out or home / "metrics.json"
    if out.is_dir():
        raise Refusal(f"--out {out} is a folder: give the name of a file, such as {out / 'metrics.json'}")
    check_writable(out)
    args.plan = protocols.planned(args)
    processes, where = together()
    how = generating.generation(args, processes)
    with _written(out, processes) as add, generating.resumable(args):
        for row in (_checkpoint_rows if args.ckpt_path else _pipeline_rows)(args, how, where):
            add(row)
    return 0


@contextmanager
def _written(out: Path, processes: Processes) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what adds a row to the file `out`, whole after each. At the end, also that of an error, the table of all rows is printed.

    Rows that the file has and no new one stands for stay in it, under `earlier`, and are named.
    """
    from ddil_lightning.evaluation import earlier
    from ddil_lightning.evaluation.stamps import called
    from ddil_lightning.evaluation.table import table, write_rows

    rows: list[dict[str, Any]] = []
    written, before = False, earlier.read(out) if processes.first else []

    def write() -> None:
        stay = earlier.staying(before, rows)
        found = {"rows": rows, "n": rows[0]["n"], "seed": rows[0]["protocol"]["seeds"]["first"]}
        write_rows(out, found | ({"earlier": stay} if stay else {}))  # type: ignore[arg-type]

    def add(row: dict[str, Any]) -> None:
        nonlocal written
        rows.append(row)
        written = False  # until this one is in the file, too
        processes.by_first(write)
        written = True

    try:
        yield add
    finally:
        if rows and processes.first:
            print(table(rows), end="", flush=True)  # also of what could not be written
        if written and processes.first:
            print(f"measured by {called(rows[0]['protocol'])}; written to {out}", flush=True)
            stay = earlier.staying(before, rows)
            named = ", ".join(map(earlier.called, stay[:SHOWN])) + (f" and {len(stay) - SHOWN} more" if len(stay) > SHOWN else "")
            print(f"rows of before stay in it, under `earlier`: {named}\n" if stay else "", end="", flush=True)


def _parser() -> Parser:
    parser = Parser("ddil-test", description=test.__doc__)
    parser.add_argument("run", nargs="?", type=place, help="a run folder (its exported pipelines are tested)")
    parser.add_argument("--ckpt_path", type=place, help="a checkpoint file of a run, beside or below its config.yaml")
    parser.add_argument("--pipeline", type=place, help="any pipeline folder, a hub id, builtin, builtin/digits or builtin/flow")
    parser.add_argument("--steps", type=STEPS, nargs="+", help="step counts (default: those a student is made for, 32 for a teacher)")
    parser.add_argument("--guidance", type=SCALE, help="guidance g (default: what the pipeline recommends)")
    parser.add_argument("--dpm", action="store_true", help="rows with DPM-Solver++ 2M too, for students that step by DDIM")
    parser.add_argument("--n", type=number(16, 10**7), help="prompts (default: the protocol's; 1000, or all of a smaller set of your own)")
    parser.add_argument("--seed", type=SEED, help="of prompts and noise (of a protocol: of its noise)")
    parser.add_argument("--truncate", action="store_true", help="cut captions that are too long for the text encoder")
    parser.add_argument(
        "--data",
        type=place,
        help="shapes, digits (default: what the pipeline names), captions of your own (COCO json, jsonl, csv, txt, a folder, a data set of "
        "Hugging Face), or the folder of the files that a protocol names",
    )
    protocols.add_options(parser)
    teaching.add_options(parser)
    parser.add_argument("--out", type=path, help="the JSON file (default: metrics.json in the run folder, else here)")
    generating.add_options(parser)
    comparing.add_options(parser)
    return parser


def _pipeline_rows(args: argparse.Namespace, how: Generation, where: Any) -> Iterator[dict[str, Any]]:
    """Each when it is measured. Student, teacher and the students of earlier stages are on the device in turn."""
    from ddil_lightning.backbones.loading import recommended
    from ddil_lightning.backbones.source import Source
    from ddil_lightning.evaluation.rows import pipeline_row
    from ddil_lightning.runs.folder import stage_pipelines

    if args.run and (Path(args.run) / "student.safetensors").is_file():
        raise Refusal(f"no pipeline can hold the student of {args.run}, so there is none to test: its rows are in summary.json")
    if args.run and not (Path(args.run) / "pipeline").is_dir():
        raise Refusal(f"{args.run} holds no exported pipeline (pipeline/): give a finished run, or --ckpt_path for one that is not")
    rack, own = Rack(where, generating.precision(args)), Source(str(Path(args.run) / "pipeline") if args.run else args.pipeline)
    teacher = _teacher(args, recommended(own.path), rack)
    suite = protocols.suite_of(args, args.plan, rack.take(own), how.processes, teacher)
    stages = {n: Source(str(folder)) for n, folder in stage_pipelines(Path(args.run)).items()} if args.run else {}
    counts, g = _checked(args, rack.take(own), suite, stages)
    suite = teacher.taught(suite, how) if teacher else suite
    for n in counts:
        tested = rack.take(stages.get(n, own))
        for dpm in _solvers(args, tested):
            yield pipeline_row(suite, tested, n, g, dpm, how)
        del tested  # nobody keeps what the next one takes the place of


def _checked(args: argparse.Namespace, backbone: Pipeline, suite: Suite, stages: Mapping[int, Any]) -> tuple[list[int], float]:
    """The step counts of the rows and their guidance_scale, after prompts were measured, and counts that no stage is for were tried."""
    from ddil_lightning.backbones import sampling

    check_prompts(args.truncate, suite, backbone)
    own = backbone.about.get("made_for", [4, 2, 1] if "method" in backbone.about else [32])
    g = guidance_scale(backbone, args.guidance)
    counts = args.steps or sorted({*stages, *own}, reverse=True)
    own_counts, solvers = [n for n in counts if n not in stages], _solvers(args, backbone)
    check_steps(backbone, own_counts, solvers)
    for dpm in solvers if own_counts else ():  # some schedulers fail in few steps only, which would be after all the others
        sampling.pipeline_latents(backbone.with_solver(dpm), suite.prompts[:1], min(own_counts), g)
    return counts, g


def _solvers(args: argparse.Namespace, backbone: Any) -> list[bool]:
    """Whether DPM-Solver++ 2M, for each row of a step count."""
    return [False, True] if args.dpm and backbone.steps_by_ddim else [False]


def _checkpoint_rows(args: argparse.Namespace, how: Generation, where: Any) -> Iterator[dict[str, Any]]:
    """Each when it is measured. The method leaves the device for its teacher's images."""
    from ddil_lightning.commands.restore import restore
    from ddil_lightning.evaluation.rows import of_checkpoint, student_rows
    from ddil_lightning.runs.checkpoint import find_checkpoint
    from ddil_lightning.runs.export import about_student

    # Once, for all processes: a run that goes on removes it, or has a newer one by the time of the rows.
    path = how.processes.by_first(lambda: find_checkpoint(str(args.ckpt_path), None, ""))
    method = restore(path)
    rack = Rack(where, {"dtype": method.backbone.dtype})
    teacher = _teacher(args, about_student(method, method.deployment.steps[0]), rack)
    rack.clear()
    deployment = method.to(where).deployment
    suite = protocols.suite_of(args, args.plan, method.backbone, how.processes, teacher)
    check_prompts(args.truncate, suite, method.backbone)
    if args.guidance is not None and not (deployment.told or deployment.guided):
        raise Refusal(baked(args.ckpt_path, deployment.quoted))
    g = deployment.quoted if args.guidance is None else args.guidance
    counts = args.steps or deployment.steps
    for n in counts:
        deployment.sampler(n)  # what its grid cannot take is refused before anything is drawn
    if teacher:
        method.cpu()
        suite = teacher.taught(suite, how)
        rack.clear()
        deployment = method.to(where).deployment
    of = of_checkpoint(path, method)
    yield from student_rows(suite, method.backbone, {n: deployment.sampler(n) for n in counts}, g, args.dpm, how, of)


def _teacher(args: argparse.Namespace, card: Mapping[str, Any], rack: Rack) -> Teacher | None:
    """Whose images of the prompts are a second reference, by the options or the student's `card`; None for nobody's."""
    return teaching.teacher_of(args, teaching.named(args, args.plan and args.plan.protocol, [card]), rack.take)
