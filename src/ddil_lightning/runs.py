"""Run folders: `runs/<config>/<time>/`, the newest of a config as `latest`, and what to resume."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

from .callbacks.checkpoints import sorted_checkpoints


def new_folder(run_dir: str | None, config: str) -> Path:
    """The folder of a fresh run. Raises ValueError when `run_dir` already holds a run: nothing is overwritten."""
    if run_dir is not None:
        folder = Path(run_dir)
        if (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
            raise ValueError(f"{folder} already holds a run: choose another --run_dir, or go on with --ckpt_path last")
    else:
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        folder = Path("runs") / config / stamp
        for k in range(2, 100):
            if not folder.exists():
                break
            folder = Path("runs") / config / f"{stamp}-{k}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def point_latest(folder: Path, config: str) -> None:
    """`runs/<config>/latest` is the newest run of that config (a link; where links are not allowed, a file with the path)."""
    latest = Path("runs") / config / "latest"
    latest.parent.mkdir(parents=True, exist_ok=True)
    temporary = latest.with_name(".latest.part")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(folder.resolve(), latest.parent.resolve()))
    except OSError:
        temporary.write_text(str(folder.resolve()))
    if latest.is_dir() and not latest.is_symlink():
        raise ValueError(f"{latest} is a folder, not the link this command makes: move it away")
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
        raise ValueError(f"no checkpoint in {folder}: give --ckpt_path a file, a run folder, or `last` after a run of this config")
    return found[-1].resolve()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, read with weights_only=True. Raises ValueError for one that is half written or none of ours."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        others = [p.name for p in sorted_checkpoints(path.parent) if p != path]
        hint = f"; also there: {', '.join(others)}" if others else ""
        raise ValueError(f"the checkpoint {path} cannot be read ({type(error).__name__}: it may be half written){hint}") from error
    if "ddil" not in state:
        raise ValueError(f"{path} is no checkpoint of this library: it has no clock (key 'ddil')")
    return state


def old_metrics(folder: Path, upto: int) -> list[dict[str, float]]:
    """The rows of metrics.csv up to a clock. The CSV logger starts anew, so a resumed run logs them again; the old file is kept aside."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]
    os.replace(path, folder / "metrics.before-resume.csv")
    return [row for row in rows if row.get("student_updates", 0) <= upto]


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
