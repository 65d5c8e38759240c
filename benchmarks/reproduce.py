"""The paper's comparison in miniature, on seeds that no setting was chosen on: {PD, LCM, DMD2} x {base, +Reflected, +DDIL, +both}.

Every cell is a shipped config trained on the built-in pipeline with its own budget and scored on held-out prompts twice, with other prompts
and noise the second time, so that the spread of the measurement can be told from that of the training; a classifier is taught by its
images, too (downstream.py). A finished cell is a JSON file in --cells, which belongs to the repository: a run of hours is interrupted at
will and goes on elsewhere, and what has changed since (config, options, teacher) is measured anew. docs/reproduction.md is made of them.
The same of the built-in flow teacher, a transformer, has cells and a page of its own.

    python benchmarks/reproduce.py [--methods pd lcm dmd2] [--seeds 3] [--seed 100] [--jobs 2] [--json FILE] [--page docs/reproduction.md]
    python benchmarks/reproduce.py --only_page
    python benchmarks/reproduce.py --pipeline builtin/flow [--methods lcm_flow pd_flow dmd2_flow] [...] [--page docs/flow.md]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import builtin
import common
import downstream
import torch
from builtin_runs import FLOW, Run, Teacher, digest, fingerprint
from reproduce_table import HEADS, REPORTED, page, report
from tables import Report
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.evaluation.rows import folder_sampler
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.files import write_text
from ddil_lightning.runs.finish import machine
from ddil_lightning.runs.folder import stage_pipelines
from ddil_lightning.training.method import Distillation

HERE = Path(__file__).parent
CELLS = HERE / "reproduced"
OF_FLOW = HERE / "reproduced_flow"
LESSON = (1000, 300)
"""Images that a classifier is taught by, and its updates."""
VARIANTS = ("base", "reflected", "ddil", "both")
AGAIN = 1
"""The suite's seed for the second time."""
SETS = 2
"""What the second set and the lesson are: scenes that nothing else is made of. In cells that do not say so they are others
(`reproduce_table.SETS`)."""


def file_of(run: Run, cells: Path) -> Path:
    """Where a cell is kept."""
    return cells / f"{run.method}-{run.variant}-{run.seed}.json"


def depends(run: Run, lesson: Sequence[int]) -> str:
    """A digest of all that a cell depends on but for the code and the machine, both of which it names."""
    return digest(*run.depends, run.teacher.n, *lesson)


def known(run: Run, cells: Path, lesson: Sequence[int]) -> dict[str, Any] | None:
    """A finished cell, None where there is none or it was made with other settings."""
    file = file_of(run, cells)
    found = json.loads(file.read_text()) if file.is_file() else None
    return found if found is not None and found["depends"] == depends(run, lesson) else None


def check_place(todo: Sequence[Run], cells: Path, lesson: Sequence[int]) -> None:
    """Raises ValueError where a committed cell, hours of work, would be replaced by one of fewer prompts or updates."""
    shipped = (1000, None, LESSON)
    other = next(
        (run for run in todo if (run.teacher.n, run.captions, tuple(lesson)) != shipped or "updates=" in " ".join(run.words)), None
    )
    if other is not None and cells.resolve() in (CELLS, OF_FLOW, HERE / "scheduled"):
        raise ValueError(f"{cells} holds cells of the repository, of 1000 prompts and whole runs: give these another place, by --cells")


def cell(run: Run, cells: Path, threads: int, lesson: tuple[int, int]) -> dict[str, Any]:
    """Train a run, score it and keep it."""
    torch.set_num_threads(threads)
    common.quiet()
    before = time.perf_counter()
    method, seconds = builtin.trained(run)
    spent = method.evaluations
    reference = torch.load(run.teacher.reference, weights_only=True)
    dataset, n, steps = method.backbone.about["dataset"], run.teacher.n, REPORTED[run.method]
    rows = builtin.rows(run, method, builtin.Paired.beside(builtin.suite(dataset, n), reference), steps)
    again = builtin.rows(run, method, again_suite(dataset, n), steps)
    made = {
        "method": run.method,
        "variant": run.variant,
        "seed": run.seed,
        "depends": depends(run, lesson),
        "config": run.config,
        "told": list(run.words),
        "captions": run.captions,
        "updates": method.student_updates,
        "network_evaluations": spent,
        "seconds_training": round(seconds, 1),
        "seconds": round(time.perf_counter() - before, 1),
        "machine": machine(),
        "protocol": rows[0]["protocol"],
        "rows": [slim(row) for row in rows],
        "sets": SETS,
        "again": [slim(row) for row in again],
        "downstream": {str(k): taught(run, method, k, lesson) for k in steps},
    }
    write_rows(file_of(run, cells), made)  # type: ignore[arg-type]
    return made


@functools.lru_cache(maxsize=1)
def again_suite(dataset: str, n: int) -> Suite:
    """Other prompts, other noise and other real images, once per process."""
    return Suite.builtin(dataset, n=n, seed=AGAIN)


