"""Memory that is freed leaves the process, where glibc would keep it."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ddil_lightning import heap

PINNED = """
import re
from pathlib import Path
from ddil_lightning.heap import give_back

def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

begin = resident()
blocks = [bytearray(b"x") * 65536 for _ in range(3200)]  # 200 MiB, below the size from which glibc maps a block by itself
blocks = blocks[99::100]  # the last lies above all others
held = resident()
give_back()
print(held - begin, resident() - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_below_one_that_lives_on_leave_the_process() -> None:
    found = subprocess.run([sys.executable, "-c", PINNED], capture_output=True, text=True, check=True)
    held, after = map(int, found.stdout.split())
    assert held > 150 and after < 50


@pytest.mark.parametrize("answer", [SimpleNamespace(), OSError("no library"), TypeError("Windows wants a name")])
def test_another_library_is_left_alone(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(name: None) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ctypes, "CDLL", loaded)
    heap._trim.cache_clear()
    heap.give_back()
    assert heap._trim() is None
    heap._trim.cache_clear()
