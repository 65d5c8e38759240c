"""Phased consistency distillation (Wang et al. 2024, arXiv 2405.18407, Alg. 1; METHODS 5.4) as a feedback loss of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import fraction, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import Distance
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.feed import Wants
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.adversary import Adversary, Critic, Span
from ddil_lightning.training.contest import Contest
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.gan import Gan, Logits
from ddil_lightning.training.identity import identity_but
from ddil_lightning.training.method import Distillation


class Jumps(Adversary):
    """A discriminator of jumps, which the student is to fool by the margin of the hinge loss and no further, as its authors have it."""

    def fooling(self, logits: Logits) -> Tensor:
        """[B] the student's side on the logits D of its jumps: max(0, 1 - D), or softplus(-D)."""
        return self.gan.real(logits)


class PCM(Contest, Distillation):
    """In each of M phases the jump to the phase's edge e should end where the jump ends that begins after one guided teacher step.

    The jump is DDIM's, alpha_e x0 + sigma_e eps: at the edge itself it is the identity, so that no boundary scalings are needed, and with
    M = 1 this is LCM without them. A student of M phases samples by M deterministic DDIM steps, an edge each; so student and teacher
    transport alike, a latent needs no x0, and forward latents, roll-outs of either and mixtures are all legal. The GAN is one of latents
    between the edges, whose "real" is the target's jump and not data: it is defined wherever the target is. Reflection acts on the guided
    teacher's x0 and on the target's, never on the student's.

    Args:
        w_conditioned: the student is told w (a zero-initialised embedding); without it one guidance is baked in, and the teacher
            alone sees w.
        phases: M, the steps of the student; their edges are nodes of the training grid.
        solver_steps: nodes of the training grid, between which the teacher takes one step; a multiple of `phases`.
        target_decay: decay of the average of the student that gives targets; 0: the online student, without gradient.
        distance: of the ends of the two jumps.
        gan: the discriminator on noised ends, which reads the frozen teacher's features; its authors' weight is 0.1, its loss the hinge.
        critic: the discriminator's time scale.
    """

    wants = Wants(real=False)
    target: Role
    head: nn.Module | None

    def __init__(
        self,
        *,
        w_conditioned: bool = True,
        phases: int = 4,
        solver_steps: int = 40,
        target_decay: float = 0.95,
        distance: Distance = Distance(),
        gan: Gan = Gan(features="teacher", kind="hinge"),
        critic: Critic = Critic(1),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.check_guidance(w_conditioned, "w_conditioned")
        fraction(target_decay=target_decay)
        total = self.backbone.schedule.steps
        within(1, total, phases=phases, solver_steps=solver_steps)
        if total % solver_steps or solver_steps % phases:
            raise ValueError(
                f"solver_steps = {solver_steps} must divide the schedule's {total} times, and phases = {phases} must divide solver_steps: "
                "else the edges of the phases are no nodes"
            )
        self.distance, self.target_decay, self.phases = distance, target_decay, phases
        self.grid = Grid(Grid.named("trailing", solver_steps, total).times.tolist(), [Grid.named("trailing", phases, total)])
        student = self.role("student", w_conditioned=w_conditioned)
        self.head, self.takes_turns, self.loss_is_distance = None, gan.is_on, not gan.is_on
        critic.check_pull(student, None)
        self.critic_lr = self.lr if critic.lr is None else critic.lr
        more = self.discriminator(gan)
        self.cast(student=student, target=student.copied("target"), **more, teacher=self.role("teacher", reflection=self.reflection))
        self.adversary = Jumps(self, None, self.head, critic.steps if gan.is_on else 1, gan)
        self.policies = Policies(Policy(self.student, ddim), Policy(self.teacher, ddim, fine=self.grid))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of the student, and with a GAN one of the discriminator on the same ends."""
        student, critic = self.both()
        span = self.phase(self.edge(b))
        with torch.set_grad_enabled(self.adversary.student_turn):
            y, target = self.ends(b)

        if self.adversary.student_turn:
            with self.adversary.still():
                loss = self.distance(y, target) + self.adversary.gan.weight * self.adversary.realism(y, b, span)
                if self.descend(student, self.feedback(b, loss)):
                    self.advance()
                    self.target.follow(self.student, self.target_decay)

        self.adversary.descend(critic, y.detach(), b, target, span)

    def ends(self, b: LatentBatch) -> tuple[Tensor, Tensor]:
        """Where the student's jump t -> e ends, and the target's u -> e from the point to which the teacher steps: [B, C, H, W] each."""
        e = self.edge(b)
        with torch.no_grad():
            x_u = self.feed.answered(b, self.answer)
            target = identity_but(self.inside(b), x_u, b, self.f_target, self.shards.split)
        # The student comes last: its activations do not lie in memory, and out of the cache, while the other two work.
        return self.f(self.student, b.x_t, b.t, e, b), target

    def answer(self, b: LatentBatch) -> Tensor:
        """x_u [B, C, H, W]: the guided teacher's one step from x_t, which the buffer keeps beside it."""
        p = self.teacher(b.x_t, b.t, b.c)  # CFG, then reflection
        return ddim(self.teacher.schedule, b.x_t, p, b.t, b.s)  # t -> u along the guided flow

    def f_target(self, x_u: Tensor, b: LatentBatch) -> Tensor:
        """Where the target's jump from (x_u, u) to the edge ends [B, C, H, W]."""
        return self.f(self.target, x_u, b.s, self.edge(b), b, reflect=True)

    def inside(self, b: LatentBatch) -> list[int]:
        """The rows whose teacher's step does not end at the edge, where the target's jump is none."""
        each = len(self.grid) // self.phases
        return [row for row, node in enumerate(self.feed.origin(b).node) if (node + 1) % each]

    def f(self, denoiser: Denoiser, x: Tensor, t: Tensor, e: Tensor, b: LatentBatch, reflect: bool = False) -> Tensor:
        """The jump to the edge [B, C, H, W], x0 reflected on the target's side. At the edge, END too, it is x whatever is predicted."""
        now = t.clamp(min=0)  # no network is told END
        p = denoiser(x, now, b.c)
        if reflect:
            self.record_saturation(p.x0)
            p = denoiser.reflected(x, now, p, self.reflection)
        return torch.where((t == e).view(-1, *(1,) * (x.ndim - 1)), x, ddim(denoiser.schedule, x, p, t, e))

    def edge(self, b: LatentBatch) -> Tensor:
        """[B] the end of the phase of a node: the next time of the student's own grid."""
        each = len(self.grid) // self.phases
        return self.grid.at((b.node // each + 1) * each)

    def phase(self, e: Tensor) -> Span:
        """What the discriminator sees of jumps to the edge e: x_e noised to a time of the phase, which begins T / M above its edge."""
        return Span(e, e.clamp(min=0), e + self.student.schedule.steps // self.phases - 1)

    def deploy(self, student: Denoiser) -> Deployment:
        """DDIM from edge to edge, deterministic, in the one step count that it is made for."""
        total = student.schedule.steps
        scheduler = partial(self.backbone.scheduler, ddim, student.predicts, "trailing", self.phases)
        grid = partial(Grid.named, "trailing", total=total)
        return Deployment(Policy(student, ddim), grid, (self.phases,), self.eval_guidance, scheduler)
