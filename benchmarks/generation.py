"""What drawing images for a table costs: ddil-test's sampler beside the diffusers pipeline, called plainly in the same batches.

Block by block in turn, so that both meet the same machine; the first round warms up. The images must be the same, pixel by pixel. The third
row also keeps them as PNG.

    python benchmarks/generation.py [--pipeline DIR|builtin|random] [--steps 4] [--batch 32] [--rounds 6] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import tables
import torch
from torch import Tensor

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.commands.arguments import device
from ddil_lightning.evaluation.drawing import Timed
from ddil_lightning.evaluation.kept import Keep, Kept
from ddil_lightning.evaluation.rows import pipeline_source
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.miniature.sources import load_source
from ddil_lightning.processes import Processes

COLUMNS = (("name", ""), ("seconds_per_image", "s / image"), ("speed", "speed"), ("different", "pixels that differ"))
PLAIN, OURS, KEPT = "pipeline(...)", "ddil-test", "ddil-test --keep_images"

Draw = Callable[[int], Tensor]
"""A block's images [N, 3, H, W], uint8, from its first seed."""


def plain(backbone: Pipeline, prompts: Sequence[str], g: float, args: argparse.Namespace) -> Draw:
    """The pipeline as a script calls it."""

    def draw(seed: int) -> Tensor:
        made = []
        for i in range(0, len(prompts), args.batch):
            part = list(prompts[i : i + args.batch])
            generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
            options: dict[str, Any] = {"num_inference_steps": args.steps, "guidance_scale": g, "output_type": "pt"}
            made.append(to_uint8(2 * backbone.pipe(part, generator=generators, **options).images - 1))
        return torch.cat(made)

    return draw


def ours(backbone: Pipeline, prompts: Sequence[str], g: float, args: argparse.Namespace, keep: Path | None = None) -> Draw:
    """The same images as a row of ddil-test has them drawn, checked and, with `keep`, written."""
    source = pipeline_source(backbone, args.steps, g, batch=args.batch)

    def draw(seed: int) -> Tensor:
        suite = Suite("prompts", prompts, seed=seed, batch=args.batch)
        timed = Timed(source.sample, chunk=args.batch)
        # A folder of its own for every block: what is there is not drawn again.
        sample = Kept(Keep(keep), f"{source.name} from {seed}", suite, {}, timed, Processes()) if keep else timed
        return torch.cat([to_uint8(batch.images) for batch in suite.batches(sample, suite.passes()[0])])

    return draw


def measure(args: argparse.Namespace) -> tables.Report:
    """Time the blocks and make the report."""
    now = common.clock(args)
    if args.quick:
        args.rounds, args.batch, args.steps = 1, 4, 1
    backbone = Pipeline(common.pipeline_at(args.pipeline)).to(device())
    prompts = load_source(backbone.about["dataset"]).prompts(2 * args.batch, args.seed)
    g = float(backbone.about.get("guidance_scale", backbone.guidance))
    seconds: dict[str, list[float]] = {PLAIN: [], OURS: [], KEPT: []}
    different = dict.fromkeys(seconds, 0)
    with tempfile.TemporaryDirectory() as folder:
        draws = {
            PLAIN: plain(backbone, prompts, g, args),
            OURS: ours(backbone, prompts, g, args),
            KEPT: ours(backbone, prompts, g, args, Path(folder)),
        }
        for k in range(args.rounds + 1):
            images = {}
            for name, draw in draws.items():
                begun = now()
                images[name] = draw(args.seed + k * len(prompts))
                common.synchronize(backbone.device)
                seconds[name] += [now() - begun] if k else []
                different[name] += int((images[name] != images[PLAIN]).sum())
    return report(seconds, different, len(prompts), args)


def report(seconds: dict[str, list[float]], different: dict[str, int], n: int, args: argparse.Namespace) -> tables.Report:
    """Speeds relative to the plain block of the same round, median over the rounds."""
    rows: list[dict[str, Any]] = []
    for name, own in seconds.items():
        speeds = [a / b for a, b in zip(seconds[PLAIN], own, strict=True)]
        rows.append(
            {
                "name": name,
                "seconds_per_image": statistics.median(own) / n,
                "speed": statistics.median(speeds),
                "different": different[name],
            }
        )
    return {
        "benchmark": "generation",
        "columns": COLUMNS,
        "rows": rows,
        "targets": [
            tables.target("speed of generation beside the pipeline's", rows[1]["speed"], 0.95),
            tables.target("pixels that differ from the pipeline's", rows[1]["different"] + rows[2]["different"], 0, at_most=True),
        ],
        "notes": [f"{args.rounds} rounds of {n} images in batches of {args.batch}, {args.steps} steps, after one that warms up"],
    }


def main(argv: list[str] | None = None) -> tables.Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="images in a call")
    parser.add_argument("--rounds", type=int, default=6, help="blocks of two calls of each")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--cpu_time", action="store_true", help="read the CPU clock of this process: for a busy machine, with --threads 1")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
