"""Run folders: `runs/<config>/<time>/`, the newest of a config as `latest`, what to resume, and metrics.csv."""

from __future__ import annotations

import csv
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from .callbacks.checkpoints import clock_of, sorted_checkpoints

CLOCK = "student_updates"


def reserve(run_dir: str | None, config: str) -> tuple[Path, list[Path]]:
    """Make the folder of a fresh run -> (folder, the directories that had to be made, innermost first: what `discard` removes).

    Raises ValueError when `run_dir` already holds a run: nothing is overwritten.
    """
    if run_dir is not None:
        check_free(Path(run_dir))
        return Path(run_dir), _make(Path(run_dir))
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"-{k}" for k in range(2, 1000))):
        folder = Path("runs") / config / f"{stamp}{suffix}"
        made = _make(folder)
        if made:  # a folder that exists belongs to a run that was started in the same second
            return folder, made
    raise ValueError(f"no free name for a run in {folder.parent}: give --run_dir")


def check_free(folder: Path) -> None:
    """Raises ValueError when a fresh run in `folder` would overwrite something."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--run_dir {folder} is a file: give a folder")
    if any((folder / name).exists() for name in ("config.yaml", "checkpoints", "metrics.csv", "summary.json")):
        raise ValueError(f"{folder} already holds a run: choose another --run_dir, or go on with it by --ckpt_path last")


def _make(folder: Path) -> list[Path]:
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return []
    return missing


def discard(made: list[Path]) -> None:
    """Remove the directories of a run that never started, as far as they are empty."""
    for folder in made:
        try:
            folder.rmdir()
        except OSError:
            return


def point_latest(folder: Path, config: str) -> None:
    """`runs/<config>/latest` is the newest run of that config (a link; where links are not allowed, a file with the path).

    Raises ValueError when something that is no such link has that name.
    """
    latest = Path("runs") / config / "latest"
    if latest.is_dir() and not latest.is_symlink():
        raise ValueError(f"{latest} is a folder, not the link this command makes: move it away")
    latest.parent.mkdir(parents=True, exist_ok=True)
    temporary = latest.with_name(f".latest.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(folder.resolve(), latest.parent.resolve()))
    except OSError:
        temporary.write_text(str(folder.resolve()))
    os.replace(temporary, latest)


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
    """A checkpoint, read with weights_only=True. Raises ValueError for one that is half written or none of ours."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        others = [p.name for p in sorted_checkpoints(path.parent) if p.resolve() != path.resolve()]
        hint = f"take another: {', '.join(others)}" if others else "there is no other beside it"
        raise ValueError(f"the checkpoint {path} cannot be read ({type(error).__name__}): it is half written or none; {hint}") from error
    if not isinstance(state, dict) or "ddil" not in state:
        raise ValueError(f"{path} is no checkpoint of this library: it has no clock (key 'ddil')")
    return state


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


def stage_pipelines(folder: Path) -> dict[int, Path]:
    """The pipelines that the halvings of a run in stages have left in `folder`, by their step count."""
    found = [(re.fullmatch(r"\d+-(\d+)-steps", p.name), p) for p in sorted((folder / "stages").glob("*-steps"))]
    return {int(name[1]): p for name, p in found if name and (p / "model_index.json").is_file()}


def check_newest(path: Path) -> None:
    """Raises ValueError when a run would go on from another than its newest checkpoint and so overwrite what came after."""
    newest, clock = sorted_checkpoints(path.parent)[-1:], clock_of(path)
    if newest and clock is not None and clock_of(newest[0]) != clock:
        raise ValueError(
            f"{path.name} is not the newest checkpoint of its run, which is {newest[0].name}: go on from that one, "
            "or branch off into a new folder with --run_dir"
        )


def write_text(path: Path, text: str) -> None:
    """Written whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class MetricsFile(Logger):
    """metrics.csv: one row per logged update, the union of all columns, complete after every row and after a resume.

    Lightning's CSVLogger deletes the file of the run it goes on with. `source`, `upto`: the run folder that is resumed and its clock;
    rows of later updates are left out, because these updates are made again.
    """

    name, version = "metrics", ""

    def __init__(self, folder: Path, source: Path | None = None, upto: int = 0) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self._fields: list[str] = []
        self._resumed = None if source is None else (source / "metrics.csv", upto)

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": step, **{key: float(value) if hasattr(value, "item") else value for key, value in metrics.items()}}
        if set(row) - set(self._fields) or not self.path.is_file():
            rows = self._kept()
            fields = {name for r in (*rows, row) for name in r}
            self._fields = sorted(fields, key=lambda name: (name != CLOCK, name != "step", name))
            self._write([*rows, row])
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._fields).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them all."""

    def _kept(self) -> list[dict[str, Any]]:
        (path, upto), self._resumed = self._resumed or (self.path, None), None
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]
        return [row for row in rows if CLOCK not in row or upto is None or float(row[CLOCK]) <= upto]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(".metrics.csv.part")
        try:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._fields)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def wandb_logger(folder: Path, name: str, mode: str, config: dict[str, Any]) -> Any:
    """A W&B logger that writes below the run folder and never asks for a key."""
    from lightning.pytorch.loggers import WandbLogger

    title = f"{name}/{folder.name}"
    return WandbLogger(project="ddil-lightning", name=title, save_dir=str(folder), offline=mode == "offline", config=config)


def check_wandb_key() -> None:
    """Raises ValueError where W&B would have to ask for a key."""
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    if not known and not os.environ.get("WANDB_API_KEY"):
        raise ValueError(
            "--wandb online needs a key: run `wandb login` or set WANDB_API_KEY, or use --wandb offline and `wandb sync` later"
        )
