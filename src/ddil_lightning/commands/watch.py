"""Several processes end together: when one of them dies, the others must not wait for it for minutes.

A process that waits in a collective call hears no signal and no exception. A thread beside it does: it looks after the processes that
Lightning's launcher has started, after the one that has started this one, and after those beside it whose starter outlives them (srun's).
It ends this one in a line where it does not end by itself.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from os import pipe
from pathlib import Path
from typing import Any

from ddil_lightning.processes import Processes
from ddil_lightning.signals import ending, lives

LOOK, PATIENCE, GRACE = 0.5, 5.0, 15.0
"""Seconds between two looks, for a process to end by itself once another is dead, and without a sign of life after a signal."""


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of a collective call that has lost another process."""
    import torch

    known = getattr(torch.distributed, "DistError", ())
    return isinstance(error, known or ()) or bool(re.search(r"gloo|NCCL|TCPStore|[Cc]onnection (reset|closed)|[Ss]ocket", str(error)))


def beside(processes: Processes) -> list[int]:
    """The numbers of the run's other processes that are on this machine and can be seen from here. All processes ask together."""
    seen = Path("/proc/self/ns/pid")  # a container has numbers of its own
    here = socket.gethostname(), seen.stat().st_ino if seen.exists() else 0
    return [number for there, number in processes.gathered((here, os.getpid())) if there == here and number != os.getpid()]


class Watch:
    """Inside, this process ends in a line when another process of its run has died.

    `launcher`: Lightning's, whose processes are looked after (it would kill all of them without a word). `parent`: the process that has
    started this one for the run, None for a user's shell. `says`: how to go on. `alive`: (the time of the last sign of life, how many
    seconds the longest took), None while a checkpoint is written. `leave`: gives up what the process holds. `others`: the numbers of
    further processes to look after. Whether such a one has ended well cannot be seen: `meet` waits for all of them at a good end.
    """

    def __init__(
        self,
        launcher: Any,
        parent: int | None,
        says: Callable[[], str],
        alive: Callable[[], tuple[float, float] | None],
        leave: Callable[[], None],
        others: Callable[[], Sequence[int]] = lambda: (),
        meet: Callable[[], Any] = lambda: None,
    ) -> None:
        self.launcher, self.parent, self.says, self.alive, self.leave = launcher, parent, says, alive, leave
        self.others, self.meet = others, meet
        self._children: list[Any] = []
        self._over = threading.Event()
        self._asked: float | None = None
        self._pipe = (-1, -1)
        self._before = -1

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._pipe = pipe()
            os.set_blocking(self._pipe[1], False)
            # The number of a signal is written there at once, also while this process waits in native code.
            self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True, name="watch").start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if error is None:
                self.meet()
        finally:
            self._over.set()
            if self._pipe[0] >= 0:
                signal.set_wakeup_fd(self._before)
            if error is not None:
                self._kill()

    def _watch(self) -> None:
        while not self._over.wait(0 if self._pipe[0] >= 0 else LOOK):
            self._listen()
            found = self._dead() or self._stuck()
            # What waits for a dead process in a collective call mostly hears of it, and has more to say.
            if found and not self._over.wait(PATIENCE):
                self._end(found)

    def _listen(self) -> None:
        if self._pipe[0] >= 0 and select.select([self._pipe[0]], [], [], LOOK)[0] and set(os.read(self._pipe[0], 64)) & set(ending()):
            self._asked = self._asked or time.monotonic()

    def _dead(self) -> str | None:
        """Which process of the run is dead, in words."""
        started = getattr(self.launcher, "procs", None)
        if started:
            self._children += started
            started.clear()  # Lightning's own observer, which would kill this process without a word, then finds nothing to observe
        codes = [process.poll() for process in self._children]
        found = [f"process {i} of the run has ended with code {code}" for i, code in enumerate(codes, 1) if code]
        if self.parent is not None and os.getppid() != self.parent:
            found.append("the process that started this one has ended")
        if not all(map(lives, self.others())):
            found.append("another process of the run has ended")
        return found[0] if found else None

    def _stuck(self) -> str | None:
        """Why this process must end that was asked to and shows no life, in words."""
        alive = self.alive()
        if self._asked is None or alive is None:
            return None
        last, longest = alive
        if time.monotonic() - max(self._asked, last) < GRACE + 4 * longest:
            return None
        return "asked to end, but another process does not answer"

    def _kill(self) -> None:
        for process in self._children:
            if process.poll() is None:
                process.kill()

    def _end(self, found: str) -> None:
        self._kill()
        print(f"ddil-fit: {found}; {self.says()}", file=sys.stderr, flush=True)
        self.leave()
        os._exit(2)
