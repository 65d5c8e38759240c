"""How a student is used: a value that previews, tests, probes and the export share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.transitions import NEAR, NoiseCorrected, ddim

CORRECTED = (
    "DDIM, as its scheduler steps. It was trained and measured with noise correction, which takes the initial noise for the predicted one "
    "in the first step (Kohler et al. 2024) and which no scheduler of diffusers has: ddil-test --compare and ddil-probe do so by ddim-nc"
)
"""What the card of a student says of its sampler where the first step is corrected."""


def deployed(method: Any, made: Any) -> Deployment:
    """What a method's deploy(student) has answered. Raises ValueError for anything but a Deployment."""
    if not isinstance(made, Deployment):
        raise ValueError(f"{type(method).__name__}.deploy(student) returns {made!r}: it returns a Deployment")
    return made


def one_step(steps: int, total: int) -> Grid:
    """The grid of a student that is told of pure noise alone. Raises ValueError for more steps than one."""
    if steps != 1:
        raise ValueError("the student is made for one step: further ones begin at latents that it was never told about")
    return Grid.named("trailing", 1, total)


def trained_counts(grid: Grid, total: int) -> tuple[int, ...]:
    """The step counts, most first, whose trailing nodes are all nodes of the training `grid`: those of its roll-outs, and 4, 2 and 1."""
    nodes = set(grid.nodes.tolist())
    few = {n for n in (4, 2, 1) if nodes >= set(Grid.named("trailing", n, total).nodes.tolist())}
    return tuple(sorted({*few, *map(len, grid.rollouts)}, reverse=True))


@dataclass(frozen=True, eq=False)
class Deployment:
    """Inference, whole: `policy` down `grid(steps)` at `guidance`, and the scheduler that makes diffusers do the same.

    A method makes one in `deploy`. `steps`: the step counts that the student is made for, the one that its pipeline recommends first.
    `scheduler`: makes the scheduler of the exported pipeline, a flow's of the `grid` that it is called with; None for a teacher, which has
    its own. `guidance`: the g that samples are
    asked for; `stands_for`: the g that they stand for, where another was baked in. `scheduled`: the policy that the scheduler steps by,
    where diffusers has none that steps as `policy` does, and `remark` what the card says of that (`without`).
    Raises ValueError for `steps` that are none.
    """

    policy: Policy
    grid: Callable[[int], Grid]
    steps: tuple[int, ...]
    guidance: float
    scheduler: Callable[..., Any] | None = None
    stands_for: float | None = None
    scheduled: Policy | None = None
    remark: str = ""

    def __post_init__(self) -> None:
        counts = self.steps if isinstance(self.steps, tuple | list) else ()
        if not counts or not all(isinstance(n, int) and n >= 1 for n in counts):
            raise ValueError(
                f"Deployment takes the step counts that its student is made for as a tuple, such as (4,) or (4, 2), not {self.steps!r}"
            )

    def without(self, scheduled: Policy, remark: str) -> Deployment:
        """The same, whose exported pipeline samples by another policy, `scheduled`; its card says so in the words of `remark`."""
        return replace(self, scheduled=scheduled, remark=remark)

    def by_ddim(self) -> Deployment:
        """The same, whose exported pipeline takes DDIM's own first step where this policy takes a corrected one."""
        corrects = isinstance(self.policy.transition, NoiseCorrected)
        return self.without(Policy(self.policy.denoiser, ddim), CORRECTED) if corrects else self

    @property
    def exported(self) -> Deployment:
        """As the exported pipeline samples: this one, unless no scheduler steps as its policy does."""
        return self if self.scheduled is None else replace(self, policy=self.scheduled, scheduled=None)

    def sampler(self, steps: int) -> tuple[Policy, Grid]:
        """The policy and its grid in `steps` steps. Raises ValueError for a count that the grid cannot take, and for a grid of another."""
        made = self.grid(steps)
        if len(made) != steps:
            raise ValueError(
                f"deploy(student) has made {made} for {steps} steps, which has {len(made)}: see the grid that it gives Deployment"
            )
        return self.policy, made

    def made_scheduler(self, steps: int) -> Any:
        """The exported pipeline's scheduler; a flow's holds the nodes of one step count, `steps`. Raises ValueError where there is none."""
        if self.scheduler is None:
            raise ValueError(
                f"a pipeline needs the scheduler that its student was trained for: give Deployment one in deploy(student); {NEAR}"
            )
        return self.scheduler(grid=self.grid(steps)) if self.is_flow else self.scheduler()

    @property
    def is_flow(self) -> bool:
        """Whether the network is told sigma, so that the nodes of a scheduler are sigmas too."""
        return self.denoiser.schedule.told is not None

    @property
    def denoiser(self) -> Denoiser:
        """What the policy asks, below whatever is wrapped around it; it counts the evaluations of this deployment."""
        return next(m for m in self.policy.modules() if isinstance(m, Denoiser))

    @property
    def network(self) -> nn.Module:
        """The network itself, below policy and denoiser."""
        return self.denoiser.network

    @property
    def told(self) -> bool:
        """Whether the network is told the guidance; else it is baked in (or, of a teacher, made of two evaluations)."""
        return bool(getattr(self.network, "w_conditioned", False))

    @property
    def guided(self) -> bool:
        """Whether the network is guided from outside, in two evaluations, by its user's guidance and negative prompt."""
        return self.denoiser.null is not None and not self.told

    @property
    def guidance_scale(self) -> float:
        """The `guidance_scale` to call the exported pipeline with: g, if its student is told it or guided by it, 1 if it is baked in."""
        return self.guidance if self.told or self.guided else 1.0

    @property
    def called_with(self) -> Mapping[str, float]:
        """What the exported pipeline's call is given besides (`Transition.called_with`)."""
        return self.policy.transition.called_with

    @property
    def quoted(self) -> float:
        """The guidance that a table names."""
        return self.guidance if self.stands_for is None else self.stands_for
