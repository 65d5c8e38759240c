"""The processes that a launcher such as torchrun has started, for commands that have no Trainer."""

from __future__ import annotations

import os
from typing import Any

from ddil_lightning.commands.arguments import device
from ddil_lightning.processes import PATIENCE, Processes


def together() -> tuple[Processes, Any]:
    """The processes that were started together, and the device of this one; or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(), device()
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    fabric = Fabric(devices=here, num_nodes=int(os.environ["WORLD_SIZE"]) // here, strategy=DDPStrategy(timeout=PATIENCE))
    fabric.launch()
    return Processes(fabric), fabric.device
