"""What the parts of a run ask of each other and of the Trainer, checked before anything is written or trained."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import TensorBoardLogger

from ddil_lightning.callbacks import Alerts, Checkpoints, Previews, Profile, Progress, ShiftProbe, Stages, Validation
from ddil_lightning.callbacks.annealing import AnnealPrior, OnClock
from ddil_lightning.callbacks.stages import staged
from ddil_lightning.commands.configs import read_config
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.errors import Refusal
from ddil_lightning.imitation.prior import Schedule
from ddil_lightning.runs.boards import check_tensorboard
from ddil_lightning.runs.export import check_steps as exportable
from ddil_lightning.runs.export import unheld, untrained
from ddil_lightning.runs.finish import Test
from ddil_lightning.training.completeness import check_complete
from ddil_lightning.training.method import Distillation

OWN = (Alerts, Checkpoints, Previews, Profile, Progress, Stages)
"""The callbacks that every run has, each with a group of options of its name."""


def check_steps(method: Distillation, config: Any) -> None:
    """Raises ValueError now, and not after the training, for a step count that the student or its teacher cannot take.

    Also for a prompt of the previews or of a Validation that their text encoder cannot take whole: it is known before the data are encoded.
    """
    test, previews, student, teacher = config.test, config.previews, method.deployment.sampler, method.baseline.sampler
    exported: Callable[[int], Any] = partial(exportable, method.deployments()[-1])
    asked = [("export_steps", [config.export_steps] if config.export_steps is not None else [], exported)]
    asked += [("test.student_steps", test.student_steps or [], student)]
    asked += [("test.teacher_steps", test.teacher_steps if test.n else [], teacher)]
    if previews.every:
        previews.check_prompts(method.backbone, config.data)
        asked += [("previews.student_steps", previews.student_steps or [], student)]
        asked += [("previews.teacher_steps", previews.teacher_steps, teacher)]
    callbacks = config.trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, ShiftProbe):
            asked += [("the steps of ShiftProbe", [callback.steps], student)]
            asked += [("its teacher_steps", [callback.teacher_steps], teacher)]
        if isinstance(callback, Validation):
            callback.check(method.backbone, config.data)
            asked += [("the steps of Validation", callback.steps or [], student)]
    for name, steps, sampler in asked:
        for n in steps:
            try:
                sampler(n)
            except ValueError as error:
                raise ValueError(f"{name} {n}: {error}") from error


def cautions(method: Distillation, config: Any) -> Iterator[str]:
    """What a run may mean and most do not, a line each: no own latents in training, a reflection that nobody asks, and times in use that
    training does not have."""
    multistep = max((max(deployment.steps) for deployment in method.deployments()), default=1)
    if multistep > 1 and not any(prior.student > 0 for prior in _priors(method, config)):
        yield (
            f"the student takes up to {multistep} steps and is never trained on latents of its own, where its errors compound: give "
            "data.prior.student a share, unless this is a baseline"
        )
    own = not type(method).__module__.startswith("ddil_lightning.")  # those of the package that have no such role ask it themselves
    if own and method.reflection.mode != "off" and not any(role.reflection is method.reflection for role in method.roles.values()):
        yield (
            f"model.reflect = {method.reflection.mode} has no effect, unless {type(method).__name__} asks self.reflection itself: none of "
            'its roles is made with it, as self.role("teacher", reflection=self.reflection)'
        )
    test, previews = config.test, config.previews
    counts = {n for deployment in method.deployments() for n in deployment.steps} if not _stages(method) else set()
    counts |= {*(test.student_steps or []), *((previews.student_steps or []) if previews.every else []), config.export_steps or 1}
    yield from filter(None, (untrained(method, method.deployment, n) for n in sorted(counts)))


def _stages(method: Distillation) -> list[Any]:
    """The stages of a method that has some."""
    return list(method.stages) if staged(method) else []  # type: ignore[arg-type]


def _priors(method: Distillation, config: Any) -> list[Any]:
    """Every prior that will be in force: of the plan's parts, and where it leaves that open, the schedule's or the data's own."""
    callbacks = config.trainer.callbacks or []
    schedules = [c.schedule for c in (callbacks if isinstance(callbacks, list) else [callbacks]) if isinstance(c, AnnealPrior)]
    own = [prior for schedule in schedules for prior in schedule.ahead(method.updates)] or [config.data.prior]
    stages = _stages(method)
    open_ = not stages or any(not stage.parts and not stage.preliminary for stage in stages)
    return [part for stage in stages for part in stage.parts] + (own if open_ else [])


