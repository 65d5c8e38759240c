"""The memory that a run takes, measured: the device's where it is a GPU, else the process's beyond what it had when the command began."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

STATUS, MAPS, CLEAR = (Path("/proc/self") / name for name in ("status", "maps", "clear_refs"))


class Meter:
    """From when it is made, which is before anything of a run is loaded, to the peak of the training."""

    def __init__(self) -> None:
        self._before, self._files = _process("VmRSS"), _process("RssFile")
        self.peak: int | None = None

    def begin(self) -> None:
        """Training begins: what an export was tried with before it does not count, where the system can forget it (Linux, CUDA)."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            CLEAR.write_text("5")

    def end(self, device: torch.device, modules: Iterable[nn.Module]) -> None:
        """Training of `modules` is over, on `device`.

        Weights may lie in files that are mapped. Of such files they count themselves, and not what was read and is not needed any more,
        which the system takes back when it likes.
        """
        if device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(device)
            return
        files = _process("RssFile") - self._files
        self.peak = max(_process("VmHWM") - self._before - files + _mapped(modules), 0)


def _process(what: str) -> int:
    """Bytes that this process holds (VmRSS) or has held (VmHWM). Where there is no Linux both are the most that it has held."""
    with suppress(OSError):
        found = re.search(rf"{what}:\s*(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    if what == "RssFile":
        return 0
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _mapped(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers that lie in mapped files of weights."""
    ranges = []
    with suppress(OSError):
        for line in MAPS.read_text().splitlines():
            if line.endswith(".safetensors"):
                begin, _, end = line.split()[0].partition("-")
                ranges.append((int(begin, 16), int(end, 16)))
    tensors = {x.data_ptr(): x for module in modules for x in (*module.parameters(), *module.buffers()) if x.device.type == "cpu"}
    inside = (x for address, x in tensors.items() if any(begin <= address < end for begin, end in ranges))
    return sum(x.numel() * x.element_size() for x in inside)


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
