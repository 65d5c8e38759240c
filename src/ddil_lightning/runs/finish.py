"""What stands at the end of a run: the exported pipeline and the results; and a rehearsal of that end before the first update."""

from __future__ import annotations

import functools
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ddil_lightning.bounds import at_least, lengths, seeds, within
from ddil_lightning.diffusion.denoiser import evaluating
from ddil_lightning.errors import one_line
from ddil_lightning.files import replacing_folder
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.randomness import undisturbed
from ddil_lightning.training.sharing import merged


@dataclass
class Test:
    """What a run is measured by when it ends.

    Args:
        n: how many held-out prompts, at least 16; 0 for no test.
        teacher_steps: the step counts of the teacher's rows.
        student_steps: those of the student's rows, by default all that the run has made students for. A count that a stage of the run has
            ended with is tested on that stage's student.
        seed: of prompts and noise.
        dpm: rows with DPM-Solver++ 2M too, for students that step by DDIM.
        fresh: measure the teacher's rows now, where they would be those kept of an earlier run of the same teacher.
    """

    n: int = 256
    teacher_steps: list[int] = field(default_factory=lambda: [32, 4, 2, 1])
    student_steps: list[int] | None = None
    seed: int = 0
    dpm: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.n and self.n < 16:
            raise ValueError(f"test.n {self.n}: at least 16 prompts, some hundreds for numbers that mean something, or 0 for no test")
        within(0, 10**7, **{"test.n": self.n})
        seeds(**{"test.seed": self.seed})
        at_least(1, **{"test.teacher_steps": self.teacher_steps, "test.student_steps": self.student_steps})
        lengths(**{"test.student_steps": self.student_steps})

    def smallest(self, made_for: Sequence[int]) -> Test:
        """The same test at its least: one row of the teacher and one of the student, at the fewest steps."""
        student = min(self.student_steps or made_for)
        return replace(self, n=16, teacher_steps=sorted(self.teacher_steps)[:1], student_steps=[student])


def finish(
    method: Distillation, folder: Path, test: Test, export_steps: int | None, examples: Sequence[str], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write pipeline/ (compared with the trainer's own samples), test teacher and student, and answer the content of summary.json.

    `facts` come first in it: the config's name, the seed and so on. Of a student that no pipeline can hold, the weights are written.
    What fails is told in `failed`, part by part, and keeps nothing else from being made.
    """
    from ddil_lightning.evaluation.table import table
    from ddil_lightning.runs import export

    summary: dict[str, Any] = {
        **facts,
        "student_updates": method.student_updates,
        "network_evaluations": method.evaluations,
        "machine": machine(),
        "rows": [],
        "failed": {},
    }
    with trying("pipeline", summary["failed"]):
        if export.unheld(method) is None:
            steps = method.deployment.steps[0] if export_steps is None else export_steps
            prompts = export.check_prompts(method, examples)
            summary["export_difference"] = difference = export.deliver(method, folder / "pipeline", prompts, steps)
            print(f"pipeline written and checked: {folder / 'pipeline'} (latents differ by {difference:.1e})", flush=True)
        else:
            why = export.unheld(method) if method.backbone.holds_students else "no pipeline can hold this student"
            print(f"{why}; its weights: {_save_weights(method, folder)}", flush=True)
    with trying("test", summary["failed"]):
        summary["rows"] = _rows(method, folder, test) if test.n else []
        print(table(summary["rows"]) if summary["rows"] else "", end="", flush=True)
    return summary


@contextmanager
def trying(what: str, failed: dict[str, str]) -> Iterator[None]:
    """Whatever the body raises becomes an entry of `failed`: the parts of a run's end do not hang on each other."""
    try:
        yield
    except Exception as error:
        if os.environ.get("DDIL_DEBUG"):
            traceback.print_exc()
        failed[what] = one_line(error)


def rehearse(method: Distillation, folder: Path, test: Test, export_steps: int | None, examples: Sequence[str]) -> None:
    """The whole end of a run on the student as it is, small and in a folder of its own below `folder`, which is removed.

    Export, reload and comparison at the end of every stage to come, a small test batch and the report: what cannot work is known before
    the first update. Leaves random numbers and counts of evaluations as they were. Raises whatever these parts raise.
    """
    from ddil_lightning.evaluation.table import write_rows
    from ddil_lightning.runs import export
    from ddil_lightning.runs.report import write_report

    counts = method.evaluations
    with undisturbed(method.device), evaluating(method.deployment.network), replacing_folder(folder / "rehearsal", keep=False) as place:
        if export.unheld(method) is None:
            export.rehearse(method, place / "pipeline", export.check_prompts(method, examples), export_steps)
        else:
            _save_weights(method, place)
        rows = _rows(method, place, test.smallest(method.deployment.steps), quiet=True) if test.n else []
        write_rows(place / "summary.json", {"rows": rows, "student_updates": 0})  # type: ignore[arg-type]
        write_report(place)
    for name, role in method.roles.items():
        role.evaluations = counts[name]


def _save_weights(method: Distillation, folder: Path) -> Path:
    deployment = method.deployment
    if method.backbone.holds_students:  # whose `save` writes pipelines
        with merged(method):
            return method.backbone.save_weights(folder, method.deployment.network, torch.float32)
    return method.backbone.save(folder, deployment.network, deployment.scheduler, torch.float32, False)


def _rows(method: Distillation, folder: Path, test: Test, quiet: bool = False) -> list[dict[str, Any]]:
    """The rows of results by what the backbone can be measured by: its own law, the built-in suite, or nothing."""
    from ddil_lightning.evaluation.rows import method_rows
    from ddil_lightning.evaluation.suite import Suite
    from ddil_lightning.runs.folder import stage_pipelines

    def say(name: str) -> None:
        if not quiet:
            print(f"testing {name} on {test.n} {method.backbone.samples}", flush=True)

    measured = method.backbone.measured(method, test, say)
    if measured is not None:
        return measured
    dataset = method.backbone.about.get("dataset")
    if not dataset:
        return []
    suite = Suite.builtin(dataset, n=test.n, seed=test.seed).for_pipeline(method.backbone)
    return method_rows(suite, method, test.teacher_steps, test.student_steps, say, stage_pipelines(folder), test.dpm, test.fresh)


def machine() -> dict[str, Any]:
    """The device, the date, the versions of Python and of packages and a checkout's commit, which figures must be quoted with."""
    import platform
    from importlib import metadata

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    packages = ("ddil-lightning", "torch", "lightning", "diffusers", "transformers")
    versions = {name: metadata.version(name) for name in packages}
    return {"device": device, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **versions, "commit": commit()}


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package is imported from, with + where its files have been changed since; None without one.

    It is asked once, by the rehearsal of a run's end: when the run does end, another one may be checked out.
    """
    import subprocess

    package = Path(__file__).parents[1]
    if not package.parents[1].joinpath(".git").exists():
        return None

    def git(*words: str) -> str:
        call = ["git", "--no-optional-locks", "-C", str(package), *words]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):  # no git, or a folder of somebody else's, which git does not look into
        return None
