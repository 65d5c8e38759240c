"""The signals that ask a process to end: Ctrl-C, a scheduler's SIGTERM, SLURM's warning of it, SIGUSR1, and a closed terminal's SIGHUP.

All of them end it in the same way.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. `number`: which; `said`: what its user should read, such as how to go on."""

    def __init__(self, number: int = signal.SIGINT, *said: str) -> None:
        super().__init__(*said)
        self.number = int(number)

    @property
    def code(self) -> int:
        """The exit code that shells and schedulers expect."""
        return 128 + self.number


def ending() -> list[int]:
    """The signals that ask this process to end, without those that it was told to ignore (nohup does that with SIGHUP)."""
    known = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]  # Windows has two
    return [number for number in known if number is not None and signal.getsignal(number) is not signal.SIG_IGN]


def listen(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Have the signals of `ending` call `handler`, and answer the handlers before, for `unlisten`.

    Outside the main thread nothing is changed and {} is answered, because Python forbids it there.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in ending()}


def unlisten(before: dict[int, Any]) -> None:
    """Put the handlers back that `listen` has answered."""
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def listening() -> Iterator[None]:
    """Inside, every signal of `ending` raises Stopped, as Ctrl-C raises KeyboardInterrupt, so that all is cleaned up on the way out."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    before = listen(stop)
    try:
        yield
    finally:
        unlisten(before)


def lives(process: int) -> bool:
    """Whether a process of this number is on this machine, as far as this process sees."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
