"""Where the time of an update goes: torch's profiler on some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from ddil_lightning.bounds import at_least
from ddil_lightning.files import replacing, write_text


class Profile(Callback):
    """Profiles some updates of the student: `profile/A-B.json.gz`, for ui.perfetto.dev, and the dearest operations in `profile/A-B.txt`.

    Their batches are traced whole, from the data and roll-outs to the optimiser. On the first process alone, which is slower then.

    Args:
        updates: how many student updates; 0 for none.
        after: student updates of this run before them, while caches fill and kernels are chosen.
    """

    def __init__(self, updates: int = 0, after: int = 10) -> None:
        at_least(0, **{"profile.updates": updates, "profile.after": after})
        self.updates, self.after = updates, after
        self._profiler: Any = None
        self._begun = self._first = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note where this run begins, and begin where nothing is to pass before."""
        self._begun = pl_module.student_updates
        if self.after == 0:
            self._begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Begin or end between two batches, so that the data of a batch belong to it."""
        done = pl_module.student_updates - self._begun
        if self._profiler is None and done == self.after:
            self._begin(trainer, pl_module)
        elif self._profiler is not None and pl_module.student_updates >= self._first + self.updates:
            self._end(trainer, pl_module.student_updates)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """A run that is over before them leaves what was traced."""
        if self._profiler is not None:
            self._end(trainer, pl_module.student_updates)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Trace no more."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _begin(self, trainer: Any, method: Any) -> None:
        if not self.updates or not trainer.is_global_zero:
            return
        kinds = torch.profiler.ProfilerActivity
        self._first = method.student_updates
        self._profiler = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if method.device.type == "cuda" else [])])
        self._profiler.start()

    def _end(self, trainer: Any, clock: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = Path(trainer.default_root_dir) / "profile" / f"{self._first}-{clock}.json.gz"
        with replacing(path) as temporary:
            whole = temporary.with_name(temporary.name + ".gz")  # by its name the profiler packs it
            profiler.export_chrome_trace(str(whole))
            whole.replace(temporary)
        by = "self_cuda_time_total" if any(e.device_type.name == "CUDA" for e in profiler.events()) else "self_cpu_time_total"
        write_text(path.with_suffix("").with_suffix(".txt"), profiler.key_averages().table(sort_by=by, row_limit=40))
        print(f"updates {self._first} to {clock} were profiled: {path}", flush=True)
