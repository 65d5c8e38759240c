"""What a step of every method costs beside the network calls that it makes: the floor, counted and replayed.

While a shipped config trains, all that its step asks of networks is written down: which network, with what, whether gradients flow and how
often back. After the step the same calls are made once more and nothing else, so that a slow moment of the machine hits both. Networks are
those of the roles, discriminators' heads, networks of images and the decoder; roll-outs are part of the step that they were made for.

The targets are of CPU time (--threads 1 --cpu_time): 1.05 for LCM, PD and DMD2, 1.15 for the others.

    python benchmarks/floors.py [--methods lcm emd ...] [--variant plain|ddil] [--updates 12] [--threads 1 --cpu_time] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import common
import torch
import yaml
from lightning.pytorch import Callback
from tables import Report, target
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ddil_lightning import assemble
from ddil_lightning.data.encoded import encode
from ddil_lightning.packaged import find_config
from ddil_lightning.training.method import Distillation

LIMIT, LIMITS = 1.15, {"lcm": 1.05, "pd": 1.05, "dmd2": 1.05}
"""How many floors a step may cost: of a method by its name, and of any other."""
WAYS_IN = ("forward", "features", "with_features")
COLUMNS = (
    ("name", "method"),
    ("updates", "updates"),
    ("calls", "calls / update"),
    ("evaluations", "network evaluations / update"),
    ("seconds", "seconds / update"),
    ("floor", "floor, seconds / update"),
    ("ratio", "x floor"),
    ("limit", "target"),
)


@dataclass(eq=False)
class Call:
    """One call of a network as it was made.

    `trained`: its parameters wanted gradients; `back`: how often gradients flowed back through it; `weights`: how often to them as well.
    """

    network: nn.Module | None
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    trained: bool
    back: int = 0
    weights: int = 0

    def again(self) -> None:
        """The same call, and as many passes back."""
        parameters = [] if self.network is None else list(self.network.parameters())
        asked = [p.requires_grad for p in parameters]
        if any(asked) != self.trained:
            for p in parameters:
                p.requires_grad_(self.trained)
        with torch.set_grad_enabled(self.grad):
            args, kwargs = tree_map(fresh, self.args), tree_map(fresh, self.kwargs)
            out = self.function(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if wants(x)]
        for left in reversed(range(self.back)):
            loss: Any = sum(x.float().square().mean() for x in tree_leaves(out) if wants(x))
            if left < self.weights:
                loss.backward(retain_graph=left > 0)
            elif given:  # else they went to a last layer alone, which is next to nothing
                torch.autograd.grad(loss, given, retain_graph=left > 0)
        for p, was in zip(parameters, asked, strict=True):
            p.requires_grad_(was)


def wants(x: Any) -> bool:
    """Whether gradients flow to it."""
    return isinstance(x, Tensor) and x.requires_grad


def fresh(x: Any) -> Any:
    """A tensor without its history, which wants gradients where it did."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


