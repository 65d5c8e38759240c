"""Every feedback loss x {as published, + Reflected, + DDIL, + both} on the toy: does DDIL help a loss that its paper never tried?

Every method with a pair of shipped configs toy2d/NAME.yaml and toy2d/NAME_ddil.yaml takes part, on one problem, on seeds that no setting
was chosen on, with two budgets: its config's student updates, the same for all variants of a method, and --evaluations of all networks
together, the same for everybody. A finished cell (method, variant, budget, three seeds) is a JSON file in --cells, which belongs to the
repository: hours of work are interrupted at will and go on elsewhere, and a cell is made anew where its config has changed. docs/zoo.md is
made of them and of zoo_builtin.py's, some methods on the built-in pipeline. Of two methods the published student is also sampled with
what can be done without training (diffusion/remedies.py), so that what DDIL trains away stands beside what costs nothing.

    python benchmarks/zoo.py [--methods emd dmd2 ...] [--seeds 12] [--seed 2000] [--jobs 2] [--page docs/zoo.md]
    python benchmarks/zoo.py --only_page --page docs/zoo.md
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import common
import toy2d
import zoo_builtin
from builtin_runs import digest, trains
from tables import Report, markdown
from zoo_table import REMEDIED, REMEDIES, SAME_TIMES, VARIANTS, keeps_to, page, report

from ddil_lightning import assemble
from ddil_lightning.errors import Refusal
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.files import write_text
from ddil_lightning.packaged import find_config
from ddil_lightning.runs.finish import machine

CELLS = Path(__file__).parent / "zoo"
Budget = Literal["updates", "evaluations"]
PROBLEM = {"scale": 2.0, "guidance": 2.0, "width": 48}
"""One problem and one size of network for all methods, whatever their configs have; everything else is their config's."""
EVALUATIONS = 200_000
"""Of all networks, a sample each: what LCM's config spends."""
SAMPLED_ANEW = ("pd", "lcm")
"""The methods whose published students are sampled with REMEDIES, at the updates of their configs."""


CONTROLLED = ("diff_instruct", "dmd2", "moments", "pd", "snapfusion", "ufogen")
"""The methods that gain by roll-outs at the updates of their configs, and can have the control: of reflow, DMD and BOOT every latent is a
part of a trajectory."""


@dataclass(frozen=True)
class Cell:
    """One variant of a method for one group of seeds, or its base with REMEDIES.

    `spent`: the evaluations that it is given; None for the updates of its config.
    """

    method: str
    variant: str
    seeds: tuple[int, ...]
    words: tuple[str, ...]
    n: int
    spent: int | None = None

    @property
    def budget(self) -> Budget:
        """What is the same for whom it is compared with."""
        return "updates" if self.spent is None else "evaluations"

    @property
    def file(self) -> str:
        """Its file's name."""
        return f"{self.method}-{self.variant}-{self.budget}-{self.seeds[0]}.json"

    @property
    def depends(self) -> str:
        """A digest of all that it depends on but for the code and the machine, both of which it names."""
        configs = [trains(template.format(self.method)) for template in (toy2d.PLAIN, toy2d.DDIL)]
        return digest(self.method, self.variant, self.seeds, self.words, self.n, self.spent, *configs, *self.remedies)

    @property
    def remedies(self) -> tuple[str, ...]:
        """What its sampler is scored with besides."""
        return REMEDIES if self.variant == REMEDIED else ()

    @property
    def trained(self) -> str:
        """The variant that is trained for it."""
        return "base" if self.variant == REMEDIED else self.variant

    @property
    def task(self) -> toy2d.Task:
        """The same as benchmarks/toy2d.py asks for it."""
        return toy2d.Task(self.method, (self.trained,), self.seeds, self.words, self.n, None)

    def known(self, cells: Path) -> dict[str, Any] | None:
        """The finished cell, None where there is none, it was made with other settings, or it has not spent what it was given."""
        file = cells / self.file
        found = json.loads(file.read_text()) if file.is_file() else None
        return found if found is not None and found["depends"] == self.depends and self.spends(found) else None

    @property
    def usual(self) -> Cell:
        """The same at the updates of its config, from which its length is known."""
        return replace(self, spent=None)

    def spends(self, record: dict[str, Any]) -> bool:
        """Whether a training has spent what it was given."""
        return keeps_to(self.spent, record["evaluations"], record["updates"])


def methods() -> list[str]:
    """The methods with a pair of toy configs, in alphabetical order."""
    return sorted(file.name.removesuffix("_ddil.yaml") for file in find_config("toy2d/lcm.yaml").parent.glob("*_ddil.yaml"))


