"""Checkpoints that a run goes on from: found, read as far as they are needed, and refused by name where something in them is missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .callbacks.checkpoints import clock_of, sorted_checkpoints


def checkpoint(ckpt_path: str, run_dir: str | None, config: str) -> Path:
    """The checkpoint behind `last`, a run folder or a file. Raises ValueError naming where it looked."""
    if ckpt_path == "last":
        folder = Path(run_dir) if run_dir else Path("runs") / config / "latest"
        if folder.is_file():
            folder = Path(folder.read_text())
    else:
        folder = Path(ckpt_path)
        if folder.is_file():
            return folder
    found = sorted_checkpoints(folder / "checkpoints") or sorted_checkpoints(folder)
    if not found:
        what = "holds no checkpoint" if folder.exists() else "does not exist"
        raise ValueError(f"--ckpt_path {ckpt_path}: {folder} {what}; give a file, a run folder, or `last` after a run of this config")
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


def check_whole(path: Path, state: Mapping[str, Any], method: Any) -> None:
    """Raises ValueError, naming it, for a part of a checkpoint without which a run would go on otherwise than it stopped."""
    missing = [name for name in ("DDILDataModule", "loops", "callbacks", "optimizer_states", "lr_schedulers") if name not in state]
    mine: dict[str, Any] = {}
    method.on_save_checkpoint(mine)
    theirs = state["ddil"]
    missing += [f"ddil.{name}" for name in mine["ddil"] if name not in theirs]
    missing += [f"ddil.evaluations.{name}" for name in mine["ddil"]["evaluations"] if name not in theirs.get("evaluations", {})]
    missing += [f"DDILDataModule.{name}" for name in ("done", "collected_at", "buffers") if name not in (state.get("DDILDataModule") or {})]
    begun = theirs.get("student_updates", 0) > theirs.get("stage_start", 0)  # a stage begins with an empty optimiser
    optimizers = state.get("optimizer_states") or []
    missing += [f"optimizer_states.{i}.state" for i, one in enumerate(optimizers) if begun and not one.get("state")]
    if missing or not optimizers:
        named = missing[0] if missing else "optimizer_states"
        raise ValueError(f"the checkpoint {path} lacks {named}: it was changed or written by another version; take another checkpoint")


def check_fits(path: Path, state: Mapping[str, Any], method: Any) -> None:
    """Raises ValueError when the weights of a checkpoint are not those of `method`: another class, pipeline or option."""
    mine, theirs = method.state_dict(), state["state_dict"]
    missing, unknown = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    other = [name for name in mine.keys() & theirs.keys() if mine[name].shape != theirs[name].shape]
    if missing or unknown or other:
        said = [f"it lacks {missing[0]}"] if missing else []
        said += [f"it has {unknown[0]} as well"] if unknown else []
        said += [f"the shape of {min(other)} differs"] if other else []
        raise ValueError(f"the checkpoint {path} does not fit this config: {', '.join(said)}; resume with the config.yaml of its run")


def folder_of(path: Path) -> Path | None:
    """The run folder that a checkpoint file lies in, None for a file elsewhere."""
    return path.parent.parent if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file() else None


def check_newest(path: Path) -> None:
    """Raises ValueError when a run would go on from another than its newest checkpoint and so overwrite what came after."""
    newest, clock = sorted_checkpoints(path.parent)[-1:], clock_of(path)
    if newest and clock is not None and clock_of(newest[0]) != clock:
        raise ValueError(
            f"{path.name} is not the newest checkpoint of its run, which is {newest[0].name}: go on from that one, "
            "or branch off into a new folder with --run_dir"
        )
