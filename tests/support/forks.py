"""Two processes on this machine's CPU, forked from the test."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from suite import Entry

WORLD = 2


def forked(job: Callable[[int], None], timeout: float = 240) -> None:
    """Runs `job(rank)` in WORLD children of this process, started as torchrun would: seconds, not the half minute of new imports.

    Children that wait for one that has failed, or for ever, are killed. A crash in native code prints the child's stack.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What this process holds (sockets, threads' objects) is not the children's to collect.
    gc.collect()
    gc.freeze()
    try:
        children = [_child(job, rank, port) for rank in range(WORLD)]
    finally:
        gc.unfreeze()
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < WORLD and time.monotonic() < deadline and not any(codes.values()):
        for pid in (pid for pid in children if pid not in codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in (pid for pid in children if pid not in codes):
        os.kill(pid, signal.SIGKILL)
        codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert not any(codes.values()), f"exit codes of the processes: {[codes[pid] for pid in children]}"


def _child(job: Callable[[int], None], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    faulthandler.enable(sys.__stderr__)
    try:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "GROUP_RANK": 0, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", **{k: str(v) for k, v in names.items()}})
        rank_zero_only.rank = rank  # which Lightning sets once, when it is imported
        job(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ddp(entry: Entry) -> dict[str, Any]:
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=entry.unused)
    return {"strategy": strategy, "devices": WORLD, "num_nodes": 1}
