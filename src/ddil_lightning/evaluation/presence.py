"""Which networks a suite can have here: of one that cannot be had a line says what is left out, and what to give; or it is refused."""

from __future__ import annotations

import logging
from functools import cache

import torch

from ddil_lightning.evaluation.given import REFERRED
from ddil_lightning.evaluation.networks import NETWORKS, Absent, Networks, Spec, Unpackaged
from ddil_lightning.evaluation.registry import metrics

MAKES = {"features": ("features", "patches"), "embed": ("embeddings",), "clip": ("cosine",)}
"""The needs of metrics that a member of `Networks` meets, where they are not called as it is."""


def needing(member: str) -> list[str]:
    """The keys of the numbers that cannot be without a member of `Networks`."""
    spaces = MAKES.get(member, (member,))
    needs = {*spaces, *(need for need, (_, space) in REFERRED.items() if space in spaces)}
    return [column.key for metric in metrics() if needs & {*metric.needs} for column in metric.columns]


def present(networks: Networks, device: str | torch.device = "cpu") -> Networks:
    """`networks.load(device)` without those that cannot be had, each told once in a line that names the numbers left out.

    Raises ValueError with that line where `networks.strict`, and as `Networks.load` does for a file that does not fit.
    """

    def lacking(member: str, spec: Spec, why: Absent) -> None:
        give = "" if isinstance(why, Unpackaged) else f"; give {NETWORKS[spec.name].file}, as {member}={spec.name}:PATH"
        lost = ", ".join(needing(member))
        if networks.strict:
            raise ValueError(f"the network {spec.name}, which {lost} look through, cannot be had: {why}{give}") from why
        _tell(f"without the network {spec.name} there is no {lost}: {why}{give}")

    return networks.load(device, lacking)


@cache
def _tell(line: str) -> None:
    logging.getLogger(__name__).warning(line)
