"""Rectified flow by reflow (Liu et al. 2023, Alg. 1; InstaFlow, Liu et al. 2024; METHODS 5.5), as a feedback loss of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.bounds import lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import Transition, ddim, noise_corrected
from ddil_lightning.feed import Pairs, Wants
from ddil_lightning.records import END, FORWARD, TEACHER, LatentBatch, sent, take
from ddil_lightning.training.deployment import Deployment, one_step, trained_counts
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.regression import Regression


class Reflow(Distillation):
    """The student's flow should go straight from noise z to y, where the teacher's flow ends: v(u_r) = y - z on u_r = (1 - r) z + r y.

    The line is walked in the teacher's own times. At r = alpha / (alpha + sigma) its point is, up to a factor, alpha y + sigma z, so that a
    network of a variance-preserving process is told what it was trained for, begins as the teacher's flow, and needs no scheduler of its
    own: a DDIM step is the Euler step along the line. |v - (y - z)| is (alpha + sigma) / sigma |x0 - y| there. The first node is z itself,
    from which the step along the line is alpha_s y + sigma_s z, DDIM's with noise correction: DDIM would read alpha y + sigma eps there,
    and leave the line where alpha is not 0. No scheduler of diffusers corrects it, so the exported pipeline of several steps takes DDIM's
    first step, and its card says so.

    Forward latents lie on the line of a stored pair, those of the teacher's own trajectories on the line of their ends. A student's own
    latent has no z: with `relabel` the teacher's flow is solved from where it is, which makes y an answer to it (METHODS 1.4, class A).
    A student that is straight enough is distilled into one step by a second run: its pipeline, `nodes: 1`, and images compared
    (`regression.of`), as InstaFlow does it.

    Args:
        nodes: times of the training, evenly spaced in r, beside those of `rollouts`; 1 for noise alone.
        rollouts: the step counts that roll-outs walk, on trailing nodes.
        teacher_steps: of the teacher's roll-outs, on the whole grid; a multiple of each of `rollouts`.
        relabel: steps in which the teacher answers a student's own latent; 0 refuses these.
        w_conditioned: the student is told w (a zero-initialised embedding); without it guidance is baked in.
        regression: of x0 on y. In latents its distance is of the velocities; of images, the one of x0 and y.
        pairs: noise and the teacher's answer to it.
    """

    loss_is_distance = True

    def __init__(
        self,
        *,
        nodes: int = 32,
        rollouts: tuple[int, ...] = (4,),
        teacher_steps: int = 32,
        relabel: int = 0,
        w_conditioned: bool = False,
        regression: Regression = Regression(1.0),
        pairs: Pairs = Pairs(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.check_guidance(w_conditioned, "w_conditioned")
        schedule = self.backbone.schedule
        lengths(rollouts=rollouts)
        within(1, schedule.steps, nodes=nodes, rollouts=rollouts, teacher_steps=teacher_steps)
        within(0, schedule.steps, relabel=relabel)
        self.steps = (1,) if nodes == 1 else rollouts
        walks = [Grid.named("trailing", n, schedule.steps) for n in self.steps]
        fine = Grid.named("trailing", teacher_steps, schedule.steps)
        for walk in walks:
            fine.rows(walk.nodes)  # raises where the teacher would not stop at the student's nodes
        times = {*straight(schedule, nodes), *(t for walk in walks for t in walk.nodes.tolist())}
        self.grid = Grid([*sorted(times, reverse=True), END], walks, rule="straight")
        self.relabel, self.regression, self._distance = relabel, regression, regression.between(self.backbone)
        self.wants = Wants(pure_noise=True, ends=True, pairs=pairs, real=False)
        student = self.role("student", w_conditioned=w_conditioned)
        self.cast(student=student, teacher=self.role("teacher", reflection=self.reflection))
        # A single step ends at x0, corrected or not, and nothing is to be said of it.
        self.transition: Transition = ddim if nodes == 1 else noise_corrected(schedule)
        self.policies = Policies(Policy(self.student, self.transition), Policy(self.teacher, ddim, fine=fine))

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update: x0 at a point of the line answers y, that is, the velocity there is y - z."""
        with torch.no_grad():
            x, y = self.line(b)
        x0 = self.student(x, b.t, b.c).x0
        if self.regression.of == "latents":
            scale = self.slope(b, x)
            x0, y = scale * x0, scale * y
        if self.descend(self.optimizers(), self.feedback(b, self.regression.weight * self._distance(x0, y))):
            self.advance()

    def line(self, b: LatentBatch) -> tuple[Tensor, Tensor]:
        """(x, y) [B, C, H, W]: the point at b.t between the ends z and y, or a student's own latent and the teacher's answer to it."""
        assert b.noise is not None and b.end is not None and b.whole is not None  # `wants` asks for them
        ours = (b.source == FORWARD) | (b.whole == TEACHER)
        wide = (-1, *(1,) * (b.end.ndim - 1))
        on = ours & (b.node > 0)  # at the first node every latent is its z
        x = torch.where(on.view(wide), self.student.schedule.add_noise(b.end, b.noise, b.t), b.x_t)
        origin = self.feed.origin(b)
        if not self.relabel or not origin.rolled:
            return x, b.end
        assert origin.whole is not None
        # One at least, for a teacher in shards is asked by all processes together, however many of these states are here.
        asked = [row for row in origin.rolled if origin.whole[row] != TEACHER] or origin.rolled[:1]
        rows = sent(torch.tensor(asked), x.device)
        answers = self.feed.answered(take(b._replace(x_t=x), rows), self.answer, [origin.slot[row] for row in asked])
        return x, torch.where(ours.view(wide), b.end, b.end.index_copy(0, rows, answers.to(b.end.dtype)))

    def answer(self, b: LatentBatch) -> Tensor:
        """y [B, C, H, W]: where the teacher's flow ends from x_t, in `relabel` steps, which the buffer keeps beside it."""
        y = self.policies.teacher.solve(b.x_t, b.t, b.c, self.relabel)  # type: ignore[union-attr]
        self.record_saturation(y)  # of answers that the buffer keeps, when they are asked for
        return y

    def slope(self, b: LatentBatch, like: Tensor) -> Tensor:
        """[B, 1, ...] |dv| / |dx0| = (alpha + sigma) / sigma on the line; 1 at the first node, where r is 0."""
        alpha, sigma = self.student.schedule.at(b.t, like)
        return torch.where((b.node > 0).view(sigma.shape), (alpha + sigma) / sigma, torch.ones_like(sigma))

    # What the rest of the library asks -----------------------------------------------------------------------------------------------

    def check_prior(self, prior: Any) -> None:
        """Also raises ValueError for student latents that nobody would answer."""
        super().check_prior(prior)
        if prior.student > 0 and not self.relabel:
            raise ValueError(
                f"the prior gives {prior.student:g} to student latents, which lie on no line to an answer: set model.relabel "
                "to the steps in which the teacher answers them, or give that share to forward or teacher latents"
            )

    def deploy(self, student: Denoiser) -> Deployment:
        """Euler steps along the line, on trailing nodes: DDIM's, of which the first is corrected; the pipeline's is DDIM's own."""
        total = self.student.schedule.steps
        counts = trained_counts(self.grid, total)
        scheduler = partial(self.backbone.scheduler, ddim, student.predicts, "trailing", counts[0])
        grid = partial(one_step, total=total) if self.steps == (1,) else partial(Grid.named, "trailing", total=total)
        return Deployment(Policy(student, self.transition), grid, counts, self.eval_guidance, scheduler).by_ddim()


def straight(schedule: NoiseSchedule, n: int) -> list[int]:
    """`n` times from the last one down, nearest to even steps of r = alpha / (alpha + sigma) from there to r = 1, without repetitions."""
    r = (schedule.alphas / (schedule.alphas + schedule.sigmas))[:-1]
    wanted = r[-1] + (1 - r[-1]) * torch.arange(n, dtype=r.dtype) / n
    return sorted({int((r - at).abs().argmin()) for at in wanted}, reverse=True)
