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
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from builtin_table import STUDENT_STEPS, TEACHER_STEPS, report
from torch import Tensor

from ddil_lightning.evaluation.batches import as_saved
from ddil_lightning.evaluation.registry import keys
from ddil_lightning.evaluation.suite import Suite, paired_distance
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.files import replacing

OFF, STATIC = "model.init_args.reflect=off", "model.init_args.reflect=static"
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": ("{}.yaml", (OFF,)),
    "reflected": ("{}.yaml", (STATIC,)),
    "ddil": ("{}_ddil.yaml", (OFF,)),
    "both": ("{}_ddil.yaml", (STATIC,)),
    "both_critic": ("{}_ddil.yaml", (STATIC, "model.init_args.reflects.critic=true")),  # of DMD2 alone
    "same_times": ("{}_ddil.yaml", (OFF, "data.rollouts.control=true")),
    "same_times_reflected": ("{}_ddil.yaml", (STATIC, "data.rollouts.control=true")),
}
CHECKPOINT = "student.ckpt"
DEFAULT = ["base", "reflected", "ddil", "both", "same_times_reflected"]


class Paired:
    """A suite that also compares a sampler's images with `reference` [N, 3, H, W], images of the same prompts from the same noise."""

    def __init__(self, suite: Suite, reference: Tensor | None = None) -> None:
        self.suite, self.prompts, self.reference, self.protocol = suite, suite.prompts, reference, suite.protocol

    def score(self, sample: Callable[[list[str], int], Tensor]) -> dict[str, Any]:
        """The suite's metrics and `paired`, the mean squared difference of 8-bit images in [-1, 1]."""
        kept: list[Tensor] = []

        def keep(prompts: list[str], seed: int) -> Tensor:
            kept.append(sample(prompts, seed))
            return kept[-1]

        metrics = self.suite.score(keep)
        self.images = as_saved(torch.cat(kept)[: len(self.prompts)])
        metrics["paired"] = None if self.reference is None else paired_distance(self.images, self.reference)
        return metrics


# Workers -------------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def suite(dataset: str, n: int) -> Suite:
    """The held-out prompts and images, once per process."""
    return Suite.builtin(dataset, n=n)


@functools.lru_cache(maxsize=1)
def encoded(pipeline: str, n: int | None) -> Any:
    """The training data after the frozen encoders, once per process; `n`: only so many captions."""
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.data.captions import Shapes, builtin
    from ddil_lightning.data.encoded import encode

    backbone = Pipeline(pipeline)
    dataset = backbone.about.get("dataset", "shapes")
    return encode(Shapes(n) if n and dataset == "shapes" else builtin(dataset), backbone)


def teacher(task: dict[str, Any]) -> dict[str, Any]:
    """The teacher's rows; its images in 32 steps are kept as the reference of every paired distance."""
    from ddil_lightning.evaluation.rows import policy_row

    trainer, method, _ = built(task)
    method = method.to(trainer.strategy.root_device).eval()
    held_out, rows, reference = suite(method.backbone.about["dataset"], task["n"]), [], None
    for steps in TEACHER_STEPS:
        paired = Paired(held_out, reference)
        rows.append(policy_row(paired, method.backbone, f"teacher@{steps}", *method.baseline.sampler(steps), method.eval_guidance))  # type: ignore[arg-type]
        reference = paired.images if reference is None else reference
    torch.save(reference, task["reference"])
    return {"variant": "teacher", "seed": None, "rows": rows}


def student(task: dict[str, Any]) -> dict[str, Any]:
    """One run, scored. Its networks are kept, so that other prompts, or more of them, need no second training."""
    from ddil_lightning.evaluation.rows import method_rows
    from ddil_lightning.runs.checkpoint import load_checkpoint
    from ddil_lightning.runs.folder import stage_pipelines

    folder = Path(task["students"])
    if not (folder / CHECKPOINT).is_file():
        train(task, folder)
    trainer, method, _ = built(task)
    state = load_checkpoint(folder / CHECKPOINT)
    method.load_state_dict(state["state_dict"])
    method.on_load_checkpoint(state)
    counts = {"updates": method.student_updates, "network_evaluations": method.evaluations}
    method = method.to(trainer.strategy.root_device).eval()
    paired = Paired(suite(method.backbone.about["dataset"], task["n"]), torch.load(task["reference"], weights_only=True))
    steps, dpm = STUDENT_STEPS[task["method"]], task["method"] == "pd"
    rows = method_rows(paired, method, (), steps, stages=stage_pipelines(folder), dpm=dpm)  # type: ignore[arg-type]
    return {"variant": task["variant"], "seed": task["seed"], "seconds": state["seconds"], **counts, "rows": rows}


