"""Distillation at the real size on a GPU: images a second, peak memory, and the share of the matrix units' peak.

{SD1.5, SDXL} x {whole, LoRA} x {LCM, DMD2} x {plain, DDIL}, in bf16-mixed with a base in bfloat16 and gradient checkpointing, on the
published architectures with random weights, at 512 and 1024 pixels. One call of some five minutes; a setting that does not fit is a row
that says so. Images a second are those that the student or the critic is trained on. The share counts the floating-point operations of
the last update (torch's FlopCounterMode) against PEAKS; a card that is not listed there has none.

    python benchmarks/gpu.py [--models sd15 sdxl] [--batch 8 2] [--updates 6] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import published
import real_size
import tables
import torch
from real_size import Cell

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.runs.memory import gib

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
"""Dense bfloat16 operations a second with float32 sums, by the makers' data sheets."""
SIDES = {"sd15": 512, "sdxl": 1024, "tiny": 32}
NAMES = {"sd15": "SD1.5", "sdxl": "SDXL", "tiny": "tiny"}
COLUMNS = (
    ("name", ""),
    ("batch", "batch"),
    ("trained", "trained weights, millions"),
    ("images", "images/s"),
    ("peak", "peak, GiB"),
    ("share", "share of the matrix peak"),
    ("note", ""),
)


def cells(model: str, batch: int, rank: int) -> list[Cell]:
    """All settings of a model, those that need least memory first."""
    every = itertools.product((rank, 0), ("LCM", "DMD2"), (False, True))
    return [Cell(NAMES[model], method, r, ddil, batch) for r, method, ddil in every]


def measured(cell: Cell, backbone: Pipeline, side: int, updates: int, critic_steps: int) -> dict[str, Any]:
    """The row of a cell, or why there is none."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        row, _ = real_size.measure(cell, backbone, side, updates, critic_steps, count=True)
    except torch.OutOfMemoryError:
        return {"name": cell.name, "batch": cell.batch, "note": "does not fit"}
    finally:
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    fastest = next((ops for name, ops in PEAKS.items() if gpu and name in torch.cuda.get_device_name()), None)
    share = None if fastest is None else row["flops"] / row["seconds"] / fastest
    return {**row, "batch": cell.batch, "peak": gib(torch.cuda.max_memory_allocated()) if gpu else None, "share": share}


def measure(args: argparse.Namespace) -> tables.Report:
    """The rows of all models that were asked for."""
    rows = []
    for model, batch in [("tiny", 2)] if args.quick else zip(args.models, args.batch, strict=True):
        with tempfile.TemporaryDirectory() as place:  # whole copies are made from what is stored
            folder = Path(place) / model
            common.random_pipeline(folder) if args.quick else published.write(folder, model, SIDES[model])
            backbone = Pipeline(str(folder), torch.bfloat16)
            for cell in cells(model, batch, 4 if args.quick else 64):
                row = measured(cell, backbone, SIDES[model], 2 if args.quick else args.updates, 1 if args.quick else 5)
                print(row, flush=True)  # a run that is cut short has shown what it had
                rows.append(row)
    return {"benchmark": "real size on a GPU", "columns": COLUMNS, "rows": rows}


def main(argv: Sequence[str] | None = None) -> tables.Report:
    """Run the benchmark as its options say."""
    made = common.parser(__doc__, pipeline=False)
    made.add_argument("--models", nargs="+", choices=("sd15", "sdxl"), default=["sd15", "sdxl"])
    made.add_argument("--batch", nargs="+", type=int, default=[8, 2], help="of every model")
    made.add_argument("--updates", type=int, default=6, help="of the student, the first and the last of which are not timed")
    return common.main(measure, made.parse_args(argv))


if __name__ == "__main__":
    main()
