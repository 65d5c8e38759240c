"""Updates by hand: micro-batches, clipping, the learning rate by the clock, and losses that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import at_least, fraction, lengths, within
from ddil_lightning.records import LatentBatch
from ddil_lightning.texts import reason
from ddil_lightning.training.reducing import Reduction
from ddil_lightning.training.watch import Watch


@dataclass(frozen=True)
class Optimizer:
    """The optimiser and its learning rate, by the clock of student updates.

    Args:
        kind: AdamW, or any other optimiser by its name in torch.optim or by its class path, such as bitsandbytes.optim.AdamW8bit.
        options: what its constructor takes besides, by name.
        lr: the learning rate, which rises linearly over `warmup` updates and then falls linearly to `final_lr * lr` at the end of the run.
        final_lr: the share of `lr` that is left at the end; 1 keeps it, 0 anneals it away.
        warmup: student updates until `lr` is reached.
        betas: AdamW's decays of the gradient's mean and of its square; another optimiser gets them if it takes any.
        weight_decay: AdamW's, per step and in units of the learning rate; another optimiser gets it if it takes one.
        clip: the norm to which gradients are clipped; 0 for no clipping.
        accumulate: micro-batches of `data.batch_size` in one update.
    """

    kind: str = "AdamW"
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-5
    final_lr: float = 0.05
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        within(0, 10, **{"optimizer.lr": self.lr, "optimizer.final_lr": self.final_lr})
        within(0, 10**9, **{"optimizer.warmup": self.warmup})
        lengths(2, **{"optimizer.betas": self.betas})
        fraction(**{"optimizer.betas": self.betas})
        within(0, 1, **{"optimizer.weight_decay": self.weight_decay})
        at_least(0, **{"optimizer.clip": self.clip})
        within(1, 10**6, **{"optimizer.accumulate": self.accumulate})
        optimizer_class(self.kind)  # a run is refused before anything is loaded
        own = [name for name in self.options if name in ("lr", "params")]
        if own:
            raise ValueError(f"optimizer.options has {own[0]}, which is not its to say: set optimizer.lr")


UNFIT = {"LBFGS": "asks for the loss several times in a step", "SparseAdam": "takes sparse gradients alone"}
"""Optimisers of torch that no method here can use, and why."""


def optimizer_class(kind: str) -> type[torch.optim.Optimizer]:
    """The class of an optimiser by its name in torch.optim or by its path. Raises ValueError where there is none of that name."""
    path, _, name = kind.rpartition(".")
    try:
        found = getattr(import_module(path or "torch.optim"), name, None)
    except (ImportError, ValueError) as error:
        raise ValueError(f"optimizer.kind is {kind!r}: {reason(error)}; install the package, or take another optimiser") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        known = [n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
        near = get_close_matches(name, known, 1, 0.6)
        what = f"did you mean {near[0]}?" if near else f"there is none of that name in {path or 'torch.optim'}"
        raise ValueError(f"optimizer.kind is {kind!r}, which is no optimiser: {what}")
    if name in UNFIT:
        raise ValueError(f"optimizer.kind is {kind!r}, which {UNFIT[name]}: take another optimiser")
    return found


class Descent:
    """What turns a loss into an optimiser step, as `optimizer` says: the optimiser, clipping, several micro-batches per update.

    An optimiser is that of one loss. What other losses have left on its weights goes before the first micro-batch of each update.
    `watch`: whether losses are finite. `begun`: whether any loss was descended in this training, and `student_moved`: whether the
    student's weights were updated in it. `micro`: how many
    micro-batches of the update under way are done, by the name of the loss; it belongs to a checkpoint. `batch`: the latents of the last.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.settings = optimizer
        self.clip, self.accumulate = optimizer.clip, optimizer.accumulate
        self.final_lr, self.warmup = optimizer.final_lr, optimizer.warmup
        self.micro: dict[str, int] = {}
        self.watch, self.reduction = Watch(), Reduction()
        self._sound: dict[str, Tensor] = {}  # of the micro-batches of the update under way, by the name of the loss
        self.last: Tensor | None = None
        self.batch: LatentBatch | None = None
        self.begun = self.student_moved = False
        self._loss_of: dict[int, str] = {}  # of every optimiser, by identity
        self._begun: set[int] = set()  # the optimisers that have made an update in this training, by identity
        self._told: list[tuple[torch.optim.Optimizer, list[dict[str, Any]]]] = []

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float, trainer: Any) -> torch.optim.Optimizer:
        """The optimiser over `parameters`; `base_lr` is what the clock's schedule multiplies.

        Raises ValueError for what it does not take, and where there are no parameters.

        Fused where it can be: its step then reads every weight once, and holds no copy of them as the `foreach` ones do.
        """
        given, kind = self.settings, optimizer_class(self.settings.kind)
        takes = signature(kind).parameters
        usual = {"betas": given.betas, "weight_decay": given.weight_decay}
        deaf = [name for name, value in usual.items() if name not in takes and value != getattr(Optimizer, name)]
        anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())  # which it hands to somebody who may know them
        deaf += [name for name in given.options if name not in takes and not anything]
        if deaf:
            raise ValueError(f"optimizer.{deaf[0]} is none of {given.kind}'s, which takes {', '.join(n for n in takes if n != 'params')}")
        own = {name: value for name, value in usual.items() if name in takes}
        # Under a gradient scaler (16-mixed) a fused optimiser would unscale by itself, after the clipping.
        if "fused" in takes and not {"fused", "foreach"} & set(given.options) and getattr(trainer.precision_plugin, "scaler", None) is None:
            own["fused"] = True
        weights = list(parameters)
        if not weights:
            raise ValueError("an optimiser was asked for without any weights to move: those of a copied role and of the teacher are frozen")
        made = kind([{"params": weights, "base_lr": lr}], lr=lr, **{**own, **given.options})  # type: ignore[call-arg]
        told = {"base_lr", "fused", "foreach", *own, *given.options}  # the rest may be a state, such as Prodigy's estimate of the rate
        self._told.append((made, [{name: group[name] for name in told & group.keys()} for group in made.param_groups]))
        return made

    def restate(self) -> None:
        """The optimisers of a training have the settings of its config again, and not those of the checkpoint that it goes on from.

        Called once the checkpoint has been restored, by the Clock.
        """
        for optimizer, groups in self._told:
            for group, told in zip(optimizer.param_groups, groups, strict=True):
                group.update(told)
        self._told, self._begun, self._loss_of = [], set(), {}
        self.begun = self.student_moved = False

    def rebase(self, lr: float) -> None:
        """`restate` gives `lr` as the rate that the clock's schedule multiplies to the optimisers that were made before.

        A sharded training makes its optimisers before it restores the checkpoint that says in which stage it is.
        """
        for _, groups in self._told:
            for told in groups:
                told["base_lr"] = lr

    def step(self, method: Any, optimizer: Any, loss: Tensor, name: str) -> bool:
        """One micro-batch of `loss`; True when it completed an update. A loss that is not finite ends the run (`watch`).

        `method`: the Distillation in training; its clock gives the learning rate, its networks the suspects. Raises ValueError for a loss
        that reaches none of the optimiser's weights.
        """
        sound = self.watch.ask(
            torch.isfinite(loss.detach()), partial(self._fault, method, name, loss.detach(), method.student_updates, self.batch)
        )
        self.last, self.begun = loss.detach(), True
        if not self.micro.get(name):
            if self._loss_of.setdefault(id(optimizer), name) != name:
                raise ValueError(
                    f"{type(method).__name__} descends {self._loss_of[id(optimizer)]} and {name} by one optimiser, and each clears the "
                    "other's gradients: descend their sum, or give each an optimiser of its own"
                )
            optimizer.zero_grad()  # another loss may have reached these weights since: the student's passes through a critic, say
        done = (self.micro.get(name, 0) + 1) % self.accumulate
        with self.reduction.of(optimizer, method.trainer.strategy, last=not done), detached(method, name):
            method.manual_backward(loss / self.accumulate)
        self._sound[name] = torch.minimum(self._sound[name], sound) if name in self._sound else sound
        self.micro[name] = done
        if done:
            return False
        if id(optimizer) not in self._begun:
            self._begin(method, optimizer, name)
        if self.clip:
            # By hand, gradients are clipped before a gradient scaler (16-mixed) has unscaled them.
            plugin = method.trainer.precision_plugin
            scaler = getattr(plugin, "scaler", None)
            limit = self.clip if scaler is None else self.clip * scaler.get_scale()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor(method.stage_updates, method.stage_length)
        with spared(optimizer, 1 - self._sound.pop(name)):
            optimizer.step()
        optimizer.zero_grad()
        return True

    def _begin(self, method: Any, optimizer: Any, name: str) -> None:
        """The first update of an optimiser: what its loss reaches is the same in all of them."""
        self._begun.add(id(optimizer))
        reached = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if not reached:
            raise ValueError(
                f"the {name} of {type(method).__name__} reaches none of the weights that its optimiser moves: was their network asked "
                "under no_grad, or is this the optimiser of another loss?"
            )
        self.student_moved |= any(id(p) in reached for p in method.student.weights())

    def factor(self, updates: int, length: int) -> float:
        """The learning rate's multiple after so many `updates` of a stage's `length`: linear warm-up, then linear to `final_lr`."""
        if updates < self.warmup:
            return (updates + 1) / self.warmup
        return 1 - (1 - self.final_lr) * (updates - self.warmup) / max(length - self.warmup, 1)

    @property
    def loss(self) -> float | None:
        """The loss of the last micro-batch; reading it waits for the device."""
        return None if self.last is None else float(self.last)

    def _fault(self, method: Any, name: str, loss: Tensor, updates: int, batch: LatentBatch | None, mine: bool) -> str:
        """What is said of a loss that is not finite, here (`mine`) or elsewhere."""
        suspects = self._suspects(method.roles, batch)  # on all processes: a sharded network answers only when all ask
        found = f"the {name} is {float(loss)}" if mine else f"the {name} is not finite on another process"
        return f"{found} at student update {updates}{suspects if mine else ''}"

    @torch.no_grad()
    def _suspects(self, roles: Mapping[str, Role], b: LatentBatch | None) -> str:
        """Which networks answer a batch with values that are not finite, in words."""
        if b is None:
            return ""
        told = {True: b.c._replace(s=b.s), False: b.c}
        bad = [name for name, role in roles.items() if not bool(role(b.x_t, b.t, told[role.s_conditioned]).x0.isfinite().all())]
        if not bool(b.x_t.isfinite().all()):
            return ": the latents themselves are not finite"
        return f": not finite is the output of the {' and the '.join(bad)} network" if bad else ": the outputs of all networks are finite"

    @property
    def halfway(self) -> bool:
        """Whether an update is under way: accumulated gradients are in no checkpoint."""
        return any(self.micro.values())


@contextmanager
def detached(method: Any, name: str) -> Iterator[None]:
    """Inside is the backward pass of a loss. Raises ValueError for one that goes on into the graph of another that was descended before."""
    try:
        yield
    except RuntimeError as error:
        if any(said in str(error) for said in ("backward through the graph a second time", "modified by an inplace operation")):
            raise ValueError(
                f"the {name} of {type(method).__name__} hangs on the graph of a loss that was descended before it: hand it x.detach() of "
                "what the other has made, or ask the network again"
            ) from error
        raise


@contextmanager
def spared(optimizer: Any, unsound: Tensor) -> Iterator[None]:
    """Inside, a step of a fused optimiser leaves weights and states as they are where `unsound` [] is 1, without the host's knowing.

    It is how a gradient scaler tells it. Another optimiser takes the step: its weights are then not finite, and in no checkpoint.
    """
    own = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper holds it
    alone = all(type(p) in (nn.Parameter, Tensor) for group in own.param_groups for p in group["params"])  # no kernel mixes in DTensors
    if not (alone and getattr(own, "_step_supports_amp_scaling", False)) or hasattr(own, "found_inf"):
        yield
        return
    own.found_inf = unsound
    try:
        yield
    finally:
        del own.found_inf
