"""The command ddil-export: the student of a checkpoint in the formats that its users' tools open."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ddil_lightning.commands.arguments import STEPS, Parser, device, path, place
from ddil_lightning.errors import Refusal
from ddil_lightning.files import check_writable, read_table

FORMATS = ("diffusers", "lora", "kohya", "single-file", "comfy")
"""Those of `runs.release`, which imports torch."""


def export(argv: list[str]) -> int:
    """The student of a checkpoint as a folder to publish: in one or several formats, each reloaded and compared, with a model card."""
    args = _parser().parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise Refusal(f"{args.out} is there and not an empty folder: choose another --out")
    if args.public and args.push is None:
        raise Refusal("--public says who sees what --push uploads: give --push owner/name too")
    check_writable(args.out / "README.md")
    from ddil_lightning.runs.card import unlicensed
    from ddil_lightning.runs.release import Push, release

    push = None if args.push is None else Push(args.push, args.public)
    from ddil_lightning.commands.restore import restore

    method = restore(args.ckpt_path).to(device())
    given = _release(method, args)
    for what, difference in release(method, given):
        print(f"written and checked: {what} (latents differ by {difference:.1e})", flush=True)
    print(f"model card: {args.out / 'README.md'}")
    if args.license is None and unlicensed(args.out / "README.md"):
        print(f"its licence is `other`, for the card of {method.backbone.path} names none or cannot be had: say it, by --license")
    if push is not None:
        print(f"uploaded: {push.upload(given)} ({'public' if args.public else 'private'})")
    return 0


def _parser() -> Parser:
    parser = Parser("ddil-export", description=export.__doc__)
    parser.add_argument("--ckpt_path", type=place, required=True, help="a checkpoint file or a run folder")
    parser.add_argument("--out", type=path, required=True, help="the folder to write: a new or an empty one")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["diffusers"],
        help="diffusers: OUT/pipeline; lora: adapters for load_lora_weights; kohya: these for ComfyUI and A1111; single-file: all in one; "
        "comfy: adapters of a transformer under ComfyUI's names",
    )
    parser.add_argument("--name", type=_name, help="what the files are called, before the step count (default: config and teacher)")
    parser.add_argument("--steps", type=STEPS, help="the step count that the folder recommends (default: what the student is made for)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of all components (default: float32)"
    )
    parser.add_argument("--safety_checker", action="store_true", help="the pipeline with the teacher's safety checker")
    parser.add_argument("--license", help="of the student, for the card (default: what the teacher's card names, else other)")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to the Hugging Face hub, with your own token, as a private repository"
    )
    parser.add_argument("--public", action="store_true", help="as one that everybody can read")
    return parser


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for files: letters, digits, dots, dashes and underscores")
    return text


def _release(method: Any, args: Any) -> Any:
    import torch

    from ddil_lightning.commands.configs import read_config
    from ddil_lightning.runs.checkpoint import config_of
    from ddil_lightning.runs.export import check_prompts, check_steps, untrained
    from ddil_lightning.runs.release import Release, check_formats, default_name

    check_formats(method, args.format)
    if args.steps is not None:
        try:
            check_steps(method.deployment, args.steps)
        except ValueError as error:
            raise Refusal(f"--steps {args.steps}: {error}") from error
        if said := untrained(method, method.deployment, args.steps):
            print(said, flush=True)
    config: Path = config_of(args.ckpt_path)
    settings, summary = read_config(config), read_table(config.parent / "summary.json")
    if summary.get("student_updates") != method.student_updates:  # measured at another checkpoint
        summary = {}
    return Release(
        args.out,
        args.format,
        args.name or default_name(settings.get("name"), method.backbone.path),
        args.steps or method.deployment.steps[0],
        check_prompts(method, []),
        getattr(torch, args.dtype),
        args.safety_checker,
        {"config": settings, "summary": summary},
        args.license,
        args.push,
    )
