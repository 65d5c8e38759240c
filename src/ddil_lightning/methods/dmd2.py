"""Improved distribution matching distillation, DMD2 (Yin et al. 2024; METHODS 4), as a feedback loss of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser, to_w
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.schedule import Grid
from ddil_lightning.diffusion.solver import Policies, Policy
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.adversary import Adversary, Gan
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.method import Distillation

Normaliser = Literal["sample", "batch"]


class DMD2(Distillation):
    """The student's outputs should have the teacher's law: the KL divergence's gradient is the difference of two scores, and a GAN helps.

    The real score is the guided teacher's, the fake score that of a critic that follows the student's outputs on a faster time scale:
    `critic_steps` updates to one of the student's. A latent needs no x0, so all sources are legal; student latents are DMD2's backward
    simulation. Both turns take their latents from the same batches of the DataModule, and the real side of the GAN is data alone.
    The guidance is baked into the student: it is not told w, and its pipeline is called with guidance_scale 1.

    `steps`: nodes of the grid (4: 999, 749, 499, 249). `rollouts`: the step counts that backward simulation walks. `teacher_steps`: of the
    teacher's DDIM roll-outs, on the whole grid. `critic_lr`: default `lr`. `real_guidance`: g of the real score (default: `guidance`); 1
    takes one evaluation of the teacher instead of two.
    `gan_weight`, `critic_gan_weight`: lambda_g and lambda_d, 0 and 0 for no GAN. `gan_features`: whose bottleneck the head reads.
    `normaliser`: of the gradient, per sample or over the batch (`direction`). `tau`: range of the scores' times as shares of T.
    `reflect_real`, `reflect_critic`, `reflect_student`: which estimates are thresholded where `reflect` is not off. The critic's is not by
    default: with both scores in one box nothing pulls an output back that has left it. The student's is straight-through and in training
    alone: no diffusers scheduler holds a box per channel, and roll-outs are as the student is deployed.
    """

    critic: Role
    head: nn.Module | None

    def __init__(
        self,
        *,
        steps: int = 4,
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        critic_steps: int = 5,
        critic_lr: float | None = None,
        real_guidance: float | None = None,
        gan_weight: float = 5e-3,
        critic_gan_weight: float = 1e-2,
        gan_features: Literal["critic", "teacher"] = "critic",
        normaliser: Normaliser = "sample",
        tau: tuple[float, float] = (0.02, 0.98),
        reflect_real: bool = True,
        reflect_critic: bool = False,
        reflect_student: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        backbone, total = self.backbone, self.backbone.schedule.steps
        self.check_guidance(told=False)
        lengths(rollouts=rollouts)
        lengths(2, tau=tau)
        within(1, total, rollouts=rollouts, steps=steps, teacher_steps=teacher_steps)
        within(0, 1, tau=tau)
        within(0, 10, critic_lr=critic_lr)
        within(0, 1000, real_guidance=real_guidance)
        self._check(steps, teacher_steps, tau)
        gan = Gan(gan_weight, critic_gan_weight, gan_features)
        self.critic_lr, self.real_guidance = self.lr if critic_lr is None else critic_lr, real_guidance
        self.normaliser, self.tau = normaliser, (min(round(tau[0] * total), total - 1), min(round(tau[1] * total), total - 1))
        self.reflect_critic, self.reflect_student = reflect_critic, reflect_student
        noise_seed = int(torch.randint(2**31, ()))
        nodes = Grid.named("lcm", steps, total, solver_steps=steps)
        walks = [Grid.named("lcm", n, total, solver_steps=steps) for n in rollouts]
        self.grid = Grid(nodes.times.tolist(), walks, rule=f"trailing-{steps}")
        self.head = None
        self.cast(
            student=backbone.role("student", recompute=self.gradient_checkpointing),
            critic=backbone.role("critic", recompute=self.gradient_checkpointing),
            **({"head": backbone.head()} if gan.is_on else {}),
            teacher=backbone.role("teacher", reflection=self.reflection if reflect_real else None),
        )
        self.adversary = Adversary(self, self.critic, self.head, critic_steps, gan, noise_seed)
        fine = Grid.named("trailing", teacher_steps, total)
        self.policies = Policies(Policy(self.student, "renoise"), Policy(self.teacher, "ddim", fine=fine))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of critic and head; every `critic_steps`-th time one of the student before it, on the same outputs."""
        optimizers: Any = self.optimizers()
        student, critic = optimizers
        with torch.set_grad_enabled(self.adversary.student_turn):
            x = self.student(b.x_t, b.t, b.c).x0
            x = self.reflection.through(x) if self.reflect_student else x

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
            g = self.real_guidance
            c = b.c if g is None else b.c.guided(None if g == 1 else to_w(g))
            real, fake = self.teacher(y, t, c).x0, self.critic(y, t, b.c).x0
            if self.reflect_critic:
                fake = self.reflection(fake)
            d = direction(x, real, fake, self.normaliser)
        return 0.5 * mse(x, (x - d).detach())

    # What the rest of the library asks -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """One for the student; one for critic and head."""
        return [self.adamw(self.student.weights(), self.lr), self.adamw(self.adversary.weights(), self.critic_lr)]

    def setup(self, stage: str) -> None:
        """Raises ValueError for a GAN without data."""
        super().setup(stage)
        self.adversary.check_data(self.feed.has_images())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also where the run stands between two student updates."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ddil"] |= self.adversary.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        self.adversary.restore(checkpoint["ddil"])

    def deploy(self, student: Denoiser) -> Deployment:
        """Re-noising on trained nodes alone, in the trained step count or fewer; its samples stand for the real score's guidance."""
        n, total = len(self.grid), self.student.schedule.steps
        steps = tuple(sorted({n, *(k for k in (4, 2, 1) if k < n)}, reverse=True))
        scheduler = partial(self.backbone.scheduler, "renoise", student.predicts, "lcm", n)
        grid = partial(Grid.named, "lcm", total=total, solver_steps=n)
        return Deployment(Policy(student, "renoise"), grid, steps, self.eval_guidance, scheduler, self.real_guidance)

    def _check(self, steps: int, teacher_steps: int, tau: tuple[float, float]) -> None:
        total = self.backbone.schedule.steps
        if total % steps:
            raise ValueError(f"steps = {steps} does not divide the schedule's {total} times")
        if teacher_steps % steps:
            raise ValueError(
                f"teacher_steps = {teacher_steps} is no multiple of steps = {steps}: the teacher must stop at the student's nodes"
            )
        if tau[0] >= tau[1]:
            raise ValueError(f"tau is {list(tau)!r}: give shares of T with 0 <= tau[0] < tau[1] <= 1")


def direction(x: Tensor, real: Tensor, fake: Tensor, normaliser: Normaliser = "sample") -> Tensor:
    """g [B, ...] = (fake - real) / mean |x - real| in float32 or wider, 0 where that is not a number (DMD, Eq. 7 and 8; METHODS 4.2).

    `sample`: a mean per sample. `batch`: over batch and channels, a position for itself: for data of so few dimensions that a sample's own
    mean is noise. The mean is at least 1e-3 rms(x), because reflection can make it tiny.
    """
    x, real, fake = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (x, real, fake))
    dims = tuple(range(1, x.ndim)) if normaliser == "sample" else (0, 1)
    floor = 1e-3 * x.square().mean(dims, keepdim=True).sqrt()
    return ((fake - real) / torch.maximum((x - real).abs().mean(dims, keepdim=True), floor)).nan_to_num(0.0, 0.0, 0.0)
