"""Which schedule of the prior? The shapes that a YAML can name, on a teacher that is known exactly and on the built-in pipeline.

All have reflection and the mean roll-out share of the shipped config, so that what is compared is when roll-outs come and not how many.
`constant` is the shipped config. `linear`, `cosine` and `exponential` raise the share of roll-outs, `falling` lowers it, and so do `gated`
(by the losses) and `gated_by` (by ShiftProbe's loss ratio) where the student allows it, whose mean is what the training makes of it.
`piecewise` (the paper's two parts) and `dagger` (p^k) leave the share as it is and let the student act more and more, not the teacher;
`mixed` is their control, whose student acts half of the time from the first update to the last.

    python benchmarks/schedules.py [--methods pd lcm dmd2] [--schedules linear ...] [--seed 1000] [--seeds 12] [--jobs 2] [--json FILE]
    python benchmarks/schedules.py --builtin linear dagger [--methods lcm] [--seed 100] [--seeds 3]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import reproduce
import toy2d
import yaml
from builtin_runs import Run, Teacher, fingerprint
from reproduce_table import HEADINGS, REPORTED, SHOWN, TITLES, compared, values
from tables import Part, Report
from toy2d import STATIC, Task
from toy2d_table import MEASURES, NAMES, join, row

from ddil_lightning.packaged import find_config

CONSTANT = "constant"
SCHEDULES = (CONSTANT, "linear", "cosine", "exponential", "falling", "gated", "gated_by", "piecewise", "dagger", "mixed")
UNFIT = {("pd", "gated_by"), ("dmd2", "gated")}
"""ShiftProbe samples in one step count, and a student that is halved takes others before its last stage."""
SWING = 0.8
"""How far a ramp goes to either side of the mean share, of what there is room for."""
RATE = 0.5
PERIODS = 5
"""An exponential schedule shrinks by RATE in each of so many periods of a stage."""
SHOWN_TOY = ("energy_distance", "coverage", "density", "mode_kl", "energy_teacher", "shift")


def shares(forward: float, student: float, teacher: float) -> dict[str, float]:
    """A prior, as a YAML writes it."""
    return {"forward": round(forward, 6), "student": round(student, 6), "teacher": round(1 - round(forward, 6) - round(student, 6), 6)}


def words(name: str, prior: Mapping[str, float], lengths: Sequence[int]) -> tuple[str, ...]:
    """The callbacks of a schedule as words of a command line. `prior`: the config's, `lengths`: student updates of each stage."""
    if name == CONSTANT:
        return ()
    rolled, length = 1 - prior["forward"], min(lengths)
    part, every = prior["student"] / rolled, max(1, round(length / PERIODS))  # the student's share of the roll-outs

    def at(share: float, student: float = part) -> dict[str, float]:
        return shares(1 - share, share * student, share * (1 - student))

    def ends(shape: Callable[[int], float], rising: bool = True) -> dict[str, dict[str, float]]:
        low, high = ramp(rolled, gone(shape, lengths), rising)
        return {"first": at(low), "last": at(high)}

    if name in ("linear", "falling"):
        return anneal("Linear", **ends(lambda c: min(c / length, 1), name == "linear"), end=length)
    if name == "cosine":
        return anneal("Cosine", **ends(lambda c: (1 - math.cos(math.pi * min(c / length, 1))) / 2), end=length)
    if name == "exponential":
        return anneal("Exponential", **ends(lambda c: 1 - RATE ** (c / every)), rate=RATE, every=every)
    if name == "gated":
        return anneal("Gated", **ends(lambda c: min(c / length, 1)), steps=10, patience=max(1, length // 40))
    if name == "gated_by":
        probe = {"every": max(1, length // 12), "count": 64, "losses": 32}
        gate = anneal("GatedBy", **ends(lambda c: min(c / length, 1)), measure="shift/loss_ratio", below=1.25, steps=6)
        return (callback("ShiftProbe", **probe), *gate)
    if name == "piecewise":
        return anneal("Piecewise", priors=[at(rolled, 0.3), at(rolled, 0.7)], starts=[0, length // 2])
    if name == "mixed":
        return anneal("Constant", prior=at(rolled, 0.5))
    return anneal("Exponential", first=at(rolled, 0.0), last=at(rolled, 1.0), rate=RATE, every=every)  # dagger


def gone(shape: Callable[[int], float], lengths: Sequence[int]) -> float:
    """The mean over all updates of the share of the way that a schedule has gone, which begins anew in every stage."""
    return sum(shape(clock) for length in lengths for clock in range(length)) / sum(lengths)


def ramp(mean: float, gone: float, rising: bool = True) -> tuple[float, float]:
    """Where a share begins and ends if its mean over the way, of which `gone` is gone on average, is to be `mean`."""
    if not rising:
        way = SWING * min((1 - mean) / gone, mean / (1 - gone))
        return mean + gone * way, mean - (1 - gone) * way
    way = SWING * min(mean / gone, (1 - mean) / (1 - gone))
    return mean - gone * way, mean + (1 - gone) * way


def anneal(kind: str, **told: Any) -> tuple[str, ...]:
    """AnnealPrior with a schedule of a class."""
    return (callback("AnnealPrior", schedule={"class_path": kind, "init_args": told}),)


def callback(kind: str, **told: Any) -> str:
    """A callback more."""
    return "trainer.callbacks+=" + json.dumps({"class_path": kind, "init_args": told})


def of_config(name: str, config: str) -> tuple[str, ...]:
    """The words of a schedule for a config: its own prior, and the lengths of its stages, in each of which a schedule begins anew."""
    found = yaml.safe_load(find_config(config).read_text())
    told = found["model"]["init_args"]
    return words(name, found["data"]["prior"], [stage["updates"] for stage in told.get("stages", [{"updates": told.get("updates")}])])


# On the toy ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheduled(Task):
    """A task of toy2d.py whose variants are schedules."""

    def said(self, variant: str) -> tuple[str, tuple[str, ...]]:
        """The config, and the words of its schedule."""
        config = toy2d.DDIL.format(self.method)
        return config, ("--seed", str(self.seeds[0]), *self.group, STATIC, *of_config(variant, config))

    @property
    def file(self) -> str:
        """A name that says what the schedules are, too."""
        told = hashlib.sha256(json.dumps([self.said(v) for v in self.variants]).encode()).hexdigest()[:8]
        return f"schedules-{told}-{super().file}"


def toy(args: argparse.Namespace) -> Report:
    """Every schedule for every method on the toy, paired against the shipped config."""
    if args.quick:
        args.seeds, args.n = 2, 64
    seeds = range(args.seed, args.seed + args.seeds)
    groups = [tuple(seeds[i : i + 3]) for i in range(0, len(seeds), 3)]
    todo = []
    for method in args.methods:
        names = tuple(s for s in (CONSTANT, *args.schedules) if (method, s) not in UNFIT)
        told = (*(toy2d.quick(method) if args.quick else ()), *args.set)
        todo += [Scheduled(method, tuple(dict.fromkeys(names)), group, told, args.n, None) for group in groups]
    start, records = time.time(), []
    for i, done in enumerate(common.parallel(functools.partial(toy2d.work, cache=args.cache), todo, args.jobs)):
        records += done
        print(f"[{i + 1}/{len(todo)}, {time.time() - start:.0f} s] {done[0]['method']}, seeds from {done[0]['seeds'][0]}", flush=True)
    joined = join(records)
    rows = [row(joined, method, variant, CONSTANT) for method, variant in joined]
    shown = [("variant", ""), ("evaluations", "evaluations"), *((k, MEASURES[k]) for k in SHOWN_TOY)]
    parts: list[Part] = [{"title": NAMES[m], "columns": shown, "rows": [r for r in rows if r["method"] == m]} for m in args.methods]
    return {
        "benchmark": "schedules",
        "columns": [("method", "method"), ("variant", ""), ("energy_distance", MEASURES["energy_distance"])],
        "rows": rows,
        "parts": parts,
        "seconds": round(time.time() - start, 1),
        "notes": [
            f"{args.seeds} seeds in groups of 3, {args.n} samples a seed in 4 steps; ± is the standard error of the mean, [t] of "
            "the paired difference to constant, the shipped config; no p is corrected for the number of comparisons"
        ],
    }


# On the built-in pipeline --------------------------------------------------------------------------------------------------------------


def built_in(args: argparse.Namespace) -> Report:
    """Some schedules on the built-in pipeline, whose missing cells are made as reproduce.py makes them; its `both` is constant."""
    if args.quick:
        args.updates, args.n, args.seeds, args.captions, lesson = 2, 16, 1, 64, (64, 5)
    else:
        args.updates, args.captions, lesson = None, None, (1000, 300)
    args.cells.mkdir(parents=True, exist_ok=True)
    place = args.cache or Path("runs/benchmarks/reproduce")
    place.mkdir(parents=True, exist_ok=True)
    pipeline = common.pipeline_at(args.pipeline)
    found = Teacher(pipeline, fingerprint(pipeline), args.n, place)
    short = (f"model.init_args.updates={args.updates}",) if args.updates else ()
    todo = [
        Run(found, m, s, seed, f"{m}_ddil.yaml", (STATIC, *of_config(s, f"{m}_ddil.yaml"), *short), args.captions)
        for seed in range(args.seed, args.seed + args.seeds)
        for m in args.methods
        for s in args.builtin
        if (m, s) not in UNFIT
    ]
    missing = [run for run in todo if reproduce.known(run, args.cells, lesson) is None]
    reproduce.check_place(missing, args.cells, lesson)
    if missing:
        reproduce.teacher(found, args.cells, lesson, args.jobs)
    for made in common.parallel(functools.partial(reproduce.cell, cells=args.cells, threads=1, lesson=lesson), missing, args.jobs):
        print(f"{reproduce.name(made)}: {made['seconds']:.0f} s", flush=True)
    cells = [cell for run in todo if (cell := reproduce.known(run, args.cells, lesson))]
    return told_of(
        args, cells, [cell for cell in constant(args, found, lesson, short) if cells and alike(cell["protocol"], cells[0]["protocol"])]
    )


def constant(args: argparse.Namespace, found: Teacher, lesson: tuple[int, int], short: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The reproduction's cells of the shipped configs that are of today's settings: their variant `both`, at any seed."""
    for file in sorted(reproduce.CELLS.glob("*-both-*.json")):
        method, variant, seed = file.stem.rsplit("-", 2)
        run = Run(found, method, variant, int(seed), f"{method}_ddil.yaml", (STATIC, *short), args.captions)
        if (cell := reproduce.known(run, reproduce.CELLS, lesson)) is not None:
            yield cell


def alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two protocols are one: the cells of earlier versions say less of theirs."""
    return all(a[key] == b[key] for key in a.keys() & b.keys())


def told_of(args: argparse.Namespace, cells: Sequence[dict[str, Any]], shipped: Sequence[dict[str, Any]]) -> Report:
    """The tables of these cells, paired against those of the shipped config."""
    names = [cell["variant"] for cell in cells]
    numbers = {(m, k, "base" if v == "both" else v, s): found for (m, k, v, s), found in values([*cells, *shipped]).items()}
    parts: list[Part] = []
    for method in args.methods:
        for steps in REPORTED[method]:
            rows = []
            for name in dict.fromkeys(("base", *names)):
                seeds = sorted(s for m, k, v, s in numbers if (m, k, v) == (method, steps, name))
                if seeds:
                    each = {key: compared(numbers, (method, steps), name, seeds, key) for key in SHOWN}
                    rows.append({"name": CONSTANT if name == "base" else name, "seeds": len(seeds), **each})
            shown = [("name", ""), ("seeds", "seeds"), *((key, HEADINGS[key]) for key in SHOWN)]
            parts.append({"title": f"{TITLES[method]}, {steps} step{'s' * (steps > 1)}", "columns": shown, "rows": rows})
    note = "± is the standard error of the mean, [t] of the paired difference to constant, the shipped config, on the seeds that both have"
    return {"benchmark": "schedules, built-in", "columns": [("name", "")], "rows": [], "parts": parts, "notes": [note]}


def measure(args: argparse.Namespace) -> Report:
    """The toy, or the built-in pipeline where schedules are named for it."""
    if args.seed is None:
        args.seed = 100 if args.builtin else 1000
    if args.seeds is None:
        args.seeds = 3 if args.builtin else 12
    if args.n is None:
        args.n = 1000 if args.builtin else 2000
    return built_in(args) if args.builtin else toy(args)


def main(argv: Sequence[str] | None = None) -> Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__)
    parser.set_defaults(seed=None)
    parser.add_argument("--methods", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--builtin", nargs="+", choices=SCHEDULES[1:], help="these, on the built-in pipeline")
    parser.add_argument("--seeds", type=int, help="from --seed on (default: 12 of the toy, 3 of the built-in pipeline)")
    parser.add_argument("--n", type=int, help="samples of the toy (default 2000), or held-out prompts (1000)")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--cache", type=Path, help="a folder that keeps finished groups of the toy, or the students of the pipeline")
    parser.add_argument("--cells", type=Path, default=reproduce.HERE / "scheduled", help="the finished cells of the built-in pipeline")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
