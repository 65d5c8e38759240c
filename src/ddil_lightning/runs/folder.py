"""Run folders: `runs/<config>/<time>/`, which belong to one run, the newest of a config as `latest`, and what is in one."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import IO

from ddil_lightning.files import lock, read_table, sweep, switch, write_text

WRITTEN = (
    "config.yaml", "checkpoints", "metrics.csv", "summary.json", "pipeline", "pipeline-unverified", "report.html", "samples", "stages",
    "student.safetensors", "metrics.json", "wandb", "tensorboard",
)  # fmt: skip
"""What a run may write into its folder."""
BEGUN = {"config.yaml", "checkpoints", "metrics.csv", "samples", "wandb", "tensorboard"}
"""What a run leaves that has ended before its first checkpoint: that it has begun, and what it has shown."""
LOCK, PATIENCE = ".lock", 10.0
"""The file by which a run holds its folder, and for how many seconds another waits for it."""


class Claim:
    """A run folder that belongs to this process, from before anything is written until `release`. Two runs never write to one folder.

    `made`: the directories that had to be made for it, innermost first.
    """

    def __init__(self, folder: Path, made: list[Path]) -> None:
        self.folder, self.made = folder, made
        try:
            self._lock: IO[bytes] | None = _locked(folder / LOCK)
        except BaseException:
            _remove_empty(made)
            raise

    def release(self, started: bool) -> None:
        """Give the folder up; a run that has not `started` also removes the directories that were made for it, where they are empty."""
        if self._lock is not None:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        if not started:
            _remove_empty(self.made)


def reserve(run_dir: str | None, config: str, anew: bool = False) -> Claim:
    """The folder of a fresh run, `run_dir` or a new one below runs/.

    Raises ValueError when `run_dir` holds anything that a run would write, but see `check_free`, or when another run has just taken it.
    """
    if run_dir is not None:
        folder = Path(run_dir)
        check_free(folder, anew)
        claim = Claim(folder, _make(folder))
        try:
            check_free(folder, anew)  # again: another run may have come and gone between the two
            sweep(folder, inside=anew, alone=True)  # one that was killed before it began
        except BaseException:
            claim.release(started=False)
            raise
        return claim
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"-{k}" for k in range(2, 1000))):
        folder = Path("runs") / config / f"{stamp}{suffix}"
        made = _make(folder)
        if made:  # a folder that exists belongs to a run that was started in the same second
            return Claim(folder, made)
    raise ValueError(f"no free name for a run in {folder.parent}: give --run_dir")


def take_up(folder: Path) -> Claim:
    """The folder of a run that goes on, without what a killed process has left half written in it.

    Raises ValueError while another process writes to it, and for a pipeline/ in it that no run has written.
    """
    claim = Claim(folder, [])
    try:
        for name in ("pipeline", "pipeline-unverified"):
            if (folder / name).exists() and "method" not in read_table(folder / name / "ddil.json"):
                raise ValueError(f"{folder / name} was not written by a run, and would be replaced at its end: move it away")
        sweep(folder, alone=True)  # a job goes on on another machine than the one that was killed
    except BaseException:
        claim.release(started=True)
        raise
    return claim


def check_free(folder: Path, anew: bool = False) -> None:
    """Raises ValueError when a fresh run in `folder` would overwrite something.

    `anew`: it may overwrite what a run has left there that has ended before its first checkpoint.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--run_dir {folder} is a file: give a folder")
    found = [name for name in WRITTEN if (folder / name).exists() or (folder / name).is_symlink()]
    # Boards make their own before anything begins.
    begun = set(found) <= BEGUN and ("config.yaml" in found or set(found) <= {"wandb", "tensorboard"})
    if anew and begun and not any((folder / "checkpoints").glob("*.ckpt")):
        return
    if "config.yaml" in found and (begun or "checkpoints" in found):
        raise ValueError(f"{folder} already holds a run: choose another --run_dir, or go on with it by --ckpt_path last")
    if found:
        raise ValueError(f"{folder} already holds {found[0]}, which a run would overwrite: choose another --run_dir")


def _make(folder: Path) -> list[Path]:
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return []
    return missing


def _remove_empty(made: list[Path]) -> None:
    for folder in made:
        try:
            folder.rmdir()
        except OSError:
            return


def _locked(path: Path) -> IO[bytes] | None:
    """The lock file, open and locked until it is closed or the process ends; None where the file system knows no locks."""
    deadline = time.monotonic() + PATIENCE  # a process that is just ending may still hold it
    while True:
        try:
            return lock(path)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"another process is writing to the run folder {path.parent}: wait for its end") from error
        time.sleep(0.2)


def is_complete(folder: Path, clock: int) -> bool:
    """Whether summary and student in a run folder are both of `clock` student updates, by what they say themselves, and nothing failed."""
    if read_table(folder / "summary.json").get("student_updates") != clock or read_table(folder / "summary.json").get("failed"):
        return False
    pipeline = read_table(folder / "pipeline" / "ddil.json").get("student_updates") == clock
    return pipeline or (folder / "student.safetensors").is_file()


def check_latest(config: str) -> None:
    """Raises ValueError when a folder that is no link has the name runs/<config>/latest, which `point_latest` would have to replace."""
    latest = Path("runs") / config / "latest"
    if latest.is_dir() and not latest.is_symlink():
        raise ValueError(f"{latest} is a folder, not the link this command makes: move it away")


def point_latest(folder: Path, config: str) -> None:
    """Make `runs/<config>/latest` lead to `folder`: a link, or where links are not allowed a file with the path.

    Where neither can be written, that is printed and no error.
    """
    latest = Path("runs") / config / "latest"
    try:
        latest.parent.mkdir(parents=True, exist_ok=True)
        try:
            switch(latest, os.path.relpath(folder.resolve(), latest.parent.resolve()))
        except OSError:
            write_text(latest, str(folder.resolve()))
    except OSError as error:
        # The run itself is elsewhere, or it could not have begun here.
        print(f"{latest} could not be set ({error.strerror}): --ckpt_path last will not find this run", flush=True)


def stage_pipelines(folder: Path) -> dict[int, Path]:
    """The pipelines that the halvings of a run in stages have left in `folder`, by their step count."""
    found = [(re.fullmatch(r"\d+-(\d+)-steps", p.name), p) for p in sorted((folder / "stages").glob("*-steps"))]
    return {int(name[1]): p for name, p in found if name and (p / "model_index.json").is_file()}
