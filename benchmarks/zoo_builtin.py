"""Which loss wins, and does DDIL help it, on the pipeline that pictures can be judged of: benchmarks/zoo.py's part of fewer methods.

As published and + DDIL, neither with reflection, with the two budgets of the toy: a config's own updates, and --evaluations of all networks
together, for which a short trial training counts what an update spends. PD's, LCM's and DMD2's trainings of their own updates are those of
the reproduction (reproduce.py), which are not made twice. A finished cell is a JSON file in --cells, as there. docs/zoo.md shows them.

    python benchmarks/zoo_builtin.py [--methods lcm emd ...] [--budgets evaluations updates] [--seeds 3] [--seed 100] [--jobs 2]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import builtin
import common
import reproduce
import torch
from builtin_runs import VARIANTS, Run, Teacher, digest, fingerprint
from tables import Part, Report
from toy2d import longer
from zoo_table import BUDGETS, built_in, keeps_to

from ddil_lightning import assemble
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.runs.finish import machine
from ddil_lightning.training.method import Distillation

CELLS = Path(__file__).parent / "zoo_builtin"
METHODS = ("lcm", "tcd", "pd", "dmd2", "emd", "imagine_flash", "ufogen")
"""Those that the comparison is about, and the two others of which short runs (healthy.py) and the toy promised most."""
COMPARED = ("base", "ddil")
STEPS = 4
EVALUATIONS = 92_160
"""What LCM's config spends on the built-in pipeline, of all networks together, a sample each: some five minutes."""
TRIAL = (0.05, 20)
"""The share of a config's updates that the trial trains, and how many updates at least: the first roll-outs are more than their share."""


@dataclass(frozen=True)
class Cell:
    """One training, scored. `spent`: the evaluations that it is given; None for the updates of its config."""

    run: Run
    spent: int | None

    @property
    def budget(self) -> str:
        """What is the same for whom it is compared with."""
        return "updates" if self.spent is None else "evaluations"

    @property
    def file(self) -> str:
        """Its file's name."""
        return f"{self.run.method}-{self.run.variant}-{self.budget}-{self.run.seed}.json"

    @property
    def depends(self) -> str:
        """A digest of all that it depends on but for the code and the machine."""
        return digest(*self.run.depends, self.run.teacher.n, self.spent)

    def known(self, cells: Path) -> dict[str, Any] | None:
        """The finished cell: here, or of equal updates among the reproduction's."""
        file = cells / self.file
        found = json.loads(file.read_text()) if file.is_file() else None
        if found is not None and found["depends"] == self.depends and keeps_to(self.spent, total(found), found["updates"]):
            return found
        theirs = reproduce.known(self.run, reproduce.CELLS, reproduce.LESSON) if self.spent is None else None
        return None if theirs is None else {**theirs, "budget": "updates"}


def total(cell: dict[str, Any]) -> int:
    """The evaluations of all networks together that a cell's training has spent."""
    return sum(cell["network_evaluations"].values())


def wanted(args: argparse.Namespace, teacher: Teacher) -> list[Cell]:
    """All cells, whole seeds first, so that an interrupted run can be compared."""
    return [
        Cell(Run(teacher, m, v, seed, VARIANTS[v][0].format(m), (*VARIANTS[v][1], *args.set), args.captions), spent)
        for seed in range(args.seed, args.seed + args.seeds)
        for spent in (args.evaluations if budget == "evaluations" else None for budget in args.budgets)
        for m in args.methods
        for v in COMPARED
    ]


def measure(args: argparse.Namespace) -> Report:
    """Make the cells that are missing, and the report of all that are there."""
    if args.quick:
        args.n, args.seeds, args.captions, args.evaluations = 16, 1, 64, min(args.evaluations, 4000)
        args.set += ["data.batch_size=2"]
        args.cells = args.cache / "cells" if args.cells == CELLS else args.cells
    args.cells.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers when they import torch
    pipeline = common.pipeline_at(args.pipeline)
    teacher = Teacher(pipeline, fingerprint(pipeline), args.n, args.cache)
    asked = wanted(args, teacher)
    todo = [] if args.only_page else [cell for cell in asked if cell.known(args.cells) is None]
    if todo and not (teacher.reference.is_file() and teacher.file.is_file()):
        builtin.kept(teacher.file, lambda: builtin.baseline(teacher), args.jobs)
    start, work = time.time(), functools.partial(make, cells=args.cells)
    for i, made in enumerate(common.parallel(work, todo, args.jobs)):
        at = f"{i + 1}/{len(todo)}, {time.time() - start:.0f} s"
        print(f"[{at}] {made['method']} {made['variant']}, {made['budget']}, seed {made['seed']}: {made['seconds']:.0f} s", flush=True)
    found = [known for one in asked if (known := one.known(args.cells)) is not None]
    return {"benchmark": "zoo, built-in", "columns": [("name", "")], "rows": [], "parts": built_in(found, args.evaluations)}


