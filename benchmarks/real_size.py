"""What distillation costs at the real size: images a second and peak memory of one setting, for large.py and gpu.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.imitation.options import Buffer, Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.methods import DMD2, LCM
from ddil_lightning.training.adversary import Critic
from ddil_lightning.training.gan import Gan
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.optimisation import Optimizer
from ddil_lightning.training.options import Memory

PRIORS = {"LCM": SamplingPrior(0.5, 0.5), "DMD2": SamplingPrior(0.25, 0.5, 0.25)}
"""With DDIL, as in the configs of the paper's scale."""


@dataclass(frozen=True)
class Cell:
    """One setting: `rank` 0 for whole copies, `ddil` for a prior with roll-outs."""

    model: str
    method: str
    rank: int
    ddil: bool
    batch: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """As a table calls it."""
        return f"{self.model} {self.method}{' + DDIL' if self.ddil else ''}, {f'LoRA {self.rank}' if self.rank else 'whole'}"


class Noise(Captions):
    """Pictures of noise with captions of the built-in vocabulary: what a step costs does not depend on them."""

    def __init__(self, side: int, n: int) -> None:
        self.side, self.n = side, n

    def __len__(self) -> int:
        return self.n

    def prompts(self, index: Sequence[int]) -> list[str]:
        return ["a small red circle" if i % 2 else "a large blue square on a grey background" for i in index]

    def pixels(self, index: Sequence[int]) -> Tensor:
        return torch.stack([torch.rand(3, self.side, self.side, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in index])


class Timed(Callback):
    """When the student was updated, on a clock that waits for the device; the floating-point operations of the last updates."""

    def __init__(self, count_last: bool) -> None:
        self.count_last, self.at, self.flops = count_last, [], 0  # type: ignore[var-annotated]
        self._counter: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.at = [self._now(pl_module)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.student_updates >= len(self.at):
            self.at.append(self._now(pl_module))
            if self._counter is not None:
                self._counter.__exit__(None, None, None)
                self.flops = self._counter.get_total_flops()
            elif self.count_last and pl_module.student_updates == pl_module.updates - 1:
                self._counter = FlopCounterMode(display=False)  # from here on, because the draw comes before the start of a batch
                self._counter.__enter__()

    @staticmethod
    def _now(method: Any) -> float:
        if method.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def built(cell: Cell, backbone: Backbone, updates: int, critic_steps: int) -> Distillation:
    """The method of a cell."""
    flow, told = backbone.predicts == "flow", backbone.told
    even = {"solver_steps": 40} if flow else {}
    own: dict[str, Any] = {"w_conditioned": told, "rollouts": (4,), **even} if cell.method == "LCM" else {}
    if cell.method == "DMD2":
        critic = Critic(critic_steps, pull=0.03 if flow else 0.0)
        own = {"critic": critic, "gan": Gan(5e-3, 1e-2), "teacher_steps": 8}
    kinds = {"LCM": LCM, "DMD2": DMD2}
    return kinds[cell.method](
        pipeline=backbone,
        guidance=3.5 if flow else 7.5,
        updates=updates,
        adapter=Adapter(cell.rank or None),
        optimizer=Optimizer(lr=1e-6),
        memory=Memory(teacher_dtype=cell.dtype, gradient_checkpointing=True),  # type: ignore[arg-type]
        **own,
    )


def measure(
    cell: Cell, backbone: Backbone, side: int, updates: int, critic_steps: int = 5, count: bool = False
) -> tuple[dict[str, Any], Distillation]:
    """The row of a cell, images a second after the first update, and its method."""
    method = built(cell, backbone, updates, critic_steps)
    prior = PRIORS[cell.method] if cell.ddil else SamplingPrior()
    rollouts = Rollouts(every=1, trajectories=cell.batch)
    data = DDILDataModule(Noise(side, max(4, cell.batch)), prior, cell.batch, rollouts, Buffer(64 * cell.batch))
    timed, gpu = Timed(count), torch.cuda.is_available()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "gpu" if gpu else "cpu", "devices": 1, "precision": "bf16-mixed"}
    trainer = Trainer(max_epochs=-1, callbacks=[timed], **quiet)
    trainer.fit(method, data)
    spent = [b - a for a, b in zip(timed.at, timed.at[1:], strict=False)]
    # The last one was counted, which takes time of its own; the first one warms up.
    fair = spent[1 : -1 if count else None] or spent
    seconds = sum(fair) / len(fair)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    images = cell.batch * (critic_steps if cell.method == "DMD2" else 1)  # a batch an update of the critic
    row = {"name": cell.name, "trained": trained / 1e6, "updates": updates, "seconds": seconds, "images": images / seconds}
    return {**row, "flops": timed.flops}, method
