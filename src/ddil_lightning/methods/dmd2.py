"""Improved distribution matching distillation, DMD2 (Yin et al. 2024; METHODS 4), as a feedback loss of DDIL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddil_lightning.bounds import lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser, to_w
from ddil_lightning.diffusion.schedule import Grid
from ddil_lightning.diffusion.solver import Policies, Policy
from ddil_lightning.methods.losses import mse, per_sample
from ddil_lightning.records import LatentBatch
from ddil_lightning.streams import Streams
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
        backbone, schedule, predicts = self.backbone, self.backbone.schedule, self.backbone.predicts
        total = schedule.steps
        self.check_guidance(told=False)
        lengths(rollouts=rollouts)
        lengths(2, tau=tau)
        within(1, total, rollouts=rollouts, steps=steps, teacher_steps=teacher_steps)
        within(1, 10**6, critic_steps=critic_steps)
        within(0, 1000, gan_weight=gan_weight, critic_gan_weight=critic_gan_weight)
        within(0, 1, tau=tau)
        within(0, 10, critic_lr=critic_lr)
        within(0, 1000, real_guidance=real_guidance)
        self._check(steps, teacher_steps, (gan_weight, critic_gan_weight), tau)
        self.critic_steps, self.critic_lr, self.real_guidance = critic_steps, self.lr if critic_lr is None else critic_lr, real_guidance
        self.gan_weight, self.critic_gan_weight, self.gan_features = gan_weight, critic_gan_weight, gan_features
        self.normaliser, self.tau = normaliser, (min(round(tau[0] * total), total - 1), min(round(tau[1] * total), total - 1))
        self.reflect_critic, self.reflect_student = reflect_critic, reflect_student
        self.critic_updates = 0
        # The noise of the losses follows from this number and the clocks, so that a resumed run repeats it.
        self.noise_seed = int(torch.randint(2**31, ()))
        nodes = Grid.named("lcm", steps, total, solver_steps=steps)
        walks = [Grid.named("lcm", n, total, solver_steps=steps) for n in rollouts]
        self.grid = Grid(nodes.times.tolist(), walks, rule=f"trailing-{steps}")
        self.student = Denoiser(backbone.student(False, self.gradient_checkpointing), schedule, predicts)
        self.critic = Denoiser(backbone.critic(self.gradient_checkpointing), schedule, predicts)
        self.head = backbone.head() if gan_weight or critic_gan_weight else None
        box = self.reflection if reflect_real else None
        self.__dict__["teacher"] = Denoiser(backbone.teacher(), schedule, predicts, null=backbone.null(), reflection=box)
        fine = Grid.named("trailing", teacher_steps, total)
        self.__dict__["policies"] = Policies(Policy(self.student, "renoise"), Policy(self.teacher, "ddim", fine=fine))
        self.with_average()

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of critic and head; every `critic_steps`-th time one of the student before it, on the same outputs."""
        optimizers: Any = self.optimizers()
        student, critic = optimizers
        with torch.set_grad_enabled(self.student_turn):
            x = self.student(b.x_t, b.t, b.c).x0
            x = self.reflection.through(x) if self.reflect_student else x

        if self.student_turn:
            with untouched(self.critic, self.head):
                loss = self.matching(x, b) + self.gan_weight * self.realism(x, b)
                if self.descend(student, self.feedback(b, loss)):
                    self.advance()

        if self.descend(critic, self.following(x.detach(), b), "critic_loss"):
            self.critic_updates += 1

    # The losses ----------------------------------------------------------------------------------------------------------------------

    def matching(self, x: Tensor, b: LatentBatch) -> Tensor:
        """[B] pseudo-loss whose gradient in x is `direction` / numel."""
        y, t, _ = self.diffuse(x.detach(), "matching", *self.tau)
        with torch.no_grad():
            g = self.real_guidance
            c = b.c if g is None else b.c.guided(None if g == 1 else to_w(g))
            real, fake = self.teacher(y, t, c).x0, self.critic(y, t, b.c).x0
            if self.reflect_critic:
                fake = self.reflection(fake)
            d = direction(x, real, fake, self.normaliser)
        return 0.5 * mse(x, (x - d).detach())

    def realism(self, x: Tensor, b: LatentBatch) -> Tensor | float:
        """[B] the student's side of the GAN: softplus(-D)."""
        if not self.gan_weight:
            return 0.0
        y, t, _ = self.diffuse(x, "realism")
        return per_sample(softplus(-self.logits(self.discriminator.features(y, t, b.c))))

    def following(self, x: Tensor, b: LatentBatch) -> Tensor:
        """The critic's denoising loss on outputs x in the network's own space, and the other side of the GAN, from one forward of both."""
        y, t, eps = self.diffuse(x, "critic")
        p, features = self.critic.with_features(y, t, b.c)
        prediction = p.eps - p.x0 if self.critic.predicts == "flow" else getattr(p, self.critic.predicts)
        loss = mse(prediction, self.critic.schedule.target(self.critic.predicts, x, eps, t))
        self.record(denoising=loss)
        if not self.critic_gan_weight or b.real is None or b.real_c is None:
            return (b.weight * loss).mean()
        if self.gan_features == "teacher":
            features = self.teacher.features(y, t, b.c)
        z, t, _ = self.diffuse(b.real, "real")
        fake, real = self.logits(features), self.logits(self.discriminator.features(z, t, b.real_c))
        gan = b.weight * per_sample(softplus(fake)) + per_sample(softplus(-real))
        self.record(gan=gan)
        return (b.weight * loss + self.critic_gan_weight * gan).mean()

    def logits(self, features: Tensor) -> Tensor:
        """[B, ...] of the head in float32; a batch's features may come from a network in half precision."""
        assert self.head is not None
        return self.head(features.float()).float().flatten(1)

    def diffuse(self, x: Tensor, purpose: str, low: int = 0, high: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha x + sigma eps, t, eps) with t [B] ~ U{low..high} (all times), each rank and purpose with numbers of its own."""
        step = self.critic_updates * self.accumulate + self._micro.get("critic_loss", 0)
        generator = Streams(self.noise_seed, step, self.stage, self.global_rank).local(purpose, x.device)
        schedule = self.student.schedule
        t = torch.randint(low, (schedule.steps - 1 if high is None else high) + 1, (len(x),), generator=generator, device=x.device)
        eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return schedule.add_noise(x, eps, t), t, eps

    # Turns and networks --------------------------------------------------------------------------------------------------------------

    @property
    def student_turn(self) -> bool:
        """Whether this batch updates the student; it is the last of its cycle, so that the critic has caught up."""
        return (self.critic_updates + 1) % self.critic_steps == 0

    @property
    def discriminator(self) -> Denoiser:
        """Whose features the head reads."""
        return self.critic if self.gan_features == "critic" else self.teacher

    @property
    def steps(self) -> tuple[int, ...]:
        """The trained step count, and fewer."""
        return tuple(sorted({len(self.grid), *(n for n in (4, 2, 1) if n < len(self.grid))}, reverse=True))

    @property
    def student_guidance(self) -> float:
        """That of the real score, which the student's distribution is drawn to."""
        return self.eval_guidance if self.real_guidance is None else self.real_guidance

    def denoisers(self) -> dict[str, Denoiser]:
        """Student, teacher and critic."""
        return {"student": self.student, "teacher": self.teacher, "critic": self.critic}

    def configure_optimizers(self) -> Any:
        """One for the student; one for critic and head."""
        fake = nn.ModuleList([self.critic] if self.head is None else [self.critic, self.head])
        return [self.adamw(self.student, self.lr), self.adamw(fake, self.critic_lr)]

    def setup(self, stage: str) -> None:
        """Raises ValueError for a GAN without data."""
        super().setup(stage)
        if self.head is not None and not self.feed.has_images():
            raise ValueError(
                "DMD2's GAN compares with data, but the data set has no images: give images, or set model.gan_weight and "
                "model.critic_gan_weight to 0"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also where the run stands between two student updates."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ddil"] |= {"critic_updates": self.critic_updates, "noise_seed": self.noise_seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        self.critic_updates, self.noise_seed = checkpoint["ddil"]["critic_updates"], checkpoint["ddil"]["noise_seed"]

    # Inference -----------------------------------------------------------------------------------------------------------------------

    def sampler(self, steps: int) -> tuple[Policy, Grid]:
        """Re-noising on trained nodes alone."""
        deployed = Denoiser(self.deployed(), self.student.schedule, self.student.predicts)
        return Policy(deployed, "renoise"), Grid.named("lcm", steps, self.student.schedule.steps, solver_steps=len(self.grid))

    def scheduler(self) -> Any:
        """LCMScheduler with the trained nodes for its own grid, and a time scaling at which its boundary conditions vanish."""
        own = {"original_inference_steps": len(self.grid), "timestep_scaling": 1e10}
        return self.backbone.scheduler("LCMScheduler", set_alpha_to_one=True, clip_sample=False, **own)

    def _check(self, steps: int, teacher_steps: int, weights: tuple[float, float], tau: tuple[float, float]) -> None:
        total = self.backbone.schedule.steps
        if total % steps:
            raise ValueError(f"steps = {steps} does not divide the schedule's {total} times")
        if teacher_steps % steps:
            raise ValueError(
                f"teacher_steps = {teacher_steps} is no multiple of steps = {steps}: the teacher must stop at the student's nodes"
            )
        if tau[0] >= tau[1]:
            raise ValueError(f"tau is {list(tau)!r}: give shares of T with 0 <= tau[0] < tau[1] <= 1")
        if weights[0] and not weights[1]:
            raise ValueError(f"gan_weight = {weights[0]} needs a discriminator that learns: set critic_gan_weight")


def direction(x: Tensor, real: Tensor, fake: Tensor, normaliser: Normaliser = "sample") -> Tensor:
    """g [B, ...] = (fake - real) / mean |x - real| in float32 or wider, 0 where that is not a number (DMD, Eq. 7 and 8; METHODS 4.2).

    `sample`: a mean per sample. `batch`: over batch and channels, a position for itself: for data of so few dimensions that a sample's own
    mean is noise. The mean is at least 1e-3 rms(x), because reflection can make it tiny.
    """
    x, real, fake = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (x, real, fake))
    dims = tuple(range(1, x.ndim)) if normaliser == "sample" else (0, 1)
    floor = 1e-3 * x.square().mean(dims, keepdim=True).sqrt()
    return ((fake - real) / torch.maximum((x - real).abs().mean(dims, keepdim=True), floor)).nan_to_num(0.0, 0.0, 0.0)


@contextmanager
def untouched(*modules: nn.Module | None) -> Iterator[None]:
    """No gradient reaches the parameters of `modules` inside; it still passes through them. Those that had none before have none after."""
    trained = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
