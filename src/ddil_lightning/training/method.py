"""What all methods share: the frozen pipeline, one clock, optimisation by hand, averages, and what inference needs to know."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.roles import Role
from ddil_lightning.backbones.source import Source
from ddil_lightning.bounds import fraction, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.reflection import Mode, Reflection
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.feed import Feed, Wants
from ddil_lightning.records import LatentBatch
from ddil_lightning.training import completeness
from ddil_lightning.training.averaging import Averaging
from ddil_lightning.training.clock import Clock, Clocks
from ddil_lightning.training.deployment import Deployment, deployed
from ddil_lightning.training.measures import Measures
from ddil_lightning.training.offload import Offload
from ddil_lightning.training.optimisation import Descent, Optimizer
from ddil_lightning.training.options import Memory, TensorFloat32, check_precision, checked_box, compile_roles, fit_box, guidance_range
from ddil_lightning.training.question import Asked
from ddil_lightning.training.randomness import Borrowed
from ddil_lightning.training.reducing import prepare
from ddil_lightning.training.sharding import Shards, check_strategy
from ddil_lightning.training.sharing import leave_out_shared, leave_to_each_process, share_buffers


class Distillation(Clocks, LightningModule):
    """Base of every method: the Lightning shell around parts that it holds (optimisation, averaging, sharding, measures).

    A method, in its constructor, casts its roles (`cast`: student, teacher and what else it needs), sets `policies` and `grid`, and writes
    `training_step` and `deploy`. What it leaves out is named (`completeness`).

    Args:
        pipeline: what is distilled: a built-in name, a folder, a hub id or a single file, a Source that says more, or a loaded Backbone.
        guidance: g = 1 + w, or a range [g_min, g_max] for a student that is told it; by default what the pipeline recommends.
        updates: student updates in all, the one clock of a run.
        optimizer: its kind, AdamW by default, and its learning rate.
        ema: decay of the average of the student that is evaluated and exported; 0 for the online student.
        reflect: how estimates of x0 are held in the box of the data: `off`, `static` (clamped to it), or `dynamic` (scaled into it first).
        box: [[lo, ...], [hi, ...]], a number per channel of the latents; estimated from the data if it is not given.
        adapter: LoRA on the one frozen network in the place of whole copies of it.
        memory: what saves memory and time.
        log_every: student updates between two rows of `metrics.csv`.
    """

    student: Role
    policies: Policies
    """Who can act in a roll-out: the student as it is deployed, and the teacher."""
    grid: Grid
    """The times the student trains on, with the grids that inference walks."""

    wants: Wants = Wants()
    """What else it needs of its latents."""

    sources: tuple[str, ...] = ("forward", "student", "teacher")
    """The sources on which the method's targets are defined (METHODS 1.4)."""

    takes_turns: bool = False
    """Whether a backward pass may leave trained parameters without a gradient: DDP is told to look for them. So of every method with two
    optimisers, whether both of them move in every batch or not."""

    loss_is_distance: bool = False
    """Whether the student's loss on a latent is its distance to a target, measured alike wherever the latent comes from: a signed loss, a
    discriminator's, or one with a term of data alone is none, and losses by source are then not set beside each other (`Alerts`)."""

    def __init__(
        self,
        pipeline: str | Backbone | Source = "builtin",
        guidance: float | list[float] | None = None,
        updates: int = 1000,
        optimizer: Optimizer = Optimizer(),
        ema: float = 0.0,
        reflect: Mode = "off",
        box: list[list[float]] | None = None,
        adapter: Adapter = Adapter(),
        memory: Memory = Memory(),
        log_every: int = 10,
    ) -> None:
        super().__init__()
        self.reached = set[str]()  # hooks of the base that were called by now
        self.automatic_optimization = False
        self.descent, self.averaging = Descent(optimizer), Averaging(ema)
        self.shards, self.measures, self.feed, self._random = Shards(), Measures(), Feed(), Borrowed()
        self._asked = Asked()
        self.roles: dict[str, Role] = {}
        self.offload = Offload(memory.offload)
        self.adapter = adapter
        within(1, 10**9, updates=updates, log_every=log_every)
        fraction(ema=ema)
        self.backbone: Backbone = pipeline if isinstance(pipeline, Backbone) else Pipeline(pipeline, **memory.stored)
        self._recommended = guidance is None
        self.guidance = guidance_range(self.backbone.guidance if guidance is None else guidance)
        self.updates, self.lr = updates, optimizer.lr
        self.gradient_checkpointing, self.compiles, self.log_every = memory.gradient_checkpointing, memory.compile, log_every
        self._tf32 = memory.tf32
        self.box, self.has_box = box, box is not None or reflect == "off"
        self.reflection = Reflection(*checked_box(box, self.backbone.latent_shape[0]), reflect)
        self.average: nn.Module | None = None
        leave_out_shared(self)

    # Roles and deployment ----------------------------------------------------------------------------------------------------------

    def role(self, name: str, **kwargs: Any) -> Role:
        """The backbone's role `name` (`Backbone.role`), as the config has all roles: with adapters, with gradient checkpointing."""
        return self.backbone.role(name, recompute=self.gradient_checkpointing, adapter=self.adapter, **kwargs)

    def cast(self, **parts: nn.Module) -> None:
        """Take the method's roles, by name, and other modules that it trains beside them. Called once, in the constructor.

        Roles with weights of their own become submodules; the frozen teacher stays out of parameters, checkpoints, DDP and shards. The
        student's average, which is deployed where `ema` asks for one, is made here. A frozen network that is no role, such as one of
        images, is no attribute of a method, which would take it into every checkpoint: it lies in an object that is no module, as in
        `methods.add.Looking`.
        """
        for name, part in parts.items():
            if isinstance(part, Role):
                self.roles[name] = part
            else:
                self._asked.listen(part)
            if not isinstance(part, Role) or part.own:
                setattr(self, name, part)
        self._guide()
        if "student" in parts:
            average = self.averaging.start(self.student)
            self.average = None if average is None else average.network
        self._trained = frozenset(name for name, role in self.roles.items() if role.weights())
        completeness.check_names(self)
        share_buffers(self)

    @property
    def unguided(self) -> bool:
        """Whether the teacher is asked at guidance 1 alone: then it is asked once, not twice.

        A method of one's own may ask it at another than the config's, which nobody could see: it says here where it does not.
        """
        return self.guidance == (1, 1) and type(self).__module__.startswith("ddil_lightning.")

    def _guide(self) -> None:
        if "teacher" in self.roles:
            self.teacher.unguided = self.unguided

    @property
    def teacher(self) -> Role:
        """The frozen pipeline, guided by classifier-free guidance."""
        return self.roles["teacher"]

    def deploy(self, student: Denoiser) -> Deployment:
        """How `student` is used: policy, grids, step counts and scheduler. Every method writes it; a function of the present stage."""
        raise TypeError(f"{type(self).__name__} does not say how its student is deployed: write deploy(student)")

    @property
    def deployment(self) -> Deployment:
        """The student as it is now: the average if there is one, the whole of it where it was sharded and has been gathered.

        Under fsdp2 it is sharded while it trains, and all processes must call it together; see `gathered`.
        """
        return deployed(self, self.deploy(self.outgoing.apart(self.shards.whole)))

    def deployments(self) -> list[Deployment]:
        """How the student will be deployed at the end of every stage to come, the present one first."""
        return [self.deployment]

    @property
    def outgoing(self) -> Role:
        """The role that is deployed: the average if there is one, else the student."""
        return self.averaging.role or self.student

    def walks(self) -> Sequence[Grid]:
        """The grids that roll-outs walk, now and in all stages to come."""
        return self.grid.rollouts

    @property
    def baseline(self) -> Deployment:
        """The frozen pipeline with DDIM on trailing nodes, without reflection: the first rows of every table."""
        policy, total = Policy(self.teacher.apart(), ddim), self.teacher.schedule.steps
        return Deployment(policy, lambda n: Grid.named("trailing", n, total), (32,), self.eval_guidance)

    @property
    def eval_guidance(self) -> float:
        """The guidance g of previews and tests: what the pipeline recommends, if it was trained, else the middle of the range."""
        low, high = self.guidance
        g = self.backbone.guidance
        return g if low <= g <= high else (low + high) / 2

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the deployed network is whole on the first process. All processes enter together."""
        self.shards.gather(self.outgoing.network, self.device)
        try:
            yield
        finally:
            self.shards.forget()

    @property
    def evaluations(self) -> dict[str, int]:
        """Network evaluations of one sample each so far, by role."""
        return {name: role.evaluations for name, role in self.roles.items()}

    @property
    def asked_of_moving(self) -> int:
        """Evaluations so far of the roles that training moves, those with trained weights and what follows such; and calls of other
        modules that are trained beside them."""
        moving = [role for name, role in self.roles.items() if name in self._trained or role.follows]
        return self._asked.times + sum(role.evaluations for role in (*moving, self.averaging.role) if role is not None)

    @property
    def question(self) -> str:
        """See `question.question`."""
        return self._asked.question(self)

    @cached_property
    def taught(self) -> str:
        """`Backbone.fingerprint`, for which every weight is read: once, for nothing changes a frozen network."""
        return self.backbone.fingerprint()

    def check_guidance(self, told: bool, switch: str = "") -> None:
        """Raises ValueError for a range of guidance and a student that is not `told` its w; `switch`: the option that would tell it.

        The student of a network that is told it already is told it as well, which a line says: no refusal, for a run of days that was
        begun with the option goes on.
        """
        low, high = self.guidance
        if self.backbone.told and not told and switch:
            logging.getLogger(__name__).warning(
                f"the network of {self.backbone.path} is told its guidance, and so is its student, whatever model.{switch} = false says"
            )
        if low != high and not (told or self.backbone.told):
            other = f", or set model.{switch} to true" if switch else ""
            raise ValueError(f"{type(self).__name__}'s student is not told the guidance: give one number, not {low} to {high}{other}")

    # Optimisation ----------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The optimiser of what the student trains. A method that trains more, such as a critic, gives a list, one for each loss that it
        descends; what is trained and in none of them is refused."""
        return self.optimizer_of(self.student.weights(), self.lr)

    def optimizer_of(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """An optimiser over `parameters`, of the kind that the config says."""
        return self.descent.optimizer(parameters, lr, self.trainer)

    def feedback(self, b: LatentBatch, loss: Tensor) -> Tensor:
        """The scalar loss of the student's per-sample losses [B]; the buffer's priorities and the measures hear of it on the way.

        Raises ValueError for losses of another shape.
        """
        completeness.check_losses(self, b, loss)
        self.descent.batch = b
        self.measures.losses(loss.detach(), b.source, going_on=bool(self.descent.micro.get("loss")))
        self.feed.observe(b, loss)
        return (b.weight * loss).mean()

    def descend(self, optimizer: Any, loss: Tensor, name: str = "loss") -> bool:
        """One micro-batch of `loss`; True when it completed an update (`optimisation.Descent.step`).

        `name`: of the loss in curves and messages; "loss" is the student's. Raises ValueError for a loss that is no scalar, or that hangs
        on nothing that is trained.
        """
        completeness.check_loss(self, loss, name)
        self.measures.record(**{name: loss})
        return self.descent.step(self, optimizer, loss, name)

    @completeness.ours
    def advance(self) -> None:
        """The student was updated: the clock, the average and those who listen to every update follow."""
        self.student_updates += 1
        self.averaging.follow(self.student, self.stage_updates)
        self.measures.updated(self.student_updates)

    def record_saturation(self, x0: Tensor) -> None:
        """Add estimates x0 [B, ...] of the teacher, a target or a student that are held in the box: the share of them on its edge or
        outside, `reflect/saturated`, is what `Alerts` listens to, with `reflect` off too."""
        self.measures.record(**{"reflect/saturated": self.reflection.saturation(x0.detach())})

    def on_student_turn(self) -> None:
        """Go on to the batch that updates the student, in a method with turns: a memory plan tries the largest step of them."""

    # Lightning -------------------------------------------------------------------------------------------------------------------

    @completeness.ours
    def setup(self, stage: str) -> None:
        """Check strategy and precision, and the prior against the method. Raises ValueError."""
        if stage == "fit" and not any(isinstance(callback, Clock) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            completeness.check_reached(self, "configure_callbacks")
            lost = f"{type(self).__name__}.configure_callbacks drops what super().configure_callbacks() returns, the clock of the run"
            raise ValueError(f"{lost}: return that with yours added")
        shares = any(role.shared for role in self.roles.values())
        check_strategy(self.trainer.strategy, self.trainer.precision, shares, offload=bool(self.offload.names))
        check_precision(self.trainer.precision, self.takes_turns and self.descent.accumulate > 1)
        prepare(self.trainer.strategy, self.takes_turns)
        if self.feed.prior is not None:
            self.check_prior(self.feed.prior)

    def check_prior(self, prior: Any) -> None:
        """Raises ValueError when `prior` gives a share to a source on which this method has no target, or whose policy it has not."""
        for name in ("forward", "student", "teacher"):
            completeness.check_source(self, name, getattr(prior, name))

    @completeness.ours
    def on_fit_start(self) -> None:
        """The box from the data, once it is encoded; then what is not needed leaves the device.

        Raises ValueError for what is trained and in no optimiser.
        """
        completeness.check_trained(self, self.trainer.optimizers, self.trainer.lr_scheduler_configs)
        self._move_box()
        if not self.has_box:
            fit_box(self.reflection, self.feed, self.trainer.is_global_zero)
            self.has_box = True
        self.offload.begin(self)
        self.descent.reduction.begin(self.trainer.strategy, self.takes_turns)

    def restate(self) -> None:
        """Optimisers and box are those of the config again, and not those of the checkpoint that the training goes on from.

        Called by the Clock before the first batch, when every strategy has restored the checkpoint: a sharded one does so after
        `on_fit_start`.
        """
        self.descent.restate()
        self._move_box()

    def _move_box(self) -> None:
        if self.box is not None:
            self.reflection.move(*self.box)  # of a run that goes on with another one

    @completeness.ours
    def configure_model(self) -> None:
        """Share out and shard, as the strategy says, and compile, where the config does."""
        leave_to_each_process(self)
        self.shards.set_up(self, self.outgoing.network, self.trainer.strategy)
        if self.compiles:
            compile_roles(self.roles.values())

    @completeness.ours
    def on_train_end(self) -> None:
        """What comes after training is the first process's alone, and finds everything on the device."""
        self.descent.watch.read(all_of_them=True)
        self.offload.end(self)
        self.shards.gather(self.outgoing.network, self.device)

    @completeness.ours
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout takes torch's own numbers: for this step they are the feed's, so that a resumed run repeats them.

        And what an earlier batch was asked without waiting is read.
        """
        self.descent.watch.read()
        for role in self.roles.values():
            role.moved = False
        self._random.take(self.feed.dropout, self.device)

    @completeness.ours
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The module's hook is the last one of a batch: what must not be done before a checkpoint is written is done now."""
        self._random.give_back()
        copied = [role for role in self.roles.values() if role.moved and not role.follows]
        if copied and self.feed.holds_rollouts:  # a flush in the same step forgets what the former weights answered
            for role in copied:
                role.follows = True
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "after_checkpoints"):
                callback.after_checkpoints(self.trainer, self)

    @completeness.ours
    def configure_callbacks(self) -> list[Callback]:
        """The clock travels with the method, so that a bare Trainer gets it too.

        A Trainer calls this hook first: what the method lacks is named before the data ask for it.
        """
        completeness.check_complete(self)
        self._asked.begin(self)  # before a checkpoint is restored: what it counts is no setting
        return [Clock(), *([TensorFloat32()] if self._tf32 else [])]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the clocks and the counts of evaluations."""
        self.descent.watch.read(all_of_them=True)
        names = ("student_updates", "stage", "stage_start", "evaluations")
        own = {"has_box": self.has_box and self.reflection.mode != "off", "sharded": self.shards.split, "strength": self.adapter.strength}
        checkpoint["ddil"] = {**{name: getattr(self, name) for name in names}, **own, "guidance": list(self.guidance)}

    @completeness.ours
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` has added."""
        state = checkpoint["ddil"]
        for name in ("student_updates", "stage", "stage_start"):
            setattr(self, name, state[name])
        self.has_box = self.has_box or state["has_box"]
        if self._recommended:  # what a pipeline recommends may change, and what a student was taught does not
            self.guidance = guidance_range(state.get("guidance", self.backbone.guidance_before))
            self._guide()
        self.descent.micro = {}  # the gradients of an update that was under way are in no checkpoint: it begins anew
        for name, role in self.roles.items():
            role.evaluations = state["evaluations"][name]

    def _apply(self, fn: Any, recurse: bool = True) -> Distillation:
        super()._apply(fn, recurse)
        for part in (*self.backbone.awake(), *filter(None, [self.shards.whole])):
            part._apply(fn)
        share_buffers(self)
        return self
