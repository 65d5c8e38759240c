"""PD, LCM and DMD2 on the built-in pipeline, each with and without DDIL and reflection: the reproduction tables, over seeds.

Every variant is a shipped config trained by the library with its default budget, and sampled in few steps from the same noise as the
teacher; paired differences over seeds decide. `base` is the method alone, `reflected` has reflection, `ddil` roll-outs, `both` the two: the
shipped config; `both_critic`, of DMD2, reflects its critic as well. `same_times` is the control: as `ddil`, but every roll-out is replaced
by data noised to its times, so that an emphasis on timesteps is not mistaken for the correction of a shift. PD's students are also sampled
with DPM-Solver++ 2M. Finished runs are kept under --cache and not repeated, nor is a training whose students are to be scored anew (--n).

    python benchmarks/builtin.py [--method lcm] [--seeds 3] [--jobs 2] [--n 1000] [--updates N] [--variants base both ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import common
import torch
from builtin_runs import VARIANTS, Run, Teacher, fingerprint
from builtin_table import STUDENT_STEPS, TEACHER_STEPS, Baseline, Record, report
from tables import Report
from torch import Tensor

from ddil_lightning import Pipeline, Shapes, assemble
from ddil_lightning.data.captions import builtin
from ddil_lightning.data.encoded import Encoded, encode
from ddil_lightning.evaluation.batches import as_saved
from ddil_lightning.evaluation.drawing import Sampler
from ddil_lightning.evaluation.paired import paired_distance
from ddil_lightning.evaluation.rows import method_rows, policy_row
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.files import replacing
from ddil_lightning.processes import Processes
from ddil_lightning.runs.checkpoint import load_checkpoint, reinstate
from ddil_lightning.runs.folder import stage_pipelines
from ddil_lightning.training.method import Distillation

R = TypeVar("R", Baseline, Record)
CHECKPOINT = "student.ckpt"
DEFAULT = ["base", "reflected", "ddil", "both", "same_times_reflected"]


@dataclass(frozen=True, eq=False)
class Paired(Suite):
    """A suite that also compares a sampler's images with `reference` [N, 3, H, W], images of the same prompts from the same noise."""

    reference: Tensor | None = None
    drawn: list[Tensor] = field(default_factory=list)

    @classmethod
    def beside(cls, suite: Suite, reference: Tensor | None = None) -> Paired:
        """A suite's own, with a reference."""
        return cls(**{f.name: getattr(suite, f.name) for f in fields(Suite)}, reference=reference)

    @property
    def images(self) -> Tensor:
        """The images of the prompts that were scored last, as files hold them."""
        return as_saved(torch.cat(self.drawn)[: len(self.prompts)])

    def score(self, sample: Sampler, processes: Processes | None = None, look: Any = None) -> dict[str, Any]:
        """The suite's metrics and `paired`, the mean squared difference of 8-bit images in [-1, 1]."""
        self.drawn.clear()

        def keep(prompts: list[str], seed: int) -> Tensor:
            self.drawn.append(sample(prompts, seed))
            return self.drawn[-1]

        metrics = super().score(keep, processes, look)
        return metrics | {"paired": None if self.reference is None else paired_distance(self.images, self.reference)}


# Workers -------------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def suite(dataset: str, n: int) -> Suite:
    """The held-out prompts and images, once per process."""
    return Suite.builtin(dataset, n=n)


@functools.lru_cache(maxsize=1)
def encoded(pipeline: str, n: int | None) -> Encoded:
    """The training data after the frozen encoders, once per process; `n`: only so many captions."""
    backbone = Pipeline(pipeline)
    dataset = backbone.about.get("dataset", "shapes")
    return encode(Shapes(n) if n and dataset == "shapes" else builtin(dataset), backbone)


def baseline(teacher: Teacher) -> Baseline:
    """The teacher's rows; its images in 32 steps are kept as the reference of every paired distance."""
    trainer, method, _ = assemble(teacher.config, f"model.init_args.pipeline={teacher.pipeline}", "--seed", "0")
    method = method.to(trainer.strategy.root_device).eval()
    held_out, rows, reference = suite(method.backbone.about["dataset"], teacher.n), [], None
    for steps in TEACHER_STEPS:
        paired = Paired.beside(held_out, reference)
        rows.append(policy_row(paired, method.backbone, f"teacher@{steps}", *method.baseline.sampler(steps), method.eval_guidance))
        reference = paired.images if reference is None else reference
    torch.save(reference, teacher.reference)
    return {"rows": rows}


