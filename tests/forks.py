"""Two processes on this machine's CPU, forked from the test."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from suite import Entry

WORLD = 2


def forked(job: Callable[[int], None], timeout: float = 240) -> None:
    """Runs `job(rank)` in WORLD children of this process, started as torchrun would: seconds, not the half minute of new imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_child(job, rank, port) for rank in range(WORLD)]
    deadline, codes = time.monotonic() + timeout, dict.fromkeys(children, -1)
    while -1 in codes.values() and time.monotonic() < deadline and not any(code > 0 for code in codes.values()):
        for pid in (pid for pid, code in codes.items() if code == -1):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status) % 256
        time.sleep(0.02)
    for pid, code in codes.items():
        if code == -1:  # the other one failed, or time is up
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert list(codes.values()) == [0] * WORLD, f"exit codes of the processes: {list(codes.values())}"


def _child(job: Callable[[int], None], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "GROUP_RANK": 0, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", **{k: str(v) for k, v in names.items()}})
        job(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ddp(entry: Entry) -> dict[str, Any]:
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=entry.unused)
    return {"strategy": strategy, "devices": WORLD, "num_nodes": 1}
