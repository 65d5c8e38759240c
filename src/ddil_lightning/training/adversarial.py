"""What the methods share whose student is a generator of samples, one step from every node, with a critic that follows it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import Grid
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.feed import Wants
from ddil_lightning.records import Context, LatentBatch
from ddil_lightning.training.adversary import Adversary, Critic, Gan
from ddil_lightning.training.contest import Contest
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.scores import Reflects, Scores


class Adversarial(Contest, Distillation):
    """Base of the methods that move a generator by the difference of two scores: DMD2, EM distillation, SiD, ...

    The student answers at each of a few nodes with a sample, which the deployment re-noises to the next; the guidance is baked into it. A
    method calls `generator` in its constructor, which casts student, critic, head and teacher and sets grid and policies, and writes
    `training_step` with the optimisers of student and critic.

    Args:
        steps: nodes of the grid (4: 999, 749, 499, 249), a divisor of the schedule's times.
        start: the time t* that the student is told at its first node, where it is given pure noise, by default the last; the others lie
            below it (500 in EMD, 399 in DMD2's one step of SDXL; indices from 0, so 499: `start` + 1 is a multiple of `steps`).
        rollouts: the step counts that backward simulation walks.
        teacher_steps: of the teacher's DDIM roll-outs, on the whole grid; a multiple of `steps`.
        scores: the two scores whose difference moves the student.
        reflects: which estimates are thresholded where `reflect` is not off.
    """

    wants = Wants(pure_noise=True)
    takes_turns = True
    critic: Role
    head: nn.Module | None

    def __init__(
        self,
        *,
        steps: int = 4,
        start: int | None = None,
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        scores: Scores = Scores(),
        reflects: Reflects = Reflects(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.check_guidance(told=False)
        lengths(rollouts=rollouts)
        total = self.backbone.schedule.steps
        within(1, total, rollouts=rollouts, steps=steps, teacher_steps=teacher_steps)
        within(0, total - 1, start=start)
        self.times = total if start is None else start + 1  # of the schedule, which the student knows
        self.scores, self.reflects, self.tau = scores, reflects, scores.times(total)
        self.grid = generator_grid(steps, rollouts, self.times)
        self._fine = teacher_grid(teacher_steps, steps, total)

    def oppose(self, critic: Critic, gan: Gan = Gan()) -> None:
        """Cast the roles and set the adversary and the policies."""
        backbone = self.backbone
        self.critic_lr = self.lr if critic.lr is None else critic.lr
        self.head = None
        self.cast(
            student=self.role("student"),
            critic=self.role("critic"),
            **({"head": backbone.head(gan.layers, gan.features)} if gan.is_on else {}),
            teacher=self.role("teacher", reflection=self.reflection if self.reflects.real else None),
        )
        self.adversary = Adversary(self, self.critic, self.head, critic.steps, gan)
        self.policies = Policies(Policy(self.student, renoise), Policy(self.teacher, ddim, fine=self._fine))

    def samples(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """The student's x0 [B, ...] at x_t, straight-through the box where `reflects.student` says so."""
        x = self.student(x_t, t, c).x0
        return self.reflection.through(x) if self.reflects.student else x

    def estimates(self, y: Tensor, t: Tensor, b: LatentBatch) -> tuple[Tensor, Tensor]:
        """x0 [B, ...] at y by the real score and by the fake one, reflected as `reflects` says."""
        real, fake = self.teacher(y, t, self.scores.asked(b.c)).x0, self.critic(y, t, b.c).x0
        return real, self.reflection(fake) if self.reflects.critic else fake

    # What the rest of the library asks -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Raises ValueError for a GAN without data."""
        super().setup(stage)
        self.adversary.check_data(self.feed.has_images())

    def check_prior(self, prior: Any) -> None:
        """Raises ValueError also for teacher roll-outs where the student's first node, given pure noise, is below the teacher's."""
        super().check_prior(prior)
        if prior.teacher > 0 and self.times < self.backbone.schedule.steps:
            raise ValueError(
                f"the prior gives {prior.teacher:g} to the teacher, which does not start from pure noise at t = {self.times - 1}: "
                "leave model.start out, or give that share to forward or student"
            )

    def deploy(self, student: Denoiser) -> Deployment:
        """Re-noising on trained nodes alone, in the trained step count or fewer; its samples stand for the real score's guidance."""
        n = len(self.grid)
        steps = tuple(sorted({n, *(k for k in (4, 2, 1) if k < n)}, reverse=True))
        scheduler = partial(self.backbone.scheduler, renoise, student.predicts, "lcm", n, times=self.times)
        grid = partial(Grid.named, "lcm", total=self.times, solver_steps=n)
        return Deployment(Policy(student, renoise), grid, steps, self.eval_guidance, scheduler, self.scores.guidance)


def generator_grid(steps: int, rollouts: Sequence[int], total: int) -> Grid:
    """`steps` trailing nodes of `total` times and the walks down them. Raises ValueError where they do not divide the times."""
    if total % steps:
        raise ValueError(f"steps = {steps} does not divide the schedule's {total} times, counted up to the student's first node")
    nodes = Grid.named("lcm", steps, total, solver_steps=steps)
    walks = [Grid.named("lcm", n, total, solver_steps=steps) for n in rollouts]
    return Grid(nodes.times.tolist(), walks, rule=f"trailing-{steps}")


def teacher_grid(teacher_steps: int, steps: int, total: int) -> Grid:
    """The teacher's grid, on which all the student's nodes lie. Raises ValueError where they do not."""
    if teacher_steps % steps:
        raise ValueError(f"teacher_steps = {teacher_steps} is no multiple of steps = {steps}: the teacher must stop at the student's nodes")
    return Grid.named("trailing", teacher_steps, total)
