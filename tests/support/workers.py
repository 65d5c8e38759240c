"""Several fresh interpreters that run functions of the tests together, started as torchrun would.

They are not forked from the tests: a child of a process that has had threads inherits what belonged to them. Autograd's threads died there
now and then, of torch's own "Invalid thread pool!" (ParallelOpenMP.cpp), when several were started at once. Because an interpreter needs
seconds for its imports, the same ones run one task after the other.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LOOK = 0.02  # seconds between two looks for answers


class WorkerError(Exception):
    """A task that did not come to its end in every process. What they printed is in the output of the test."""


class Workers:
    """`world` processes, which are there from the first task on and write what they print below `folder`."""

    def __init__(self, folder: Path, world: int = 2) -> None:
        self.folder, self.world = folder, world
        self.processes: list[subprocess.Popen[str]] = []
        self._numbers = itertools.count()
        self._shown = [0] * world

    def run(self, job: Callable[..., Any], *given: Any, timeout: float = 240) -> list[Any]:
        """What `job(rank, *given)` returns in every process: a function of a module that can be imported, and what pickle can take.

        Raises WorkerError where one of them fails, dies or is late. All are ended then, and the next task gets new ones.
        """
        if any(process.poll() is not None for process in self.processes) or not self.processes:
            self.close()
            self._start()
        place = self.folder / f"task{next(self._numbers)}"
        place.mkdir()
        environ = {**os.environ, "WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(self.world), "TORCHELASTIC_RUN_ID": "test"}
        environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # they meet in a file: no port can be taken
        task = {"cwd": os.getcwd(), "environ": environ, "path": sys.path, "timeout": timeout, "job": pickle.dumps((job, given))}
        (place / "task").write_bytes(pickle.dumps(task))
        done = False
        try:
            for process in self.processes:
                with suppress(BrokenPipeError):  # which the answer that is missing tells better
                    print(place, file=process.stdin, flush=True)
            results = self._answers(place, timeout)
            done = True
            return results
        finally:
            if not done:
                self.close()
            self._show()

    def close(self) -> None:
        """Ends the processes, and whatever they have started."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        self.processes = []

    def _start(self) -> None:
        self._shown = [0] * self.world
        for rank in range(self.world):
            # RANK is there before anything is imported: Lightning reads it once.
            environ = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-u", str(Path(__file__).with_name("worker.py")), str(rank)]
            with self._said(rank).open("wb") as out:
                started = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environ, text=True, start_new_session=True
                )
            self.processes.append(started)

    def _answers(self, place: Path, timeout: float) -> list[Any]:
        """Waits for the answers of all processes, or for the first sign that one will not come."""
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world:
            for rank in (rank for rank in range(self.world) if rank not in results):
                code = self.processes[rank].poll()  # before the look for its answer, which may have come in between
                if (place / f"{rank}").exists():
                    returned, found = pickle.loads((place / f"{rank}").read_bytes())
                    if not returned:
                        raise WorkerError(f"process {rank} failed: {found}")
                    results[rank] = found
                elif code is not None:
                    raise WorkerError(f"process {rank} ended with code {code} and without an answer")
            if time.monotonic() > deadline:
                late = [rank for rank in range(self.world) if rank not in results]
                raise WorkerError(f"no answer within {timeout} s from process {late}")
            time.sleep(LOOK)
        return [results[rank] for rank in range(self.world)]

    def _said(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.txt"

    def _show(self) -> None:
        """Prints what the processes have printed since the last time."""
        for rank in range(self.world):
            if not self._said(rank).exists():
                continue
            with self._said(rank).open("rb") as said:
                said.seek(self._shown[rank])
                text = said.read()
            self._shown[rank] += len(text)
            if text:
                print(f"--- process {rank}\n{text.decode(errors='replace')}")
