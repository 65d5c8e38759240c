"""What a method must have set, what the names in its options can be, and what it hands over in a step."""

from __future__ import annotations

import linecache
import logging
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ddil_lightning.feed import Wants
from ddil_lightning.records import SOURCES, LatentBatch

DECLARED = ("wants", "sources", "takes_turns", "loss_is_distance")
"""What the class of a method declares, and the base reads."""
PATIENCE = 10_000
"""Batches, at least those of 100 updates, in which a method must have updated its student once."""
Hook = TypeVar("Hook", bound=Callable[..., Any])

NEEDED = {
    "end": "wants = Wants(ends=True)",
    "whole": "wants = Wants(ends=True)",
    "noise": "wants = Wants(noise=True), or Wants(ends=True) for that of trajectories",
    "real": "wants = Wants(real=True), and data with images",
    "real_c": "wants = Wants(real=True), and data with images",
}
"""By which declaration a batch has a field that is None in another one."""


def check_complete(method: Any) -> None:
    """Raises TypeError, naming it, for what a method has not set that it must, and for a declaration that nobody would read.

    Raises ValueError for a range of guidance that its student cannot be told.
    """
    lacking = [f"{name} (cast it in the constructor)" for name in ("student", "teacher") if name not in method.roles]
    lacking += [name for name in ("policies", "grid") if not hasattr(method, name)]
    lacking += ["deploy(student)"] if type(method).deploy.__qualname__ == "Distillation.deploy" else []
    if lacking:
        raise TypeError(f"{type(method).__name__} lacks {', '.join(lacking)}: see Distillation and CONTRIBUTING.md")
    misspelled = next(_misspelled(method), None)
    if misspelled is not None:
        raise TypeError(f"{type(method).__name__}.{misspelled[0]} is read by nobody: did you mean {misspelled[1]}?")
    known = SOURCES[:3]
    if isinstance(method.sources, str) or not method.sources or not set(method.sources) <= set(known):
        raise TypeError(f'{type(method).__name__}.sources is {method.sources!r}: give a tuple of {", ".join(known)}, such as ("forward",)')
    student = method.student
    method.check_guidance(told=bool(getattr(student.network, "w_conditioned", False)) or student.null is not None)


def ours(hook: Hook) -> Hook:
    """A hook of the base, which a method adds to by `super()`: that it was reached is noted, for `check_reached`."""

    @wraps(hook)
    def noted(method: Any, *args: Any, **kwargs: Any) -> Any:
        method.reached.add(hook.__name__)
        return hook(method, *args, **kwargs)

    return cast(Hook, noted)


def check_reached(method: Any, *names: str) -> None:
    """Raises ValueError for a hook of these `names` that was called by now and has not reached that of the base."""
    for name in names:
        if name not in method.reached:
            own = " or ".join(f"{cls.__name__}.{name}" for cls in _replacing(method, name))
            raise ValueError(
                f"{own} never calls super().{name}(...), without which parts of a run are off in silence: call it with the same arguments"
                + (", and return what it returns with yours added" if name == "configure_callbacks" else "")
            )


def _replacing(method: Any, name: str) -> list[type]:
    """The classes of a method that have a hook of this name before that of the base."""
    kinds = [cls for cls in type(method).__mro__ if name in vars(cls)]
    return kinds[: next(i for i, cls in enumerate(kinds) if cls.__name__ == "Distillation")]


def _misspelled(method: Any) -> Iterator[tuple[str, str]]:
    """(name, what it was probably meant to be) of attributes of a method's class that are nearly a declaration, and nothing else."""
    own = [
        cls for cls in type(method).__mro__ if cls.__module__.partition(".")[0] not in ("ddil_lightning", "lightning", "torch", "builtins")
    ]
    for name, value in (item for cls in own for item in vars(cls).items()):
        near = get_close_matches(name, DECLARED, 1, 0.85)
        if near and near[0] != name and _declares(near[0], value):
            yield name, near[0]


def _declares(name: str, value: Any) -> bool:
    """Whether a value is what the declaration `name` takes: what else has a name like it is a method's own business."""
    if name == "sources":
        return value in SOURCES or (isinstance(value, tuple | list) and bool(value) and all(one in SOURCES for one in value))
    return isinstance(value, {"wants": Wants, "takes_turns": bool, "loss_is_distance": bool}.get(name, ()))


def check_source(method: Any, name: str, share: float) -> None:
    """Raises ValueError where a prior gives a `share` to a source on which a method has no target, or to a teacher that cannot act."""
    if share > 0 and name not in method.sources:
        raise ValueError(
            f"the prior gives {share:g} to {name} latents, on which {type(method).__name__} has no target: its sources are "
            f"{', '.join(method.sources)}"
        )
    if share > 0 and name == "teacher" and method.policies.teacher is None:
        raise ValueError(
            f"the prior gives {share:g} to teacher latents, and {type(method).__name__} has no teacher that acts: set "
            "self.policies = Policies(Policy(self.student, ...), Policy(self.teacher, ...))"
        )


