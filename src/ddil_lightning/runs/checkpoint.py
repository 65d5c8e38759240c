"""Checkpoints that a run goes on from: found, read as far as they are needed, and refused by name where something in them is missing."""

from __future__ import annotations

import copy
import io
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from ddil_lightning.files import write_text
from ddil_lightning.texts import read_text
from ddil_lightning.training.completeness import check_reached
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.sharing import shared_names

CHANGED = "it was changed or written by another version; take another checkpoint"
"""The cause and the remedy, said of every checkpoint that lacks something."""
RUN = "ddil-run.txt"
"""The file in a run's `checkpoints.folder` that says which run folder is its own."""


def find_checkpoint(ckpt_path: str, run_dir: str | None, config: str) -> Path:
    """The checkpoint file behind `ckpt_path`: a file itself, the newest of a run folder, or for `last` that of `run_dir` or of the
    newest run of `config`. Raises ValueError, naming where it looked, where there is none."""
    if ckpt_path == "last":
        folder = Path(run_dir) if run_dir else Path("runs") / config / "latest"
        if folder.is_file():
            folder = Path(folder.read_text())
    else:
        folder = Path(ckpt_path)
        if folder.is_file():
            return folder
    found = checkpoints_of(folder)
    if not found:
        what = "holds no checkpoint" if folder.exists() else "does not exist"
        newest = ", or `last` after a run of this config" if config else ""  # of no config there is no last run
        raise ValueError(f"--ckpt_path {ckpt_path}: {folder} {what}; give a file{' or' if not newest else ','} a run folder{newest}")
    return found[-1].resolve()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, mapped from the disk, by weights_only=True. Raises ValueError for one that is half written or none of ours."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        others = [p.name for p in sorted_checkpoints(path.parent) if p.resolve() != path.resolve()]
        hint = f"take another: {', '.join(others)}" if others else "there is no other beside it"
        raise ValueError(f"the checkpoint {path} cannot be read ({type(error).__name__}): it is half written or none; {hint}") from error
    if not isinstance(state, dict) or "ddil" not in state:
        raise ValueError(f"{path} is no checkpoint of this library: it has no clock (key 'ddil')")
    if not isinstance(state["ddil"], dict) or not isinstance(state.get("state_dict"), dict):
        raise ValueError(
            f"{path} is damaged: its {'clock' if 'state_dict' in state else 'state_dict'} is missing or no table; take another"
        )
    return state


def check_readable(method: Any, callbacks: Sequence[Any] = (), last: bool = True) -> bool:
    """Whether that could be said, for a hook may ask for what some step makes: it is asked again, unless this is the `last` time.

    Raises ValueError, naming it, for what a run would write into its checkpoints and no run could go on from.

    Clocks that are not handed on, and objects of classes: `load_checkpoint` reads tensors, numbers, texts, and lists and dicts of such.
    """
    named, made = type(method).__name__, dict[str, Any]()
    try:
        method.on_save_checkpoint(made)
        states = [(type(callback).__name__, callback.state_dict()) for callback in callbacks]
    except AttributeError:
        if last:
            raise
        return False
    own: dict[str, Any] = {}
    Distillation.on_save_checkpoint(method, own)
    clocks = _table(made.get("ddil"))
    lost = [f"ddil.{name}" for name in own["ddil"] if name not in clocks]
    if lost:
        raise ValueError(
            f"no run could go on from a checkpoint of {named}: its on_save_checkpoint leaves out {lost[0] if clocks else 'ddil'}; call "
            'super().on_save_checkpoint(checkpoint) first, and add to checkpoint["ddil"]'
        )
    parts = {name: (value, "write in on_save_checkpoint what it holds") for name, value in made.items() if name != "ddil"}
    parts |= {f"ddil.{name}": (value, "write in on_save_checkpoint what it holds") for name, value in clocks.items()}
    hint = "leave save_hyperparameters() out, the run's config.yaml has them all"
    parts |= {f"hyper_parameters.{name}": (value, hint) for name, value in dict(getattr(method, "hparams", {})).items()}
    parts |= {f"callbacks.{name}": (state, "write in its state_dict what it holds") for name, state in states}
    for name, (value, remedy) in parts.items():
        if not _reads(value):
            raise ValueError(
                f"no run could go on from a checkpoint of {named}: its {name} {_kind(value)}, and a checkpoint holds tensors, numbers, "
                f"texts, and lists and dicts of such; {remedy}"
            )
    return True


