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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import common
import torch
import yaml
from tables import Report
from toy2d_table import Record, plot, report

from ddil_lightning import assemble
from ddil_lightning.callbacks.stages import staged
from ddil_lightning.diffusion.remedies import Remedy
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.packaged import find_config
from ddil_lightning.toy import Toy
from ddil_lightning.toy.scores import Exam
from ddil_lightning.training.method import Distillation

STEPS = 4
OFF, STATIC, CONTROL = "model.init_args.reflect=off", "model.init_args.reflect=static", "data.rollouts.control=true"
PLAIN, DDIL = "toy2d/{}.yaml", "toy2d/{}_ddil.yaml"
Actor = Literal["teacher", "student", "backward"]
"""Who takes all roll-outs, in place of the config's shares; `backward`: the student, and there is no forward share either."""


@dataclass(frozen=True)
class Variant:
    """A config, `{}` being the method's name, and what is changed of it."""

    config: str
    words: tuple[str, ...]
    actor: Actor | None = None


VARIANTS = {
    "base": Variant(PLAIN, (OFF,)),
    "reflected": Variant(PLAIN, (STATIC,)),
    "ddil": Variant(DDIL, (OFF,)),
    "both": Variant(DDIL, (STATIC,)),
    "longer_base": Variant(PLAIN, (OFF,)),
    "same_times": Variant(DDIL, (OFF, CONTROL)),
    "same_times+R": Variant(DDIL, (STATIC, CONTROL)),
    "teacher_rollouts": Variant(DDIL, (OFF,), "teacher"),
    "student_rollouts": Variant(DDIL, (OFF,), "student"),
    "student_only": Variant(DDIL, (OFF,), "backward"),
}
METHODS = {
    "pd": tuple(VARIANTS),
    "lcm": tuple(name for name in VARIANTS if name not in ("student_rollouts", "student_only")),  # its roll-outs are the student's anyway
    "dmd2": tuple(name for name in VARIANTS if name != "student_only"),  # which is its base
}


@dataclass(frozen=True)
class Task:
    """Some variants of a method for one group of seeds, which are members of one process.

    `words`: what all variants are told, as on ddil-fit's command line. `n`: samples per seed. `prior`: shares of the sources for the
    variants with DDIL, by default their config's.
    """

    method: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    words: tuple[str, ...]
    n: int
    prior: tuple[float, float, float] | None

    @property
    def file(self) -> str:
        """A name that says all that the records depend on, the configs included, but for the code."""
        configs = [find_config(template.format(self.method)).read_text() for template in (PLAIN, DDIL)]
        depends = [self.method, self.variants, self.seeds, self.words, self.n, self.prior, configs]
        return f"{self.method}-{self.seeds[0]}-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.json"

    @property
    def group(self) -> tuple[str, ...]:
        """The words that every variant begins with."""
        return f"model.init_args.pipeline.init_args.members={len(self.seeds)}", *self.words

    def said(self, variant: str) -> tuple[str, tuple[str, ...]]:
        """The config of a variant and the words that it is told."""
        its = VARIANTS[variant]
        shares: tuple[str, ...] = ()
        if its.config == DDIL and (its.actor or self.prior):
            shares = prior_words(its.config.format(self.method), its.actor, self.prior)
        return its.config.format(self.method), ("--seed", str(self.seeds[0]), common.ANEW, *self.group, *shares, *its.words)


