"""What stands at the end of a run: the exported pipeline, the results, the report, and a method rebuilt from its config."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from .main import Refusal
from .messages import explain
from .methods import Distillation


@dataclass
class Test:
    """What a run is measured by when it ends: `n` held-out prompts, the rows, the suite's seed. n = 0: no test."""

    n: int = 384
    teacher_steps: list[int] = field(default_factory=lambda: [32, 4, 2, 1])
    student_steps: list[int] = field(default_factory=lambda: [4, 2, 1])
    seed: int = 0


def finish(
    method: Distillation, folder: Path, test: Test, export_steps: int, examples: Sequence[str], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write pipeline/ (and compare it with the trainer's own samples), test teacher and student -> the content of summary.json.

    `facts` come first in it: the config's name, the seed and so on.
    """
    from . import evaluate, export, scoring

    prompts = (list(method.backbone.about.get("previews") or examples) or ["", ""])[:4]
    difference = export.deliver(method, folder / "pipeline", prompts, export_steps)
    print(f"pipeline written and checked: {folder / 'pipeline'} (latents differ by {difference:.1e})", flush=True)
    summary: dict[str, Any] = {
        **facts,
        "student_updates": method.student_updates,
        "network_evaluations": method.evaluations,
        "export_difference": difference,
        "machine": machine(),
        "rows": [],
    }
    dataset = method.backbone.about.get("dataset")
    if test.n and dataset:
        suite = evaluate.Suite.builtin(dataset, n=test.n, seed=test.seed)
        say = lambda name: print(f"testing {name} on {test.n} prompts", flush=True)  # noqa: E731
        summary["rows"] = scoring.method_rows(suite, method, test.teacher_steps, test.student_steps, say)
        print(evaluate.table(summary["rows"]), end="")
    return summary


def machine() -> dict[str, Any]:
    """What figures must be quoted with."""
    import platform
    from importlib import metadata

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    packages = ("ddil-lightning", "torch", "lightning", "diffusers", "transformers")
    versions = {name: metadata.version(name) for name in packages}
    return {"device": device, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **versions}


def rebuild(config: Path) -> Distillation:
    """The method that a run's config.yaml describes, with fresh weights; data, callbacks and trainer are not made."""
    import yaml

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Distillation, "model", required=True)
    try:
        return parser.instantiate_classes(parser.parse_object({"model": (yaml.safe_load(config.read_text()) or {}).get("model")})).model
    except ArgumentError as error:
        raise Refusal(f"{config}: {explain(str(error), [], [Distillation])}") from error
