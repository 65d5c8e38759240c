"""Runs that go well, and runs with one fault each: the figures of docs/healthy.md.

Those of the built-in pipeline have the configs as they are, but for `--share` of their updates, with the average's memory shortened
alike. The faults are set on the analytic toy, whose runs are whole and take seconds, and beside each stands the same config
without it.

    python benchmarks/healthy.py [--cases lcm_ddil no_data ...] [--share 0.25] [--cache FOLDER] [--student FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
import yaml
from healthy_table import Record, report
from tables import Report

from ddil_lightning import Pipeline, ShiftProbe, assemble
from ddil_lightning.backbones import samplers
from ddil_lightning.evaluation.rows import method_rows, pipeline_row
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.packaged import find_config
from ddil_lightning.runs.finish import Test
from ddil_lightning.training.method import Distillation


@dataclass(frozen=True)
class Case:
    """A config and what is changed of it, as on ddil-fit's command line. `share`: whether it is trained on --share of its updates."""

    config: str
    words: tuple[str, ...] = ()

    @property
    def short(self) -> bool:
        """The toy's runs are whole."""
        return not self.config.startswith("toy2d/")


METHODS = ("lcm", "pd", "dmd2")
OTHERS = (
    "tcd",
    "pcm",
    "ctm",
    "snapfusion",
    "dmd",
    "diff_instruct",
    "emd",
    "sid",
    "moments",
    "add",
    "ladd",
    "ufogen",
    "imagine_flash",
    "reflow",
    "boot",
)
STALE = "data.rollouts.every=800", "data.buffer.max_age=100000"
CASES = {
    **{f"{name}{prior}": Case(f"{name}{prior}.yaml") for name in METHODS for prior in ("", "_ddil")},
    **{f"toy {name}{prior}": Case(f"toy2d/{name}{prior}.yaml") for name in METHODS for prior in ("", "_ddil")},
    **{f"{name}_ddil": Case(f"{name}_ddil.yaml") for name in OTHERS},
    "average too long": Case("toy2d/lcm_ddil.yaml", ("model.ema=0.9995",)),
    "rate too high": Case("toy2d/lcm_ddil.yaml", ("model.optimizer.lr=0.3",)),
    "rate beyond all": Case("toy2d/lcm_ddil.yaml", ("model.optimizer.lr=10",)),
    "no data": Case("toy2d/lcm_ddil.yaml", ("data.prior.forward=0.0", "data.prior.student=1.0")),
    "stale buffer": Case("toy2d/lcm_ddil.yaml", ("data.prior.forward=0.0", "data.prior.student=1.0", *STALE)),
    "guidance 25": Case("toy2d/lcm_ddil.yaml", ("model.guidance=25.0", "model.reflect=off")),
    "slow critic": Case("toy2d/dmd2_ddil.yaml", ("model.critic.lr=1e-5",)),
    "strong GAN": Case("toy2d/dmd2_ddil.yaml", ("model.gan.weight=10", "model.gan.critic_weight=10")),
}
"""Three methods on the built-in pipeline and the toy, with DDIL and without, the others with it on the former, and the faults."""


def scaled(settings: Mapping[str, Any], share: float) -> list[str]:
    """The overrides for `share` of the config's updates and of its average's memory."""
    if "stages" in settings:
        plan = ", ".join(f"{{steps: {s['steps']}, updates: {max(1, round(share * s['updates']))}}}" for s in settings["stages"])
        words = [f"model.stages=[{plan}]"]
    else:
        words = [f"model.updates={max(1, round(share * settings['updates']))}"]
    return [*words, f"model.ema={max(0.0, 1 - (1 - settings['ema']) / share):.4g}"]


def words_of(case: Case, args: argparse.Namespace) -> tuple[str, ...]:
    """What ddil-fit would be told beside the config."""
    settings = yaml.safe_load(find_config(case.config).read_text(encoding="utf-8"))["model"]["init_args"]
    share = 0.005 if args.quick else args.share if case.short else 1.0
    own = common.instead(args.pipeline) if case.short else []
    return ("--seed", str(args.seed), *own, *(scaled(settings, share) if share < 1 else ()), *case.words, *args.set)


