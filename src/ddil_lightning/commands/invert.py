"""The command ddil-invert: prompts that a teacher gives back for images, and what few-step students make of them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_lightning.commands import entries, generating
from ddil_lightning.commands.arguments import SCALE, SEED, STEPS, Parser, number, path, place
from ddil_lightning.errors import Refusal
from ddil_lightning.files import check_writable

if TYPE_CHECKING:
    from ddil_lightning.evaluation.findings import Findings


def invert(argv: list[str]) -> int:
    """Prompts of images, found by the teacher (PH2P), and how like these images every student draws them (the paper's appendix F)."""
    parser = Parser("ddil-invert", description=invert.__doc__)
    parser.add_argument(
        "--teacher", type=place, help="the pipeline that prompts are found by (default: the one that a student's card names)"
    )
    parser.add_argument(
        "--student",
        type=place,
        action="append",
        default=[],
        help=f"a finished run or any pipeline, as {entries.FORM} or a YAML file of a list of one; may be given several times",
    )
    parser.add_argument(
        "--images", type=place, default="builtin", help="a folder of pictures (default: builtin, held-out ones of built-in data)"
    )
    parser.add_argument("--n", type=number(1, 10**6), help="images (default: 16, or all of a smaller folder)")
    parser.add_argument("--tokens", type=number(1, 10**4), help="words of a prompt (default: 10, or as many as the text encoder reads)")
    parser.add_argument("--updates", type=number(0, 10**6), default=40, help="of the embeddings, projected after every tenth and the last")
    parser.add_argument("--passes", type=number(0, 1000), default=2, help="rounds in which words are exchanged (our PH2P, by Adam: 0)")
    parser.add_argument(
        "--timesteps", type=number(0, 10**6), nargs=2, metavar=("LOW", "HIGH"), help="of the loss (default: those of high noise, 700 999)"
    )
    parser.add_argument("--seeds", type=number(1, 1000), default=4, help="images of each prompt; the paper's diversity takes 10")
    parser.add_argument("--steps", type=STEPS, help="of the students (default: what their cards recommend, else 4)")
    parser.add_argument("--teacher_steps", type=STEPS, default=32, help="of the teacher")
    parser.add_argument("--guidance", type=SCALE, help="guidance g of the teacher, and of a student that is told it (default: by its card)")
    parser.add_argument(
        "--network", nargs="+", default=[], metavar="NAME", help="of features=NAME[:PATH] and distance=NAME[:PATH], as ddil-test has them"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of images, search and noise")
    generating.add_dtype(parser)
    parser.add_argument("--out", type=path, default=Path("invert.json"), help="the JSON file (default: invert.json)")
    args = parser.parse_args(argv)
    if args.teacher is None and not args.student:
        raise Refusal("give --teacher, by which prompts are found, or a --student whose card names one")
    if args.out.suffix.lower() != ".json":
        raise Refusal(f"--out {args.out}: give a file's name that ends in .json")
    check_writable(args.out)
    from ddil_lightning.evaluation.findings import Findings
    from ddil_lightning.evaluation.table import write_rows
    from ddil_lightning.runs.inverted import text

    findings = Findings(args.out)
    with findings.going_on():
        found = _found(args, findings)
        print(text(found), end="", flush=True)  # first: what cannot be written can still be read
        write_rows(args.out, found)  # type: ignore[arg-type]
    print(f"written to {args.out}")
    return 0


def _found(args: argparse.Namespace, findings: Findings) -> dict[str, Any]:
    """Everything that is found and measured, and by which settings."""
    from dataclasses import asdict

    import torch

    from ddil_lightning.backbones.vocabulary import Vocabulary
    from ddil_lightning.commands.inverting import compared, inverted, material

    teacher, students = _cast(args)
    vocabulary = Vocabulary(teacher.backbone)
    search = _search(args, vocabulary)
    given = material(args.images, args.n, args.seed, teacher.backbone, args.network)
    measures = given.measures()  # before anything is searched: its networks may be missing
    longest = [vocabulary.text(torch.zeros(search.tokens, dtype=torch.long)), *(given.captions or [])]
    for sampler in (teacher, *students):  # before an hour of search and not after it
        sampler.backbone.check_length(longest)
    prompts = inverted(given, vocabulary, search, args.seed, findings)
    rows, recovery = compared([teacher, *students], given, [found["prompt"] for found in prompts], measures, args.seeds, args.seed)
    said = {"teacher": teacher.name, "students": [s.name for s in students], "images": given.about, "n": len(given.names)}
    said |= {"search": asdict(search), "seeds": args.seeds, "seed": args.seed, "networks": measures.networks.about()}
    return {"protocol": said, "prompts": prompts, "rows": rows, "recovery": recovery}


def _search(args: argparse.Namespace, vocabulary: Any) -> Any:
    """The settings of the search, checked against the teacher."""
    from ddil_lightning.evaluation.inversion import Search

    backbone, plain = vocabulary.backbone, Search()
    total = backbone.schedule.steps
    low, high = args.timesteps or (7 * total // 10, total - 1)
    if not low <= high < total:
        raise Refusal(f"--timesteps {low} {high}: give two from 0 to {total - 1}, those of {backbone.path}, the smaller one first")
    tokens = min(plain.tokens, vocabulary.longest) if args.tokens is None else args.tokens
    if tokens > vocabulary.longest:
        raise Refusal(f"--tokens {tokens}: the text encoder of {backbone.path} reads {vocabulary.longest} words at most")
    return Search(tokens=tokens, updates=args.updates, passes=args.passes, timesteps=(low, high))


def _cast(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The teacher and the students, loaded and checked against each other."""
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.backbones.samplers import check_alike, scale_of
    from ddil_lightning.backbones.source import Source
    from ddil_lightning.commands.arguments import check_steps, device, pipeline_of
    from ddil_lightning.commands.inverting import Sampler
    from ddil_lightning.commands.rack import ready

    kind, loaded = generating.precision(args), []
    for word, entry in [(word, entries.student(word)) for word in args.student]:
        asked = entry.steps[0] if entry.steps else args.steps
        path = pipeline_of(entry.source.path, asked, "to invert with")
        made = ready(entry, Pipeline(replace(entry.source, path=path), **kind).to(device()))
        loaded.append((word, made, asked or int(made.about.get("steps", 4)), entry.guidance))
    named = entries.teacher(args.teacher) if args.teacher else None
    source = named or next((found for _, s, *_ in loaded if (found := Source.of_card(s.about))), None)
    if source is None:
        raise Refusal(f"{args.student[0]} has no card that names its teacher: give it, by --teacher")
    teacher = Pipeline(source, **kind).to(device())
    g = teacher.guidance if args.guidance is None else args.guidance
    check_steps(teacher, [args.teacher_steps])
    students = []
    for word, student, steps, guidance in loaded:
        check_alike(student, teacher)
        check_steps(student, [steps])
        told = args.guidance if student.network().w_conditioned and guidance is None else guidance
        students.append(Sampler(word, student, steps, scale_of(student, told, g)))
    return Sampler(entries.written(source), teacher, args.teacher_steps, g), students