def slim(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its protocol, which the cell has, and without what it repeats."""
    return {"name": row["name"], "steps": row["steps"], "nfe": row["nfe"], "metrics": row["metrics"]}


def taught(run: Run, method: Distillation, steps: int, lesson: tuple[int, int]) -> dict[str, float]:
    """The downstream scores of a student in so many steps."""
    stages = stage_pipelines(run.students)
    policy, grid = folder_sampler(stages[steps], method.device) if steps in stages else method.deployment.sampler(steps)
    return downstream.score(drawing(method, policy, grid, method.deployment.quoted), *lesson)


def drawing(method: Distillation, policy: Policy, grid: Grid, g: float) -> Callable[[list[str], int], Tensor]:
    """The sampler of a policy, as suites ask for it."""
    return lambda prompts, seed: sampling.images(method.backbone, policy, grid, prompts, g, seed)


def teacher(found: Teacher, cells: Path, lesson: tuple[int, int], threads: int) -> dict[str, Any]:
    """The teacher's rows and what its images and the real ones teach, from its file if it is there; its images are made in any case."""
    file = cells / "teacher.json"
    rows = builtin.kept(found.file, lambda: builtin.baseline(found), threads)["rows"]
    told = json.loads(file.read_text()) if file.is_file() else {}
    if told.get("depends") == digest(found.weights, found.n, *lesson):
        return told
    trainer, method, _ = builtin.assemble(found.config, f"model.init_args.pipeline={found.pipeline}", "--seed", "0")
    method = method.to(trainer.strategy.root_device).eval()
    best = builtin.TEACHER_STEPS[0]
    sample = drawing(method, *method.baseline.sampler(best), method.eval_guidance)
    told = {
        "depends": digest(found.weights, found.n, *lesson),
        "machine": machine(),
        "protocol": rows[0]["protocol"],
        "rows": [slim(row) for row in rows],
        "downstream": {str(best): downstream.score(sample, *lesson), "real": downstream.real(*lesson)},
    }
    write_rows(file, told)  # type: ignore[arg-type]
    return told


def wanted(args: argparse.Namespace, found: Teacher) -> list[Run]:
    """All cells, whole seeds first, so that an interrupted run can be compared."""
    every = []
    for seed in range(args.seed, args.seed + args.seeds):
        for method in args.methods:
            one = argparse.Namespace(**{**vars(args), "method": method, "seed": seed, "seeds": 1})
            every += builtin.runs(one, found)
    return every


def measure(args: argparse.Namespace) -> Report:
    """Make the cells that are missing, and the report and the page of all that are there."""
    args.methods = args.methods or [m for m in REPORTED if m.endswith("_flow") == (args.pipeline == FLOW)]
    own = OF_FLOW if args.pipeline == FLOW else CELLS
    if args.quick:
        args.updates, args.n, args.seeds, args.captions, args.lesson = args.updates or 2, min(args.n, 16), 1, 64, (64, 5)
        own = args.cache / "cells"
    args.cells = args.cells or own
    args.cells.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    pipeline = common.pipeline_at(args.pipeline)
    found = Teacher(pipeline, fingerprint(pipeline), args.n, args.cache)
    if not args.only_page:
        make(args, found)
    cells = [json.loads(file.read_text()) for file in sorted(args.cells.glob("*-*.json"))]
    fresh = [c for c in cells if of_today(c, found, args)]
    told = report(fresh, json.loads((args.cells / "teacher.json").read_text()))
    told["notes"] += [f"left out, because it was made with other settings than today's: {name(c)}" for c in cells if c not in fresh]
    if args.page:
        write_text(args.page, page(told, HEADS[args.pipeline == FLOW]))
    return told


def of_today(cell: dict[str, Any], found: Teacher, args: argparse.Namespace) -> bool:
    """Whether a finished cell is what these options ask for: only such cells are comparable."""
    one = argparse.Namespace(**{**vars(args), "method": cell["method"], "variants": [cell["variant"]], "seed": cell["seed"], "seeds": 1})
    return cell["variant"] in VARIANTS and cell["depends"] == depends(builtin.runs(one, found)[0], args.lesson)


def name(cell: dict[str, Any]) -> str:
    """A cell in words."""
    return f"{cell['method']} {cell['variant']} seed {cell['seed']}"


def make(args: argparse.Namespace, found: Teacher) -> None:
    """Make the cells that are missing."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by the workers when they import torch
    if not found.reference.is_file():
        found.file.unlink(missing_ok=True)
    todo = [run for run in wanted(args, found) if known(run, args.cells, args.lesson) is None]
    check_place(todo, args.cells, args.lesson)
    if todo or not (args.cells / "teacher.json").is_file():
        teacher(found, args.cells, args.lesson, args.threads * args.jobs)
    start, work = time.time(), functools.partial(cell, cells=args.cells, threads=args.threads, lesson=args.lesson)
    for i, made in enumerate(common.parallel(work, todo, args.jobs)):
        at = f"{i + 1}/{len(todo)}, {time.time() - start:.0f} s"
        print(f"[{at}] {name(made)}: {made['seconds']:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__)
    parser.set_defaults(seed=100)
    parser.add_argument("--methods", nargs="+", choices=list(REPORTED), help="default: all of the pipeline's kind")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant, from --seed on")
    parser.add_argument("--updates", type=int, help="student updates (default: the config's)")
    parser.add_argument("--n", type=int, default=1000, help="held-out prompts")
    sizes = ("IMAGES", "UPDATES")
    parser.add_argument("--lesson", nargs=2, type=int, default=LESSON, metavar=sizes, help="what a classifier is taught by")
    parser.add_argument("--jobs", type=int, default=2, help="processes; each takes one cell at a time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each")
    parser.add_argument("--captions", type=int, help="train on so many captions only (default: the whole built-in set)")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/reproduce"), help="where trained students are kept")
    parser.add_argument("--cells", type=Path, help="the finished cells (default: the repository's)")
    parser.add_argument("--page", type=Path, help="write the page of all cells")
    parser.add_argument("--only_page", action="store_true", help="measure nothing, show what is there")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