def finished() -> list[Part]:
    """The tables of the cells that are there, for the page of the whole zoo."""
    return measure(options().parse_args(["--only_page"]))["parts"]


def make(one: Cell, cells: Path) -> dict[str, Any]:
    """Train a cell, score it and keep it."""
    torch.set_num_threads(1)
    common.quiet()
    before = time.perf_counter()
    run, method, seconds = trained(one)
    spent = method.evaluations  # of the training: what the test calls is counted too
    reference = torch.load(run.teacher.reference, weights_only=True)
    held_out = builtin.Paired.beside(builtin.suite(method.backbone.about["dataset"], run.teacher.n), reference)
    rows = builtin.rows(run, method, held_out, (STEPS,))
    made = {
        "method": run.method,
        "variant": run.variant,
        "seed": run.seed,
        "budget": one.budget,
        "depends": one.depends,
        "config": run.config,
        "told": list(run.words),
        "updates": method.student_updates,
        "network_evaluations": spent,
        "seconds_training": round(seconds, 1),
        "seconds": round(time.perf_counter() - before, 1),
        "machine": machine(),
        "protocol": rows[0]["protocol"],
        "rows": [reproduce.slim(row) for row in rows],
    }
    write_rows(cells / one.file, made)  # type: ignore[arg-type]
    return made


def trained(one: Cell) -> tuple[Run, Distillation, float]:
    """The training of a cell, its method and its seconds.

    Where its updates spend otherwise than those of the trial, for roll-outs and what is kept of them are not the same all the time, it is
    trained anew, as long as that says. Raises ValueError where it then still has not spent what it was given.
    """
    if one.spent is None:
        return (one.run, *builtin.trained(one.run))
    method, times = lasting(one.run, one.spent)
    for _ in range(2):
        run = replace(one.run, words=(*one.run.words, longer(method, times)))
        made, seconds = builtin.trained(run)
        spent = sum(made.evaluations.values())
        if keeps_to(one.spent, spent, made.student_updates):
            return run, made, seconds
        times *= one.spent / spent
    raise ValueError(f"{one.file} was given {one.spent:,} evaluations and has spent {spent:,}")


def lasting(run: Run, spent: int) -> tuple[Distillation, float]:
    """The method of a run, and how many times as long as its config's a training is that spends so many evaluations."""
    method = assemble(run.config, *run.told).method
    with tempfile.TemporaryDirectory() as folder:
        words = (*run.told, longer(method, max(TRIAL[0], TRIAL[1] / method.updates)), f"trainer.default_root_dir={folder}")
        trainer, trial, data = assemble(run.config, *words)
        data.captions = builtin.encoded(run.teacher.pipeline, 64)
        trainer.fit(trial, datamodule=data)
    return method, spent / (sum(trial.evaluations.values()) / trial.student_updates * method.updates)


def options() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = common.parser(__doc__)
    parser.set_defaults(seed=100)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names of config pairs")
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS)[::-1], help="what is the same for all")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="network evaluations of the equal budget")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every variant, from --seed on")
    parser.add_argument("--n", type=int, default=1000, help="held-out prompts")
    parser.add_argument("--captions", type=int, help="train on so many captions only (default: the whole built-in set)")
    parser.add_argument("--jobs", type=int, default=2, help="processes; each takes one cell at a time")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/zoo"), help="where trained students are kept")
    parser.add_argument("--cells", type=Path, default=CELLS, help="the finished cells")
    parser.add_argument("--only_page", action="store_true", help="measure nothing, show what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> Report:
    """The command line of this benchmark."""
    return common.main(measure, options().parse_args(argv))


if __name__ == "__main__":
    main()