def _reads(value: Any) -> bool:
    """Whether a value comes back from a checkpoint as `load_checkpoint` reads it."""
    file = io.BytesIO()
    try:
        torch.save(_emptied(value), file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever pickle finds that it cannot write, or must not read
        return False
    return True


def _emptied(value: Any) -> Any:
    """A value with tensors of no element in the place of its own, which may be as large as a network."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return torch.empty(0, dtype=value.dtype)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _emptied(x)) for key, x in value.items())
    return type(value)(map(_emptied, value)) if type(value) in (list, tuple) else value


def _kind(value: Any) -> str:
    """What a value that is not read is, or holds, in words."""
    inner = [*value.values()] if isinstance(value, Mapping) else list(value) if isinstance(value, list | tuple | set) else []
    odd = [x for x in inner if not _reads(x)]
    return f"holds a {type(odd[0]).__name__}" if odd else f"is a {type(value).__name__}"


def reinstate(method: Any, state: Mapping[str, Any]) -> None:
    """Give a fresh `method` the clocks and the networks of a checkpoint; one of a `bare` pipeline takes the deployed network alone.

    First the clocks, as Lightning has it: they say of which stage the networks are. Optimisers, data and callbacks are the trainer's.
    """
    method.on_load_checkpoint(state)
    check_reached(method, "on_load_checkpoint")
    if method.backbone.bare:
        _adopt(method, state["state_dict"])
    else:
        method.load_state_dict(state["state_dict"])


def _adopt(method: Any, weights: Mapping[str, Any]) -> None:
    """What inference needs of a checkpoint, mapped from the file: the network that is deployed, in the place of the pipeline's too."""
    from torch import nn

    from ddil_lightning.diffusion.denoiser import Denoiser

    network = method.outgoing.network
    name = next(name for name, module in method.named_modules() if module is network)
    for part, prefix in ((network, f"{name}."), (method.reflection, "reflection.")):
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        part.load_state_dict(own, assign=part is network)
    method.backbone.stands_in(network)
    for child, module in list(method.named_children()):
        if isinstance(module, Denoiser) and module.network is not network:
            module.network = nn.Identity()
        elif module is not network and any(p.is_meta for p in module.parameters()):
            delattr(method, child)


def check_whole(path: Path, state: Mapping[str, Any], method: Any) -> None:
    """Raises ValueError, naming it, for a part of a checkpoint without which a run would go on otherwise than it stopped."""
    check_clocks(path, state, method)
    parts = ("DDILDataModule", "loops", "callbacks", "optimizer_states", "lr_schedulers")
    data, callbacks = _table(state.get("DDILDataModule")), _table(state.get("callbacks"))
    missing = [name for name in parts if name not in state]
    missing += [f"DDILDataModule.{name}" for name in ("done", "collected_at", "buffers") if name not in data]
    # Every run has this callback, and its state is never empty.
    missing += [] if callbacks.get("Checkpoints") else ["callbacks.Checkpoints"]
    faults = [f"lacks {name}" for name in missing] or _optimizer_faults(state, method)
    if faults:
        raise ValueError(f"the checkpoint {path} {faults[0]}: {CHANGED}")


def check_clocks(path: Path, state: Mapping[str, Any], method: Any) -> None:
    """Raises ValueError, naming it, for a clock or a count of `method` that a checkpoint lacks, and for adapters of another strength."""
    mine: dict[str, Any] = {}
    method.on_save_checkpoint(mine)
    clocks = state["ddil"]
    counted = _table(clocks.get("evaluations"))
    missing = [name for name in mine["ddil"] if name not in (*clocks, "strength")]  # which older runs have not
    missing += [f"evaluations.{name}" for name in mine["ddil"]["evaluations"] if name not in counted]
    if missing:
        raise ValueError(f"the checkpoint {path} lacks ddil.{missing[0]}: {CHANGED}")
    strength = clocks.get("strength")
    if strength is not None and strength != method.adapter.strength:
        raise ValueError(
            f"the checkpoint {path} does not fit this config: its adapters have an alpha of {strength:g} x rank, and these one of "
            f"{method.adapter.strength:g} x rank, as which they would be another student; resume with the config.yaml of its run"
        )


def _optimizer_faults(state: Mapping[str, Any], method: Any) -> list[str]:
    """What the optimiser states of a checkpoint lack or have too much of, in words: Lightning restores as many as there are."""
    clocks, found, optimizers = state["ddil"], list(state["optimizer_states"] or []), _optimizers(method)
    if not found or (optimizers is not None and len(found) < len(optimizers)):
        return [f"lacks optimizer_states.{len(found)}"]
    if optimizers is not None and len(found) > len(optimizers):
        return [f"has optimizer_states.{len(optimizers)}, and the method {len(optimizers)} optimiser(s)"]
    begun = clocks["student_updates"] > clocks["stage_start"]  # a stage begins with an empty optimiser
    faults = []
    for i, one in enumerate(map(_table, found)):
        steps, keys = _table(one.get("state")), [key for group in one.get("param_groups") or [] for key in group["params"]]
        known = None if optimizers is None else [p for group in optimizers[i].param_groups for p in group["params"]]
        if known is not None and len(keys) != len(known):
            return [f"has {len(keys)} parameters in optimizer_states.{i}, and the method {len(known)}"]
        if not steps:
            faults += [f"lacks optimizer_states.{i}.state"] if begun and _remembers(optimizers, i) else []
            continue
        if known is not None:
            # Sharded runs number the parameters of the whole method, others those of the optimiser.
            every = dict(zip(keys, known, strict=True)) if not clocks["sharded"] else dict(enumerate(method.parameters()))
            absent = [key for key in keys if not steps.get(key) and _has_moved(every.get(key), state["state_dict"], method)]
            faults += [f"lacks optimizer_states.{i}.state.{key}" for key in absent]
    return faults


def _remembers(optimizers: list[Any] | None, i: int) -> bool:
    """Whether an optimiser keeps anything between its steps, by one of its kind and settings; True where it cannot be tried."""
    if optimizers is None:
        return True
    kind, probe = type(optimizers[i]), torch.nn.Parameter(torch.zeros(1))
    probe.grad = torch.ones(1)
    try:
        tried = kind([probe], **{name: value for name, value in optimizers[i].defaults.items() if name in signature(kind).parameters})
        tried.step()
    except Exception:  # whatever an optimiser of a third party needs
        return True
    return any(value is not None for value in tried.state[probe].values())


def _optimizers(method: Any) -> list[Any] | None:
    """The optimisers that a trainer will ask `method` for; None where they cannot be had before there is a trainer."""
    from lightning.pytorch.plugins import Precision
    from torch.optim import Optimizer

    asked = copy.copy(method)  # it alone meets the stand-in
    asked.trainer = SimpleNamespace(precision_plugin=Precision())
    try:
        made = asked.configure_optimizers()
    except AttributeError:  # somebody's own method that asks more of its trainer
        return None
    every = list(made) if isinstance(made, list | tuple) else [made]
    return every if all(isinstance(one, Optimizer) for one in every) else None


def _has_moved(parameter: Any, weights: Mapping[str, Any], method: Any) -> bool:
    """Whether a parameter is another than that of an untrained method: one that never has a gradient has rightly no optimiser state."""
    import torch

    name = next((name for name, p in method.named_parameters() if p is parameter), None)
    return name is None or not torch.equal(weights[name], parameter.detach().to("cpu"))


def _table(value: Any) -> Mapping[Any, Any]:
    """The value where it is a table, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def check_fits(path: Path, state: Mapping[str, Any], method: Any) -> None:
    """Raises ValueError when the weights of a checkpoint are not those of `method`: another class, pipeline or option."""
    mine, theirs = method.state_dict(), state["state_dict"]
    missing = sorted(mine.keys() - theirs.keys())
    unknown = sorted(theirs.keys() - mine.keys() - shared_names(method))  # tables of a base were in checkpoints of adapters once
    other = [name for name in mine.keys() & theirs.keys() if mine[name].shape != getattr(theirs[name], "shape", None)]
    if missing or unknown or other:
        said = [f"it lacks {missing[0]}"] if missing else []
        said += [f"it has {unknown[0]} as well"] if unknown else []
        said += [f"the shape of {min(other)} differs"] if other else []
        raise ValueError(f"the checkpoint {path} does not fit this config: {', '.join(said)}; resume with the config.yaml of its run")


def folder_of(path: Path) -> Path | None:
    """The run folder that a checkpoint file belongs to: that which it lies in, or whose `checkpoints.folder` it does; None elsewhere."""
    run = _noted(path.parent) or (path.parent.parent if path.parent.name == "checkpoints" else None)
    return run if run is not None and (run / "config.yaml").is_file() else None


def check_newest(path: Path) -> None:
    """Raises ValueError when a run would go on from another than its newest checkpoint and so overwrite what came after."""
    newest, clock = sorted_checkpoints(path.parent)[-1:], clock_of(path)
    if newest and clock is not None and clock_of(newest[0]) != clock:
        raise ValueError(
            f"{path.name} is not the newest checkpoint of its run, which is {newest[0].name}: go on from that one, "
            "or branch off into a new folder with --run_dir"
        )


def clock_of(path: Path) -> int | None:
    """The clock in a checkpoint's name, None for another name."""
    found = re.fullmatch(r"updates=(\d+)\.ckpt", path.name)
    return int(found[1]) if found else None


def sorted_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder by their clock, oldest first."""
    return sorted((p for p in folder.glob("updates=*.ckpt") if clock_of(p) is not None), key=lambda p: clock_of(p) or 0)


def checkpoints_of(folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, also those in its `checkpoints.folder`, or of a folder of checkpoints, oldest first."""
    elsewhere = _elsewhere(folder)
    return (sorted_checkpoints(elsewhere) if elsewhere else []) or sorted_checkpoints(folder / "checkpoints") or sorted_checkpoints(folder)


def note_run(folder: Path, run: Path) -> None:
    """Have `folder`, which a run's `checkpoints.folder` names, say whose checkpoints it holds. Raises OSError."""
    if (run / "config.yaml").is_file():
        write_text(folder / RUN, str(run.resolve()))


def _noted(folder: Path) -> Path | None:
    """The run that a folder of checkpoints says to be of, if it does."""
    try:
        return Path(read_text(folder / RUN).strip())
    except ValueError:
        return None


def _elsewhere(run: Path) -> Path | None:
    """The folder outside the run folder that the run's config.yaml has its checkpoints written to, unless they are another run's by now."""
    try:
        config = yaml.safe_load(read_text(run / "config.yaml"))
    except (ValueError, yaml.YAMLError):
        return None
    named = _table(_table(config).get("checkpoints")).get("folder")
    folder = Path(named) if isinstance(named, str) else None
    return folder if folder is not None and _noted(folder) in (None, run.resolve()) else None


def config_of(ckpt_path: str | Path) -> Path:
    """The config.yaml of the run that a checkpoint belongs to. Raises ValueError where there is none."""
    path = find_checkpoint(str(ckpt_path), None, "")
    for folder in (folder_of(path), path.parent, path.parent.parent):
        if folder is not None and (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ValueError(f"no config.yaml beside {path} or above it: a checkpoint is rebuilt from the config of its run")
