"""Distillation at the real size on a CPU: the memory of one update, with adapters on one base in bfloat16.

Networks are those of the published configurations with random weights: 0.86 billion of Stable Diffusion 1.5, 2.6 billion of SDXL, with
their text encoders and autoencoder. Stable Diffusion 3.5 medium and Flux.1 dev have their real width and so many --blocks (Flux: of each
kind), not all 24 and 57. Every setting runs in a process of its own; its peak is that of the process less what it was before the networks
were loaded (the interpreter and the libraries).

    python benchmarks/large.py [--models sd15 sdxl sd35 flux] [--side 128] [--blocks 3] [--updates 2] [--quantize int8] [--json FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import common
import published
import published_flows
import real_size
import tables
import torch
from real_size import Cell

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.quantising import Quantize
from ddil_lightning.backbones.source import Source
from ddil_lightning.runs.memory import Meter, gib

T = TypeVar("T")
CELLS = {
    "sd15": (Cell("SD1.5", "LCM", 64, True, 1),),
    "sdxl": (Cell("SDXL", "DMD2", 64, True, 1),),
    "sd35": (Cell("SD3.5 medium", "LCM", 64, True, 1), Cell("SD3.5 medium", "DMD2", 64, True, 1)),
    "flux": (Cell("Flux.1 dev", "LCM", 64, True, 1), Cell("Flux.1 dev", "DMD2", 64, True, 1)),
    "tiny": (Cell("tiny", "LCM", 4, True, 1), Cell("tiny", "DMD2", 4, True, 1)),
}
FLOWS = ("sd35", "flux")
LARGEST = 8.0
"""GiB that a flow transformer of a few blocks may take, whatever it is distilled by."""
COLUMNS = (
    ("name", ""),
    ("trained", "trained weights, millions"),
    ("updates", "updates"),
    ("seconds", "seconds an update"),
    ("peak", "peak, GiB"),
)


def one(folder: str, cell: Cell, side: int, updates: int, quantize: Quantize | None) -> dict[str, Any]:
    """A row, measured in this process from the loading of the pipeline on."""
    common.quiet()
    import diffusers  # noqa: F401 (the libraries' share, which any run has)
    import peft  # noqa: F401
    import transformers  # noqa: F401

    meter = Meter()
    # Flux says no size of its own but the usual one.
    backbone = Pipeline(Source(folder, size=side), getattr(torch, cell.dtype), quantize=quantize)
    row, method = real_size.measure(cell, backbone, side, updates, critic_steps=1)
    meter.end(torch.device("cpu"), (method, *backbone.parts()))
    row["name"] += f", base in {quantize}" if quantize else ""
    return {**row, "peak": gib(meter.peak or 0), "flow": backbone.predicts == "flow"}


def apart(work: Callable[..., T], *given: Any) -> T:
    """What `work` answers in a process of its own, which leaves nothing behind."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, given)


def measure(args: argparse.Namespace) -> tables.Report:
    """The rows of all models that were asked for."""
    rows, side = [], 32 if args.quick else args.side
    for model in ["tiny"] if args.quick else args.models:
        with tempfile.TemporaryDirectory() as place:
            folder = (args.folder or Path(place)) / model
            if args.quick:
                common.random_pipeline(folder)
            elif not (folder / "model_index.json").is_file():
                write, more = (published_flows.write, (args.blocks,)) if model in FLOWS else (published.write, ())
                apart(write, folder, model, side, *more)
            rows += [apart(one, str(folder), cell, side, args.updates, args.quantize) for cell in CELLS[model]]
    targets = [tables.target(f"{row['name']}: peak, GiB", row["peak"], LARGEST, at_most=True) for row in rows if row.pop("flow")]
    return {"benchmark": "real size, batch 1, gradient checkpointing", "columns": COLUMNS, "rows": rows, "targets": targets}


def main(argv: Sequence[str] | None = None) -> tables.Report:
    """Run the benchmark as its options say."""
    made = common.parser(__doc__, pipeline=False)
    made.add_argument("--models", nargs="+", choices=("sd15", "sdxl", *FLOWS), default=["sd15", "sdxl"])
    made.add_argument("--side", type=int, default=128, help="of the images, in pixels")
    made.add_argument("--blocks", type=int, default=3, help="of the flow transformers, which have their real width")
    made.add_argument("--updates", type=int, default=2)
    made.add_argument("--quantize", choices=get_args(Quantize), help="the linear layers of the frozen network (model.memory.quantize)")
    made.add_argument("--folder", type=Path, help="where the random pipelines are kept (default: nowhere)")
    return common.main(measure, made.parse_args(argv))


if __name__ == "__main__":
    main()
