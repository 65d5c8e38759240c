"""What DDIL costs on top of plain distillation: roll-outs and their draw, in seconds and in network evaluations, beside the formula.

One Lightning run whose prior, cadence and buffer change from block to block, so that all settings meet the same machine and networks.
A formula for the overhead over a plain step of C forwards per sample (LCM: 3 student, 2 teacher, 1 target): q c / (u C), with q the share
of roll-out latents, c forwards per stored state, u uses of a stored state. On N nodes, c = (N - 1) / N (p_S + g (1 - p_S)) with p_S the
student's share of the roll-outs and g = 2 for a guided teacher: the last state is stored, not evaluated. Without a buffer u = 1 and a
trajectory stops at a random node: c = (N - 1) / 2 (p_S + g (1 - p_S)). A teacher that walks nodes between those of the roll-out (LCM's on
a grid of 50) costs as many times more; on the built-in config's 4 nodes there are none. Where the teacher's answers to states are kept,
what is not asked again is taken off: q (c / u - g k) / C, k = 1 - (1 - exp(-u)) / u being the share of draws of states drawn before.
A target is not asked where the teacher's step ends at s = 0: C is 6 - e, e the share of a forward latent's nodes with such an end, and as
many of the roll-outs' states as have one are taken off, e_r: q (c / u - g k + e - e_r) / C.

What a trained sample of the config asks for, by role, is counted in a run of its own that nothing is changed in, from its middle on: there
the buffer is full, and as many states go as come.

    python benchmarks/overhead.py [--pipeline DIR|builtin|random] [--rounds 12] [--count 720] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import common
import tables
from lightning.pytorch import Callback

from ddil_lightning import DDILDataModule, Distillation, assemble
from ddil_lightning.data.encoded import encode
from ddil_lightning.imitation.buffer import ReplayBuffer
from ddil_lightning.imitation.prior import SamplingPrior

PLAIN_COST = 6  # forwards of one sample in a plain LCM step whose target is asked everywhere; a backward counts as two
GUIDED = 2
SLOWER, ASKED = 0.15, 5.45  # targets: overhead in seconds, forwards of a trained sample
COLUMNS = (
    ("name", ""),
    ("uses", "uses / state"),
    ("formula", "formula"),
    ("counted", "counted"),
    ("seconds_per_step", "seconds / step"),
    ("measured", "measured"),
)

ROLES = (
    ("name", "forwards of a trained sample"),
    ("student", "student"),
    ("backward", "its backward"),
    ("teacher", "teacher"),
    ("target", "target"),
    ("sum", "sum"),
    ("formula", "formula"),
)


@dataclass
class Setting:
    """A prior with its cadence (0: no buffer), and what was seen of it."""

    name: str
    prior: SamplingPrior
    every: int
    buffer: ReplayBuffer | None = None
    seconds: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)  # weighted, of one sample each, per block


def settings(data: DDILDataModule) -> list[Setting]:
    """Plain, the config's own, and what one would change first: shares, teacher, reuse, no buffer."""
    own = data.prior if data.prior.rollouts else SamplingPrior(0.75, 0.25, 0.0)
    every, q = data.collect_every, own.rollouts
    wanted = [
        ("plain", SamplingPrior(), every),
        (f"default: {q:g} student, every {every}", own, every),
        (f"{q:g} student, every {2 * every}", own, 2 * every),
        (f"{q:g} student, every {max(every // 2, 1)}", own, max(every // 2, 1)),
        (f"0.25 student, every {every}", SamplingPrior(0.75, 0.25, 0.0), every),
        (f"0.25 student + 0.25 teacher, every {every}", SamplingPrior(0.5, 0.25, 0.25), every),
        (f"0.25 teacher, every {every}", SamplingPrior(0.75, 0.0, 0.25), every),
        (f"{q:g} student, no buffer", own, 0),
    ]
    return [Setting(name, prior, n, copy.deepcopy(data.buffer) if n else None) for name, prior, n in wanted]


class Blocks(Callback):
    """Gives every setting a block of updates in turn and times it whole; the first round warms up and fills the buffers."""

    def __init__(self, settings: list[Setting], now: Callable[[], float], block: int, rounds: int) -> None:
        self.settings, self.now, self.block = settings, now, block
        self.updates = block * len(settings) * (rounds + 1)
        self._before, self._since = 0.0, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin with the first block."""
        self._begin(trainer.datamodule, pl_module, self.settings[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Close a block that is full and begin the next."""
        clock = pl_module.student_updates
        if clock % self.block:
            return
        common.synchronize(pl_module.device)
        done, index = self.now() - self._since, clock // self.block - 1
        setting = self.settings[index % len(self.settings)]
        if index >= len(self.settings):
            setting.seconds.append(done / self.block)
            setting.evaluations.append(weighted(pl_module, trainer.datamodule) - self._before)
        self._begin(trainer.datamodule, pl_module, self.settings[(index + 1) % len(self.settings)])

    def _begin(self, data: DDILDataModule, method: Distillation, setting: Setting) -> None:
        data.prior, data.collect_every, data.buffer = setting.prior, setting.every or 1, setting.buffer
        self._before, self._since = weighted(method, data), self.now()


class Later(Callback):
    """Remembers the counts of evaluations after so many student updates."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.before: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the clock."""
        if pl_module.student_updates == self.updates:
            self.before = dict(pl_module.evaluations)


def by_role(args: argparse.Namespace, words: Sequence[str], updates: int) -> dict[str, Any]:
    """Forwards of a trained sample in the second half of a run of the config as it is, roll-outs included."""
    later = Later(updates // 2)
    trainer, method, data = assemble(args.config, *words, f"model.init_args.updates={updates}", callbacks=[later])
    data.captions = encode(common.few_captions(method, 64 if args.quick else 512), method.backbone)
    trainer.fit(method, datamodule=data)
    samples = (method.student_updates - later.updates) * data.batch_size
    asked = {role: (n - later.before[role]) / samples for role, n in method.evaluations.items()} | {"backward": 2.0}
    own = Setting("", data.prior, data.collect_every, data.buffer)
    spared = ends(method)
    formula = (PLAIN_COST - spared[0]) * (1 + predicted(own, data.batch_size, data.trajectories, nodes(method), spared)[1])
    return {"name": args.config.removesuffix(".yaml"), **asked, "sum": sum(asked.values()), "formula": formula}


def nodes(method: Distillation) -> float:
    """The mean length of a roll-out."""
    walks = method.grid.rollouts
    return sum(map(len, walks)) / len(walks)


def ends(method: Distillation) -> tuple[float, float]:
    """The shares of forward latents and of roll-outs' states whose step ends at s = 0, where a target with a boundary is not asked."""
    if getattr(method, "boundary", None) is None:
        return 0.0, 0.0
    states = [t for walk in method.grid.rollouts for t in walk.nodes.tolist()]
    last = int(method.grid.nodes[-1])
    return 1 / len(method.grid), states.count(last) / len(states)


def weighted(method: Distillation, data: DDILDataModule) -> float:
    """Forwards of one sample so far; the student's backward in every update counts as two more."""
    return sum(method.evaluations.values()) + 2 * method.student_updates * data.batch_size


def predicted(s: Setting, batch: int, trajectories: int, nodes: float, ends: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """(uses of a stored state, overhead by the formula). `ends`: as the function of this name says."""
    q, per_transition = s.prior.rollouts, s.prior.p_student + GUIDED * (1 - s.prior.p_student)
    plain, asked = PLAIN_COST - ends[0], ends[0] - ends[1]
    if q == 0:
        return 0.0, 0.0
    if s.buffer is None:
        return 1.0, q * ((nodes - 1) / 2 * per_transition + asked) / plain
    uses = q * batch * s.every / (nodes * trajectories)
    spared = 0.0 if s.buffer.answers.storage == "none" else GUIDED * known(uses)
    return uses, q * ((nodes - 1) / nodes * per_transition / uses - spared + asked) / plain


def known(uses: float) -> float:
    """The share of draws whose state was drawn before, where every state is drawn `uses` times on average, with replacement."""
    return 1 - (1 - math.exp(-uses)) / uses


def measure(args: argparse.Namespace) -> tables.Report:
    """Time the blocks and make the report."""
    now = common.clock(args)
    words = (f"model.init_args.pipeline={common.pipeline_at(args.pipeline)}", "--seed", str(args.seed), *args.set)
    given = assemble(args.config, *words).data
    cases = settings(given)
    # A block holds a whole number of collections of every setting, or the cheap half of a cycle would be compared with the dear one.
    blocks = Blocks(cases, now, block=2 * given.collect_every, rounds=1 if args.quick else args.rounds)
    trainer, method, data = assemble(args.config, *words, f"model.init_args.updates={blocks.updates}", callbacks=[blocks])
    data.captions = encode(common.few_captions(method, 64 if args.quick else 512), method.backbone)
    trainer.fit(method, datamodule=data)
    made = report(cases, data, nodes(method), ends(method), blocks.block)
    updates = min(args.count, 8) if args.quick else args.count
    if updates:
        own = by_role(args, words, updates)
        title = f"Network evaluations by role, from update {updates // 2} of {updates} on"
        made["parts"] = [{"title": title, "columns": ROLES, "rows": [own]}]
        made["targets"].append(tables.target("forwards of a trained sample, roll-outs included", own["sum"], ASKED, at_most=True))
    return made


def report(cases: list[Setting], data: DDILDataModule, length: float, spared: tuple[float, float], block: int) -> tables.Report:
    """Ratios to the plain block of the same round, median over the rounds; counts are means."""
    plain = cases[0]
    rows: list[dict[str, Any]] = []
    for s in cases:
        uses, formula = predicted(s, data.batch_size, data.trajectories, length, spared)
        ratios = [a / b for a, b in zip(s.seconds, plain.seconds, strict=True)]
        rows.append(
            {
                "name": s.name,
                "prior": [s.prior.forward, s.prior.student, s.prior.teacher],
                "collect_every": s.every,
                "uses": uses,
                "formula": formula,
                "counted": sum(s.evaluations) / sum(plain.evaluations) - 1,
                "seconds_per_step": statistics.median(s.seconds),
                "measured": statistics.median(ratios) - 1,
            }
        )
    return {
        "benchmark": "overhead",
        "columns": COLUMNS,
        "rows": rows,
        "targets": [tables.target("overhead of the default buffer", rows[1]["measured"], SLOWER, at_most=True)],
        "notes": [
            f"batch {data.batch_size}, {data.trajectories} trajectories a collection, {length:g} nodes on average, "
            f"{len(plain.seconds)} rounds of {block} updates",
            "counted: a backward is two forwards; the lengths of roll-outs are drawn, so few rounds scatter about the formula",
        ],
    }


def main(argv: list[str] | None = None) -> tables.Report:
    """The command line of this benchmark."""
    parser = common.speed_parser(__doc__, "lcm_ddil.yaml")
    parser.add_argument("--rounds", type=int, default=12, help="blocks of every setting")
    parser.add_argument("--count", type=int, default=720, help="student updates of the run that is counted by role; 0 leaves it out")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
