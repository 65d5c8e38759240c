"""One line that says where the run stands: student updates, loss, time left."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ProgressBar

from ddil_lightning.bounds import at_least


class Progress(ProgressBar):
    """A Rich bar over student updates with the loss and an estimate of the time left; plain lines where there is no terminal.

    Args:
        lines: about how many plain lines a run prints, besides that of its first update.
    """

    def __init__(self, lines: int = 10) -> None:
        super().__init__()
        at_least(1, **{"progress.lines": lines})
        self.lines = lines
        self._bar: Any = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing: Lightning asks for it on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again, after `disable`."""
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
        self._begun, self._printed = pl_module.student_updates, -1
        if self._console.is_terminal:
            self._bar.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar; without a terminal print a line after the first update and for each of `lines` parts of the run."""
        if self._bar is None:
            return
        clock, part = pl_module.student_updates, self._part(pl_module)
        self._bar.update(self._task, completed=clock)
        if self._console.is_terminal:
            if clock % pl_module.log_every == 0:  # reading the loss waits for the device
                self._bar.update(self._task, loss=self._loss(pl_module))
        elif part != self._printed and clock > self._begun:
            self._printed = part
            remaining = self._bar.tasks[0].time_remaining
            left = f", about {remaining:.0f} s left" if remaining else ""
            self._console.print(f"{clock}/{pl_module.updates} updates, loss {self._loss(pl_module)}{left}", highlight=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop the bar where the run has ended."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop the bar, so that an error leaves the terminal as it was."""
        self._stop()

    def _part(self, method: Any) -> int:
        return method.student_updates * self.lines // method.updates

    @staticmethod
    def _loss(method: Any) -> str:
        loss = method.descent.loss
        return "?" if loss is None else f"{loss:.4f}"

    def _stop(self) -> None:
        if self._bar is not None and self._console.is_terminal:
            self._bar.stop()
        self._bar = None
