"""Improved distribution matching distillation, DMD2 (Yin et al. 2024; METHODS 4), as a feedback loss of DDIL."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser, to_w
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import Grid
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.feed import Wants
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.adversary import Adversary, Critic
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.gan import Gan
from ddil_lightning.training.method import Distillation

Normaliser = Literal["sample", "batch"]


@dataclass(frozen=True)
class Scores:
    """The real score, the guided teacher's, and the fake one, the critic's, as the student is moved by their difference.

    Args:
        guidance: g of the real score, by default the method's own; 1 takes one evaluation of the teacher instead of two.
        normaliser: of the gradient, per `sample` or over the `batch`, for data of so few dimensions that a sample's own mean is noise.
        tau: range of the times at which the scores are compared, as shares of the schedule's T.
    """

    guidance: float | None = None
    normaliser: Normaliser = "sample"
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


class DMD2(Distillation):
    """The student's outputs should have the teacher's law: the KL divergence's gradient is the difference of two scores, and a GAN helps.

    The real score is the guided teacher's, the fake score that of a critic that follows the student's outputs on a faster time scale:
    `critic.steps` updates to one of the student's. A latent needs no x0, so all sources are legal; student latents are DMD2's backward
    simulation. Both turns take their latents from the same batches of the DataModule, and the real side of the GAN is data alone.
    The guidance is baked into the student: it is not told w, and its pipeline is called with guidance_scale 1.

    Args:
        steps: nodes of the grid (4: 999, 749, 499, 249), a divisor of the schedule's times.
        rollouts: the step counts that backward simulation walks.
        teacher_steps: of the teacher's DDIM roll-outs, on the whole grid; a multiple of `steps`.
        critic: the critic's time scale.
        gan: the discriminator on the critic's features; 0 and 0 for no GAN.
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
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        critic: Critic = Critic(),
        gan: Gan = Gan(5e-3, 1e-2),
        scores: Scores = Scores(),
        reflects: Reflects = Reflects(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        backbone, total = self.backbone, self.backbone.schedule.steps
        self.check_guidance(told=False)
        lengths(rollouts=rollouts)
        within(1, total, rollouts=rollouts, steps=steps, teacher_steps=teacher_steps)
        self._check(steps, teacher_steps)
        self.critic_lr = self.lr if critic.lr is None else critic.lr
        self.scores, self.reflects, self.tau = scores, reflects, scores.times(total)
        nodes = Grid.named("lcm", steps, total, solver_steps=steps)
        walks = [Grid.named("lcm", n, total, solver_steps=steps) for n in rollouts]
        self.grid = Grid(nodes.times.tolist(), walks, rule=f"trailing-{steps}")
        self.head = None
        self.cast(
            student=self.role("student"),
            critic=self.role("critic"),
            **({"head": backbone.head(gan.layers, gan.features)} if gan.is_on else {}),
            teacher=self.role("teacher", reflection=self.reflection if reflects.real else None),
        )
        self.adversary = Adversary(self, self.critic, self.head, critic.steps, gan)
        fine = Grid.named("trailing", teacher_steps, total)
        self.policies = Policies(Policy(self.student, renoise), Policy(self.teacher, ddim, fine=fine))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of critic and head; every `critic.steps`-th time one of the student before it, on the same outputs."""
        optimizers: Any = self.optimizers()
        student, critic = optimizers
        with torch.set_grad_enabled(self.adversary.student_turn):
            x = self.student(b.x_t, b.t, b.c).x0
            x = self.reflection.through(x) if self.reflects.student else x

        if self.adversary.student_turn:
            with self.adversary.still():
                loss = self.matching(x, b) + self.adversary.gan.weight * self.adversary.realism(x, b)
                if self.descend(student, self.feedback(b, loss)):
                    self.advance()

        self.adversary.descend(critic, x.detach(), b)

    def matching(self, x: Tensor, b: LatentBatch) -> Tensor:
        """[B] pseudo-loss whose gradient in x is `direction` / numel."""
        y, t, _ = self.adversary.diffuse(x.detach(), "matching", *self.tau)
        with torch.no_grad():
            g = self.scores.guidance
            c = b.c if g is None else b.c.guided(None if g == 1 else to_w(g))
            real, fake = self.teacher(y, t, c).x0, self.critic(y, t, b.c).x0
            if self.reflects.critic:
                fake = self.reflection(fake)
            d = direction(x, real, fake, self.scores.normaliser)
        return 0.5 * mse(x, (x - d).detach())

    # What the rest of the library asks -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """One for the student; one for critic and head."""
        return [self.optimizer_of(self.student.weights(), self.lr), self.optimizer_of(self.adversary.weights(), self.critic_lr)]

    def on_student_turn(self) -> None:
        """The last batch of the critic's cycle."""
        self.adversary.updates += (-self.adversary.updates - 1) % self.adversary.every

    def setup(self, stage: str) -> None:
        """Raises ValueError for a GAN without data."""
        super().setup(stage)
        self.adversary.check_data(self.feed.has_images())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also where the run stands between two student updates."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ddil"] |= self.adversary.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore where the run stood between two student updates."""
        super().on_load_checkpoint(checkpoint)
        self.adversary.restore(checkpoint["ddil"])

    def deploy(self, student: Denoiser) -> Deployment:
        """Re-noising on trained nodes alone, in the trained step count or fewer; its samples stand for the real score's guidance."""
        n, total = len(self.grid), self.student.schedule.steps
        steps = tuple(sorted({n, *(k for k in (4, 2, 1) if k < n)}, reverse=True))
        scheduler = partial(self.backbone.scheduler, renoise, student.predicts, "lcm", n)
        grid = partial(Grid.named, "lcm", total=total, solver_steps=n)
        return Deployment(Policy(student, renoise), grid, steps, self.eval_guidance, scheduler, self.scores.guidance)

    def _check(self, steps: int, teacher_steps: int) -> None:
        total = self.backbone.schedule.steps
        if total % steps:
            raise ValueError(f"steps = {steps} does not divide the schedule's {total} times")
        if teacher_steps % steps:
            raise ValueError(
                f"teacher_steps = {teacher_steps} is no multiple of steps = {steps}: the teacher must stop at the student's nodes"
            )


def direction(x: Tensor, real: Tensor, fake: Tensor, normaliser: Normaliser = "sample") -> Tensor:
    """g [B, ...] = (fake - real) / mean |x - real| in float32 or wider, 0 where that is not a number (DMD, Eq. 7 and 8; METHODS 4.2).

    `sample`: a mean per sample. `batch`: over batch and channels, a position for itself: for data of so few dimensions that a sample's own
    mean is noise. The mean is at least 1e-3 rms(x), because reflection can make it tiny.
    """
    x, real, fake = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (x, real, fake))
    dims = tuple(range(1, x.ndim)) if normaliser == "sample" else (0, 1)
    floor = 1e-3 * x.square().mean(dims, keepdim=True).sqrt()
    return ((fake - real) / torch.maximum((x - real).abs().mean(dims, keepdim=True), floor)).nan_to_num(0.0, 0.0, 0.0)
