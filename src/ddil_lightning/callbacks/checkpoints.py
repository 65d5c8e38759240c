"""Checkpoints by the clock of student updates, written whole or not at all, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Checkpoint


class Checkpoints(Checkpoint):
    """`checkpoints/updates=N.ckpt` every `every` student updates (0: only at the end), the newest `keep` of them, and at the end.

    A checkpoint holds the student, its averages, the optimiser, the buffer and the clocks, never the frozen teacher. Lightning's own
    ModelCheckpoint counts the steps of every optimiser, which is another clock. `folder` defaults to the trainer's root.
    Ctrl-C ends the run after the step in progress, with a checkpoint; a second one stops at once.
    """

    def __init__(self, every: int = 200, keep: int = 2, folder: str | None = None) -> None:
        if every < 0 or keep < 1:
            raise ValueError(f"checkpoints: every >= 0 and keep >= 1, got {every} and {keep}")
        self.every, self.keep, self.folder = every, keep, folder
        self.last: Path | None = None
        self.interrupted = False
        self._previous: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen for Ctrl-C."""
        self._saved_at = pl_module.student_updates
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when the clock has moved on by `every`, when it is done, and when Ctrl-C was pressed."""
        clock = pl_module.student_updates
        due = self.every and clock % self.every == 0
        if clock != self._saved_at and (due or self.interrupted or clock >= pl_module.updates):
            self.save(trainer, clock)
        if self.interrupted:
            trainer.should_stop = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def save(self, trainer: Any, clock: int) -> Path:
        """Write to a temporary name, then rename: a full disk leaves the older checkpoints as they were."""
        folder = Path(self.folder or Path(trainer.default_root_dir) / "checkpoints")
        path = folder / f"updates={clock}.ckpt"
        temporary = path.with_suffix(".part")
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                os.replace(temporary, path)
        except OSError as error:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"the checkpoint {path} could not be written ({error.strerror or error}); the last good one is {self.last or 'none'}",
            ) from error
        self.last, self._saved_at = path, clock
        if trainer.is_global_zero:
            for old in sorted_checkpoints(folder)[: -self.keep]:
                old.unlink(missing_ok=True)
        return path

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


def sorted_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder by their clock, oldest first."""
    found = [(int(m.group(1)), p) for p in folder.glob("updates=*.ckpt") if (m := re.fullmatch(r"updates=(\d+)\.ckpt", p.name))]
    return [p for _, p in sorted(found)]
