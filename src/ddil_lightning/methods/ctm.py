"""Consistency trajectory models (Kim et al. 2023, arXiv 2310.02279, Eq. 4 to 10; METHODS 5.4) as a feedback loss of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import fraction, lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import Distance, mse
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.processes import averaged
from ddil_lightning.records import END, Context, LatentBatch, Prediction, sent, take, widest
from ddil_lightning.training.adversary import Adversary, Critic
from ddil_lightning.training.contest import Contest
from ddil_lightning.training.deployment import Deployment, trained_counts
from ddil_lightning.training.gan import Gan
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.randomness import numbers_of
from ddil_lightning.training.sharding import Sharded


class CTM(Contest, Distillation):
    """A network that is told s jumps from x_t to any lower s: G(x, t, s), which for VP is DDIM's step with that network's answer.

    Soft consistency: G_theta(x_t, t, s) should be G_target(x_u, u, s), where the guided teacher has stepped from t to u >= s, and both are
    compared at the clean end, to which the target takes them from s. It needs no x0, so forward latents, roll-outs of student or teacher
    and mixtures (a student's step is a DDIM step) are all legal. The denoising term, g(x_t, t, s = t) against x0, is defined on forward
    latents alone, and masked on all others; where w is told it is told w = 0, for data are unguided. The GAN compares jumps to the clean
    end with data. Either has the weight that makes its gradient in the network's last layer as large as that of soft consistency.
    Reflection acts on the guided teacher's x0 and on the target's, never on the student's.

    Args:
        w_conditioned: the student is told w (a zero-initialised embedding); without it one guidance is baked in, and the teacher
            alone sees w.
        solver_steps: nodes of the training grid, on which t, u and s lie.
        teacher_steps: steps of the teacher from t to u at most, each to the next node; none goes beyond s.
        rollouts: the step counts of student roll-outs, one of which is drawn for each.
        target_decay: decay of the average of the student that gives targets; 0: the online student, without gradient.
        distance: of both jumps at the clean end.
        denoising: weight of the denoising term besides the adaptive one; 0 for none.
        gan: the discriminator on noised jumps, which reads the frozen teacher's features; its weight multiplies the adaptive one.
        critic: the discriminator's time scale.
    """

    target: Role
    head: nn.Module | None

    def __init__(
        self,
        *,
        w_conditioned: bool = True,
        solver_steps: int = 40,
        teacher_steps: int = 1,
        rollouts: tuple[int, ...] = (4,),
        target_decay: float = 0.95,
        distance: Distance = Distance(),
        denoising: float = 1.0,
        gan: Gan = Gan(features="teacher", kind="hinge"),
        critic: Critic = Critic(1),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.check_guidance(w_conditioned, "w_conditioned")
        fraction(target_decay=target_decay)
        lengths(rollouts=rollouts)
        total = self.backbone.schedule.steps
        within(1, total, solver_steps=solver_steps, teacher_steps=teacher_steps, rollouts=rollouts)
        within(0, 1000, denoising=denoising)
        if denoising and not w_conditioned and self.guidance != (1, 1):
            raise ValueError(
                f"denoising = {denoising:g} asks the student for data, which guidance {self.guidance[0]:g} has not made: "
                "set it to 0, w_conditioned to true or guidance to 1"
            )
        self.distance, self.denoising, self.target_decay, self.teacher_steps = distance, denoising, target_decay, teacher_steps
        walks = [Grid.named("trailing", n, total) for n in rollouts]
        self.grid = Grid(Grid.named("trailing", solver_steps, total).times.tolist(), walks, rule=f"trailing-{solver_steps}")
        student = self.role("student", w_conditioned=w_conditioned, s_conditioned=True)
        self.head, self.takes_turns, self.loss_is_distance = None, gan.is_on, not (gan.is_on or denoising)
        critic.check_pull(student, None)
        self.critic_lr = self.lr if critic.lr is None else critic.lr
        more = self.discriminator(gan)
        self.cast(student=student, target=student.copied("target"), **more, teacher=self.role("teacher", reflection=self.reflection))
        self.adversary = Adversary(self, None, self.head, critic.steps if gan.is_on else 1, gan)
        self.policies = Policies(Policy(self.student, ddim), Policy(self.teacher, ddim, fine=self.grid))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of the student, and with a GAN one of the discriminator on the same jumps."""
        student, critic = self.both()
        with torch.set_grad_enabled(self.adversary.student_turn):
            y, target = self.ends(b, self.below(b.node))

        if self.adversary.student_turn:
            with self.adversary.still():
                loss = soft = self.distance(y, target)
                if self.denoising:
                    loss = loss + self.denoising * self.as_large(soft, self.denoised(b), b)
                if self.adversary.gan.weight:
                    loss = loss + self.adversary.gan.weight * self.as_large(soft, self.adversary.realism(y, b), b)
                if self.descend(student, self.feedback(b, loss)):
                    self.advance()
                    self.target.follow(self.student, self.target_decay)

        self.adversary.descend(critic, y.detach(), b)

    def ends(self, b: LatentBatch, j: Tensor) -> tuple[Tensor, Tensor]:
        """Where the student's jump t -> s and the target's u -> s end, [B, C, H, W] each, both taken on to the clean end by the target.

        `j` [B]: the index of s in the grid's times.
        """
        s, end = self.grid.at(j), torch.full_like(b.t, END)
        with torch.no_grad():
            x_u, u = self.feed.answered(b, self.answer), b.s  # the first step, which none of s is above
            for k in range(2, self.teacher_steps + 1):
                v = self.grid.at(torch.minimum(b.node + k, j))  # the next node, and not beyond s
                p = self.teacher(x_u, u.clamp(min=0), b.c)  # CFG, then reflection
                x_u, u = jump(self.teacher.schedule, x_u, p, u, v), v
            x_s = self.G(self.target, x_u, u, s, b.c, reflect=True)
            target = self.G(self.target, x_s, s, end, b.c, reflect=True)
        x_s = self.G(self.student, b.x_t, b.t, s, b.c)
        return self.G(self.target, x_s, s, end, b.c), target  # the gradient passes through the target, to x_s

    def answer(self, b: LatentBatch) -> Tensor:
        """x_u [B, C, H, W] at the next node: the guided teacher's first step from x_t, which the buffer keeps beside it."""
        return jump(self.teacher.schedule, b.x_t, self.teacher(b.x_t, b.t, b.c), b.t, b.s)

    def G(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, c: Context, reflect: bool = False) -> Tensor:
        """The jump t -> s [B, C, H, W] of a network that is told s, with x0 reflected on the target's side; the identity at s = t."""
        now = t.clamp(min=0)  # no network is told END for its own time
        p = denoiser(x, now, c._replace(s=s))
        if reflect:
            self.record_saturation(p.x0)
            p = denoiser.reflected(x, now, p, self.reflection)
        return jump(denoiser.schedule, x, p, t, s)

    def below(self, node: Tensor) -> Tensor:
        """[B] indices of s in the grid's times, uniform below every node, the clean end among them."""
        share = torch.rand(node.shape, generator=numbers_of(self).local("s", node.device), device=node.device, dtype=widest(node.device))
        return node + 1 + (share * (len(self.grid) - node)).long()

    def denoised(self, b: LatentBatch) -> Tensor:
        """[B] the denoising loss of g(x_t, t, s = t) in the network's own space, 0 where no x0 belongs to x_t: but on forward latents."""
        rows = self.feed.origin(b).data  # as many on every rank
        if b.real is None or not rows:
            return torch.zeros(len(b.t), device=b.t.device)
        known = sent(torch.tensor(rows), b.t.device)
        x, t, x0, c = b.x_t[known], b.t[known], b.real[known], take(b.c, known)
        p = self.student(x, t, (c.guided(0.0) if self.student.network.w_conditioned else c)._replace(s=t))
        truth = self.student.schedule.from_x0(x, t, x0)
        loss = mse(self.student.output(p), self.student.output(truth))
        return loss.new_zeros(len(b.t)).index_add(0, known, loss)

    def as_large(self, soft: Tensor, term: Tensor | float, b: LatentBatch) -> Tensor:
        """A loss [B] times the ratio of the norms of both gradients in the student's last layer (Eq. 10, after Esser et al. 2021).

        The gradients are those of the batches of all processes.
        """
        network: Any = self.student.network
        layer, norms = network.last_layer(), []
        for loss in (soft, torch.as_tensor(term)):
            mean = (b.weight * loss).mean()
            grad = torch.autograd.grad(mean, layer, retain_graph=True, allow_unused=True)[0] if mean.requires_grad else None
            norms.append(averaged(torch.zeros_like(layer) if grad is None else grad).float().norm())  # all ask, who has one or not
        ratio = (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
        self.measures.record(adaptive_weight=ratio)
        return ratio * term

    def setup(self, stage: str) -> None:
        """Raises ValueError for a GAN without data, and for adaptive weights where no process has the whole last layer."""
        super().setup(stage)
        if isinstance(self.trainer.strategy, Sharded) and (self.denoising or self.adversary.gan.weight):
            raise ValueError(
                "CTM weighs its other terms by gradients of the student's last layer, which fsdp2 shards: set model.denoising to 0 and "
                "leave model.gan out, or train with ddp"
            )
        self.adversary.check_data(self.feed.has_images())

    def deploy(self, student: Denoiser) -> Deployment:
        """Deterministic jumps from node to node (gamma = 0), each told where it ends. No pipeline of diffusers could tell it so."""
        total = student.schedule.steps
        grid = partial(Grid.named, "trailing", total=total)
        return Deployment(Policy(student, ddim), grid, trained_counts(self.grid, total), self.eval_guidance)


def jump(schedule: NoiseSchedule, x: Tensor, p: Prediction, t: Tensor, s: Tensor) -> Tensor:
    """DDIM's step t -> s [B, ...]; at s = t, END too, x itself whatever the prediction is."""
    return torch.where((t == s).view(-1, *(1,) * (x.ndim - 1)), x, ddim(schedule, x, p, t, s))
