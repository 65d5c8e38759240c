"""Whatever is given to any of the five commands: a result, or one line and code 2. No traceback, no folder left, no wait without end.

The inputs are generated (SEED), hundreds of them in one process: every numeric option of every class and command at values that mean
nothing, configs that are cut and twisted, pipelines and checkpoints with damaged files, prompts and paths of all kinds.
"""

from __future__ import annotations

import inspect
import itertools
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ddil_lightning import cli, fitting, main
from ddil_lightning.callbacks import Cadence, FlushBuffer, Previews, Progress, ShiftProbe
from ddil_lightning.callbacks.checkpoints import Checkpoints
from ddil_lightning.datamodule import DDILDataModule
from ddil_lightning.finish import Test as Measured
from ddil_lightning.methods import DMD2, LCM, PD
from ddil_lightning.prior import Exponential, Gated, Linear
from ddil_lightning.toy import Toy

SEED, LIMIT = 0, 20  # seconds for one input
VALUES = [
    "-1",
    "0",
    ".nan",
    "nan",
    ".inf",
    "-.inf",
    "null",
    "1e30",
    "100000000000000000000000",
    "1.5",
    "true",
    "x",
    "[]",
    "{}",
    "[1, [2]]",
    '""',
    "-4",
]


class Case(NamedTuple):
    """One input: a command and its words. `change` is done to the files of the place before."""

    command: str
    words: list[str]
    change: Callable[[Path], None] | None = None


def parameters(cls: type) -> list[str]:
    """The options of a class and of its bases."""
    found = [inspect.signature(c).parameters.values() for c in cls.__mro__[:-1] if "__init__" in vars(c)]
    known = (p for ps in found for p in ps if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [p.name for p in known if p.name not in ("self", "pipeline", "captions", "schedule", "first", "last", "stages", "prior")]


def fit_options() -> Iterator[list[str]]:
    """Words that end where a value is missing, for everything that ddil-fit takes numbers or names for."""
    plan = "model.stages=[{steps: 4, updates: 1}, {steps: 2, updates: 1}]"
    for cls, own in ((LCM, []), (DMD2, ["model.guidance=2.0"]), (PD, [plan, "model.teacher_steps=8"])):
        for name in parameters(cls):
            yield [f"model={cls.__name__}", *own, f"model.{name}"]
    for group, cls in (
        ("data", DDILDataModule),
        ("checkpoints", Checkpoints),
        ("previews", Previews),
        ("progress", Progress),
        ("test", Measured),
    ):
        for name in parameters(cls):
            yield [f"{group}.{name}"]
    for name in ("forward", "student", "teacher", "mix"):
        yield [f"data.prior.{name}"]
    for name in ("n", "seed"):
        yield ["data.captions=Shapes", f"data.captions.{name}"]
    for cls in (ShiftProbe, Cadence, FlushBuffer):
        for name in parameters(cls):
            yield [f"trainer.callbacks+={cls.__name__}", f"trainer.callbacks.{name}"]
    for schedule in (Linear, Exponential, Gated):
        for name in parameters(schedule):
            ends = ["schedule.first={forward: 0.5, student: 0.5}", "schedule.last={forward: 0.5, student: 0.5}"]
            made = [f"trainer.callbacks+={json.dumps({'class_path': 'AnnealPrior', 'init_args': {'schedule': schedule.__name__}})}"]
            yield [*made, *(f"trainer.callbacks.{end}" for end in ends), f"trainer.callbacks.schedule.{name}"]
    for name in parameters(Toy):
        yield [f"model.pipeline={json.dumps({'class_path': 'Toy'})}", f"model.pipeline.{name}"]
    for kind, name in itertools.product(("stages", "parts"), ("steps", "updates", "lr", "warmup", "kind", "parts", "forward")):
        inner = "{%s}" if kind == "stages" else "{steps: 4, parts: [{updates: 1, %s}]}"
        yield ["model=PD", "model.teacher_steps=8", f"model.stages=[{inner % f'{name}: VALUE'}]"]
    for name in (
        "max_epochs min_epochs max_steps min_steps max_time limit_train_batches overfit_batches accumulate_grad_batches gradient_clip_val "
        "log_every_n_steps devices num_nodes val_check_interval check_val_every_n_epoch num_sanity_val_steps fast_dev_run precision strategy "
        "accelerator logger callbacks profiler plugins deterministic benchmark inference_mode use_distributed_sampler detect_anomaly "
        "barebones sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir enable_checkpointing enable_progress_bar"
    ).split():
        yield [f"trainer.{name}"]
    for name in ("updates", "seed", "run_dir", "ckpt_path", "checkpoint_every", "wandb", "export_steps", "name"):
        yield [f"--{name}"]


def with_value(words: list[str], value: str) -> list[str]:
    *before, last = words
    return [*before, last.replace("VALUE", value) if "VALUE" in last else f"{last}={value}"]