def train(task: dict[str, Any], folder: Path) -> None:
    """Train one run into `folder`: its last networks, and the students of each stage. What an interrupted run has left there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    trainer, method, data = built(task, f"trainer.default_root_dir={folder}")
    data.captions = encoded(task["pipeline"], task["captions"])
    start = time.perf_counter()
    trainer.fit(method, datamodule=data)
    state: dict[str, Any] = {"state_dict": method.state_dict(), "seconds": time.perf_counter() - start}
    method.on_save_checkpoint(state)
    with replacing(folder / CHECKPOINT) as part:
        torch.save(state, part)


def built(task: dict[str, Any], *more: str) -> tuple[Any, Any, Any]:
    """Trainer, method and data of a task."""
    return common.build(task["config"], pipeline=task["pipeline"], seed=task["seed"] or 0, overrides=[*task["overrides"], *more])


def work(task: dict[str, Any]) -> dict[str, Any]:
    """A task's record, from the cache if it is there."""
    file = Path(task["file"])
    if file.is_file():
        return json.loads(file.read_text())
    torch.set_num_threads(task["threads"])
    common.quiet()
    record = (student if task["variant"] else teacher)(task)
    write_rows(file, record)  # type: ignore[arg-type]
    return record


# The benchmark -------------------------------------------------------------------------------------------------------------------------


def fingerprint(pipeline: str) -> str:
    """A hash of all weights of a pipeline."""
    from ddil_lightning.backbones.pipeline import Pipeline

    found = hashlib.sha256()
    for name, part in sorted(Pipeline(pipeline).pipe.components.items()):
        for key, value in (part.state_dict() if isinstance(part, torch.nn.Module) else {}).items():
            found.update(f"{name}.{key}".encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def digest(depends: Sequence[Any]) -> str:
    """A short name of all that something depends on."""
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]


def tasks(args: argparse.Namespace, pipeline: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The teacher's task and one per variant and seed. A task's file is named by all that its result depends on."""
    from ddil_lightning.commands.configs import find_config

    weights, folder = fingerprint(pipeline), Path(args.cache)
    updates = [f"model.init_args.updates={args.updates}"] if args.updates else []

    def task(variant: str, seed: int | None, config: str, own: Sequence[str]) -> dict[str, Any]:
        overrides = [*own, *updates, *args.set] if variant else []
        said: list[Any] = [variant, seed, find_config(config).read_text(), overrides, args.captions]
        key, trained = digest([weights, args.n, keys(), *(said if variant else [])]), digest([weights, *said])
        what = {"variant": variant, "seed": seed, "config": config, "overrides": overrides, "pipeline": pipeline, "n": args.n}
        name = f"{args.method}-{variant}-{seed}" if variant else "teacher"
        return {
            **what,
            "method": args.method,
            "captions": args.captions,
            "threads": args.threads,
            "file": str(folder / f"{name}-{key}.json"),
            "students": str(folder / "students" / f"{name}-{trained}"),
        }

    first = task("", None, "lcm.yaml", [])  # the teacher's rows are the same for every method and whatever is set
    reference = first["file"].replace(".json", ".pt")
    seeds = range(args.seed, args.seed + args.seeds)
    runs = [task(name, seed, VARIANTS[name][0].format(args.method), VARIANTS[name][1]) for seed in seeds for name in args.variants]
    return {**first, "reference": reference}, [{**run, "reference": reference} for run in runs]


def measure(args: argparse.Namespace) -> common.Report:
    """The report."""
    if args.quick:
        args.updates, args.n, args.seeds, args.captions = args.updates or 2, min(args.n, 16), 1, 64
    Path(args.cache).mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by the workers when they import torch
    pipeline = common.pipeline_at(args.pipeline)
    first, runs = tasks(args, pipeline)
    if not Path(first["reference"]).is_file():
        Path(first["file"]).unlink(missing_ok=True)
    start = time.time()
    baseline = work({**first, "threads": args.threads * args.jobs})
    records = []
    for record in common.parallel(work, runs, args.jobs):
        records.append(record)
        at = f"{len(records)}/{len(runs)}, {time.time() - start:.0f} s"
        print(f"[{at}] {record['variant']} seed {record['seed']}: trained in {record['seconds']:.0f} s", flush=True)
    return report(args.method, baseline, records, args.variants, {"prompts": args.n, "seeds": args.seeds})


def main(argv: list[str] | None = None) -> common.Report:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--method", choices=list(STUDENT_STEPS), default="lcm")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=DEFAULT)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant, from --seed on")
    parser.add_argument("--updates", type=int, help="student updates (default: the config's)")
    parser.add_argument("--n", type=int, default=1000, help="held-out prompts")
    parser.add_argument("--jobs", type=int, default=2, help="processes; each takes one run at a time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each")
    parser.add_argument("--captions", type=int, help="train on so many captions only (default: the whole built-in set)")
    parser.add_argument("--cache", default="runs/benchmarks/builtin", help="where finished runs are kept")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