def student(run: Run) -> Record:
    """One run, scored. Its networks are kept, so that other prompts, or more of them, need no second training."""
    method, seconds = trained(run)
    counts = method.evaluations
    paired = Paired.beside(suite(method.backbone.about["dataset"], run.teacher.n), torch.load(run.teacher.reference, weights_only=True))
    return {
        "variant": run.variant,
        "seed": run.seed,
        "seconds": seconds,
        "updates": method.student_updates,
        "network_evaluations": counts,
        "rows": rows(run, method, paired),
    }


def trained(run: Run) -> tuple[Distillation, float]:
    """The method of a run after its training, which is done where it has not been, on its device; and the seconds that took."""
    if not (run.students / CHECKPOINT).is_file():
        train(run)
    trainer, method, _ = assemble(run.config, *run.told)
    state = load_checkpoint(run.students / CHECKPOINT)
    reinstate(method, state)
    return method.to(trainer.strategy.root_device).eval(), state["seconds"]


def rows(run: Run, method: Distillation, scored: Any, steps: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """A student's rows on a suite, by default in all its step counts, PD's with DPM-Solver++ 2M too."""
    counts, dpm = STUDENT_STEPS[run.method] if steps is None else steps, run.method == "pd" and steps is None
    return method_rows(scored, method, (), counts, stages=stage_pipelines(run.students), dpm=dpm)


def train(run: Run) -> None:
    """Train a run: its last networks, and the students of each stage. What an interrupted one has left there goes."""
    shutil.rmtree(run.students, ignore_errors=True)
    trainer, method, data = assemble(run.config, *run.told, f"trainer.default_root_dir={run.students}")
    data.captions = encoded(run.teacher.pipeline, run.captions)
    start = time.perf_counter()
    trainer.fit(method, datamodule=data)
    state: dict[str, Any] = {"state_dict": method.state_dict(), "seconds": time.perf_counter() - start}
    method.on_save_checkpoint(state)
    with replacing(run.students / CHECKPOINT) as part:
        torch.save(state, part)


def kept(file: Path, make: Callable[[], R], threads: int) -> R:
    """A record, from its file if it is there."""
    if file.is_file():
        return json.loads(file.read_text())
    torch.set_num_threads(threads)
    common.quiet()
    record = make()
    write_rows(file, record)  # type: ignore[arg-type]
    return record


def work(run: Run, threads: int) -> Record:
    """A run's record, by so many threads."""
    return kept(run.file, lambda: student(run), threads)


# The benchmark -------------------------------------------------------------------------------------------------------------------------


def runs(args: argparse.Namespace, teacher: Teacher) -> list[Run]:
    """The runs of the chosen variants, one per variant and seed."""
    updates = [f"model.init_args.updates={args.updates}"] if args.updates else []

    def made(variant: str, seed: int) -> Run:
        config, own = VARIANTS[variant]
        return Run(teacher, args.method, variant, seed, config.format(args.method), (*own, *updates, *args.set), args.captions)

    return [made(variant, seed) for seed in range(args.seed, args.seed + args.seeds) for variant in args.variants]


def measure(args: argparse.Namespace) -> Report:
    """Train what is not in the cache, score it, and make the report."""
    if args.quick:
        args.updates, args.n, args.seeds, args.captions = args.updates or 2, min(args.n, 16), 1, 64
    args.cache.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by the workers when they import torch
    pipeline = common.pipeline_at(args.pipeline)
    teacher = Teacher(pipeline, fingerprint(pipeline), args.n, args.cache)
    if not teacher.reference.is_file():
        teacher.file.unlink(missing_ok=True)
    start = time.time()
    first = kept(teacher.file, lambda: baseline(teacher), args.threads * args.jobs)
    records: list[Record] = []
    todo = runs(args, teacher)
    for record in common.parallel(functools.partial(work, threads=args.threads), todo, args.jobs):
        records.append(record)
        at = f"{len(records)}/{len(todo)}, {time.time() - start:.0f} s"
        print(f"[{at}] {record['variant']} seed {record['seed']}: trained in {record['seconds']:.0f} s", flush=True)
    return report(args.method, first, records, args.variants, {"prompts": args.n, "seeds": args.seeds})


def main(argv: list[str] | None = None) -> Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--method", choices=list(STUDENT_STEPS), default="lcm")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=DEFAULT)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant, from --seed on")
    parser.add_argument("--updates", type=int, help="student updates (default: the config's)")
    parser.add_argument("--n", type=int, default=1000, help="held-out prompts")
    parser.add_argument("--jobs", type=int, default=2, help="processes; each takes one run at a time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each")
    parser.add_argument("--captions", type=int, help="train on so many captions only (default: the whole built-in set)")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/builtin"), help="where finished runs are kept")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
