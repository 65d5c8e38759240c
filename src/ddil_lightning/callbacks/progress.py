"""One line that says where the run stands: student updates, loss, time left."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ProgressBar


class Progress(ProgressBar):
    """A Rich bar over student updates with the loss and an estimate of the time left; plain lines where there is no terminal."""

    def __init__(self, lines: int = 10) -> None:
        super().__init__()
        self.lines = lines
        self._bar: Any = None
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite."""
        self._enabled = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the bar at the clock (a resumed run starts in the middle)."""
        if not self._enabled:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console()
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
        # TimeRemaining is estimated from the last updates only: the first ones also pay for warm-up.
        self._bar = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console, refresh_per_second=2
        )
        self._task = self._bar.add_task(type(pl_module).__name__, total=pl_module.updates, completed=pl_module.student_updates, loss="")
        if self._console.is_terminal:
            self._bar.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar; without a terminal print about `lines` lines in all."""
        if self._bar is None:
            return
        clock = pl_module.student_updates
        if clock % pl_module.log_every and clock < pl_module.updates:
            self._bar.update(self._task, completed=clock)  # reading the loss would wait for the device
            return
        loss = pl_module.last_loss
        self._bar.update(self._task, completed=clock, loss=f"{loss:.4f}" if loss is not None else "")
        every = max(pl_module.updates // self.lines, 1)
        if not self._console.is_terminal and clock % every == 0 and clock != getattr(self, "_printed", None):
            self._printed = clock
            task = self._bar.tasks[0]
            left = f", about {task.time_remaining:.0f} s left" if task.time_remaining else ""
            self._console.print(f"{clock}/{pl_module.updates} updates, loss {loss:.4f}{left}" if loss is not None else f"{clock} updates")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop the bar."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
