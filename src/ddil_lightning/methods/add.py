"""Adversarial diffusion distillation, ADD (Sauer et al. 2023, arXiv 2311.17042; METHODS 5.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.bounds import within
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.records import Context, LatentBatch
from ddil_lightning.training.adversarial import Adversarial
from ddil_lightning.training.adversary import CLEAN, Adversary, Critic, Span
from ddil_lightning.training.gan import Gan
from ddil_lightning.training.vision import ToldHeads, Vision, embedding


class Added(Adversary):
    """A discriminator whose heads' losses are added."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.heads = len(self.head) if isinstance(self.head, nn.ModuleList) else 1


class Looking(Added):
    """A discriminator of decoded images, without noise: heads on the maps of a frozen Vision, told the caption.

    Real latents are decoded as well, so that nothing but what they show tells them from the student's.
    """

    conditions = 1

    def __init__(self, method: Any, every: int, gan: Gan, vision: Vision) -> None:
        super().__init__(method, None, method.head, every, gan)
        self.vision = vision

    def view(
        self, x: Tensor, b: LatentBatch, c: Context, purpose: str, jitter: float = 0.0, span: Span = CLEAN
    ) -> tuple[Tensor, ...]:
        """The maps of the images of latents x, with noise of size `jitter` on the images, and what the heads are told."""
        images = self.jittered(self.method.backbone.decode(x, gradients=True), jitter)
        return (*self.vision.to(images.device)(images), embedding(c))


class Clean(Added):
    """A discriminator of samples that are no images: heads on the layers of a frozen denoiser, asked at its least noise."""

    def view(
        self, x: Tensor, b: LatentBatch, c: Context, purpose: str, jitter: float = 0.0, span: Span = CLEAN
    ) -> tuple[Tensor, ...]:
        """The features of the samples themselves, at t = 0."""
        return self._features(self.jittered(x, jitter), torch.zeros(len(x), dtype=torch.long, device=x.device), c)


class ADD(Adversarial):
    """The student's images should look real, and its samples be what the guided teacher makes of them once they are noised.

    L_student = -sum_k D_k(F_k(decode(xS)), caption) + lambda c(t) |xS - xT|^2, D_k the mean over the places of a map, with xT the teacher's
    x0 at y = alpha_t xS + sigma_t eps, t uniform, y and xT without gradient, and c(t) = alpha_t; the heads learn by the hinge loss with R1
    at their inputs. The first term asks for no partner and the second for no x0, so every source is legal; real are the data alone.
    Reflection acts on the teacher's x0 and, straight-through, on what the discriminator sees. The paper tells the heads an embedding of the
    data image too, which a roll-out does not have; here they are told the caption.

    Args:
        steps: nodes of the grid (4: 999, 749, 499, 249), a divisor of the schedule's times.
        rollouts: the step counts that the student's roll-outs walk.
        teacher_steps: of the teacher's DDIM roll-outs, on the whole grid; a multiple of `steps`.
        vision: the frozen network of images: {class_path: Dino, init_args: {path: ...}}, or BuiltinVision on the built-in data. Where
            samples are no images, there is none, and the heads read a frozen copy of the student as it starts, at t = 0.
        distillation: lambda, of the teacher's term.
        critic: the discriminator's time scale.
        gan: the discriminator's weights, loss and R1.
    """

    def __init__(
        self,
        *,
        steps: int = 4,
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        vision: Vision | None = None,
        distillation: float = 2.5,
        critic: Critic = Critic(1),
        gan: Gan = Gan(1.0, 1.0, "initial", kind="hinge", r1=1e-5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        fine = self.nodes(steps, rollouts, teacher_steps)
        within(0, 1000, distillation=distillation)
        self._check(vision, gan)
        self.distillation = distillation
        parts = self.discriminator(gan) if vision is None else {"head": self._heads(vision)}
        self.cast(student=self.role("student"), **parts, teacher=self.role("teacher", reflection=self.reflection))
        made = Clean(self, None, self.head, critic.steps, gan) if vision is None else Looking(self, critic.steps, gan, vision)
        self.against(made, critic, fine)

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of the heads; every `critic.steps`-th time one of the student before it, on the same samples."""
        optimizers: Any = self.optimizers()
        student, heads = optimizers
        with torch.set_grad_enabled(self.adversary.student_turn):
            x = self.student(b.x_t, b.t, b.c).x0
            seen = self.reflection.through(x)

        if self.adversary.student_turn:
            with self.adversary.still():
                loss = self.adversary.gan.weight * self.adversary.realism(seen, b) + self.distillation * self.teaching(x, b)
                if self.descend(student, self.feedback(b, loss)):
                    self.advance()

        self.adversary.descend(heads, seen.detach(), b)

    def teaching(self, x: Tensor, b: LatentBatch) -> Tensor:
        """[B] c(t) |xS - xT|^2, c(t) = alpha_t: the distance of samples from what the guided teacher sees in them under noise."""
        y, t, _ = self.adversary.diffuse(x.detach(), "teaching")
        with torch.no_grad():
            target = self.teacher(y, t, b.c).x0
        self.record_saturation(target)
        alpha, _ = self.teacher.schedule.at(t, x)
        loss = alpha.flatten() * mse(x, target)
        self.measures.record(distillation=loss)
        return loss

    # What the rest of the library asks -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Raises ValueError for a GAN without images."""
        super().setup(stage)
        self.adversary.check_data(self.feed.has_images(), "take a method without a discriminator")

    def _heads(self, vision: Vision) -> nn.Module:
        return ToldHeads(vision.widths, embedding(self.backbone.null()).shape[1])

    def _check(self, vision: Vision | None, gan: Gan) -> None:
        if not gan.weight:
            raise ValueError("ADD is its discriminator, and gan.weight is 0: give a number above 0")
        if vision is None and self.backbone.size is not None:
            raise ValueError(
                f"ADD's discriminator looks at the images of {self.backbone.path} through a frozen network: give model.vision, such as "
                "{class_path: Dino, init_args: {path: FOLDER}}, or BuiltinVision on the built-in data"
            )
        if vision is not None and self.backbone.size is None:
            raise ValueError(f"the samples of {self.backbone.path} are no images, which model.vision would look at: leave it out")
        if vision is not None and (gan.layers or gan.features != "initial"):
            raise ValueError("ADD's heads read model.vision: leave gan.layers and gan.features out")
        if vision is None and gan.features != "initial":
            raise ValueError("ADD's heads read the student as it starts where samples are no images: leave gan.features out")
