"""One of the processes that workers.Workers starts: reads where tasks lie, one a line, and ends when nobody can give it another."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

MARGIN = 5.0
"""Seconds after which a process that is still busy ends by itself: only where nobody is left to end it, or to read what it says."""


def work(place: Path, rank: int) -> None:
    """Runs the task that lies in `place`, and leaves its answer there: (whether it returned, what it returned or the error's text)."""
    task = pickle.loads((place / "task").read_bytes())
    # A test's own world: what an earlier task or test has set is gone, what this one has set is there.
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["environ"], RANK=str(rank), LOCAL_RANK=str(rank))
    sys.path[:] = task["path"]
    faulthandler.dump_traceback_later(task["timeout"] + MARGIN, exit=True)
    answer: tuple[bool, Any]
    try:
        job, given = pickle.loads(task["job"])
        answer = True, job(rank, *given)
    except BaseException as error:
        traceback.print_exc()
        answer = False, "".join(traceback.format_exception_only(error))
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    sys.stderr.flush()
    written = place / f"{rank}.part"
    written.write_bytes(pickle.dumps(answer))
    written.replace(place / f"{rank}")
    gc.collect()


if __name__ == "__main__":
    faulthandler.enable()
    for line in sys.stdin:
        work(Path(line.rstrip("\n")), int(sys.argv[1]))