def trained(name: str, args: argparse.Namespace) -> Record:
    """The record of a case: its measures by the clock, and the rows of its student; `failed` is the line that ended it."""
    case, words = CASES[name], words_of(CASES[name], args)
    points: dict[str, list[tuple[int, float]]] = {}

    def hear(clock: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            points.setdefault(key, []).append((clock, float(value)))

    start, failed, rows = time.perf_counter(), "", []
    probe = ShiftProbe(count=args.count, losses=args.count // 4)
    trainer, method, data = assemble(case.config, *words, callbacks=[probe] if case.short else [])  # the toy's exam has the shift itself
    # In the steps that its student is made for in the end, four where there is a choice. One step meets no latents of its own.
    probe.steps = max(k for k in method.deployments()[-1].steps if k <= 4)
    probe.every = max(1, method.updates // 8) if probe.steps > 1 else method.updates + 1
    method.measures.listen(hear)
    try:
        trainer.fit(method, datamodule=data)
        rows = scored(method.eval(), args)
    except FloatingPointError as error:
        failed = str(error)
    return {
        "case": name,
        "command": f"ddil-fit --config {case.config} {' '.join(words)}",
        "updates": method.student_updates,
        "seconds": time.perf_counter() - start,
        "failed": failed,
        "curves": {key: list(zip(*found, strict=True)) for key, found in points.items()},
        "rows": {row["name"]: row["metrics"] for row in rows},
    }


def scored(method: Distillation, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The student's rows."""
    test = Test(n=args.n, teacher_steps=[], student_steps=None)
    if method.backbone.samples == "points":
        return method.backbone.measured(method, test, lambda name: None) or []
    return method_rows(Suite.builtin(method.backbone.about.get("dataset", "shapes"), n=args.n), method, teacher_steps=())


def called_otherwise(args: argparse.Namespace) -> Record:
    """The rows of an exported LCM student in 4 steps: as it should be called, by another sampler, and under guidance it has not seen."""
    student = Pipeline(str(args.student))
    suite = Suite.builtin(student.about.get("dataset", "shapes"), n=args.n)
    calls = {"its own": (student, 3.0), "ddim": (samplers.named(student, "ddim"), 3.0), "guidance 9": (student, 9.0)}
    rows = {name: pipeline_row(suite, pipeline, 4, g)["metrics"] for name, (pipeline, g) in calls.items()}
    told = {"case": " / ".join(calls), "command": f"ddil-test --pipeline {args.student}", "updates": None, "seconds": 0.0, "failed": ""}
    return {**told, "curves": {}, "rows": rows}


def kept(name: str, args: argparse.Namespace) -> Record:
    """A case's record, from the cache if it is there."""
    if args.cache is None:
        return trained(name, args)
    depends = [name, find_config(CASES[name].config).read_text(encoding="utf-8"), words_of(CASES[name], args), args.n, args.count]
    file = args.cache / f"{name.replace(' ', '-')}-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12]}.json"
    if not file.is_file():
        write_rows(file, trained(name, args))  # type: ignore[arg-type]
    found: Record = json.loads(file.read_text(encoding="utf-8"))
    return found


def measure(args: argparse.Namespace) -> Report:
    """Train what is missing, and make the report and the picture."""
    torch.set_num_threads(args.threads)
    if args.quick:
        args.n, args.count = 16, 8
    args.pipeline = args.pipeline and common.pipeline_at(args.pipeline)
    records = []
    for name in args.cases:
        records.append(kept(name, args))
        print(f"{name}: {records[-1]['updates']} updates, {records[-1]['seconds']:.0f} s {records[-1]['failed']}", flush=True)
    if args.student:
        records.append(called_otherwise(args))
    return report(records)


def main(argv: list[str] | None = None) -> Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__, own=True)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--share", type=float, default=0.25, help="of the updates of the configs of the built-in pipeline")
    parser.add_argument("--n", type=int, default=256, help="prompts of the test")
    parser.add_argument("--count", type=int, default=64, help="captions of the shift probe")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--cache", type=Path, help="a folder that keeps finished cases, so that a stopped call can go on (same code)")
    parser.add_argument("--student", type=Path, help="an exported LCM student: its rows by its own sampler and called otherwise, too")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