def check_method(method: Distillation) -> None:
    """Raises Refusal, naming it, for what a method of one's own has not set that it must."""
    try:
        check_complete(method)
    except TypeError as error:
        raise Refusal(str(error)) from error


def check_exports(method: Distillation, export_steps: int | None) -> None:
    """Raises ValueError now, and not after the data are encoded, for a student that no scheduler of its pipeline steps as, in any stage to
    come; those that no pipeline can hold leave their weights. `export_steps`: the step count of the last one, by default its own."""
    if unheld(method) is not None:
        return
    *before, last = method.deployments()
    for deployment, steps in [*((d, d.steps[0]) for d in before), (last, export_steps or last.steps[0])]:
        try:
            deployment.made_scheduler(steps)
        except ValueError as error:
            raise ValueError(f"the student of {type(method).__name__} could not be exported for {steps} steps: {error}") from error


def check_room(method: Distillation, data: DDILDataModule) -> None:
    """Raises ValueError for a buffer that cannot hold a single roll-out of some stage."""
    if data.buffer is None:
        return
    longest = max((len(walk) for walk in method.walks()), default=0)
    if longest * data.trajectories > data.buffer.capacity:
        raise ValueError(
            f"data.buffer.capacity {data.buffer.capacity} cannot hold one roll-out: {data.trajectories} trajectories of {longest} states; "
            "raise it, or set data.rollouts.trajectories lower, or data.buffer.capacity to 0 for roll-outs that are made for every batch"
        )


GROUPS = ("data", "trainer", "test", *(cls.__name__.lower() for cls in OWN))
BARE: tuple[tuple[type, str], ...] = ((Distillation, "deploy"), (Captions, "__len__"), (Schedule, "__call__"), (OnClock, "apply"))
"""Classes that are there to be derived from, each with what a class that can be used defines."""


def check_shape(config: Any) -> None:
    """Raises Refusal for a group of options that is no table, for a config without a method, and for a class that is only a base."""
    for name in GROUPS:
        if not isinstance(config.get(name), Namespace):
            raise Refusal(
                f"{name} is {config.get(name)!r}: it is a table of options, such as `{name}: {{...}}`; leave it out for the defaults"
            )
    if config.model is None or config.model.class_path.rpartition(".")[2] == Distillation.__name__:
        raise Refusal("the config names no method: give model: {class_path: LCM, ...}, or PD, DMD2 or one of your own")
    for cls, where in classes(config):
        for base, needed in BARE:
            if isinstance(cls, type) and issubclass(cls, base) and getattr(cls, needed) is getattr(base, needed):
                raise Refusal(f"{where}: {cls.__name__} is there to be derived from: give a class that defines {needed}")


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raises ValueError for a callback of Lightning's that waits for a metric: the curves of a run are not known to it by any name."""
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None:
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} watches {monitor!r}, and no metric is logged to Lightning by a name: "
                "leave it out; --updates says how long a run is, checkpoints.keep how many states stay, and checkpoints.best keeps the "
                "best by a number that a callback publishes, such as validation/frechet_4 of a Validation"
            )


def check_loggers(config: Any) -> None:
    """Raises ValueError for TensorBoard, asked for by its option or as a logger of Lightning's, where it is not installed."""
    asked = ["--tensorboard"] if config.tensorboard else []
    asked += [where for cls, where in classes(config) if isinstance(cls, type) and issubclass(cls, TensorBoardLogger)]
    for option in asked:
        check_tensorboard(option)


