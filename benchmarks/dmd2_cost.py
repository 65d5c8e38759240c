"""Network calls of one DMD2 student update: this library's against those of the published sequence, with GAN and backward simulation.

Both are counted on the networks themselves, not by a formula. The published sequence, per iteration: backward simulation to a random node
(0 to 3 student calls), the generator; critic with gradient for the denoising loss; discriminator on the fake and on the real side, each an
encoder pass with gradient. Once in `critic.steps` iterations also the critic, the guided teacher (2 B) and the discriminator on the
generator's output. Here roll-outs are reused through the buffer, and the denoising loss and the fake logit share one critic forward; with
`scores.share` it is the one of the matching loss too.
A pass of the encoder alone counts as its share of a forward's floating-point operations, a backward as two forwards, one where only the
input needs a gradient. The unit is one forward at batch B.

    python benchmarks/dmd2_cost.py [--pipeline DIR|builtin|random] [--updates 40] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import common
import tables
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddil_lightning import DMD2, assemble
from ddil_lightning.data.encoded import encode
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.adversary import untouched

COLUMNS = (
    ("name", ""),
    ("student", "student forwards"),
    ("critic", "critic forwards"),
    ("teacher", "teacher forwards"),
    ("encoder", "encoder passes"),
    ("forwards", "forwards, encoder passes by their share"),
    ("units", "with backwards"),
    ("ratio", "forwards / published"),
    ("ratio_units", "with backwards / published"),
)
CONFIGS = ("dmd2.yaml", "dmd2_ddil.yaml")
LIMIT = 0.62  # of the published sequence's forwards


class Counter:
    """Counts the samples that pass through the U-Nets of a method: forwards by role, encoder passes, and what their backwards cost."""

    def __init__(self, method: DMD2) -> None:
        self.method = method
        self.calls: list[tuple[str, int, int, bool]] = []  # role, samples, forwards that the backward costs, whether the decoder ran

    @contextmanager
    def running(self) -> Iterator[Counter]:
        """Count every call that is made inside."""
        handles = []
        for role, denoiser in self.method.roles.items():
            unet: Any = denoiser.network.unet  # of a U-Net family: what is counted are the passes of its two halves
            handles.append(unet.register_forward_pre_hook(self._begin(role, unet), with_kwargs=True))
            handles.append(unet.up_blocks[-1].register_forward_pre_hook(self._decode))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, role: str, unet: nn.Module) -> Any:
        def begin(module: Any, args: Any, kwargs: Any) -> None:
            x: Tensor = args[0] if args else kwargs["sample"]
            trained = any(p.requires_grad for p in unet.parameters())
            back = 0 if not torch.is_grad_enabled() else 2 if trained else int(x.requires_grad)
            self.calls.append((role, len(x), back, False))

        return begin

    def _decode(self, module: Any, args: Any) -> None:
        role, n, back, _ = self.calls[-1]
        self.calls[-1] = (role, n, back, True)

    def row(self, name: str, batch: int, updates: int, share: float) -> dict[str, Any]:
        """A row of the table, per student update and in units of B samples."""
        unit = batch * updates
        made: dict[str, Any] = {"name": name}
        for role in ("student", "critic", "teacher"):
            made[role] = sum(n for r, n, _, whole in self.calls if r == role and whole) / unit
        made["encoder"] = sum(n for _, n, _, whole in self.calls if not whole) / unit
        cost = [(n * (1.0 if whole else share) / unit, back) for _, n, back, whole in self.calls]
        made["forwards"] = sum(c for c, _ in cost)
        return made | {"units": sum(c * (1 + back) for c, back in cost)}


def published(method: DMD2, b: LatentBatch, updates: int) -> None:
    """The calls of the published sequence. j runs through 0 to 3 in turn, so that four updates have its mean exactly."""
    student, critic, teacher, every = method.student, method.critic, method.teacher, method.adversary.every
    assert b.real is not None
    for i in range(updates * every):
        turn = (i + 1) % every == 0
        x, t = b.x_t, b.t
        with torch.no_grad():
            for _ in range(i % len(method.grid)):
                x = student(x, t, b.c).x0
        with torch.set_grad_enabled(turn):
            x = student(x, t, b.c).x0
        if turn:
            with torch.no_grad():
                critic(x, t, b.c), teacher(x, t, b.c)
            with untouched(critic):
                critic.features(x, t, b.c)
        x = x.detach()
        critic(x, t, b.c), critic.features(x, t, b.c), critic.features(b.real, t, b.c)


def encoder_share(method: DMD2, b: LatentBatch) -> float:
    """The encoder's share of the floating-point operations of a critic forward."""
    counted = []
    for call in (method.critic.features, method.critic):
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            call(b.x_t, b.t, b.c)
        counted.append(flops.get_total_flops())
    return counted[0] / counted[1]


def ours(config: str, args: argparse.Namespace, pipeline: str, updates: int) -> tuple[Counter, DMD2, LatentBatch]:
    """A run of `config`, counted, with its method and its last batch."""
    guided = "model.init_args.scores.guidance=null"  # as the published sequence, where the shipped configs need half the teacher's calls
    words = (f"model.init_args.pipeline={pipeline}", "--seed", str(args.seed), f"model.init_args.updates={updates}", guided, *args.set)
    kept = Keep()
    trainer, method, data = assemble(config, *words, callbacks=[kept])
    assert isinstance(method, DMD2)
    data.captions = encode(common.few_captions(method, 64 if args.quick else 512), method.backbone)
    with Counter(method).running() as counter:
        trainer.fit(method, datamodule=data)
    return counter, method, kept.batch


class Keep(Callback):
    """Keeps the last batch of a run in a list."""

    batch: LatentBatch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep this batch in the place of the one before."""
        self.batch = batch


def measure(args: argparse.Namespace) -> tables.Report:
    """Count both sequences and make the report."""
    updates = 4 if args.quick else args.updates
    pipeline = common.pipeline_at(args.pipeline)
    rows: list[dict[str, Any]] = []
    for config in CONFIGS:
        counter, method, b = ours(config, args, pipeline, updates)
        share, size = encoder_share(method, b), len(b.t)
        if not rows:
            with Counter(method).running() as simulated:
                published(method, b, 4)
            rows.append(simulated.row("published sequence", size, 4, share))
        rows.append(counter.row(config.removesuffix(".yaml"), size, updates, share))
    for row in rows:
        row |= {"ratio": row["forwards"] / rows[0]["forwards"], "ratio_units": row["units"] / rows[0]["units"]}
    names = [row["name"] for row in rows[1:]]
    return {
        "benchmark": "dmd2_cost",
        "columns": COLUMNS,
        "rows": rows,
        "targets": [
            tables.target(f"forwards per student update of {name}, over the published sequence's", row["ratio"], LIMIT, at_most=True)
            for name, row in zip(names, rows[1:], strict=True)
        ],
        "notes": [f"{method.adversary.every} critic updates per student update, batch {size}; an encoder pass is {share:.2f} of a forward"],
    }


def main(argv: list[str] | None = None) -> tables.Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--updates", type=int, default=40, help="student updates that are counted")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
