"""The memory that a plan says, against the peak of a training: Stable Diffusion 1.5 in its real size, with random weights, on the CPU.

The pipeline is written once (published.py), and removed. Each case trains in a process of its own, at 128 pixels and
batch 1 unless asked otherwise; the full one needs some 20 GB.

    python benchmarks/memory.py [--cases lora full] [--side 128] [--batch 1] [--precision 32-true] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import published
import tables
import torch
from lightning.pytorch import Callback

CASES = {
    "full": ("LCM", "model.target_decay=0.95"),
    "lora": ("LCM-LoRA", "model.adapter.rank=64"),
    "lora-checkpointing": ("LCM-LoRA, checkpointing", "model.adapter.rank=64 model.memory.gradient_checkpointing=true"),
}
COLUMNS = (
    ("name", ""),
    ("planned", "planned, GiB"),
    ("measured", "measured, GiB"),
    ("ratio", "planned / measured"),
)


def measured(case: str, pipeline: str, batch: int, precision: str, seed: int) -> dict[str, float]:
    """The planned and the measured peak of one case in GiB, in this process, which has nothing else to do."""
    import diffusers  # noqa: F401 (the interpreter's share: what a run would import)
    import peft  # noqa: F401
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    from ddil_lightning import assemble
    from ddil_lightning.commands.plan import expected
    from ddil_lightning.data.encoded import Encoded
    from ddil_lightning.records import Context
    from ddil_lightning.runs.memory import Meter, gib

    class Begin(Callback):
        """Training begins."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Forget what loading has taken."""
            meter.begin()

    meter = Meter()
    words = [
        f"model.pipeline={pipeline}",
        "model.ema=0",
        "model.memory.teacher_dtype=bfloat16",
        f"data.batch_size={batch}",
        "--updates",
        "3",
    ]
    words += [f"trainer.precision={precision}", "trainer.accelerator=cpu", "--seed", str(seed), *CASES[case][1].split()]
    trainer, method, data = assemble("lcm.yaml", *words, callbacks=[Begin()])
    c = method.backbone.null()
    data.captions = Encoded(torch.randn(8 * batch, *method.backbone.latent_shape), Context(c.text.repeat(8 * batch, 1, 1)))
    trainer.fit(method, datamodule=data)
    meter.end(torch.device("cpu"), (method, *method.backbone.parts()))
    assert meter.peak is not None
    return {"planned": gib(expected(method, data, trainer)), "measured": gib(meter.peak)}


def measure(args: argparse.Namespace) -> tables.Report:
    """Write the pipeline, run each case, and make the report."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Path(folder) / "sd15"
        common.random_pipeline(place) if args.quick else published.write(place, "sd15", args.side)
        for case in args.cases:
            words = [sys.executable, __file__, "--one", case, "--pipeline", f"{folder}/sd15", "--batch", str(args.batch)]
            words += ["--precision", args.precision, "--seed", str(args.seed)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{case} has failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            rows.append({"name": CASES[case][0], **found, "ratio": found["planned"] / found["measured"]})
    worst = max(abs(row["ratio"] - 1) for row in rows)
    return {
        "benchmark": "memory",
        "columns": COLUMNS,
        "rows": rows,
        "targets": [tables.target("what a plan is off by, the furthest", worst, 0.15, at_most=True)],
        "notes": [f"{args.side} px, batch {args.batch}, {args.precision}; the peak of the process, less what it had when it was begun"],
    }


def main(argv: list[str] | None = None) -> tables.Report | None:
    """The command line of this benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["lora"])
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--folder", help="where the pipeline is written meanwhile (default: the system's)")
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        common.quiet()
        print(json.dumps(measured(args.one, args.pipeline, args.batch, args.precision, args.seed)))
        return None
    return common.main(measure, args)


if __name__ == "__main__":
    main()
