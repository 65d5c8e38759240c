"""How seconds and memory of a training grow with batch, resolution, steps of roll-outs, capacity of the buffer, ranks and captions.

Every size trains in a process of its own, as `assemble` makes it of the config; the sizes of one growth take turns, a block of updates at a
time, so that a slow moment of the machine hits all of them. Of captions the start is measured, from the config to the end of the first
update, with and without a cache on disk. Memory is the peak of a process beyond what it had with its libraries loaded.

An exponent is the slope of log cost against log size: by least squares over all sizes, and "at the end" between the two largest, where what
does not grow counts least. Above 1 a cost is superlinear.

    python benchmarks/growth.py [--of batch resolution steps capacity ranks captions] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import common
import tables
from growth_runs import EVERY, Workers, caches, starts, trains


class Growth(NamedTuple):
    """Something that grows: what is counted, its sizes, and the words of a command line that give a training such a size."""

    name: str
    sizes: tuple[int, ...]
    words: Callable[[int], list[str]]


GROWTHS = {
    "batch": Growth("samples of a batch", (8, 16, 32, 64), lambda n: [f"data.batch_size={n}"]),
    "resolution": Growth("pixels of an image", (32**2, 48**2, 64**2, 96**2), lambda n: [f"model.pipeline.size={math.isqrt(n)}"]),
    "steps": Growth("steps of a roll-out", (2, 4, 8, 16), lambda n: [f"model.rollouts=[{n}]", "model.solver_steps=50"]),
    "capacity": Growth("states in a full buffer", (2**9, 2**11, 2**13, 2**15), lambda n: [f"data.buffer.capacity={n}"]),
    "ranks": Growth("ranks, each with a core and a batch", (1, 2), lambda n: [f"trainer.devices={n}", *["trainer.strategy=ddp"] * (n > 1)]),
}
CAPTIONS = Growth("captions", (1024, 4096, 16384), lambda n: ["data.captions=Shapes", f"data.captions.n={n}"])
CACHES = {"memory": "encoded at every start", "file": "in a file of data.cache", "folder": "in a folder of ddil-cache"}
COLUMNS = (
    ("name", "exponent of"),
    ("cpu", "CPU seconds"),
    ("cpu_end", "at the end"),
    ("wall", "seconds"),
    ("wall_end", "at the end"),
    ("memory", "memory"),
    ("memory_end", "at the end"),
)
POINTS = (("name", ""), ("size", "size"), ("cpu", "CPU seconds"), ("wall", "seconds"), ("memory", "peak, MiB"))


@dataclass
class Point:
    """What was measured of one size: seconds of every round, by two clocks, of an update or of a start, and the peak in bytes."""

    size: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: float = 0.0

    def costs(self) -> dict[str, float]:
        """Medians over the rounds, and the peak in MiB."""
        return {"cpu": statistics.median(self.cpu), "wall": statistics.median(self.wall), "memory": self.peak / 2**20}


def turns(kind: str, args: argparse.Namespace, folder: Path) -> list[Point]:
    """All sizes of a growth, in turns; the first turn warms up and is not counted, unless it is the only one."""
    growth, count = GROWTHS[kind], 1 if args.quick else args.rounds + 1
    points, workers = [], []
    for size in growth.sizes[:2] if args.quick else growth.sizes:
        words = [f"data.rollouts.every={EVERY}", *wording(args), *growth.words(size), "--updates", str(EVERY * count)]
        world, meet = (size, str(folder / f"meet{size}")) if kind == "ranks" else (1, "")
        given = [(args.config, words, rank, world, meet, kind == "capacity") for rank in range(world)]
        workers.append(Workers(trains, *given))
        points.append(Point(size))
    for turn in range(count):
        for point, worker in zip(points, workers, strict=True):
            worker.go()
            seconds = worker.said()
            if turn or count == 1:
                point.wall.append(max(wall for wall, _ in seconds))
                point.cpu.append(statistics.fmean(cpu for _, cpu in seconds))
    for point, worker in zip(points, workers, strict=True):
        point.peak = max(worker.said())
    return points


def started(args: argparse.Namespace, folder: Path) -> dict[str, list[Point]]:
    """Starts with so many captions, by where they lie: one at a time, all sizes and places in every round."""
    sizes, rounds = ((64, 128), 1) if args.quick else (CAPTIONS.sizes, args.rounds)
    data = {size: [*wording(args), *CAPTIONS.words(size)] for size in sizes}
    writers = [Workers(caches, (["--config", args.config, *data[n], "--out", str(folder / f"folder{n}")],)) for n in sizes]
    writers += [Workers(starts, (args.config, [*data[n], f"data.cache={folder / f'file{n}'}"])) for n in sizes]
    for writer in writers:
        writer.said()
    found = {kind: [Point(n) for n in sizes] for kind in CACHES}
    for _ in range(rounds):
        for kind, points in found.items():
            for some in [points] if args.quick else [[point] for point in points]:  # where seconds mean something, one at a time
                own = [wording(args) if kind == "folder" else data[point.size] for point in some]  # a folder knows its captions
                caches_of = ["true" if kind == "memory" else str(folder / f"{kind}{point.size}") for point in some]
                begun = Workers(starts, *((args.config, [*words, f"data.cache={x}"]) for words, x in zip(own, caches_of, strict=True)))
                for point, (wall, cpu), peak in zip(some, begun.said(), begun.said(), strict=True):
                    point.wall.append(wall)
                    point.cpu.append(cpu)
                    point.peak = max(point.peak, peak)
    return found


def wording(args: argparse.Namespace) -> list[str]:
    """The words of a command line that all trainings have in common."""
    batch = f"data.batch_size={4 if args.quick else 16}"
    return [f"model.pipeline.path={args.pipeline}", "trainer.accelerator=cpu", "--seed", str(args.seed), batch, *args.set]


def exponents(points: Sequence[Point]) -> dict[str, float]:
    """The slopes of every log cost against log size, over all sizes and, `_end`, between the two largest."""
    found: dict[str, float] = {}
    x = [math.log(point.size) for point in points]
    for key in points[0].costs():
        y = [math.log(point.costs()[key]) for point in points]
        found |= {key: statistics.linear_regression(x, y).slope, f"{key}_end": (y[-1] - y[-2]) / (x[-1] - x[-2])}
    return found


def throughput(points: Sequence[Point], clock: str) -> float | None:
    """Samples a second of the most ranks over those of one, median over the rounds; None where there is no core for each."""
    one, most = points[0], points[-1]
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < most.size:
        return None
    return statistics.median(most.size * a / b for a, b in zip(getattr(one, clock), getattr(most, clock), strict=True))


def measure(args: argparse.Namespace) -> tables.Report:
    """Measure what was asked for, one growth after the other, and make the report."""
    import peft  # noqa: F401 (what every process would import)
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    args.pipeline = common.pipeline_at(args.pipeline)
    trained: dict[str, list[Point]] = {}
    begun: dict[str, list[Point]] = {}
    for kind in args.of:
        with tempfile.TemporaryDirectory() as folder:
            if kind == "captions":
                begun = started(args, Path(folder))
            else:
                trained[kind] = turns(kind, args, Path(folder))
    return report(trained, begun)


def report(trained: dict[str, list[Point]], begun: dict[str, list[Point]]) -> tables.Report:
    """The exponents and their points: of trainings by what grows, and of starts by where the captions lie."""
    named = {GROWTHS[kind].name: points for kind, points in trained.items()}
    named |= {f"{CAPTIONS.name} {CACHES[kind]}": points for kind, points in begun.items()}
    rows: list[dict[str, Any]] = [{"name": name, **exponents(points)} for name, points in named.items()]
    name, steepest = max(((row["name"], max(row["cpu_end"], row["memory_end"])) for row in rows), key=lambda found: found[1])
    targets = [tables.target(f"the steepest growth at its end, in CPU seconds or memory: {name}", steepest, 1.1, at_most=True)]
    notes = []
    if "ranks" in trained:
        ratio, by_cpu = (throughput(trained["ranks"], clock) for clock in ("wall", "cpu"))
        targets.append(tables.target("2 ranks on two cores, samples a second over those of one rank on one", ratio, 1.8))
        notes += [] if by_cpu is None else [f"the same by CPU seconds, in which nobody waits for another, nor for a core: {by_cpu:.3f}"]
    for kind in [kind for kind in begun if kind != "memory"]:
        ratio = begun[kind][-1].peak / begun[kind][0].peak
        targets.append(tables.target(f"memory with the most captions over the fewest, {CACHES[kind]}", ratio, 1.05, at_most=True))
    notes += ["beside a file of data.cache there is the data set, whose captions are in memory"] if begun else []
    notes.append("seconds are medians: of an update, roll-outs included; of captions, of a start")
    points = [{"name": name, "size": p.size, **p.costs()} for name, several in named.items() for p in several]
    parts: list[tables.Part] = [{"title": "What the exponents are fitted to", "columns": POINTS, "rows": points}]
    return {"benchmark": "growth", "columns": COLUMNS, "rows": rows, "parts": parts, "targets": targets, "notes": notes}


def main(argv: list[str] | None = None) -> tables.Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="lcm_ddil.yaml")
    parser.add_argument("--of", nargs="+", choices=[*GROWTHS, "captions"], default=[*GROWTHS, "captions"], help="what grows")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every size, and starts")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
