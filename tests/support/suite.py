"""What every method is put through: the list of methods, a small problem, and a run on it. A new method is one entry of METHODS."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.callbacks import Stages
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.data.encoded import Encoded, encode
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.methods import (
    ADD,
    BOOT,
    CTM,
    DMD,
    DMD2,
    EMD,
    LADD,
    LCM,
    PCM,
    PD,
    TCD,
    ImagineFlash,
    MomentMatching,
    Reflow,
    SiD,
    SnapFusion,
    UFOGen,
)
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.plan import Stage
from options import options
from visions import Patches


class Entry(NamedTuple):
    """One method in one setting."""

    name: str
    method: type[Distillation]
    kwargs: dict[str, Any] = {}
    falls: str = "loss"  # the logged loss that falls within 30 updates
    unused: bool = False  # some step leaves parameters of the method without a gradient (two optimisers): DDP must be told
    slow: bool = False  # one setting more, which the slow tests alone are put through
    brief: bool = False  # shares its parts with others: ordinary tests train it on the toy or in its own file, slow ones do the rest


PLAN = [Stage(steps=8, updates=3), Stage(steps=4, updates=4, warmup=2)]  # the last stage lasts to the end of a run
LORA = Adapter(4, alpha=32.0)
METHODS = [
    Entry("lcm", LCM),
    Entry("lcm-fixed-guidance", LCM, {"w_conditioned": False, "guidance": 2.0}, slow=True),
    Entry("lcm-online-target", LCM, {"target_decay": 0.0, "ema": 0.0, "distance": {"kind": "mse"}}, slow=True),
    Entry("pd", PD, {"stages": PLAN, "teacher_steps": 16}),
    Entry("dmd2", DMD2, {"guidance": 2.0, "critic": {"steps": 2}, "scores": {"share": True}}, falls="critic_loss", unused=True),
    Entry("emd", EMD, {"guidance": 2.0, "chain": {"steps": 2}}, falls="critic_loss", unused=True, brief=True),
    Entry("sid", SiD, {"guidance": 2.0, "critic": {"steps": 2}}, falls="critic_loss", unused=True, brief=True),
    Entry("f-distill", DMD2, {"guidance": 2.0, "scores": {"divergence": "js"}}, falls="critic_loss", unused=True, slow=True),
    Entry(
        "diff-instruct",
        DMD2,
        {"guidance": 2.0, "critic": {"steps": 2}, "scores": {"normaliser": "none"}, "gan": {"weight": 0.0, "critic_weight": 0.0}},
        falls="critic_loss",
        unused=True,
        brief=True,
    ),
    Entry("dmd", DMD, {"guidance": 2.0, "steps": 4, "pairs": {"steps": 2}}, falls="critic_loss", unused=True, brief=True),
    Entry("reflow", Reflow, {"guidance": 2.0, "nodes": 8, "relabel": 2, "teacher_steps": 4, "pairs": {"steps": 2}}, brief=True),
    Entry("boot", BOOT, {"guidance": 2.0, "steps": 4}, brief=True),
    Entry("snapfusion", SnapFusion, {"steps": 4, "guided": 0.5}, brief=True),
    Entry("lcm-lora", LCM, {"adapter": LORA}, slow=True),
    Entry("pd-lora", PD, {"stages": PLAN, "teacher_steps": 16, "adapter": LORA}, slow=True),
    Entry("imagine-flash", ImagineFlash, {"w_conditioned": True}, brief=True),
    Entry(
        "ladd",
        LADD,
        {"guidance": 2.0, "gan": {"kind": "softplus"}, "times": {"mean": -6.0}, "critic": {"steps": 2}},
        falls="critic_loss",
        unused=True,
        brief=True,
    ),
    Entry("add", ADD, {"guidance": 2.0, "vision": Patches(), "reflect": "off"}, falls="critic_loss", unused=True, brief=True),
    Entry("moments", MomentMatching, {"guidance": 2.0}, falls="critic_loss", unused=True, brief=True),
    Entry("ufogen", UFOGen, {"guidance": 2.0, "label_steps": 1, "gan": {"weight": 0.02}}, unused=True, brief=True),
    Entry("dmd2-lora", DMD2, {"guidance": 2.0, "critic": {"steps": 2}, "adapter": LORA}, falls="critic_loss", unused=True, slow=True),
    Entry("tcd", TCD, brief=True),
    Entry("pcm", PCM, brief=True),
    Entry("ctm", CTM, {"denoising": 0.0}, slow=True),  # first, for fsdp2 refuses the adaptive weight of the other
    Entry("ctm-denoising", CTM, brief=True),
    Entry("pcm-gan", PCM, {"gan": {"weight": 0.1, "critic_weight": 1.0, "features": "teacher"}}, unused=True, slow=True),
]
BY_NAME = {entry.name: entry for entry in METHODS}


def _params(slow: Callable[[int, Entry], bool]) -> dict[str, Any]:
    """The arguments of pytest.mark.parametrize for all entries, some of them `slow`."""
    values = [pytest.param(entry, marks=pytest.mark.slow if slow(i, entry) else ()) for i, entry in enumerate(METHODS)]
    return {"argvalues": values, "ids": [entry.name for entry in METHODS]}


ALL = _params(lambda i, entry: entry.slow or entry.brief)
"""pytest.mark.parametrize("entry", **ALL): what every method is put through, the brief ones by the slow tests."""
ALL_AND_LORA = _params(lambda i, entry: (entry.slow or entry.brief) and entry.name != "lcm-lora")
"""As ALL, and adapters too."""
PER_METHOD = _params(lambda i, entry: entry.slow or entry.brief or entry.method in [other.method for other in METHODS[:i]])
"""As ALL, for tests of seconds: a method's further settings are left to the slow tests, too."""