def pair(name: str) -> str:
    """A name of two configs, toy2d/NAME.yaml and toy2d/NAME_ddil.yaml, packaged or in the working directory. Raises ArgumentTypeError."""
    try:
        for template in (toy2d.PLAIN, toy2d.DDIL):
            find_config(template.format(name))
    except Refusal as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def said(cell: Cell, cells: Path) -> tuple[str, tuple[str, ...]]:
    """The config and the words that a cell is trained by; of a budget of evaluations from what its usual cell has spent."""
    config, words = cell.task.said(cell.trained)
    if cell.spent is None:
        return config, tuple(words)
    usual = cell.usual.known(cells)
    assert usual is not None, "cells of equal updates come first"
    return config, (*words, toy2d.longer(assemble(config, *words).method, cell.spent / usual["evaluations"]))


def trained(cell: Cell, cells: Path) -> dict[str, Any]:
    """What a cell is, trained and scored."""
    config, words = said(cell, cells)
    return {**toy2d.trained(cell.task, cell.variant, config, words, cell.remedies)}


def make(cell: Cell, cells: Path) -> dict[str, Any]:
    """Train a cell, score it and keep it.

    Where code of another count has made the cell of equal updates, from which this one's length is known, that is made anew first. Raises
    ValueError for a training that then still does not spend what it was given.
    """
    import torch

    torch.set_num_threads(1)
    common.quiet()
    record = trained(cell, cells)
    if not cell.spends(record):
        make(cell.usual, cells)
        record = trained(cell, cells)
    if not cell.spends(record):
        raise ValueError(f"{cell.file} was given {cell.spent:,} evaluations and has spent {record['evaluations']:,}")
    config, words = said(cell, cells)
    made = {**record, "budget": cell.budget, "depends": cell.depends, "config": config, "told": list(words), "machine": machine()}
    write_rows(cells / cell.file, made)  # type: ignore[arg-type]
    return made


def wanted(args: argparse.Namespace, spent: int | None) -> list[Cell]:
    """All cells of a budget, whole groups of seeds first, so that an interrupted run can be compared."""
    seeds = range(args.seed, args.seed + args.seeds)
    groups = [tuple(seeds[i : i + args.members]) for i in range(0, len(seeds), args.members)]
    every = []
    for group in groups:
        for method in args.methods:
            problem = [f"model.init_args.pipeline.init_args.{key}={value}" for key, value in PROBLEM.items()]
            words = (*problem, *(toy2d.quick(method) if args.quick else ()), *args.set)
            variants = [*VARIANTS, *([REMEDIED] if spent is None and method in SAMPLED_ANEW else [])]
            variants += [SAME_TIMES] if spent is None and method in CONTROLLED else []
            every += [Cell(method, variant, group, words, args.n, spent) for variant in variants]
    return every


def measure(args: argparse.Namespace) -> Report:
    """Make the cells that are missing, and the report and the page of all that are there."""
    if args.quick:
        args.seeds, args.members, args.n, args.evaluations = 2, 2, 64, 20_000
        args.cells = Path("runs/benchmarks/zoo") if args.cells == CELLS else args.cells
    args.cells.mkdir(parents=True, exist_ok=True)
    asked = [cell for spent in (None, args.evaluations) for cell in wanted(args, spent)]
    if not args.only_page:
        for budget in ("updates", "evaluations"):
            train([cell for cell in asked if cell.budget == budget and cell.known(args.cells) is None], args)
    found = [known for cell in asked if (known := cell.known(args.cells)) is not None]
    told = report(found, args.evaluations)
    if args.page:
        told["parts"] += [] if args.quick else zoo_builtin.finished()
        write_text(args.page, page(told, markdown))
    return told


def train(todo: Sequence[Cell], args: argparse.Namespace) -> None:
    """Make the cells that are missing of one budget."""
    start = time.time()
    work: Callable[[Cell], dict[str, Any]] = functools.partial(make, cells=args.cells)
    for i, made in enumerate(common.parallel(work, todo, args.jobs)):
        at = f"{i + 1}/{len(todo)}, {time.time() - start:.0f} s"
        print(f"[{at}] {made['method']} {made['variant']}, {made['budget']}, seeds from {made['seeds'][0]}", flush=True)


def main(argv: Sequence[str] | None = None) -> Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__, pipeline=False)
    parser.set_defaults(seed=2000)
    parser.add_argument(
        "--methods", nargs="+", type=pair, default=methods(), metavar="NAME", help="by the names of toy2d/NAME{,_ddil}.yaml"
    )
    parser.add_argument("--seeds", type=int, default=12, help="independent experiments, from --seed on")
    parser.add_argument("--members", type=int, default=3, help="seeds per process")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="network evaluations of the equal budget")
    parser.add_argument("--n", type=int, default=2000, help="samples per seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--cells", type=Path, default=CELLS, help="the finished cells")
    parser.add_argument("--page", type=Path, help="write the page of all cells")
    parser.add_argument("--only_page", action="store_true", help="measure nothing, show what is there")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
