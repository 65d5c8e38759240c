"""What an LCM step costs beside the network calls that it cannot do without.

The floor is the student's forward and backward at batch B, the teacher's forward at 2 B (guidance) and the target's forward at B, called
bare. Floor, a bare training loop and the Lightning step take turns in one process, so that a slow moment of the machine hits all three.

    python benchmarks/step_cost.py [--pipeline DIR|builtin|random] [--repeats 30] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import common
import tables
import torch
from lightning.pytorch import Callback
from torch import Tensor

from ddil_lightning import LCM, Denoiser, assemble
from ddil_lightning.data.encoded import Encoded, encode
from ddil_lightning.diffusion.denoiser import Consistency
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.imitation.rollout import guided
from ddil_lightning.records import Context, LatentBatch, take

PARTS = ("student forward + backward, B", "teacher forward, 2 B", "target forward, B")
COLUMNS = (
    ("name", ""),
    ("evaluations", "network evaluations / sample"),
    ("seconds", "seconds"),
    ("units", "forwards of B"),
    ("ratio", "x floor"),
)


def floor_calls(method: LCM, b: LatentBatch) -> dict[str, Callable[[], None]]:
    """The three network calls of a step and nothing else."""
    assert method.teacher.null is not None
    null = method.teacher.null.expand(len(b.x_t)).guided(None)
    both = type(b.c)(*(None if x is None or y is None else torch.cat([x, y]) for x, y in zip(b.c.guided(None), null, strict=True)))  # type: ignore[arg-type]
    x2, t2 = torch.cat([b.x_t, b.x_t]), torch.cat([b.t, b.t])

    def student() -> None:
        method.student.network(b.x_t, b.t, b.c).square().mean().backward()
        method.student.zero_grad()

    @torch.no_grad()
    def teacher() -> None:
        method.teacher.network(x2, t2, both)

    @torch.no_grad()
    def ema() -> None:
        method.target.network(b.x_t, b.t, b.c)

    return dict(zip(PARTS, (student, teacher, ema), strict=True))


class BareLoop:
    """The same updates as a plain script would do them: no Trainer, no DataModule, no records, no callbacks."""

    def __init__(self, method: LCM, data: Encoded, batch: int) -> None:
        self.method, self.data, self.batch = method, data, batch
        self.parameters = [p for p in method.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=method.lr, betas=method.descent.settings.betas, fused=True)
        self.times = method.grid.times.to(method.backbone.device)

    def step(self) -> None:
        """One update of the student, as a plain script would make it."""
        m, device = self.method, self.times.device
        rows = torch.randint(len(self.data), (self.batch,))
        assert self.data.latents is not None
        x0, node = self.data.latents[rows].to(device), torch.randint(len(m.grid), (self.batch,)).to(device)
        c = type(self.data.c)(*(None if x is None else x.to(device) for x in take(self.data.c, rows)))  # type: ignore[arg-type]
        c = guided(c, m.guidance, torch.default_generator)
        t, s = self.times[node], self.times[node + 1]
        x_t = m.student.schedule.add_noise(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            x_s = ddim(m.teacher.schedule, x_t, m.teacher(x_t, t, c), t, s)
            target = self.f(m.target, x_s, s, c, reflect=True)
        y = self.f(m.student, x_t, t, c)
        m.distance(y, target).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, m.descent.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        m.target.follow(m.student, m.target_decay)
        m.averaging.follow(m.student, m.student_updates)

    def f(self, denoiser: Denoiser, x: Tensor, t: Tensor, c: Context, reflect: bool = False) -> Tensor:
        """The consistency function f(x, t, c) [B, ...] of a denoiser."""
        p = denoiser(x, t, c)
        p = denoiser.reflected(x, t, p, self.method.reflection) if reflect else p
        boundary = self.method.boundary
        return p.x0 if boundary is None else Consistency(denoiser, boundary).bounded(x, t, p).x0


class Beside(Callback):
    """Times every whole Lightning step, data, logging and callbacks included, and runs the others between two steps."""

    def __init__(self, bare: BareLoop, now: Callable[[], float], warmup: int = 3) -> None:
        self.bare, self.now, self.warmup = bare, now, warmup
        self.seconds: dict[str, list[float]] = {}
        self.counted: dict[str, float] = {}
        self._since: float | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The end of a step: read the clock, let the floor and the bare loop have their turn, start the clock again."""
        common.synchronize(pl_module.device)
        keep = pl_module.student_updates > self.warmup
        if self._since is not None and keep:
            self.seconds.setdefault("Lightning step", []).append(self.now() - self._since)
        self.counted = {name: n / (pl_module.student_updates * len(batch.t)) for name, n in pl_module.evaluations.items()}
        for name, call in {**floor_calls(pl_module, batch), "bare loop": self.bare.step}.items():
            start = self.now()
            call()
            common.synchronize(pl_module.device)
            if keep:
                self.seconds.setdefault(name, []).append(self.now() - start)
        self._since = self.now()


def measure(args: argparse.Namespace) -> tables.Report:
    """Time floor, bare loop and step in turns, and make the report."""
    now = common.clock(args)
    repeats = 3 if args.quick else args.repeats
    pipeline = common.pipeline_at(args.pipeline)
    words = (f"model.init_args.pipeline={pipeline}", "--seed", str(args.seed), f"model.init_args.updates={repeats + 3}", *args.set)
    trainer, other, data = assemble(args.config, *words)
    if not isinstance(other, LCM):
        raise ValueError(f"--config {args.config}: the bare loop is LCM's, and this trains by {type(other).__name__}")
    captions = encode(common.few_captions(other, 64 if args.quick else 512), other.backbone)
    beside = Beside(BareLoop(other.to(trainer.strategy.root_device), captions, data.batch_size), now)
    trainer, method, data = assemble(args.config, *words, callbacks=[beside])
    data.captions = captions
    trainer.fit(method, datamodule=data)
    return report(beside, data.batch_size)


def report(beside: Beside, batch: int) -> tables.Report:
    """Medians over the rounds; ratios are medians of a round's own ratios."""
    seconds = beside.seconds
    seconds["floor"] = [sum(parts) for parts in zip(*(seconds[name] for name in PARTS), strict=True)]
    unit = statistics.median(seconds[PARTS[2]])
    counted = beside.counted
    evaluations = dict(zip(PARTS, (counted["student"], counted["teacher"], counted["target"]), strict=True))
    evaluations |= dict.fromkeys(("floor", "bare loop", "Lightning step"), sum(counted.values()))

    def ratio(name: str, to: str = "floor") -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    rows = [
        {
            "name": name,
            "evaluations": evaluations[name],
            "seconds": statistics.median(seconds[name]),
            "units": statistics.median(seconds[name]) / unit,
            "ratio": ratio(name),
        }
        for name in (*PARTS, "floor", "bare loop", "Lightning step")
    ]
    shell = ratio("Lightning step", "bare loop")
    return {
        "benchmark": "step_cost",
        "columns": COLUMNS,
        "rows": rows,
        "lightning_over_bare": shell,
        "targets": [tables.target("LCM step over the floor of its network calls", ratio("Lightning step"), 1.10, at_most=True)],
        "notes": [f"Lightning over the bare loop: {shell:.3f}", f"batch {batch}, medians of {len(seconds['floor'])} rounds"],
    }


def main(argv: list[str] | None = None) -> tables.Report:
    """The command line of this benchmark."""
    parser = common.speed_parser(__doc__, "lcm.yaml")
    parser.add_argument("--repeats", type=int, default=30, help="rounds of floor, bare loop and step")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
