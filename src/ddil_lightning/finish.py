"""What stands at the end of a run: the exported pipeline, the results, the report, and a method rebuilt from its config."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from .files import writing
from .main import Refusal
from .messages import explain
from .methods import Distillation
from .toy import Toy


@dataclass
class Test:
    """What a run is measured by when it ends: `n` held-out prompts, the rows, the suite's seed. n = 0: no test.

    `student_steps` (default: all that the run has made students for): a count that a stage of the run has ended with is tested on that
    stage's student. `dpm`: rows with DPM-Solver++ 2M too, for students that step by DDIM.
    """

    n: int = 256
    teacher_steps: list[int] = field(default_factory=lambda: [32, 4, 2, 1])
    student_steps: list[int] | None = None
    seed: int = 0
    dpm: bool = False

    def __post_init__(self) -> None:
        if self.n and self.n < 16:
            raise ValueError(f"test.n {self.n}: at least 16 prompts, some hundreds for numbers that mean something, or 0 for no test")
        if any(n < 1 for n in [*self.teacher_steps, *(self.student_steps or [])]):
            raise ValueError(
                f"test.teacher_steps {self.teacher_steps}, test.student_steps {self.student_steps}: a step count is at least 1"
            )


def finish(
    method: Distillation, folder: Path, test: Test, export_steps: int | None, examples: Sequence[str], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write pipeline/ (compared with the trainer's own samples), test teacher and student -> the content of summary.json.

    `facts` come first in it: the config's name, the seed and so on. Of a student that no pipeline can hold, the weights are written.
    """
    from . import evaluate, export

    summary: dict[str, Any] = {
        **facts,
        "student_updates": method.student_updates,
        "network_evaluations": method.evaluations,
        "machine": machine(),
        "rows": [],
    }
    if export.exportable(method):
        prompts, steps = export.check_prompts(method, examples), method.steps[0] if export_steps is None else export_steps
        summary["export_difference"] = difference = export.deliver(method, folder / "pipeline", prompts, steps)
        print(f"pipeline written and checked: {folder / 'pipeline'} (latents differ by {difference:.1e})", flush=True)
    else:
        print(f"no pipeline can hold this student; its weights: {_save_weights(method, folder)}", flush=True)
    if test.n:
        summary["rows"] = _rows(method, folder, test)
        print(evaluate.table(summary["rows"]) if summary["rows"] else "", end="")
    return summary


def _save_weights(method: Distillation, folder: Path) -> Path:
    from safetensors.torch import save_file

    path = folder / "student.safetensors"
    with writing(path):
        save_file({k: v.contiguous() for k, v in method.deployed().state_dict().items()}, path)
    return path


def _rows(method: Distillation, folder: Path, test: Test) -> list[dict[str, Any]]:
    """The rows of what there is to measure by: points in the plane, the built-in suite, or nothing."""
    from . import evaluate, runs, scoring
    from .toy import scores

    if isinstance(method.backbone, Toy):
        say = lambda name: print(f"testing {name}", flush=True)  # noqa: E731
        return scores.method_rows(method, test.teacher_steps, test.student_steps or method.steps, test.n, test.seed, say)
    dataset = method.backbone.about.get("dataset")
    if not dataset:
        return []
    suite = evaluate.Suite.builtin(dataset, n=test.n, seed=test.seed)
    say = lambda name: print(f"testing {name} on {test.n} prompts", flush=True)  # noqa: E731
    return scoring.method_rows(suite, method, test.teacher_steps, test.student_steps, say, runs.stage_pipelines(folder), test.dpm)


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
