"""UFOGen, a diffusion GAN (Xu et al. 2023, arXiv 2311.09257, Alg. 1; METHODS 5.7) as a feedback loss of DDIL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import within
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.policy import solve
from ddil_lightning.feed import Wants
from ddil_lightning.records import Context, LatentBatch, sent, take
from ddil_lightning.training.adversarial import Adversarial
from ddil_lightning.training.adversary import CLEAN, Adversary, Critic, Heard, Span
from ddil_lightning.training.gan import Gan


class Pairs(Adversary):
    """A discriminator of x_s at the next node: the student's x0 and the data, noised to the same time, with independent noise."""

    def view(
        self, x: Tensor, b: LatentBatch, c: Context, purpose: str, jitter: float = 0.0, span: Span = CLEAN
    ) -> tuple[Tensor, ...]:
        """The features of samples x at the next node; after the last one at time 0, the least noise that a denoiser was made for."""
        generator, s = self.generator(purpose, x.device), b.s.clamp(min=0)
        eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return self._features(self.jittered(self.method.student.schedule.add_noise(x, eps, s), jitter), s, c)

    def following(
        self, x: Tensor, b: LatentBatch, real: Tensor | None = None, span: Span = CLEAN, heard: Heard | None = None
    ) -> Tensor:
        """Telling real from fake, and nothing else: the discriminator starts as a denoiser and need not remain one."""
        told = self.telling(x, b)
        # Layers above those that the head reads get a gradient of zero, so that all parameters have one.
        rest = self.nothing(x)
        return rest if told is None else rest + self.gan.critic_weight * told.mean()


class UFOGen(Adversarial):
    """The student's x0, noised to the next node, should look like data noised to it, and x0 itself be the clean image of x_t.

    L_student = -log D(q(x_s | xS), s) + lambda gamma_t |xS - x0|^2 with gamma_t = alpha_t, so that a regression on what noise has hidden
    does not blur. D is a whole network that starts as the teacher, with a head. The second term needs the x0 of x_t, which only forward
    latents have: roll-outs are refused, unless `label_steps` has the guided teacher solve its flow from x_t to an x0 in its place.

    Args:
        steps: nodes of the grid (4: 999, 749, 499, 249), a divisor of the schedule's times.
        rollouts: the step counts that the student's roll-outs walk.
        teacher_steps: of the teacher's DDIM roll-outs, on the whole grid; a multiple of `steps`.
        reconstruction: lambda, of the regression on x0.
        label_steps: the guided teacher's DDIM steps from a rolled-out x_t to the label in the place of x0; 0 has none, and no roll-outs.
        critic: the discriminator's time scale.
        gan: the discriminator; with features `teacher`, its network stays frozen and the head alone learns.
    """

    wants = Wants()

    def __init__(
        self,
        *,
        steps: int = 4,
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        reconstruction: float = 1.0,
        label_steps: int = 0,
        critic: Critic = Critic(1),
        gan: Gan = Gan(1.0, 1.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        fine = self.nodes(steps, rollouts, teacher_steps)
        within(0, self.backbone.schedule.steps, label_steps=label_steps)
        within(0, 1000, reconstruction=reconstruction)
        if not gan.weight:
            raise ValueError("UFOGen is a diffusion GAN, and gan.weight is 0: give a number above 0")
        self.reconstruction, self.label_steps = reconstruction, label_steps
        whole: dict[str, Role] = {"critic": self.role("critic")} if gan.features == "critic" else {}
        student, teacher = self.role("student"), self.role("teacher", reflection=self.reflection)
        critic.check_pull(student, None)  # who tells samples from data does not denoise them
        self.cast(student=student, **whole, **self.discriminator(gan), teacher=teacher)
        self.against(Pairs(self, whole.get("critic"), self.head, critic.steps, gan), critic, fine)

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of the discriminator; every `critic.steps`-th time one of the student before it, on the same samples."""
        optimizers: Any = self.optimizers()
        student, critic = optimizers
        with torch.set_grad_enabled(self.adversary.student_turn):
            x = self.student(b.x_t, b.t, b.c).x0
            seen = self.reflection.through(x)
        self.record_saturation(seen)

        if self.adversary.student_turn:
            with self.adversary.still():
                loss = self.adversary.gan.weight * self.adversary.realism(seen, b) + self.reconstruction * self.regression(x, b)
                if self.descend(student, self.feedback(b, loss)):
                    self.advance()

        self.adversary.descend(critic, seen.detach(), b)

    def regression(self, x: Tensor, b: LatentBatch) -> Tensor:
        """[B] gamma_t |xS - x0|^2, gamma_t = alpha_t, with the data's x0 or, of roll-outs, the teacher's label."""
        alpha, _ = self.student.schedule.at(b.t, x)
        loss = alpha.flatten() * mse(x, self.clean(b))
        self.measures.record(reconstruction=loss)
        return loss

    @torch.no_grad()
    def clean(self, b: LatentBatch) -> Tensor:
        """The clean version of every x_t: its data or, where a policy has made it, the end of the guided teacher's flow from there."""
        assert b.real is not None  # `check_data` saw images
        origin = self.feed.origin(b)
        others = sorted({*range(len(b.t))} - {*origin.data})
        if not others:
            return b.real
        rows = sent(torch.tensor(others), b.real.device)
        label = self.feed.answered(take(b, rows), self.answer, [origin.slot[row] for row in others])
        return b.real.index_copy(0, rows, label.to(b.real.dtype))

    def answer(self, b: LatentBatch) -> Tensor:
        """Labels [B, C, H, W]: the end of the guided teacher's flow from x_t, which the buffer keeps beside it."""
        return solve(self.teacher, b.x_t, b.t, b.c, self.label_steps)

    # What the rest of the library asks -----------------------------------------------------------------------------------------------

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]
        """Forward latents, whose x0 is known; with labels of the teacher all."""
        return ("forward", "student", "teacher") if self.label_steps else ("forward",)

    def check_prior(self, prior: Any) -> None:
        """Raises ValueError for roll-outs without labels, and says what gives them some."""
        try:
            super().check_prior(prior)
        except ValueError as error:
            why = "" if self.label_steps else "; set model.label_steps to have the teacher solve for an x0 of roll-outs"
            raise ValueError(f"{error}{why}") from None

    def setup(self, stage: str) -> None:
        """Raises ValueError for a GAN without images."""
        super().setup(stage)
        self.adversary.check_data(self.feed.has_images(), "take a method without a discriminator")