def one_of(name: str) -> dict[str, Any]:
    """As ALL, where one method alone is put through the ordinary tests: it has what the others have, or is the quickest."""
    return _params(lambda i, entry: entry.name != name)


FORWARD, MIXED = SamplingPrior(), SamplingPrior(0.5, 0.25, 0.25)
BATCH, EPOCH = 4, 7  # samples per batch, batches per epoch
_fits = itertools.count(100)


class Pictures(Captions):
    """Grey discs of ten sizes with captions that the tiny tokenizer knows."""

    def __len__(self) -> int:
        return BATCH * EPOCH + 2  # two captions of every epoch are left over

    def prompts(self, index: Any) -> list[str]:
        return [f"a handwritten {('zero', 'one', 'two', 'three', 'four')[i % 5]}" for i in index]

    def pixels(self, index: Any) -> Tensor:
        y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
        return torch.stack([(x.square() + y.square() < (1 + i % 10) / 8).float().expand(3, -1, -1) * 2 - 1 for i in index])


class Log(Logger):
    """The rows that a run writes to its loggers."""

    name, version = "log", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step == metrics["student_updates"]
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""


class Gradients(Callback):
    """The gradients that every optimiser step sees, by parameter name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


class StopAt(Checkpoint):
    """Ends a run before its time, and keeps a checkpoint of the moment. A Checkpoint callback, so that it comes after all others."""

    def __init__(self, updates: int, file: Path | None = None) -> None:
        self.updates, self.file = updates, file

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.student_updates >= self.updates and not trainer.should_stop:
            if self.file is not None:
                trainer.save_checkpoint(self.file)
            trainer.should_stop = True


class StopInside(Checkpoint):
    """A checkpoint after so many critic updates, and the end of the run."""

    def __init__(self, updates: int, file: Path) -> None:
        self.updates, self.file = updates, file

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.adversary.updates == self.updates and not pl_module.descent.halfway:
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True


class Run(NamedTuple):
    """A finished fit."""

    method: Any
    data: Any
    trainer: Trainer
    rows: list[dict[str, float]]


@lru_cache
def backbone(folder: Path) -> Pipeline:
    """Shared by all runs of a session: a frozen pipeline has nothing to lose."""
    return Pipeline(str(folder))


@lru_cache
def pictures(folder: Path) -> Encoded:
    return encode(Pictures(), backbone(folder))


def build(entry: Entry, folder: Path, seed: int = 0, **kwargs: Any) -> Any:
    """The method in a setting that has everything on: an average, reflection, a range of guidance. `pipeline`: one of its own."""
    torch.manual_seed(seed)
    pipeline = kwargs.pop("pipeline", None) or backbone(folder)
    settings = {"updates": 6, "optimizer": {"lr": 1e-3}, "guidance": [1.0, 4.0], "ema": 0.9, "reflect": "static", "log_every": 1}
    return entry.method(pipeline=pipeline, **options(entry.method, settings, entry.kwargs, kwargs))


def captions(folder: Path, prior: SamplingPrior = MIXED, **kwargs: Any) -> DDILDataModule:
    settings = {"batch_size": BATCH, "rollouts": {"every": 2}, "buffer": {"capacity": 64}}
    return DDILDataModule(pictures(folder), prior, **options(DDILDataModule, settings, kwargs))


def fit(method: Any, data: LightningDataModule, *callbacks: Callback, ckpt: Path | None = None, **kwargs: Any) -> Run:
    """One fit. The global generator starts anywhere: results may hang on the seeds of method and data alone."""
    torch.manual_seed(next(_fits))
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    quiet = {"enable_checkpointing": saves, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    log, every = Log(), [Stages(pipelines=False), *callbacks]
    trainer = Trainer(**{"max_epochs": -1, "accelerator": "cpu", "logger": log, "callbacks": every, **quiet, **kwargs})
    trainer.fit(method, data, ckpt_path=None if ckpt is None else str(ckpt))
    return Run(method, data, trainer, log.rows)


def train(entry: Entry, folder: Path, *callbacks: Callback, prior: SamplingPrior = MIXED, seed: int = 0, **kwargs: Any) -> Run:
    """A method on the small problem: keyword arguments are the method's."""
    return fit(build(entry, folder, seed, **kwargs), captions(folder, prior, seed=seed), *callbacks)


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of tensors in dicts, lists and tuples."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def state(run: Run) -> dict[str, Any]:
    """Everything that decides how a run goes on."""
    method, data = run.method, run.data
    found = {"weights": method.state_dict(), "clock": method.student_updates, "evaluations": method.evaluations}
    found["optimizers"] = [o.state_dict() for o in run.trainer.optimizers]
    return found | ({"data": data.state_dict()} if isinstance(data, DDILDataModule) else {})


def digest(*modules: nn.Module) -> str:
    """A hash of all parameters and buffers."""
    tensors = (x for m in modules for x in itertools.chain(m.parameters(), m.buffers()))
    return hashlib.sha256(b"".join(x.detach().cpu().numpy().tobytes() for x in tensors)).hexdigest()


def frozen(method: Any) -> list[nn.Module]:
    """The networks of the pipeline."""
    return [part for part in method.backbone.pipe.components.values() if isinstance(part, nn.Module)]
