"""What adversarial methods share: turns of a discriminator, the nodes of a re-noising student, and its deployment on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ddil_lightning.bounds import divides, lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.feed import Wants
from ddil_lightning.records import Context
from ddil_lightning.training.adversary import Adversary, Critic
from ddil_lightning.training.contest import Contest
from ddil_lightning.training.deployment import Deployment, one_step
from ddil_lightning.training.method import Distillation


class Adversarial(Contest, Distillation):
    """A student of a few nodes, whose samples are re-noised from one to the next, against a discriminator with an optimiser of its own.

    A method calls `nodes` and `against` in its constructor, in this order, and writes `training_step`. The first node is noise without
    signal, as the deployed student sees it, unless a method's `wants` are others: UFOGen's and moment matching's forward latents are data
    noised to the last time there, as in their papers. The guidance is baked into the student.
    """

    wants = Wants(pure_noise=True)
    takes_turns = True
    head: nn.Module | None

    pull: float = 0.0
    """How far the critic is pulled to the student after each of the student's updates."""

    times: int
    """Of the schedule, those that the student knows: the first so many."""

    def nodes(
        self, steps: int, rollouts: Sequence[int], teacher_steps: int, shares: Sequence[float] = (), start: int | None = None
    ) -> Grid:
        """The teacher's grid; sets the student's: `steps` trailing nodes, of which roll-outs walk so many, visited by data in `shares`.

        `start`: the time of the first, which is given pure noise; by default the last of all. Raises ValueError for step counts that do not
        fit in each other.
        """
        total = self.backbone.schedule.steps
        self.check_guidance(told=False)
        lengths(rollouts=rollouts)
        within(1, total, rollouts=rollouts, steps=steps, teacher_steps=teacher_steps)
        within(0, total - 1, start=start)
        self.times = total if start is None else start + 1
        divides(self.times, f"the schedule's {self.times} times{' up to its start' if start else ''}", steps=steps)
        if teacher_steps % steps:
            raise ValueError(
                f"teacher_steps = {teacher_steps} is no multiple of steps = {steps}: the teacher must stop at the student's nodes"
            )
        walks = [Grid.named("lcm", n, self.times, solver_steps=steps) for n in rollouts]
        times = Grid.named("lcm", steps, self.times, solver_steps=steps).times.tolist()
        self.grid = Grid(times, walks, rule=f"trailing-{steps}", shares=shares)
        return Grid.named("trailing", teacher_steps, total)

    def against(self, adversary: Adversary, critic: Critic, fine: Grid, asks: Callable[[Context], Context] | None = None) -> None:
        """Take the discriminator, its learning rate, and who acts in roll-outs: the student by re-noising, the teacher by DDIM, under what
        `asks` makes of a context."""
        self.adversary, self.critic_lr, self.pull = adversary, self.lr if critic.lr is None else critic.lr, critic.pull
        critic.check_pull(self.student, adversary.critic)
        self.policies = Policies(Policy(self.student, renoise), Policy(self.teacher, ddim, fine=fine, asks=asks))

    def advance(self) -> None:
        """The student was updated: the critic is pulled to it, where it should be."""
        super().advance()
        if self.pull and self.adversary.critic is not None:
            self.adversary.critic.follow(self.student, 1 - self.pull)

    # What the rest of the library asks -----------------------------------------------------------------------------------------------

    def deploy(self, student: Denoiser) -> Deployment:
        """Re-noising on trained nodes alone, in the trained step count or fewer."""
        n = len(self.grid)
        steps = tuple(sorted({n, *(k for k in (4, 2, 1) if k < n)}, reverse=True))
        # Backbones of others need not know what no student of theirs asks for.
        fewer = {"times": self.times} if self.times < student.schedule.steps else {}
        scheduler = partial(self.backbone.scheduler, renoise, student.predicts, "lcm", n, **fewer)  # type: ignore[arg-type]
        grid = partial(one_step, total=self.times) if n == 1 else partial(Grid.named, "lcm", total=self.times, solver_steps=n)
        return Deployment(Policy(student, renoise), grid, steps, self.eval_guidance, scheduler)