@functools.lru_cache(maxsize=4)
def exam(config: str, words: tuple[str, ...], n: int) -> Exam:
    """What a group's students are scored against, once per process and method."""
    method = assemble(config, *words).method
    assert isinstance(method.backbone, Toy)
    return Exam(method.backbone, method.eval_guidance, n=n, near=n // 2)


def prior_words(config: str, actor: Actor | None, prior: Sequence[float] | None) -> tuple[str, ...]:
    """Overrides for the shares of the sources: `prior` or, without one, the config's; with an actor, it takes all roll-outs."""
    found = yaml.safe_load(find_config(config).read_text())["data"]["prior"]
    shares = dict(zip(("forward", "student", "teacher"), prior, strict=True)) if prior else found
    if actor:
        forward = 0.0 if actor == "backward" else shares["forward"]
        shares = {"forward": forward, "student": 0.0, "teacher": 0.0}
        shares["teacher" if actor == "teacher" else "student"] = 1 - forward
    return tuple(f"data.prior.{name}={share}" for name, share in shares.items())


def longer(method: Distillation, ratio: float) -> str:
    """The override that makes a run `ratio` times as long, every stage of it."""
    if not staged(method):
        return f"model.init_args.updates={max(1, round(ratio * method.updates))}"
    plan = ", ".join(f"{{steps: {s.steps}, updates: {max(1, round(ratio * s.length))}}}" for s in method.stages)  # type: ignore[union-attr]
    return f"model.init_args.stages=[{plan}]"


def quick(method: str) -> list[str]:
    """Overrides for a look at whether it runs."""
    small = {"pd": "stages=[{steps: 16, updates: 2}, {steps: 8, updates: 2}, {steps: 4, updates: 2}]"}
    return [
        f"model.init_args.{small.get(method, 'updates=4')}",
        *(f"model.init_args.pipeline.init_args.{x}" for x in ("size=512", "width=8")),
    ]


def work(task: Task, cache: Path | None) -> list[Record]:
    """A task's records, from the cache if they are there."""
    if cache is None:
        return train(task)
    file = cache / task.file
    if not file.is_file():
        write_rows(file, train(task))
    return json.loads(file.read_text())


def train(task: Task) -> list[Record]:
    """All variants of a task: a record each, with one value per seed of every measure."""
    torch.set_num_threads(1)
    common.quiet()
    records: list[Record] = []
    for variant in task.variants:
        config, words = task.said(variant)
        if variant == "longer_base":
            spent = {r["variant"]: r["evaluations"] for r in records}
            words = *words, longer(assemble(config, *words).method, spent["ddil"] / spent["base"])
        records.append(trained(task, variant, config, words))
    return records


def trained(task: Task, variant: str, config: str, words: Sequence[str], remedies: Sequence[str] = ()) -> Record:
    """The record of one variant: trained, and scored for every seed of the group.

    `remedies`: what is done to its sampler without training, by the names of `diffusion.remedies`, each scored as well; a shift is told the
    variance of the data.
    """
    trainer, method, data = assemble(config, *words)
    start = time.perf_counter()
    trainer.fit(method, datamodule=data)
    seconds = time.perf_counter() - start
    deployed = method.eval().deployment
    examined = exam(PLAIN.format(task.method), ("--seed", str(task.seeds[0]), *task.group), task.n)
    policy, grid = deployed.sampler(1 if deployed.steps == (1,) else STEPS)
    record: Record = {
        "method": task.method,
        "variant": variant,
        "seeds": list(task.seeds),
        "seconds": seconds,
        "updates": method.student_updates,
        "evaluations": sum(method.evaluations.values()),
        "scores": examined.score(policy, grid),
    }
    if remedies:
        variance = float(examined.real.flatten(1).var(1).mean())
        made = {name: replace(Remedy.named(name.split("-")), variance=variance) for name in remedies}
        record["remedied"] = {name: examined.score(remedy.on(policy), grid) for name, remedy in made.items()}
    return record


def tasks(args: argparse.Namespace) -> list[Task]:
    """One task per method and group of seeds; base comes first in each, and longer_base after ddil."""
    seeds = range(args.seed, args.seed + args.seeds)
    groups = [tuple(seeds[i : i + args.members]) for i in range(0, len(seeds), args.members)]
    made = []
    for name in args.methods:
        wanted = tuple(v for v in METHODS[name] if args.variants is None or v in args.variants or v == "base")
        if "longer_base" in wanted and "ddil" not in wanted:
            raise ValueError("--variants longer_base needs ddil, whose network evaluations it is given")
        words = (*(quick(name) if args.quick else ()), *args.set)
        made += [Task(name, wanted, group, words, args.n, tuple(args.prior) if args.prior else None) for group in groups]
    return made


def measure(args: argparse.Namespace) -> Report:
    """Train and score all groups, and make the report."""
    if args.quick:
        args.seeds, args.members, args.n = min(args.seeds, 2), 2, 64
    start, todo = time.time(), tasks(args)
    records: list[Record] = []
    for i, done in enumerate(common.parallel(functools.partial(work, cache=args.cache), todo, args.jobs)):
        records += done
        who, seeds = done[0]["method"], done[0]["seeds"]
        print(f"[{i + 1}/{len(todo)}, {time.time() - start:.0f} s] {who}, seeds {seeds[0]} to {seeds[-1]}", flush=True)
    made = report(records, {"seeds": args.seeds, "members": args.members, "n": args.n}, quick=args.quick)
    made["seconds"] = round(time.time() - start, 1)
    if args.plot:
        plot(made["rows"], args.plot)
    return made


def main(argv: list[str] | None = None) -> Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__, pipeline=False)
    parser.set_defaults(seed=1000)
    parser.add_argument("--seeds", type=int, default=12, help="independent experiments, from --seed on")
    parser.add_argument("--members", type=int, default=3, help="seeds per process")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all; base is always among them")
    shares = ("FORWARD", "STUDENT", "TEACHER")
    parser.add_argument("--prior", nargs=3, type=float, metavar=shares, help="shares of the variants with DDIL (default: their config's)")
    parser.add_argument("--n", type=int, default=2000, help="samples per seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--cache", type=Path, help="a folder that keeps finished groups, so that a stopped run can go on (same code)")
    parser.add_argument("--plot", type=Path, help="draw the energy distances as a PNG")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
