"""The command ddil-probe: the covariate shift of any few-step pipeline against its teacher."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_lightning.commands import entries, generating
from ddil_lightning.commands.arguments import SCALE, SEED, STEPS, Parser, advising, device, is_run, number, path, pipeline_of, place
from ddil_lightning.commands.protocols import add_sources
from ddil_lightning.errors import Refusal
from ddil_lightning.files import check_writable

if TYPE_CHECKING:
    from ddil_lightning.evaluation.findings import Findings

PARTS = ("nodes", "mixing", "switch")
SAMPLERS = tuple(name for name in entries.SAMPLERS if name != "dpm")
"""Those whose steps are a policy's: DPM-Solver++ 2M remembers."""


def _sampler(name: str) -> str:
    """A sampler's name. Raises argparse's ArgumentTypeError for none."""
    if not entries.is_sampler(name) or name == "dpm":
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SAMPLERS)}, with -ts20-tv1.0 or -es1.01 behind it or without")
    return name


def probe(argv: list[str]) -> int:
    """How far a few-step student drifts from its teacher: node by node, and with both of them taking turns (the paper's appendix E)."""
    parser = Parser("ddil-probe", description=probe.__doc__)
    parser.add_argument(
        "--student", type=place, required=True, help=f"a finished run or any pipeline, as {entries.FORM} or a YAML file of a list of one"
    )
    parser.add_argument("--teacher", type=place, help="any pipeline of the same latents, PATH[+LORA] (default: that of the student's card)")
    parser.add_argument("--n", type=number(16, 10**7), help="prompts (default: a protocol's; else 256, or all of a smaller set)")
    parser.add_argument(
        "--protocol",
        type=place,
        help="shapes, digits (default: as the student's card says), a packaged protocol or a YAML file as ddil-test takes them, or "
        "captions of your own, with images or without (COCO json, jsonl, csv, txt, a folder, a data set of Hugging Face)",
    )
    parser.add_argument("--data", type=place, help="the folder of the files that a protocol names, or its file of captions")
    add_sources(parser, "the captions")
    parser.add_argument("--steps", type=STEPS, help="of the student (default: what its card recommends, else 4)")
    parser.add_argument("--teacher_steps", type=STEPS, default=32, help="of the teacher alone: one student step is its share of them")
    parser.add_argument(
        "--sampler", type=_sampler, help=f"the student's by name, {', '.join(SAMPLERS)}, also as ddim-ts20-tv1.0-es1.01 (default: its own)"
    )
    parser.add_argument("--guidance", type=SCALE, help="guidance g of the teacher, and of a student that is told it (default: by its card)")
    parser.add_argument("--student_guidance", type=SCALE, help="guidance_scale of the student (default: by its card, else none)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts alone (default: all)")
    parser.add_argument("--seed", type=SEED, help="of prompts, noise and turns (default: a protocol's own, else 0)")
    parser.add_argument("--truncate", action="store_true", help="cut captions that are too long for the text encoder")
    generating.add_dtype(parser)
    parser.add_argument("--out", type=path, help="the JSON file, with a page beside it (default: probe.json in the run folder, else here)")
    args = parser.parse_args(argv)
    if args.images and args.protocol in (None, "shapes", "digits"):
        raise Refusal(f"--images {args.images} is the folder of a caption file's images: give that file too, by --protocol FILE")
    if args.data and args.protocol is None:
        raise Refusal(f"--data {args.data} holds the files of a protocol: say which, by --protocol NAME or FILE.yaml")
    args.student, args.teacher = entries.student(args.student), args.teacher and entries.teacher(args.teacher)
    home = Path(args.student.source.path)
    out = args.out or (home if is_run(home) else Path.cwd()) / "probe.json"
    if out.suffix.lower() != ".json":
        raise Refusal(f"--out {out}: give a file's name that ends in .json; the page beside it ends in .html")
    check_writable(out)
    check_writable(out.with_suffix(".html"))
    from ddil_lightning.evaluation.findings import Findings
    from ddil_lightning.evaluation.table import write_rows
    from ddil_lightning.runs.probed import text, write_probe

    findings = Findings(out)
    with findings.going_on():
        found = _found(args, findings, out)
        print(text(found), end="", flush=True)  # first: what cannot be written can still be read
        write_rows(out, found)  # type: ignore[arg-type]
        page = write_probe(out.with_suffix(".html"), found)
    print(f"written to {out} and {page}")
    return 0


