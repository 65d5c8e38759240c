"""DDIL's claims on a teacher that is known exactly: {PD, LCM, DMD2} x {base, reflected, ddil, both} and controls, over many seeds.

The shipped configs toy2d/*.yaml are trained by the library and their four-step samplers scored in the plane (toy/scores.py).
`same_times` replaces every roll-out by data noised to its times; `teacher_rollouts` and `student_rollouts` give all roll-outs to
one actor; `student_only` also has no forward share; `longer_base` is base with the further updates that ddil's network
evaluations would have paid for; `+R` has reflection. Members of one process share times, classes and the plans of roll-outs, so
the seeds are split into groups (--members).

    python benchmarks/toy2d.py [--seed 1000] [--seeds 12] [--methods pd lcm dmd2] [--variants base both ...] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from toy2d_table import plot, report

STEPS = 4
OFF, STATIC, CONTROL = "model.init_args.reflect=off", "model.init_args.reflect=static", "data.rollouts.control=true"
TEACHER, STUDENT, BACKWARD = "teacher", "student", "backward"  # who takes the roll-outs, in place of the config's shares
PLAIN, DDIL = "toy2d/{}.yaml", "toy2d/{}_ddil.yaml"
COMMON: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": (PLAIN, (OFF,)),
    "reflected": (PLAIN, (STATIC,)),
    "ddil": (DDIL, (OFF,)),
    "both": (DDIL, (STATIC,)),
    "longer_base": (PLAIN, (OFF,)),
    "same_times": (DDIL, (OFF, CONTROL)),
    "same_times+R": (DDIL, (STATIC, CONTROL)),
    "teacher_rollouts": (DDIL, (OFF, TEACHER)),
    "student_rollouts": (DDIL, (OFF, STUDENT)),
    "student_only": (DDIL, (OFF, BACKWARD)),
}
METHODS = {
    "pd": tuple(COMMON),
    "lcm": tuple(name for name in COMMON if name not in ("student_rollouts", "student_only")),  # its roll-outs are the student's anyway
    "dmd2": tuple(name for name in COMMON if name != "student_only"),  # which is its base
}


@functools.lru_cache(maxsize=4)
def exam(config: str, words: tuple[str, ...], n: int, seed: int) -> Any:
    """What a group's students are scored against, once per process and method."""
    from ddil_lightning.toy.scores import Exam

    _, method, _ = common.build(config, pipeline=None, seed=seed, overrides=words)
    return Exam(method.backbone, method.eval_guidance, n=n, near=n // 2)


def prior_words(config: str, actor: str | None, prior: Sequence[float] | None) -> list[str]:
    """Overrides for the shares of the sources: `prior` or, without one, the config's; with an actor, it takes all roll-outs."""
    import yaml

    from ddil_lightning.commands.configs import find_config

    found = yaml.safe_load(find_config(config).read_text())["data"]["prior"]
    shares = dict(zip(("forward", "student", "teacher"), prior, strict=True)) if prior else found
    if actor:
        forward = 0.0 if actor == BACKWARD else shares["forward"]
        shares = {"forward": forward, "student": 0.0, "teacher": 0.0}
        shares["teacher" if actor == TEACHER else "student"] = 1 - forward
    return [f"data.prior.{name}={share}" for name, share in shares.items()]


def longer(method: Any, ratio: float) -> list[str]:
    """Overrides that make a run `ratio` times as long, every stage of it."""
    if not getattr(method, "stages", None):
        return [f"model.init_args.updates={round(ratio * method.updates)}"]
    plan = ", ".join(f"{{steps: {s.steps}, updates: {round(ratio * s.length)}}}" for s in method.stages)
    return [f"model.init_args.stages=[{plan}]"]


def quick(method: str) -> list[str]:
    """Overrides for a look at whether it runs."""
    small = {"pd": "stages=[{steps: 16, updates: 2}, {steps: 8, updates: 2}, {steps: 4, updates: 2}]"}
    return [
        f"model.init_args.{small.get(method, 'updates=4')}",
        *(f"model.init_args.pipeline.init_args.{x}" for x in ("size=512", "width=8")),
    ]


def work(task: dict[str, Any]) -> list[dict[str, Any]]:
    """A task's records, from the cache if they are there."""
    if not task["cache"]:
        return train(task)
    from ddil_lightning.commands.configs import find_config
    from ddil_lightning.evaluation.table import write_rows

    configs = [find_config(t.format(task["method"])).read_text() for t in (PLAIN, DDIL)]
    key = hashlib.sha256(json.dumps([{k: v for k, v in task.items() if k != "cache"}, configs]).encode()).hexdigest()[:16]
    file = Path(task["cache"]) / f"{task['method']}-{task['seeds'][0]}-{key}.json"
    if not file.is_file():
        write_rows(file, train(task))
    return json.loads(file.read_text())


def train(task: dict[str, Any]) -> list[dict[str, Any]]:
    """All variants of one method for one group of seeds: a record each, with one value per seed of every measure."""
    torch.set_num_threads(1)
    common.quiet()
    records: list[dict[str, Any]] = []
    group = tuple([f"model.init_args.pipeline.init_args.members={len(task['seeds'])}", *task["words"]])
    for variant in task["variants"]:
        template, marks = COMMON[variant]
        config, words = template.format(task["method"]), list(group)
        actor = marks[-1] if marks[-1] in (TEACHER, STUDENT, BACKWARD) else None
        if template == DDIL and (actor or task["prior"]):
            words += prior_words(config, actor, task["prior"])
        words += [mark for mark in marks if mark != actor]
        if variant == "longer_base":
            words += longer(*_ratio(records, config, words, task["seeds"][0]))
        trainer, method, data = common.build(config, pipeline=None, seed=task["seeds"][0], overrides=words)
        start = time.perf_counter()
        trainer.fit(method, datamodule=data)
        seconds = time.perf_counter() - start
        scores = exam(PLAIN.format(task["method"]), group, task["n"], task["seeds"][0]).score(*method.eval().deployment.sampler(STEPS))
        counts = {"updates": method.student_updates, "evaluations": sum(method.evaluations.values())}
        records.append(
            {"method": task["method"], "variant": variant, "seeds": task["seeds"], "seconds": seconds, **counts, "scores": scores}
        )
    return records


def _ratio(records: list[dict[str, Any]], config: str, words: list[str], seed: int) -> tuple[Any, float]:
    """The method as it would be built, and ddil's network evaluations over base's."""
    spent = {r["variant"]: r["evaluations"] for r in records}
    return common.build(config, pipeline=None, seed=seed, overrides=words)[1], spent["ddil"] / spent["base"]


def tasks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One task per method and group of seeds; base comes first in each, and longer_base after ddil."""
    seeds = list(range(args.seed, args.seed + args.seeds))
    groups = [seeds[i : i + args.members] for i in range(0, len(seeds), args.members)]
    made = []
    for name in args.methods:
        wanted = [v for v in METHODS[name] if args.variants is None or v in args.variants or v == "base"]
        if "longer_base" in wanted and "ddil" not in wanted:
            raise ValueError("--variants longer_base needs ddil, whose network evaluations it is given")
        words = [*(quick(name) if args.quick else []), *args.set]
        task = {"method": name, "variants": wanted, "words": words, "n": args.n, "cache": args.cache, "prior": args.prior}
        made += [{**task, "seeds": group} for group in groups]
    return made


def measure(args: argparse.Namespace) -> common.Report:
    """Train, score, compare."""
    if args.quick:
        args.seeds, args.members, args.n = min(args.seeds, 2), 2, 64
    start, records = time.time(), []
    todo = tasks(args)
    for i, done in enumerate(common.parallel(work, todo, args.jobs)):
        records += done
        who, seeds = done[0]["method"], done[0]["seeds"]
        print(f"[{i + 1}/{len(todo)}, {time.time() - start:.0f} s] {who}, seeds {seeds[0]} to {seeds[-1]}", flush=True)
    made = report(records, {"seeds": args.seeds, "members": args.members, "n": args.n}, quick=args.quick)
    made["seconds"] = round(time.time() - start, 1)
    if args.plot:
        plot(made["rows"], args.plot)
    return made


def main(argv: list[str] | None = None) -> common.Report:
    """The command."""
    parser = common.parser(__doc__, pipeline=False)
    parser.set_defaults(seed=1000)
    parser.add_argument("--seeds", type=int, default=12, help="independent experiments, from --seed on")
    parser.add_argument("--members", type=int, default=3, help="seeds per process")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--variants", nargs="+", choices=list(COMMON), help="default: all; base is always among them")
    shares = ("FORWARD", "STUDENT", "TEACHER")
    parser.add_argument("--prior", nargs=3, type=float, metavar=shares, help="shares of the variants with DDIL (default: their config's)")
    parser.add_argument("--n", type=int, default=2000, help="samples per seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--cache", help="a folder that keeps finished groups, so that a run that was stopped can go on (same code)")
    parser.add_argument("--plot", type=Path, help="draw the energy distances as a PNG")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
