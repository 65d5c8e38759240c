"""What all methods share: the frozen pipeline, one clock, optimisation by hand, averages, and what inference needs to know."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from ddil_lightning.backbones.pipeline import Backbone
from ddil_lightning.bounds import fraction, lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.reflection import BOX, Mode, Reflection
from ddil_lightning.diffusion.schedule import Grid
from ddil_lightning.diffusion.solver import Policy
from ddil_lightning.training.averaging import lerp_
from ddil_lightning.training.clock import Clock
from ddil_lightning.training.optimisation import Descent
from ddil_lightning.training.sharding import Shardable, check_strategy

Dtype = Literal["float32", "bfloat16", "float16"]


def guidance_range(g: float | Sequence[float]) -> tuple[float, float]:
    """(g_min, g_max) of one guidance g or of a range. Raises ValueError for what is neither, or falls."""
    ends = list(g) if isinstance(g, Sequence) else [g]
    if len(ends) not in (1, 2):
        raise ValueError(f"guidance is {g!r}: give one number, or a range [g_min, g_max]")
    within(0, 1000, guidance=g)
    low, high = ends[0], ends[-1]
    if low > high:
        raise ValueError(f"the range of guidance falls, from {low:g} to {high:g}: give the smaller one first")
    return float(low), float(high)


def checked_box(box: list[list[float]] | None, channels: int) -> list[list[float]]:
    """(lo, hi) per channel, BOX where none is given. Raises ValueError for another shape than two lists with a number per channel."""
    if box is None:
        return [[-BOX] * channels, [BOX] * channels]
    if len(box) != 2:
        raise ValueError(f"box is {box!r}: give [[lo, ...], [hi, ...]], {channels} numbers each, one per channel of the latents")
    for side in box:
        lengths(channels, box=side)
        within(-1e6, 1e6, box=side)
    return box


class Distillation(Descent, Shardable):
    """Base of every method. A method builds `student`, `policies` and `grid` and writes `training_step`.

    `pipeline`: built-in name, folder, hub id, or a loaded Backbone. `guidance`: g, or a range [g_min, g_max] for a student that is told it
    (default: what the pipeline recommends). `updates`: student updates in all, the one clock. `lr` rises over `warmup` updates and falls
    linearly to `final_lr * lr`. `clip`: gradient norm. `accumulate`: micro-batches per update. `ema`: decay of the average that is
    evaluated and exported (0: the online student). `reflect`, `box`: thresholding of x0 estimates; the box (lo, hi per channel) is
    estimated from the data if it is not given. `teacher_dtype`: of the frozen U-Net and text encoders, `vae_dtype` of the autoencoder that
    makes the training's latents (the student's weights are float32; `trainer.precision` says what it computes in).
    """

    backbone: Backbone
    student: Denoiser
    teacher: Denoiser

    sources: tuple[str, ...] = ("forward", "student", "teacher")
    """The sources on which the method's targets are defined (METHODS 1.4)."""

    def __init__(
        self,
        pipeline: str | Backbone = "builtin",
        guidance: float | list[float] | None = None,
        updates: int = 1000,
        lr: float = 1e-5,
        final_lr: float = 0.05,
        warmup: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip: float = 1.0,
        accumulate: int = 1,
        ema: float = 0.0,
        reflect: Mode = "off",
        box: list[list[float]] | None = None,
        gradient_checkpointing: bool = False,
        teacher_dtype: Dtype = "float32",
        vae_dtype: Dtype = "float32",
        log_every: int = 10,
    ) -> None:
        super().__init__(betas=betas, weight_decay=weight_decay, clip=clip, accumulate=accumulate)
        within(1, 10**9, updates=updates, log_every=log_every)
        within(0, 10**9, warmup=warmup)
        within(0, 10, lr=lr, final_lr=final_lr)
        fraction(ema=ema)
        # Frozen networks stay out of parameters(), state_dict and DDP: they live behind the module's back.
        dtypes = getattr(torch, teacher_dtype), getattr(torch, vae_dtype)
        self.__dict__["backbone"] = pipeline if isinstance(pipeline, Backbone) else Backbone(pipeline, *dtypes)
        g = self.backbone.guidance if guidance is None else guidance
        self.guidance = guidance_range(g)
        self.updates, self.lr, self.final_lr, self.warmup, self.ema = updates, lr, final_lr, warmup, ema
        self.gradient_checkpointing, self.log_every = gradient_checkpointing, log_every
        self.has_box = box is not None or reflect == "off"
        lo, hi = checked_box(box, self.backbone.latent_shape[0])
        self.reflection = Reflection(lo, hi, reflect)
        self.student_updates, self.stage, self.stage_start = 0, 0, 0
        self.average: nn.Module | None = None

    # What the draw and inference ask -----------------------------------------------------------------------------------------

    @property
    def stage_updates(self) -> int:
        """Student updates of the present stage, of which it has `stage_length`."""
        return self.student_updates - self.stage_start

    @property
    def stage_length(self) -> int:
        """Student updates that the present stage has; a method without stages has one."""
        return self.updates

    @property
    def stage_is_over(self) -> bool:
        """Whether the present stage has had all the updates that its plan gives it."""
        return self.stage_updates == self.stage_length

    @property
    def stage_count(self) -> int:
        """How many stages there are."""
        return 1

    @contextmanager
    def at_stage(self, stage: int) -> Iterator[None]:
        """Inside, `steps`, `sampler` and `scheduler` are those of stage number `stage`: what will be exported then can be tried now."""
        yield

    @property
    def steps(self) -> tuple[int, ...]:
        """The step counts that the present student is made for, the one that its pipeline recommends first."""
        return (4, 2, 1)

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1."""
        return min(self.student_updates / self.updates, 1.0)

    @property
    def evaluations(self) -> dict[str, int]:
        """Network evaluations of one sample each so far, by role."""
        return {name: d.evaluations for name, d in self.denoisers().items()}

    def denoisers(self) -> dict[str, Denoiser]:
        """The networks by role."""
        return {"student": self.student, "teacher": self.teacher}

    def deployed(self) -> nn.Module:
        """The student network (a backbones.UNet) that is evaluated and exported: the average if there is one.

        Under fsdp2 it is sharded while it trains, and all processes must call it together; see `gathered`.
        """
        if self.whole is not None:
            return self.whole
        return self.average if self.average is not None else self.student.network

    def with_average(self) -> None:
        """Called by a method once its student exists."""
        if self.ema:
            self.average = copy.deepcopy(self.student.network).requires_grad_(False).eval()

    @property
    def eval_guidance(self) -> float:
        """The guidance g of previews and tests: what the pipeline recommends, if it was trained, else the middle of the range."""
        low, high = self.guidance
        g = self.backbone.guidance
        return g if low <= g <= high else (low + high) / 2

    @property
    def student_guidance(self) -> float:
        """The guidance g that the student's samples stand for: what it is asked for, or what was baked into it."""
        return self.eval_guidance

    def teacher_sampler(self, steps: int) -> tuple[Policy, Grid]:
        """The frozen pipeline with DDIM on trailing nodes, without reflection: the baseline of every table."""
        teacher = Denoiser(self.backbone.teacher(), self.teacher.schedule, self.teacher.predicts, null=self.teacher.null)
        return Policy(teacher, "ddim"), Grid.named("trailing", steps, self.teacher.schedule.steps)

    def sampler(self, steps: int) -> tuple[Policy, Grid]:
        """How the student is deployed in `steps` steps; the same object serves previews, tests and the check of the export."""
        raise TypeError(f"{type(self).__name__} does not say how it samples")

    def scheduler(self) -> Any:
        """The diffusers scheduler that holds the trained times, for the exported pipeline."""
        raise TypeError(f"{type(self).__name__} does not say its scheduler")

    def check_guidance(self, told: bool, switch: str = "") -> None:
        """Raises ValueError for a range of guidance and a student that is not `told` its w; `switch`: the option that would tell it."""
        low, high = self.guidance
        if low != high and not told:
            other = f", or set model.{switch} to true" if switch else ""
            raise ValueError(f"{type(self).__name__}'s student is not told the guidance: give one number, not {low} to {high}{other}")

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """The state of a checkpoint as far as inference needs it: of a `bare` pipeline the deployed network alone, mapped from the file."""
        if not self.backbone.bare:
            self.load_state_dict(weights)
            return
        network = self.deployed()
        name = next(name for name, module in self.named_modules() if module is network)
        network.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}, assign=True)
        self.reflection.load_state_dict({k.removeprefix("reflection."): v for k, v in weights.items() if k.startswith("reflection.")})
        self.backbone.stands_in(network)
        for child, module in list(self.named_children()):
            if isinstance(module, Denoiser) and module.network is not network:
                module.network = nn.Identity()
            elif module is not network and any(p.is_meta for p in module.parameters()):
                delattr(self, child)

    # Optimisation ----------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW over what the student trains."""
        return self.adamw(self.student, self.lr)

    def lr_factor(self) -> float:
        """The learning rate's multiple at the present clock: linear warm-up, then linear to `final_lr`, in every stage anew."""
        u = self.stage_updates
        if u < self.warmup:
            return (u + 1) / self.warmup
        return 1 - (1 - self.final_lr) * (u - self.warmup) / max(self.stage_length - self.warmup, 1)

    def advance(self) -> None:
        """The student was updated: the clock and the averages follow."""
        self.student_updates += 1
        if self.average is not None:
            # A young average follows faster, or the first previews would show the initial weights.
            lerp_(self.average, self.student.network, min(self.ema, (1 + self.stage_updates) / (10 + self.stage_updates)))

    # Lightning -------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check strategy and precision, and the prior against the method. Raises ValueError."""
        check_strategy(self.trainer.strategy, self.trainer.precision)
        self.check_precision(self.trainer.precision)
        if self.feed.prior is not None:
            self.check_prior(self.feed.prior)

    def check_precision(self, precision: str) -> None:
        """Raises ValueError for a Trainer that would turn the student itself to half precision."""
        if precision in ("bf16-true", "16-true"):
            mixed = precision.replace("true", "mixed")
            raise ValueError(
                f"trainer.precision {precision} would round most updates of the student to nothing: take {mixed}, which keeps its weights "
                "in float32, and model.teacher_dtype for the frozen networks"
            )

    def check_prior(self, prior: Any) -> None:
        """Raises ValueError when `prior` gives a share to a source on which this method has no target."""
        for name in ("forward", "student", "teacher"):
            if getattr(prior, name) > 0 and name not in self.sources:
                raise ValueError(
                    f"the prior gives {getattr(prior, name):g} to {name} latents, on which {type(self).__name__} has no target: "
                    f"its sources are {', '.join(self.sources)}"
                )

    def on_fit_start(self) -> None:
        """The box from the data, once it is encoded."""
        if not self.has_box:
            found = self.feed.box()
            if found is not None:
                self.reflection.lo.copy_(torch.tensor(found[0])), self.reflection.hi.copy_(torch.tensor(found[1]))
            elif self.trainer.is_global_zero:
                said = f"reflect: {self.reflection.mode} without images to take the box from: it is {-BOX} to {BOX} in every channel"
                logging.getLogger(__name__).warning(f"{said}; give another by model.box: [[lo, ...], [hi, ...]], a number per channel")
            self.has_box = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The module's hook is the last one of a batch: what must not be done before a checkpoint is written is done now."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "after_checkpoints"):
                callback.after_checkpoints(self.trainer, self)

    def configure_callbacks(self) -> list[Callback]:
        """The clock travels with the method, so that a bare Trainer gets it too."""
        return [Clock()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The clock and the counts."""
        names = ("student_updates", "stage", "stage_start", "has_box", "evaluations")
        own = {"micro": dict(self._micro), "sharded": self.sharded}
        checkpoint["ddil"] = {**{name: getattr(self, name) for name in names}, **own}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them."""
        state = checkpoint["ddil"]
        for name in ("student_updates", "stage", "stage_start", "has_box"):
            setattr(self, name, state[name])
        self._micro = dict(state["micro"])
        for name, denoiser in self.denoisers().items():
            denoiser.evaluations = state["evaluations"][name]

    def _apply(self, fn: Any, recurse: bool = True) -> Distillation:
        super()._apply(fn, recurse)
        for part in (*self.backbone.parts(), *filter(None, [self.whole])):
            part._apply(fn)
        return self
