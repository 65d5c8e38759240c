"""The average of a student's weights that is evaluated and exported in its place."""

from __future__ import annotations

from ddil_lightning.backbones.roles import Role


class Averaging:
    """An exponential moving average over student updates, with `decay`; 0 for none, and the online student is deployed."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.role: Role | None = None

    def start(self, student: Role) -> Role | None:
        """The average of a student that was just made: its copy, None without a decay."""
        self.role = student.copied("average") if self.decay else None
        return self.role

    def follow(self, student: Role, age: int) -> None:
        """The student was updated for the `age`-th time. A young average follows faster, or first previews would show initial weights."""
        if self.role is not None:
            self.role.follow(student, min(self.decay, (1 + age) / (10 + age)))
