"""Small processes under a `Watch`, which test_watch runs in interpreters of their own: `watched.py NAME FOLDER` is one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ddil_lightning.commands import watch

SAYS = "the last good checkpoint is x"
SECONDS = {"LOOK": 0.05, "PATIENCE": 0.3, "GRACE": 0.5}


def watching(
    launcher: Any = None, parent: int | None = None, alive: Any = (0.0, 0.0), leave: Callable[[], None] = lambda: None, **more: Any
) -> watch.Watch:
    return watch.Watch(launcher, parent, lambda: SAYS, lambda: alive, leave, **more)


def blocked() -> None:
    """As in a collective call: native code that hears neither signals nor exceptions, and that a child's end does not wake."""
    import ctypes

    left = 30
    while left:
        left = ctypes.CDLL(None).sleep(left)


def one_of_two_dies(folder: Path) -> None:
    others = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    launcher = SimpleNamespace(procs=list(others))
    (folder / "second").write_text(str(others[1].pid))
    with watching(launcher):
        others[0].kill()
        blocked()


def one_beside_it_dies(folder: Path) -> None:
    """Of which this process is not told, nor what has started it ends."""
    other = subprocess.Popen(["sleep", "60"])
    with watching(others=lambda: [other.pid]):
        other.kill()
        other.wait()
        blocked()


def all_end_well_together(folder: Path) -> None:
    """One that has come to its end waits for the others there, and is only then no more."""
    other = subprocess.Popen(["sleep", "60"])

    def meet() -> None:
        time.sleep(0.8)
        assert other.poll() is None

    with watching(others=lambda: [other.pid], meet=meet):
        pass
    other.kill()
    other.wait()
    time.sleep(0.8)


def hears_of_it_itself(folder: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    with watching(SimpleNamespace(procs=[other])):
        other.kill()
        time.sleep(0.2)
        print("ddil-fit: lost", file=sys.stderr, flush=True)
        raise SystemExit(3)


def other_ends_well(folder: Path) -> None:
    other = subprocess.Popen(["true"])
    with watching(SimpleNamespace(procs=[other])):
        time.sleep(0.8)


def has_lost_its_parent(folder: Path) -> None:
    with watching(parent=os.getppid() + 1):  # as it is once the parent is gone
        blocked()


def hears_a_signal(folder: Path, saving: bool = False) -> None:
    signal.signal(signal.SIGTERM, lambda *args: None)
    with watching(alive=None if saving else (time.monotonic(), 0.0)):
        (folder / "ready").touch()
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            blocked() if not saving else time.sleep(0.1)
        raise SystemExit(9)


def hears_a_signal_and_saves(folder: Path) -> None:
    hears_a_signal(folder, saving=True)


def holds_something(folder: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    held = folder / "held"
    held.touch()
    with watching(SimpleNamespace(procs=[other]), leave=held.unlink):
        other.kill()
        blocked()


if __name__ == "__main__":
    for name, seconds in SECONDS.items():
        setattr(watch, name, seconds)
    globals()[sys.argv[1]](Path(sys.argv[2]))
