"""Two processes of one run on this machine's CPU (gloo), in fresh interpreters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed

from ddil_lightning.processes import Processes
from workers import Workers

WORLD = 2


class Pair:
    """Runs functions in WORLD processes that are one process group."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workers = folder, Workers(folder, WORLD)

    def run(self, job: Callable[..., Any], *given: Any, timeout: float = 240) -> list[Any]:
        """What `job(rank, *given)` returns in every process. See Workers.run."""
        meet = Path(tempfile.mkdtemp(dir=self.folder)) / "meet"
        return self.workers.run(in_group, str(meet), timeout, job, *given, timeout=timeout)


def in_group(rank: int, meet: str, timeout: float, job: Callable[..., Any], *given: Any) -> Any:
    """`job` in a process group of its own, which Lightning finds and takes. The group of a job that failed ends with its process."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=timeout)
    distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=WORLD, timeout=patience)
    found = job(rank, *given)
    distributed.barrier()
    distributed.destroy_process_group()
    return found


def together(rank: int) -> Processes:
    """The processes of the group, as a Trainer's strategy lets them meet."""
    strategy = SimpleNamespace(
        broadcast=lambda value: (distributed.broadcast_object_list(box := [value]), box[0])[1],
        reduce_boolean_decision=lambda mine: (distributed.all_gather_object(every := [None] * WORLD, mine), all(every))[1],
        barrier=distributed.barrier,
    )
    return Processes(SimpleNamespace(global_rank=rank, world_size=WORLD, strategy=strategy))


def ddp(entry: Any) -> dict[str, Any]:
    """How a Trainer trains a method of suite.METHODS on both."""
    from lightning.pytorch.strategies import DDPStrategy  # seconds, which not every job needs

    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=entry.unused)
    return {"strategy": strategy, "devices": WORLD, "num_nodes": 1}
