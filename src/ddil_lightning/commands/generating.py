"""Options of commands that sample pipelines: in what precision, and of a table in what batches, and where its images are kept."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ddil_lightning.commands.arguments import number, path
from ddil_lightning.errors import Refusal
from ddil_lightning.files import check_writable
from ddil_lightning.signals import Stopped

if TYPE_CHECKING:
    from ddil_lightning.evaluation.generation import Generation
    from ddil_lightning.evaluation.suite import Suite
    from ddil_lightning.processes import Processes

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype(text: str) -> str:
    """The name of a precision, short or as torch has it. Raises argparse's ArgumentTypeError for none."""
    name = DTYPES.get(text, text)
    if name not in DTYPES.values():
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DTYPES)}")
    return name


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add that of the precision, which is the same for all commands that load a pipeline."""
    parser.add_argument(
        "--dtype", type=dtype, metavar="|".join(DTYPES), help="of network and text encoders (default: fp32); the autoencoder stays in fp32"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them to the parser of a command that makes a table."""
    add_dtype(parser)
    parser.add_argument("--batch", type=number(1, 10**5), help="images at a time (default: fewer the larger the latents are)")
    parser.add_argument(
        "--samples", type=number(1, 1000), default=1, help="images of each prompt (default: 1; GenEval and DPG-Bench ask for 4)"
    )
    parser.add_argument(
        "--keep_images",
        type=path,
        metavar="DIR",
        help="keep every image as PNG in a folder a row; the same command goes on with what is there",
    )
    parser.add_argument(
        "--layout",
        choices=("folder", "geneval", "dpg"),
        default="folder",
        help="of kept images: plain, or as GenEval or DPG-Bench reads them",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raises Refusal for options that do not go together, and OSError for a folder that cannot be written, before anything is loaded."""
    if args.layout != "folder" and args.keep_images is None:
        raise Refusal(f"--layout {args.layout} is of kept images: say where, by --keep_images DIR")
    if args.layout == "dpg" and args.samples > 4:
        raise Refusal(f"--samples {args.samples}: a picture of DPG-Bench holds at most 4 images of a prompt")
    if args.keep_images is not None:
        if args.keep_images.exists() and not args.keep_images.is_dir():
            raise Refusal(f"--keep_images {args.keep_images} is a file: give a folder")
        check_writable(args.keep_images / "generation.json")
    if args.dtype and getattr(args, "ckpt_path", None):
        raise Refusal("--dtype is of a pipeline: a checkpoint is tested in the precision of its config")


def precision(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a `Pipeline` that --dtype stands for."""
    import torch

    return {"dtype": getattr(torch, args.dtype)} if args.dtype else {}


def several(args: argparse.Namespace, suite: Suite) -> Suite:
    """The suite with as many images a prompt as --samples asks for, which its name tells."""
    if args.samples == 1:
        return suite
    return replace(suite, samples=args.samples, changed={**suite.changed, "samples": args.samples})


def generation(args: argparse.Namespace, processes: Processes) -> Generation:
    """How the images of all rows come about."""
    from ddil_lightning.evaluation.generation import Generation
    from ddil_lightning.evaluation.kept import Keep

    keep = Keep(args.keep_images, args.layout) if args.keep_images else None
    return Generation(args.batch, keep, processes, told=True)


@contextmanager
def resumable(args: argparse.Namespace) -> Iterator[None]:
    """Inside, a signal that stops the command also says that it can go on, where images are kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if args.keep_images is None:
            raise
        said = f"stopped; the images in {args.keep_images} stay, and the same command goes on"
        raise Stopped(getattr(stop, "number", signal.SIGINT), said) from stop
