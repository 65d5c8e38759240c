"""What a suite can have here: of a network that cannot be had a line says what is left out, and what to give; or it is refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from ddil_lightning.evaluation.given import MOMENTS, REFERRED, Given
from ddil_lightning.evaluation.networks import NETWORKS, Absent, Networks, Spec, Unpackaged
from ddil_lightning.evaluation.registry import metrics, wanted

if TYPE_CHECKING:
    from ddil_lightning.evaluation.metrics.base import Metric

MAKES = {"features": ("features", "patches"), "embed": ("embeddings",), "clip": ("cosine",)}
"""The needs of metrics that a member of `Networks` meets, where they are not called as it is."""
MEMBER = {need: member for member, needs in MAKES.items() for need in needs}


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


def unmet(asked: Sequence[str] | None, given: Given) -> dict[str, list[type[Metric]]]:
    """The metrics that are asked for, all for None, and cannot be measured by what a suite has, by the reason in words."""
    found: dict[str, list[type[Metric]]] = {}
    met = given.has()
    for metric in wanted(asked):
        gone = [need for need in metric.needs if need not in met]
        if gone:
            found.setdefault(_reason(gone, given), []).append(metric)
    return found


def as_made(asked: Sequence[str] | None, given: Given) -> list[str]:
    """The keys of the numbers that see generated images as large as they are made, so that rows of different sizes do not share them.

    Networks that bring every image to a size of their own, such as CLIP's, are not meant.
    """
    view, own = given.view, {"distance"}
    if view.crops is not None and view.crops.at is None:
        own.add("patches")
    if view.size is None:
        own |= {"features", "embeddings", "tones"}
    return [column.key for metric in wanted(asked) if own & {*metric.needs} for column in metric.columns]


def _reason(gone: Sequence[str], given: Given) -> str:
    """Why these needs are not met: for want of a network or a judge, which the others may follow from, else of images."""
    whose = {need: (REFERRED | MOMENTS).get(need, ("", ""))[0] for need in gone}
    own = [need for need in gone if not whose[need]]
    if own:
        judged = own[0] in ("verdict", "modes")
        crops = own[0] == "patches" and given.networks.features is not None
        return "there is no judge" if judged else "there are no crops" if crops else f"there is no network for {MEMBER.get(own[0], own[0])}"
    if "reference" not in whose.values():
        return "there are no images of a teacher (ddil-test --teacher PIPELINE draws them)"
    reference, space = given.reference, (REFERRED | MOMENTS)[gone[0]][1]
    if reference.rows:
        return f"the statistics of {reference.about} hold no {space}"
    return f"{given.reference.about} hold mean and covariance alone" if given.reference.gaussians else "there are no real images"


@cache
def _tell(line: str) -> None:
    logging.getLogger(__name__).warning(line)
