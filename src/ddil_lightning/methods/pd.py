"""Progressive distillation (Salimans & Ho 2022, Alg. 2) with guidance conditioning (Meng et al. 2023): Eq. 3 and Alg. 3 of DDIL."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import Distance
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.feed import Wants
from ddil_lightning.records import END, LatentBatch
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.plan import Stage, check_plan

Weight = Literal["snr+1", "truncated-snr", "snr", "x0"]


class PD(Distillation):
    """One student step = two teacher steps: N nodes are halved stage by stage, and the former student is the next teacher.

    The target needs no x0, so every source is legal: forward latents at the student's N nodes, its own DDIM roll-outs, the teacher's DDIM
    steps on 2N nodes, and mixtures of both. Reflection acts on the teacher's x0, after guidance, and so on the target: its x0 is the mean
    of the teacher's two, weighted by the growth of alpha / sigma in each step, and a mean stays in the box. The student predicts v, or the
    velocity of a flow.

    Args:
        stages: the plan, carried out by the callback Stages: a list of {kind, steps, updates, parts, lr, warmup} (`training.plan.Stage`),
            and of its parts {updates, forward, student, teacher}. `eps_to_v` turns a copy of an eps teacher into a v network, `guidance`
            teaches it guidance; both train on all times. Without a guidance stage the first halving does both: its teacher is the guided
            pipeline, at twice the evaluations.
        teacher_steps: of the first teacher's grid.
        w_conditioned: the student is told w (a zero-initialised embedding); without it guidance is baked in, and only the pipeline sees w.
        weight: of the squared error in x0: SNR + 1 (the squared error in v), max(SNR, 1), SNR or 1 (`x0`).
        distance: of the error so weighted; mse is the paper's. The pseudo-Huber one asks for a median where mse asks for a mean, which is
            blurred while the student still confuses two targets.
        rule: of all grids, `trailing` (DDIM) or `linspace` (DPM-Solver++).
        updates: student updates in all, by default the sum of the stages; it cuts the plan short, or lengthens its last stage.
    """

    former: Role | None
    """The former student; None while the plan never needs one."""
    wants = Wants(real=False)
    loss_is_distance = True

    def __init__(
        self,
        *,
        stages: list[Stage],
        teacher_steps: int = 32,
        w_conditioned: bool = True,
        weight: Weight = "snr+1",
        distance: Distance = Distance("mse"),
        rule: Literal["trailing", "linspace"] = "trailing",
        updates: int | None = None,
        **kwargs: Any,
    ) -> None:
        # At least 1: a plan without updates is refused below, by name.
        super().__init__(updates=max(sum(stage.length for stage in stages), 1) if updates is None else updates, **kwargs)
        self.check_guidance(w_conditioned, "w_conditioned")
        backbone, schedule = self.backbone, self.backbone.schedule
        within(2, schedule.steps, teacher_steps=teacher_steps)
        check_plan(stages, teacher_steps, rule, schedule.steps, backbone.predicts)
        self.stages, self.teacher_steps, self.rule = stages, teacher_steps, rule
        self.weight, self.distance, self._own = weight, distance, (self.lr, self.descent.warmup)
        student = self.role("student", w_conditioned=w_conditioned, predicts="flow" if backbone.predicts == "flow" else "v")
        self.former = None
        inherits = any(self._inherits(k) for k in range(len(stages)))
        former = {"former": student.copied("former", self.reflection)} if inherits else {}
        self.cast(student=student, **former, teacher=self.role("teacher", reflection=self.reflection))
        self._begin()

    def training_step(self, b: LatentBatch, i: int) -> None:
        """One update of the present stage."""
        with torch.no_grad():
            target = self.target(b)
        v = self.student(b.x_t, b.t, b.c).v
        scale = v_weight(self.weight, self.student.schedule, b.t, b.x_t).sqrt().view(-1, *(1,) * (v.ndim - 1))
        loss = self.distance(scale * v, scale * target)
        if self.descend(self.optimizers(), self.feedback(b, loss)):
            self.advance()

    def target(self, b: LatentBatch) -> Tensor:
        """v* [B, C, H, W] (DDIL Eq. 3): what the student must say at x_t to land, in one step, where the teacher lands in two."""
        if self.now.preliminary:  # a network for all times: no steps to match
            return self.expert(b.x_t, b.t, b.c if self.now.kind == "guidance" else b.c.guided(None)).v
        v, saturated = self.feed.answered(b, self.answer)
        self.measures.record(**{"reflect/saturated": saturated})
        return v

    def answer(self, b: LatentBatch) -> tuple[Tensor, Tensor]:
        """(v* [B, C, H, W], the saturation of the teacher's x0 [B]) by its two steps, which the buffer keeps beside x_t for the stage."""
        T, schedule, x_t, t, s = self.expert, self.student.schedule, b.x_t, b.t, b.s
        m = self.fine.at(2 * b.node + 1)  # the teacher's node between t and s
        p = T(x_t, t, b.c)
        x_m = ddim(schedule, x_t, p, t, m)
        x_s = ddim(schedule, x_m, T(x_m, m, b.c), m, s)
        return one_step(schedule, x_t, x_s, t, s), self.reflection.saturation(p.x0)

    # Stages ----------------------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> Stage:
        """The present stage of the plan."""
        return self.stages[self.stage]

    @property
    def expert(self) -> Denoiser:
        """The present stage's teacher: the guided pipeline, then the former student."""
        return self.former if self.former is not None and self._inherits(self.stage) else self.teacher

    @property
    def stage_length(self) -> int:
        """Student updates of the present stage; the run's end cuts it short, and the last one of the plan lasts to it."""
        rest = max(self.updates - self.stage_start, 1)
        return rest if self.stage == len(self.stages) - 1 else min(self.now.length, rest)

    @property
    def stage_is_over(self) -> bool:
        """Of a last stage that goes on to the end of the run, after the plan's own updates."""
        return self.stage_updates == self.now.length

    def _inherits(self, stage: int) -> bool:
        """Whether the teacher of stage number `stage` is the former student: of a halving, once one of guidance or halving has been."""
        return self.stages[stage].kind == "halve" and any(before.kind != "eps_to_v" for before in self.stages[:stage])

    def _begin(self) -> None:
        """Grids, policies and learning rate of the present stage: a function of its number, so that nothing of it needs saving."""
        own_lr, own_warmup = self._own
        self.lr = own_lr if self.now.lr is None else self.now.lr
        self.descent.warmup = own_warmup if self.now.warmup is None else self.now.warmup
        total = self.student.schedule.steps
        n = self.now.steps or self.teacher_steps // 2
        self.fine = Grid.named(self.rule, 2 * n, total)
        self.grid = Grid([*range(total - 1, -1, -1), END], rule="all") if self.now.preliminary else Grid.named(self.rule, n, total)
        self.policies = Policies(Policy(self.student, ddim), Policy(self.expert, ddim, fine=self.fine))

    def next_stage(self) -> None:
        """The deployed student becomes the teacher and starts anew as its copy, in place; optimiser, learning rate and average restart."""
        average = self.averaging.role
        if self.former is not None:
            self.former.follow(self.student if average is None else average)
        if average is not None:
            self.student.follow(average)
        self.stage, self.stage_start = self.stage + 1, self.student_updates
        self._begin()
        self.descent.restate()  # of a run that goes on at this very boundary, which would do so after the rates below are set
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["base_lr"] = self.lr

    # What the rest of the library asks -------------------------------------------------------------------------------------------

    def deploy(self, student: Denoiser) -> Deployment:
        """DDIM on the nodes of the rule, in the one step count that the present stage makes."""
        return self._deploy(student, self.stage)

    def deployments(self) -> list[Deployment]:
        """A stage to come has the same student so far, and its own step count."""
        student = self.deployment.denoiser
        return [self._deploy(student, k) for k in range(self.stage, len(self.stages))]

    def walks(self) -> list[Grid]:
        """A halving's roll-outs walk its own nodes; preliminary stages have none."""
        counts = [stage.steps for stage in self.stages[self.stage :] if stage.steps is not None]
        return [Grid.named(self.rule, n, self.student.schedule.steps) for n in counts]

    def _deploy(self, student: Denoiser, stage: int) -> Deployment:
        n, total = self.stages[stage].steps or self.teacher_steps, self.student.schedule.steps
        scheduler = partial(self.backbone.scheduler, ddim, student.predicts, self.rule, n)
        return Deployment(Policy(student, ddim), partial(Grid.named, self.rule, total=total), (n,), self.eval_guidance, scheduler)

    def setup(self, stage: str) -> None:
        """Raises ValueError where nothing would carry out the plan."""
        super().setup(stage)
        if stage == "fit" and not any(hasattr(callback, "next_stage") for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("PD trains in stages and nothing moves it from one to the next: give the Trainer the callback Stages()")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The plan up to the present stage, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ddil"]["plan"] = self._plan(self.stage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError for a checkpoint that another plan has led to."""
        super().on_load_checkpoint(checkpoint)
        theirs = checkpoint["ddil"]["plan"]
        mine = self._plan(self.stage) if self.stage < len(self.stages) else []
        if mine != theirs:
            raise ValueError(f"the checkpoint has followed the plan {', '.join(theirs)}; this config's is {', '.join(self._plan())}")
        self._begin()
        self.descent.rebase(self.lr)

    def _plan(self, upto: int | None = None) -> list[str]:
        """The plan in words: the grid, the stages before number `upto` with their updates, and that one (all without a number)."""
        upto = len(self.stages) if upto is None else upto
        past = [f"{stage} in {stage.length} updates" for stage in self.stages[:upto]]
        return [f"{self.teacher_steps} {self.rule} steps", *past, *(str(stage) for stage in self.stages[upto : upto + 1])]


def one_step(schedule: NoiseSchedule, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The v [B, C, H, W] at x_t whose single DDIM step t -> s ends in x_s (METHODS 2.3).

    For VP the rotation solved for v, (cos x_t - x_s) / sin: finite at END and where alpha_t is 0. Else from
    x0* = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t), which is the same for VP.
    """
    if schedule.variance_preserving:
        cos, sin = schedule.rotation(t, s, x_t)
        return (cos * x_t - x_s) / sin
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t, x_t), schedule.at(s, x_t)
    ratio = sigma_s / sigma_t
    return schedule.from_x0(x_t, t, (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)).v


def v_weight(kind: Weight, schedule: NoiseSchedule, t: Tensor, like: Tensor) -> Tensor:
    """[B] the factor on |dv|^2 that makes it |dx0|^2 times SNR + 1, max(SNR, 1), SNR or 1: |dv| = (alpha^2 + sigma^2) / sigma |dx0|.

    For VP these are 1, max(alpha^2, sigma^2), alpha^2 and sigma^2: no division, per sample (METHODS 2.3). Raises ValueError otherwise.
    """
    a2, s2 = (x.square().flatten() for x in schedule.at(t, like))
    norm = torch.ones_like(a2) if schedule.variance_preserving else a2 + s2
    found = {"snr+1": norm, "truncated-snr": torch.maximum(a2, s2), "snr": a2, "x0": s2}
    if kind not in found:
        raise ValueError(f"a loss weight is one of {', '.join(found)}, not {kind!r}")
    return found[kind] / norm.square()