def check_names(method: Any) -> None:
    """Raises ValueError for a name, in an option of a method that has cast its roles, that is none of the roles that the option is for."""
    trained = [name for name, role in method.roles.items() if role.weights()]  # a frozen one is a copy of one of them
    networks = getattr(getattr(method.backbone, "source", None), "networks", {})
    for option, names in (("adapter.whole", method.adapter.whole), ("model.pipeline.networks", networks)):
        unknown = [name for name in names if name not in trained]
        if unknown:
            raise ValueError(f"{option} has {unknown[0]!r}: the roles that {type(method).__name__} trains are {', '.join(trained)}")
    method.offload.check(method.roles, method.average is not None)


def check_trained(method: Any, optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[Any]) -> None:
    """Raises ValueError, by its name, for what has trained weights none of which an optimiser moves: it would never learn.

    For optimisers that `optimizer_of` has not made; learning rates by others than the clock are told. And for several optimisers of a
    method that does not say so: DDP waits, in the backward pass of each, for the gradients of all.
    """
    named, use = type(method).__name__, "self.optimizer_of(parameters, lr)"
    for made in optimizers:
        if any("base_lr" not in group for group in made.param_groups):
            raise ValueError(
                f"{named}.configure_optimizers makes its {type(made).__name__} by itself, whose learning rate no clock moves: use {use}, "
                "which makes the kind that optimizer.kind says"
            )
    if schedulers:
        logging.getLogger(__name__).warning(
            f"{named}.configure_optimizers returns learning-rate schedulers, whose rates hold for no update: the clock sets that of each "
            "by optimizer.warmup and optimizer.final_lr"
        )
    if len(optimizers) > 1 and not method.takes_turns:
        raise ValueError(
            f"{named} has {len(optimizers)} optimisers, and the backward pass of one leaves the weights of the others without a gradient: "
            "declare `takes_turns = True` in its class"
        )
    moved = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, part in method.named_children():
        trained = [p for p in part.parameters() if p.requires_grad]
        if trained and not any(id(p) in moved for p in trained):
            raise ValueError(
                f"{named}'s {name} has trained weights that no optimiser moves: give configure_optimizers "
                f"self.optimizer_of(self.{name}.parameters(), lr), or freeze it by requires_grad_(False)"
            )


def check_losses(method: Any, b: LatentBatch, loss: Tensor) -> None:
    """Raises ValueError for losses that are not one number a sample, [B]: they would be broadcast against weights and sources."""
    if loss.shape != b.weight.shape:
        raise ValueError(
            f"{type(method).__name__} hands feedback(b, loss) losses of shape {list(loss.shape)}: it takes one number of each of the "
            f"{len(b.weight)} samples, [{len(b.weight)}], as diffusion.losses has them"
        )


def check_loss(method: Any, loss: Tensor, name: str) -> None:
    """Raises ValueError for a loss that is no scalar, or that hangs on nothing that is trained."""
    if loss.ndim:
        raise ValueError(
            f"{type(method).__name__} hands descend a {name} of shape {list(loss.shape)}: it takes a scalar; of losses [B] hand it "
            "self.feedback(b, loss)"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{type(method).__name__}'s {name} hangs on no trained weights: is it made under no_grad, or detached, or of frozen networks?"
        )


def check_moves(method: Any, batches: int, returned: bool) -> None:
    """Raises ValueError for a method whose clock still stands after so many `batches` of a training, and will: its run would not end.

    `returned`: whether its step has returned a loss. One whose student is idle at first, as while a critic is trained alone, has PATIENCE.
    """
    named, write = type(method).__name__, "write `if self.descend(optimizer, self.feedback(b, loss)): self.advance()`"
    if method.descent.student_moved:
        lost = "".join(f", or {cls.__name__}.advance never calls super().advance()" for cls in _replacing(method, "advance")[:1])
        raise ValueError(f"{named}.training_step descends its loss and never calls advance(){lost}: {write}")
    if returned and not method.descent.begun:
        raise ValueError(f"{named}.training_step returns its loss, which nobody descends, for updates are made by hand: {write}")
    if batches >= max(PATIENCE, 100 * method.descent.accumulate):
        raise ValueError(f"{named} has not updated its student in the first {batches} batches, and its run ends by that clock: {write}")


def unasked(error: BaseException) -> Iterator[str]:
    """What a failed step has read of its latents and not asked for, in words: from the lines of code that the error has come through."""
    if "NoneType" not in str(error):
        return
    for (frame, _), place in zip(traceback.walk_tb(error.__traceback__), traceback.extract_tb(error.__traceback__), strict=True):
        first = place.lineno or 0
        last = getattr(place, "end_lineno", None) or first  # which Python 3.10 does not know
        code = "".join(linecache.getline(place.filename, line) for line in range(first, last + 1))
        for name, batch in list(frame.f_locals.items()):
            lacking = [field for field in NEEDED if isinstance(batch, LatentBatch) and getattr(batch, field) is None]
            for field in lacking:
                if re.search(rf"\b{name}\.{field}\b", code):
                    yield f"{name}.{field} is None here: a method asks for it by {NEEDED[field]}"
