"""The processes that a launcher such as torchrun has started, for commands that have no Trainer."""

from __future__ import annotations

import os
from typing import Any

from ddil_lightning.commands.arguments import device
from ddil_lightning.errors import Refusal
from ddil_lightning.processes import PATIENCE, Processes


def by_srun() -> int:
    """How many tasks of this command SLURM's srun has started; 1 for a batch script and for the shell of an interactive job."""
    alone = "SLURM_STEP_NUM_TASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") == "bash"
    return 1 if alone else int(os.environ["SLURM_STEP_NUM_TASKS"])


def together() -> tuple[Processes, Any]:
    """The processes that were started together, and the device of this one; or this one alone.

    Raises Refusal for tasks of srun, which know nothing of each other: each would do the whole work.
    """
    if by_srun() > 1 and "WORLD_SIZE" not in os.environ:
        raise Refusal(
            f"srun has started this command {by_srun()} times, and each would do all of it: share it out by one task a machine with "
            "torchrun --nproc_per_node N --no-python -- before the command, or set WORLD_SIZE=1 where each has work of its own"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(), device()
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    fabric = Fabric(devices=here, num_nodes=int(os.environ["WORLD_SIZE"]) // here, strategy=DDPStrategy(timeout=PATIENCE))
    fabric.launch()
    return Processes(fabric), fabric.device
