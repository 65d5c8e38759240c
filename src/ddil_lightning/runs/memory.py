"""The memory that a run takes, measured: the device's where it is a GPU, else the process's beyond what it had when the command began."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """From when it is made, which is before anything of a run is loaded, to the peak of the training."""

    def __init__(self) -> None:
        self._before = _process("VmRSS")
        self.peak: int | None = None

    def begin(self) -> None:
        """Training begins: what an export was tried with before it does not count, where the system can forget it (Linux, CUDA)."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            CLEAR.write_text("5")

    def end(self, device: torch.device) -> None:
        """Training is over, on `device`."""
        self.peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else max(_process("VmHWM") - self._before, 0)


def _process(what: str) -> int:
    """Bytes that this process holds (VmRSS) or has held (VmHWM). Where there is no Linux both are the most that it has held."""
    with suppress(OSError):
        found = re.search(rf"{what}:\s*(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def room(cuda: bool) -> tuple[int, str] | None:
    """The memory of the present device in bytes and what it is called; None where there is no such device."""
    if cuda:
        if not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine"


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / 2**30
