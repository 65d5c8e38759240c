"""What methods say of the two scores whose difference moves a student, the teacher's and a critic's."""

from __future__ import annotations

from dataclasses import dataclass

from ddil_lightning.bounds import lengths, within
from ddil_lightning.diffusion.denoiser import to_w
from ddil_lightning.records import Context


@dataclass(frozen=True)
class Scores:
    """The real score, the guided teacher's, and the fake one, the critic's, as the student is moved by their difference.

    Args:
        guidance: g of the real score, by default the method's own; 1 takes one evaluation of the teacher instead of two.
        tau: range of the times at which the scores are compared, as shares of the schedule's T.
    """

    guidance: float | None = None
    tau: tuple[float, float] = (0.02, 0.98)

    def __post_init__(self) -> None:
        within(0, 1000, **{"scores.guidance": self.guidance})
        lengths(2, **{"scores.tau": self.tau})
        within(0, 1, **{"scores.tau": self.tau})
        if self.tau[0] >= self.tau[1]:
            raise ValueError(f"scores.tau is {list(self.tau)!r}: give shares of T with 0 <= tau[0] < tau[1] <= 1")

    def times(self, total: int) -> tuple[int, int]:
        """The first and the last of the schedule's `total` times at which they are compared."""
        low, high = (min(round(share * total), total - 1) for share in self.tau)
        return low, high

    def asked(self, c: Context) -> Context:
        """The context of the real score: `c` at the guidance of its own, if it has one."""
        if self.guidance is None:
            return c
        return c.guided(None if self.guidance == 1 else to_w(self.guidance))


@dataclass(frozen=True)
class Reflects:
    """Which estimates of x0 are held in the box.

    Args:
        real: the teacher's.
        critic: the critic's; not by default, because with both scores in one box nothing pulls an output back that has left it.
        student: the student's, straight-through and in training alone: no diffusers scheduler holds a box per channel, and roll-outs are as
            the student is deployed.
    """

    real: bool = True
    critic: bool = False
    student: bool = True