@dataclass(eq=False)
class Record:
    """The calls of one step. What a call makes for itself (features by a forward) is part of it."""

    calls: list[Call] = field(default_factory=list)
    under_way: list[Call] = field(default_factory=list)
    inside: bool = False
    on: bool = True

    def listen(self, method: Distillation) -> None:
        """Hear of all calls of a method's networks."""
        adversary = getattr(method, "adversary", None)
        others = (getattr(method, "head", None), getattr(adversary, "head", None), getattr(adversary, "vision", None))
        networks = [role.network for role in method.roles.values()] + [m for m in others if isinstance(m, nn.Module)]
        for network in {id(m): m for m in networks}.values():
            first = next((p for p in network.parameters() if p.requires_grad), None)
            if first is not None:
                first.register_post_accumulate_grad_hook(functools.partial(self.arrived, network))
            for name in WAYS_IN:
                if hasattr(network, name):
                    setattr(network, name, self.heard(network, getattr(network, name)))
        backbone = method.backbone
        backbone.decode = self.heard(None, backbone.decode)  # type: ignore[method-assign]

    def heard(self, network: nn.Module | None, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are written down."""

        def called(*args: Any, **kwargs: Any) -> Any:
            if self.inside or not self.on:
                return function(*args, **kwargs)
            trained = network is not None and any(p.requires_grad for p in network.parameters())
            call = Call(network, function, args, kwargs, torch.is_grad_enabled(), trained)
            self.inside = True
            try:
                out = function(*args, **kwargs)
            finally:
                self.inside = False
            self.calls.append(call)
            self.under_way.clear()
            seen: list[Tensor] = [x for x in tree_leaves(out) if wants(x)]
            if seen:
                seen[0].register_hook(lambda gradient: self.flowed(call))
            return out

        return called

    def flowed(self, call: Call) -> None:
        """Gradients came back to a call's output."""
        call.back += 1
        self.under_way.append(call)

    def asked(self, grad: Callable[..., Any]) -> Callable[..., Any]:
        """torch.autograd.grad, after which nothing is under way: what it is asked for are no weights, or those of a last layer alone."""

        def given(*args: Any, **kwargs: Any) -> Any:
            found = grad(*args, **kwargs)
            self.under_way.clear()
            return found

        return given

    def arrived(self, network: nn.Module, first: Tensor) -> None:
        """They reached a network's weights: those that are under way through its calls."""
        if self.on:
            for call in [call for call in self.under_way if call.network is network]:
                call.weights += 1
                self.under_way.remove(call)


class Replay(Callback):
    """Times every whole step, data, roll-outs, logging and callbacks included, and then its calls alone."""

    def __init__(self, now: Callable[[], float], warmup: int) -> None:
        self.now, self.warmup, self.record = now, warmup, Record()
        self.steps: list[float] = []
        self.floors: list[float] = []
        self.calls = 0
        self.counts: list[tuple[int, int]] = []  # student updates and evaluations before the first of these steps, and after each
        self.since: float | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The networks are where they will work."""
        self.record.listen(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The end of a step: read the clock, repeat the calls, start the clock again."""
        common.synchronize(pl_module.device)
        until = self.now()
        calls, self.record.calls = self.record.calls, []
        if self.counts:
            self.steps.append(until - self.since)  # type: ignore[operator]
            self.floors.append(self.replayed(pl_module, calls))
            self.calls += len(calls)
        if pl_module.student_updates >= self.warmup:
            self.counts.append((pl_module.student_updates, sum(pl_module.evaluations.values())))
        self.since = self.now()

    def replayed(self, method: Any, calls: Sequence[Call]) -> float:
        """The seconds that the calls take; the gradients that a step has left for the next one are as before."""
        kept = [(p, p.grad) for p in method.parameters()]
        for p, _ in kept:
            p.grad = None
        self.record.on = False
        start = self.now()
        for call in calls:
            call.again()
        common.synchronize(method.device)
        taken = self.now() - start
        self.record.on = True
        for p, grad in kept:
            p.grad = grad
        return taken


def measure(args: argparse.Namespace) -> Report:
    """A row for each method."""
    now, rows = common.clock(args), []
    own = common.instead(args.pipeline and common.pipeline_at(args.pipeline))
    updates = 3 if args.quick else args.updates
    for name in args.methods:
        rows.append(row(name, f"{name}{'_ddil' * (args.variant == 'ddil')}.yaml", own, updates, args, now))
        print(f"{name}: {rows[-1]['ratio']:.3f}", flush=True)
    return {
        "benchmark": "floors",
        "columns": COLUMNS,
        "rows": rows,
        "targets": [target(f"{r['name']}: step over its floor", r["ratio"], r["limit"], at_most=True) for r in rows],
        "notes": [
            f"sums over all steps of {updates} updates after two for warming up, in turns with their replay",
            f"seconds of the {'CPU clock of this process' if args.cpu_time else 'wall clock'}",
        ],
    }


def words(config: str, own: Sequence[str], updates: int, args: argparse.Namespace) -> tuple[str, ...]:
    """The overrides of a config. `own`: those that give it another pipeline."""
    return (*own, "--seed", str(args.seed), f"model.init_args.{shortened(config, updates + 2)}", *args.set)


def row(name: str, config: str, own: Sequence[str], updates: int, args: argparse.Namespace, now: Callable[[], float]) -> dict[str, Any]:
    """One method's step and floor."""
    replay = Replay(now, warmup=2)
    with tempfile.TemporaryDirectory() as folder:
        said = (*words(config, own, updates, args), f"trainer.default_root_dir={folder}")
        trainer, method, data = assemble(config, *said, callbacks=[replay])
        data.captions = encode(common.few_captions(method, 64 if args.quick else 512), method.backbone)
        with mock.patch("torch.autograd.grad", replay.record.asked(torch.autograd.grad)):
            trainer.fit(method, datamodule=data)
    (first, spent), (last, all_spent) = replay.counts[0], replay.counts[-1]
    made = last - first
    return {
        "name": name,
        "updates": made,
        "calls": replay.calls / made,
        "evaluations": (all_spent - spent) / made,
        "seconds": sum(replay.steps) / made,
        "floor": sum(replay.floors) / made,
        "ratio": sum(replay.steps) / sum(replay.floors),
        "limit": LIMITS.get(name, LIMIT),
    }


def shortened(config: str, updates: int) -> str:
    """The override for so many updates; of a staged method, in its first stage alone."""
    stages = yaml.safe_load(find_config(config).read_text())["model"]["init_args"].get("stages")
    return f"updates={updates}" if stages is None else f"stages=[{{steps: {stages[0]['steps']}, updates: {updates}}}]"


def methods() -> list[str]:
    """The methods with a pair of built-in configs, in alphabetical order."""
    found = find_config("lcm.yaml").parent
    pairs = [f.name.removesuffix("_ddil.yaml") for f in found.glob("*_ddil.yaml")]
    return sorted(name for name in pairs if "lora" not in name and (found / f"{name}.yaml").is_file())


def main(argv: Sequence[str] | None = None) -> Report:
    """The command line of this benchmark."""
    parser = common.speed_parser(__doc__, "", own=True)
    parser.add_argument("--methods", nargs="+", choices=methods(), default=methods())
    parser.add_argument("--variant", choices=("plain", "ddil"), default="plain", help="which config of the pair")
    parser.add_argument("--updates", type=int, default=12, help="student updates that are timed")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
