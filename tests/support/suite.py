"""What every method is put through: the list of methods, a small problem, and a run on it. A new method is one entry of METHODS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.data.datamodule import DDILDataModule
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
from ddil_lightning.testing.fitting import Log as Log
from ddil_lightning.testing.fitting import Run, fit
from ddil_lightning.testing.fitting import digest as digest
from ddil_lightning.testing.fitting import equal as equal
from ddil_lightning.testing.fitting import frozen as frozen
from ddil_lightning.testing.fitting import state as state
from ddil_lightning.testing.subject import BATCH, Subject, backbone, pictures
from ddil_lightning.testing.subject import EPOCH as EPOCH
from ddil_lightning.testing.subject import Pictures as Pictures
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


class Gradients(Callback):
    """The gradients that every optimiser step sees, by parameter name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


class LateRestoring(SingleDeviceStrategy):
    """Restores a checkpoint after the optimisers were made and the fit has begun, as fsdp2 does, on one process."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


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


def build(entry: Entry, folder: Path, seed: int = 0, **kwargs: Any) -> Any:
    """The method in a setting that has everything on: an average, reflection, a range of guidance. `pipeline`: one of its own."""
    torch.manual_seed(seed)
    pipeline = kwargs.pop("pipeline", None) or backbone(folder)
    settings = {"updates": 6, "optimizer": {"lr": 1e-3}, "guidance": [1.0, 4.0], "ema": 0.9, "reflect": "static", "log_every": 1}
    return entry.method(pipeline=pipeline, **options(entry.method, settings, entry.kwargs, kwargs))


def subject(entry: Entry, folder: Path) -> Subject:
    """The same for the checks that a method of anybody's is put through."""
    return Subject(lambda **base: entry.method(**options(entry.method, {"guidance": [1.0, 4.0]}, base, entry.kwargs)), folder)


def captions(folder: Path, prior: SamplingPrior = MIXED, **kwargs: Any) -> DDILDataModule:
    settings = {"batch_size": BATCH, "rollouts": {"every": 2}, "buffer": {"capacity": 64}}
    return DDILDataModule(pictures(folder), prior, **options(DDILDataModule, settings, kwargs))


def train(entry: Entry, folder: Path, *callbacks: Callback, prior: SamplingPrior = MIXED, seed: int = 0, **kwargs: Any) -> Run:
    """A method on the small problem: keyword arguments are the method's."""
    return fit(build(entry, folder, seed, **kwargs), captions(folder, prior, seed=seed), *callbacks)
