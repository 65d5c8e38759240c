"""Checkpoints by the clock of student updates, written whole or not at all, and signals that lose nothing."""

from __future__ import annotations

import logging
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ddil_lightning.bounds import at_least
from ddil_lightning.callbacks.best import Best
from ddil_lightning.callbacks.validation import Validation
from ddil_lightning.files import replacing
from ddil_lightning.records import sent
from ddil_lightning.runs.checkpoint import check_readable, clock_of, note_run, sorted_checkpoints
from ddil_lightning.signals import Stopped, listen, unlisten
from ddil_lightning.training.clock import batches_of
from ddil_lightning.training.sharding import share

AGREE, PROMPT = 10, 5.0
"""Batches between two looks at whether any of several processes was interrupted, each of which waits for the device, and the seconds that
they may take: where they take more, every batch is looked at. A launcher that has sent SIGTERM kills 30 seconds later."""


class Checkpoints(Checkpoint):
    """`checkpoints/updates=N.ckpt` by the clock of student updates, and at the end of a stage and of the run.

    A checkpoint holds the student, its averages, the optimiser, the buffer and the clocks, never the frozen teacher. Lightning's own
    ModelCheckpoint counts the steps of every optimiser, which is another clock.
    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end the run after the update in progress, with a checkpoint; a second one stops at once. Weights
    that are not finite are not saved (FloatingPointError), so that the last checkpoint is a good one. In a script of one's own `fit` then
    returns, `signal` says which it was, and Lightning's requeueing by SIGUSR1 under SLURM, whose handler is replaced, does nothing.

    Args:
        every: student updates between two checkpoints; 0 for those at an end alone.
        keep: how many of the newest stay.
        best: a number that a callback publishes, such as validation/frechet_4 of a `Validation`: a checkpoint is written whenever it is
            better than ever before, and that of the best stays. null for none.
        folder: where they are written, by default `checkpoints/` below the trainer's root. It then says, in `ddil-run.txt`, whose they are.
    """

    def __init__(self, every: int = 200, keep: int = 2, folder: str | None = None, best: str | None = None) -> None:
        at_least(0, **{"checkpoints.every": every})
        at_least(1, **{"checkpoints.keep": keep})
        self.every, self.keep, self.folder = every, keep, folder
        self.best = None if best is None else Best(best)
        self.last: Path | None = None
        self.signal: int | None = None  # the one that asked the run to end
        self.seconds = 0.0  # of training, over all the resumes of a run
        self._before: dict[int, Any] = {}
        self._saved_at: int | None = None
        self._stop = self._saving = self._checked = False
        self._asked = self._began = 0  # how often what a checkpoint would hold was looked at; the clock of the start
        self._batches = 0  # of this process, over all its epochs
        self._look, self._looked = 1, (0, time.monotonic())  # the batch of the next look; that of the last one and its time
        self._alive, self._longest = time.monotonic(), 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have checkpoints written and read by `Mapped`, unless the user has chosen another way."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = Mapped()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises ValueError where `folder` holds checkpoints of another run, which are not ours to replace."""
        if self.folder is not None:
            here, resumed = Path(self.folder), Path(trainer.ckpt_path) if trainer.ckpt_path else None
            if sorted_checkpoints(here) and (resumed is None or resumed.resolve().parent != here.resolve()):
                raise ValueError(f"checkpoints.folder {here} holds checkpoints of another run, which would be replaced: give another")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen for signals and to what is published, and take the checkpoint that the run goes on from for the last good one.

        Raises ValueError for a best of a `Validation` that the run has not, and of what is neither better nor worse.
        """
        if self.best is not None:
            measured = [c.of for c in trainer.callbacks if isinstance(c, Validation)]
            if self.best.name.startswith("validation/"):
                if not measured:
                    raise ValueError(
                        f"checkpoints.best {self.best.name} is published by the callback Validation: give trainer.callbacks one"
                    )
                self.best.measured_on("; ".join(measured))
            self.best.sign  # noqa: B018 (raises)
            pl_module.measures.listen(self.best.hear)
        if self.last is None and trainer.ckpt_path:
            self.last = Path(trainer.ckpt_path)
        self._checked, self._asked, self._began = False, 0, pl_module.student_updates
        self._saved_at, self._since = pl_module.student_updates, time.perf_counter() - self.seconds
        self._alive = time.monotonic()
        self._look, self._looked = self._batches + 1, (self._batches, self._alive)
        self._before = listen(self._interrupt)
        # Before every batch of several processes Lightning sends around whether its own handler has heard SIGTERM, and waits for the device
        # to answer. That handler is no longer there: `_agreed` asks in its place.
        if hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"):
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Raises ValueError for what a checkpoint would hold and nobody could read again: a resume would find it after all the training.

        At the first batch, when whatever has a state for the training has made it, or after the first update of who makes it there. Who
        makes it later still is asked at the first checkpoint.
        """
        moved = pl_module.student_updates != self._began
        if not self._checked and (self._asked, moved) in ((0, False), (1, True)):
            self._asked += 1
            self._checked = check_readable(pl_module, trainer.callbacks, last=False)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when the clock has moved on by `every`, when a stage or the run is done, and when a signal came."""
        self.seconds = time.perf_counter() - self._since
        now = time.monotonic()
        self._alive, self._longest = now, max(self._longest, now - self._alive)
        clock = pl_module.student_updates
        self._batches += 1
        if self._agreed(trainer) and not pl_module.descent.halfway:
            self.save(trainer, pl_module)
            trainer.should_stop = True
            return
        if self.best is not None:
            self.best.agree(trainer.strategy.broadcast)
        due = (self.every and clock % self.every == 0) or clock >= pl_module.updates or pl_module.stage_is_over
        if (due or (self.best is not None and self.best.due)) and clock != self._saved_at:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save a run that something else has ended (a time limit, another callback), as its last whole update has left it."""
        self._listen_no_more(pl_module)
        if pl_module.student_updates != self._saved_at:
            self.save(trainer, pl_module)
        if self.best is not None and not self.best.heard and trainer.is_global_zero:
            logging.getLogger(__name__).warning(
                f"checkpoints.best: {self.best.name} was never published, so that no checkpoint is the best"
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back, and save what was reached before whatever failed between two steps: data that cannot be read, a loader's
        process that was killed, another callback, a logger.

        Of one process alone: several would have to save together. Not in the midst of a step, which may have changed half of the weights.
        """
        self._listen_no_more(pl_module)
        batches = batches_of(trainer)
        between = self._saved_at is not None and batches.started == batches.processed and not pl_module.descent.halfway
        # On a GPU numbers that are not finite are known a batch late, when their update is counted but was not taken.
        between = between and not isinstance(exception, FloatingPointError)
        if trainer.world_size == 1 and between and isinstance(exception, Exception) and pl_module.student_updates != self._saved_at:
            with suppress(Exception):  # such as a device that answers no more: what is told is what came first
                self.save(trainer, pl_module)

    def save(self, trainer: Any, method: Any) -> Path:
        """Write `updates=N.ckpt`, remove the oldest ones beyond `keep`, and answer the path.

        Raises OSError, which leaves the older checkpoints as they were, and FloatingPointError for weights that are not finite.
        """
        clock = self._saved_at = method.student_updates  # also where it fails: once is enough
        folder = Path(self.folder or Path(trainer.default_root_dir) / "checkpoints")
        path = folder / f"updates={clock}.ckpt"
        if not trainer.strategy.reduce_boolean_decision(finite(method)):
            raise FloatingPointError(f"weights of the student are not finite at student update {clock}, so they are not saved")
        if not self._checked:
            self._checked = check_readable(method, trainer.callbacks)
        self._saving = True
        try:
            if self.folder is not None and trainer.is_global_zero:
                note_run(folder, Path(trainer.default_root_dir))
            trainer.save_checkpoint(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"the checkpoint {path} could not be written ({reason}); the last good one is {self.last or 'none'}"
            ) from error
        finally:
            self._saving = False
        self.last = path
        if self.best is not None:
            self.best.due = False
        if trainer.is_global_zero:
            before = [p for p in sorted_checkpoints(folder) if (clock_of(p) or 0) < clock and not self._is_best(p)]
            for old in before[: -(self.keep - 1) or None]:
                old.unlink(missing_ok=True)
        return path

    def of_best(self) -> Path | None:
        """The checkpoint of the best student so far, by `best`; None without one."""
        found = [] if self.last is None else sorted_checkpoints(self.last.parent)
        return next((p for p in found if self._is_best(p)), None)

    def _is_best(self, path: Path) -> bool:
        return self.best is not None and self.best.clock is not None and clock_of(path) == self.best.clock

    def alive(self) -> tuple[float, float] | None:
        """When a batch last ended (time.monotonic) and how many seconds the longest one took; None while a checkpoint is written."""
        return None if self._saving else (self._alive, self._longest)

    def state_dict(self) -> dict[str, Any]:
        """The seconds of training that the run has taken so far, and the best value."""
        return {"seconds": self.seconds} | ({"best": self.best.state()} if self.best is not None else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting the seconds of training from those in the checkpoint, and know its best value."""
        self.seconds = state_dict.get("seconds", 0.0)
        if self.best is not None:
            self.best.remember(state_dict.get("best", {}))

    def _agreed(self, trainer: Any) -> bool:
        if trainer.world_size == 1:
            return self.signal is not None
        if self._batches >= self._look and not self._stop:
            (last, then), self._looked = self._looked, (self._batches, time.monotonic())
            slow = (self._looked[1] - then) / (self._batches - last) > PROMPT / AGREE
            # A signal reaches the processes in different batches: all must stop after the same one, or some would wait for ever.
            self._stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
            self._look += 1 if trainer.strategy.reduce_boolean_decision(slow, all=False) else AGREE
            if self._stop and self.signal is None:
                self.signal = signal.SIGINT
        return self._stop

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise Stopped(number)
        self.signal = number

    def _listen_no_more(self, method: Any) -> None:
        unlisten(self._before)
        self._before = {}
        if self.best is not None:
            method.measures.forget(self.best.hear)


def _nothing() -> None:
    """Is done."""


class Mapped(TorchCheckpointIO):
    """Checkpoints that are written beside their destination and mapped from the disk when they are read.

    Lightning's own go through memory and the system's temporary folder, and are read whole by every process.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint whole or not at all, and to the disk before it has its name. Raises OSError where the system refuses."""
        # torch's own writer raises no OSError.
        with replacing(Path(path), durable=True) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint whose tensors are read from the file when they are first used, so that a process reads what it needs alone."""
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only is not False)


def finite(method: Any) -> bool:
    """Whether all that a method trains and averages is finite (of a sharded one, that of this process): what roles share never changes."""
    shared = {id(p) for role in method.roles.values() for p in role.shared}
    sound = [share(p).isfinite().all() for p in method.parameters() if id(p) not in shared]
    return bool(torch.stack([sent(x, method.device) for x in sound]).all())  # one wait for all: there are hundreds of them