def _found(args: argparse.Namespace, findings: Findings, out: Path) -> dict[str, Any]:
    """Everything that is measured, and by which protocol.

    The nodes are in `out` before the sweeps begin, unless a probe of before is there, which stays until this one is whole.
    """
    from ddil_lightning.commands.gathering import asked, material
    from ddil_lightning.commands.probing import noded, swept
    from ddil_lightning.evaluation.table import write_rows
    from ddil_lightning.streams import apart

    plan = asked(args) if args.protocol is not None else None  # before pipelines are loaded
    contest, said = _contest(args)
    student, teacher = contest.student, contest.teacher
    protocol = args.protocol or student.about.get("dataset") or teacher.about.get("dataset")
    if protocol is None:
        raise Refusal(f"neither {student.path} nor {teacher.path} names a data set: say --protocol shapes, digits, NAME or CAPTIONS")
    args.protocol = protocol
    given = material(args, plan or asked(args), teacher)
    if not args.truncate:
        with advising("--truncate"):
            student.check_length(given.prompts)
            teacher.check_length(given.prompts)
    sweeps = [part for part in args.only if part != "nodes"]
    suite = given.suite() if sweeps else None  # before anything is sampled: its networks may be missing
    said |= {"n": len(given.prompts), "prompts": protocol, "seed": given.seed}
    latents, without = None, given.without
    if given.pictures is not None and "nodes" in args.only:
        latents, without = contest.forward(given.pictures), given.unread()
    if without and "nodes" in args.only:
        said["left_out"] = f"distances and losses against forward latents: {without}"
        print(f"left out: {said['left_out']}", flush=True)
    first = apart(given.seed)  # of the noise, as a suite of this seed has it
    seen, rows = noded(contest, given.prompts, None if without else latents, first, findings) if "nodes" in args.only else ([], [])
    found: dict[str, Any] = {"protocol": said, "nodes": rows, "mixing": [], "switch": [], "trends": {}}
    if suite is None:
        return found
    found["protocol"] = suite.protocol | said
    if rows and not out.exists():
        write_rows(out, found | {"protocol": found["protocol"] | {"unfinished": sweeps}})  # type: ignore[arg-type]
    # The teacher's walks serve the sweeps too, where these are of the same prompts.
    again = seen if list(suite.prompts) == given.prompts and suite.seed == first else []
    return found | swept(contest, suite, sweeps, findings, again)


def _contest(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Student and teacher, loaded and checked, and what they are in words."""
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.backbones.samplers import check_alike, grid_of, policy_of, scale_of
    from ddil_lightning.backbones.source import Source
    from ddil_lightning.commands.probing import Contest
    from ddil_lightning.commands.rack import ready
    from ddil_lightning.diffusion.policy import Policies
    from ddil_lightning.diffusion.transitions import ddim

    kind, entry = generating.precision(args), replace(args.student, sampler=args.student.sampler or args.sampler)
    if entry.sampler == "dpm":
        raise Refusal(f"--student {entry.name}: dpm remembers its last step, and cannot take turns: give one of {', '.join(SAMPLERS)}")
    asked = entry.steps[0] if entry.steps else args.steps
    path = pipeline_of(entry.source.path, asked, "to probe: ShiftProbe measures it in training")
    student = Pipeline(replace(entry.source, path=path), **kind).to(device())
    source = args.teacher or Source.of_card(student.about)
    if source is None:
        raise Refusal(f"{student.path} has no card that names its teacher: give it, by --teacher")
    teacher = Pipeline(source, **kind).to(device())
    check_alike(student, teacher)
    student = ready(entry, student)
    steps = asked or int(student.about.get("steps", 4))
    if args.teacher_steps < steps:
        raise Refusal(f"--teacher_steps {args.teacher_steps} are fewer than the student's {steps}: give at least as many")
    grid, k = grid_of(student, steps), round(args.teacher_steps / steps)
    own = student.guidance if "method" in student.about else teacher.guidance
    g = own if args.guidance is None else args.guidance
    told = args.student_guidance if entry.guidance is None else entry.guidance
    told = args.guidance if student.network().w_conditioned and told is None else told
    scales = scale_of(student, told, g), g
    policies = Policies(policy_of(student, scales[0]), policy_of(teacher, g, ddim, k))
    said: dict[str, Any] = {"student": entries.written(student.source), "teacher": entries.written(teacher.source)}
    said |= {"times": grid.times.tolist(), "substeps": k, "guidance": g}
    said |= {"student_guidance_scale": scales[0], "sampler": f"{type(student.pipe.scheduler).__name__} {student.remedy or ''}".strip()}
    return Contest(student, teacher, policies, grid, scales), said