def check_trainer(config: Any) -> None:
    """Raises ValueError for settings of the Trainer under which no update would be made, or more than are asked for."""
    for name in ("max_epochs", "max_steps"):
        if config.get(name) is not None and (config[name] == 0 or config[name] < -1):
            raise ValueError(f"trainer.{name} is {config[name]}: give -1, since --updates says how long a run is, or at least 1")
    for name in ("min_epochs", "min_steps"):
        if config.get(name) is not None:  # Lightning goes on with the epoch then, whoever has stopped it
            raise ValueError(f"trainer.{name} is {config[name]}: leave it out, --updates says how long a run is")
    if config.get("limit_train_batches") in (0, 0.0):
        raise ValueError("trainer.limit_train_batches is 0: leave it out, --updates says how long a run is")


def refuse_null(config: Any) -> None:
    """Raises Refusal for an option that is null and has to be something: jsonargparse takes null for any type."""
    for cls, name in ((DDILDataModule, "data"), (Test, "test"), *((cls, cls.__name__.lower()) for cls in OWN)):
        _refuse_null(cls, config.get(name), name)
    for cls, where, given in _named(config, ""):
        _refuse_null(cls, given, where)


def classes(config: Any) -> Iterator[tuple[Any, str]]:
    """Every class that a parsed config names, with the key where it does."""
    return ((cls, where) for cls, where, _ in _named(config, ""))


def _named(value: Any, where: str) -> Iterator[tuple[Any, str, Any]]:
    if isinstance(value, list):
        for inner in value:
            yield from _named(inner, where)
    elif isinstance(value, Namespace) and "class_path" in vars(value):
        module, _, name = value.class_path.rpartition(".")
        given = vars(value).get("init_args")
        yield getattr(import_module(module), name), where, given
        yield from _named(given, where)
    elif isinstance(value, Namespace):
        for key, inner in vars(value).items():
            yield from _named(inner, f"{where}.{key}".lstrip("."))


def _refuse_null(cls: Any, given: Any, where: str) -> None:
    if not isinstance(given, Namespace) or not isinstance(cls, type):
        return
    known: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__[:-1]:
        known = {**(inspect.signature(base).parameters if "__init__" in vars(base) else {}), **known}
    for name, parameter in known.items():
        kind = str(parameter.annotation)
        if vars(given).get(name, cls) is None and parameter.default is not None and not re.search(r"None|Optional|Any|_empty", kind):
            raise Refusal(f"{where}.{name} takes {kind}, not null")
        if is_dataclass(parameter.default):  # a record of options
            _refuse_null(type(parameter.default), vars(given).get(name), f"{where}.{name}")


def refuse_data_seed(words: Sequence[str]) -> None:
    """Raises Refusal for a data.seed in a config: it is linked to the run's seed, and jsonargparse would ignore it in silence."""
    for value in (b for a, b in zip(words, words[1:], strict=False) if a == "--config"):
        data = read_config(value).get("data")
        if isinstance(data, dict) and "seed" in data:
            raise Refusal("data.seed follows the seed of the run: set seed_everything, or --seed on the command line")


PLACEHOLDER = "YOUR_DATA"
"""What the large configs name in the place of a user's own data."""


def say_data(data: Any) -> None:
    """Leave out a config's placeholder where a folder of ddil-cache holds all data. Raises Refusal where nothing is in its place."""
    if getattr(getattr(data.captions, "init_args", None), "path", None) != PLACEHOLDER:
        return
    if not (isinstance(data.get("cache"), str) and Path(data.cache).is_dir()):
        raise Refusal(
            f"data.captions.path is still {PLACEHOLDER}: say data.captions.path=YOURS, a folder or a hub id, or data.cache=DIR, a folder "
            "that ddil-cache has made"
        )
    data.captions = None
