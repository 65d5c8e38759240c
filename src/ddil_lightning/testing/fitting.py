"""One training, and everything that decides how it goes on."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from ddil_lightning.callbacks import Stages
from ddil_lightning.data.datamodule import DDILDataModule

_fits = itertools.count(100)


class Log(Logger):
    """The rows that a run writes to its loggers."""

    name, version = "log", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Keep a row."""
        assert step == metrics["student_updates"]
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Nothing to keep."""


class Inside(Checkpoint):
    """A checkpoint from within the turns of a method, of the first batch after `update` updates of the student that has not moved it.

    A method whose every batch updates its student has no such batch, and `file` is not written.
    """

    def __init__(self, update: int, file: Path) -> None:
        self.update, self.file = update, file

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """No batch is done yet."""
        self._before = -1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Save it, if this is the batch. Accumulated gradients are in no checkpoint, and it waits until they are used."""
        clock, stood = pl_module.student_updates, pl_module.student_updates == self._before
        if clock == self.update and stood and not pl_module.descent.halfway and not self.file.exists():
            trainer.save_checkpoint(self.file)
        self._before = clock


class Run(NamedTuple):
    """A finished fit."""

    method: Any
    data: Any
    trainer: Trainer
    rows: list[dict[str, float]]


def fit(method: Any, data: LightningDataModule, *callbacks: Callback, ckpt: Path | None = None, **kwargs: Any) -> Run:
    """One fit on the CPU; `kwargs` are the Trainer's. The global generator starts anywhere: results may hang on the seeds of method and
    data alone."""
    torch.manual_seed(next(_fits))
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    quiet = {"enable_checkpointing": saves, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    log, every = Log(), [Stages(pipelines=False), *callbacks]
    trainer = Trainer(**{"max_epochs": -1, "accelerator": "cpu", "logger": log, "callbacks": every, **quiet, **kwargs})
    trainer.fit(method, data, ckpt_path=None if ckpt is None else str(ckpt))
    return Run(method, data, trainer, log.rows)


def state(run: Run) -> dict[str, Any]:
    """Everything that decides how a run goes on."""
    method, data = run.method, run.data
    found = {"weights": method.state_dict(), "clock": method.student_updates, "evaluations": method.evaluations}
    found["optimizers"] = [o.state_dict() for o in run.trainer.optimizers]
    return found | ({"data": data.state_dict()} if isinstance(data, DDILDataModule) else {})


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two states first differ, in dicts, lists and tuples: bit by bit for tensors. None where they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {', '.join(sorted(map(str, a.keys() ^ b.keys())))}"
        return next(filter(None, (difference(a[k], b[k], f"{where}.{k}".lstrip(".")) for k in a)), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)}"
        return next(filter(None, (difference(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))), None)
    same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
    return None if same else where or "the two"


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of tensors in dicts, lists and tuples."""
    return difference(a, b) is None


def digest(*modules: nn.Module) -> str:
    """A hash of all parameters and buffers."""
    tensors = (x for m in modules for x in itertools.chain(m.parameters(), m.buffers()))
    return hashlib.sha256(b"".join(x.detach().cpu().numpy().tobytes() for x in tensors)).hexdigest()


def frozen(method: Any) -> list[nn.Module]:
    """The networks of the pipeline."""
    return [part for part in method.backbone.pipe.components.values() if isinstance(part, nn.Module)]
