"""What the draw and the DataModule ask of a method: declared here, so that neither imports one."""

from __future__ import annotations

from typing import Any, Protocol

from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies
from ddil_lightning.feed import Feed, Wants


class Learner(Protocol):
    """What the draw and the DataModule ask of a method. Every method has it; the DataModule imports no method."""

    feed: Feed
    """The data, which hands itself over when training begins."""

    @property
    def backbone(self) -> Any:
        """The pipeline: it encodes captions and images, and knows the shape of the latents."""
        ...

    @property
    def student_updates(self) -> int:
        """The clock of the run: how often the student was updated."""
        ...

    @property
    def stage(self) -> int:
        """The number of the present stage, from 0."""
        ...

    @property
    def stage_updates(self) -> int:
        """The clock of the present stage, that of cadence and age."""
        ...

    @property
    def progress(self) -> float:
        """The share of the present stage that is done, 0 to 1: buffer and means begin anew with every stage."""
        ...

    @property
    def wants(self) -> Wants:
        """What else it needs of the latents."""
        ...

    @property
    def policies(self) -> Policies:
        """The student and the teacher as they act at inference."""
        ...

    @property
    def grid(self) -> Grid:
        """The times the student trains on, with the grids that inference walks."""
        ...

    @property
    def guidance(self) -> tuple[float, float]:
        """The range of guidance g = 1 + w from which every sample's w is drawn, uniform."""
        ...

    @property
    def asked_of_moving(self) -> int:
        """Evaluations so far of the networks whose answers to a state change with every update: the student, a critic, an average."""
        ...

    @property
    def question(self) -> str:
        """A digest of what its answers to a state (`Feed.answered`) depend on besides the state: pipeline, box, nodes, settings."""
        ...


def check_learner(method: Any) -> None:
    """Raises TypeError, naming it, for what a method lacks of a Learner."""
    asked = ("feed", *(name for name in vars(Learner) if not name.startswith("_")))
    lacking = [name for name in asked if not hasattr(method, name)]
    if lacking:
        raise TypeError(
            f"{type(method).__name__} has no {', '.join(lacking)}: derive it from Distillation, or see imitation.learner.Learner"
        )
