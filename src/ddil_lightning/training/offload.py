"""What leaves the device while a student trains: encoders that nobody asks any more, and the roles that `memory.offload` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddil_lightning.backbones.resting import Resting, apart, to_file


class Offload:
    """The modules of a method that rest on the CPU between their calls, from the start of its training to the end.

    `names`: of frozen roles, and `average`. The encoders rest by themselves where the data are encoded already.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._resting: list[Resting] = []

    def check(self, roles: Any, average: bool) -> None:
        """Raises ValueError for a name that is no frozen role."""
        frozen = [name for name, role in roles.items() if not role.weights()] + (["average"] if average else [])
        wrong = [name for name in self.names if name not in frozen]
        if wrong:
            why = "which is trained" if wrong[0] in roles else "which there is not"
            raise ValueError(f"memory.offload has {wrong[0]!r}, {why}: give names of {', '.join(frozen)}")
        shared = [name for name in self.names if name == "teacher" and any(role.shared for role in roles.values())]
        if shared:
            raise ValueError("memory.offload has 'teacher', which is the network below the adapters of all others: leave it out")

    def begin(self, method: Any) -> None:
        """Put to rest what can be: of a run on the CPU itself the encoders alone, in a file."""
        self._wake()  # of a training that an error ended
        backbone = method.backbone
        if not apart(method.device):
            if not method.feed.encodes:
                to_file(backbone.encoder_parts(), Path(method.trainer.default_root_dir))
            return
        roles = {**method.roles, "average": method.averaging.role}
        backbone.at = backbone.device
        if not method.feed.encodes and not backbone.resting:
            backbone.rest(backbone.device)
        # The children, because a discriminator asks a network by another way in than its forward.
        for role in map(roles.__getitem__, self.names):
            shared = [*role.shared, *(backbone.network().buffers() if role.shared else ())]
            self._resting += [Resting(part, shared) for part in role.network.children()]

    def end(self, method: Any) -> None:
        """Nothing rests any more. Encoders stay on the CPU, where Lightning takes all the rest when a training is over."""
        self._wake()
        method.backbone.wake(torch.device("cpu"))

    def _wake(self) -> None:
        for resting in self._resting:
            resting.wake()
        self._resting = []
