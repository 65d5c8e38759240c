"""What a training may move, and what it may not: looked at in every step, and once more at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

from lightning.pytorch import Callback
from torch import Tensor, equal, nn

from ddil_lightning.testing.fitting import digest, frozen
from ddil_lightning.texts import reason

Check = TypeVar("Check", bound=Callable[..., Any])


class Broken(AssertionError):
    """A promise that a method does not keep, in one line: which, how that shows, and what it mostly comes from."""


def hold(kept: bool, said: str) -> None:
    """Raises Broken where it is not `kept`."""
    if not kept:
        raise Broken(said)


def promise(check: Check) -> Check:
    """A check whose failures begin with its name, those of the method itself, and of what refuses it, among them."""

    @wraps(check)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return check(*args, **kwargs)
        except Broken as error:
            raise Broken(f"{check.__name__}: {error}") from error.__cause__
        except Exception as error:
            raise Broken(f"{check.__name__}: it ends in {type(error).__name__}: {reason(error)}") from error

    return cast(Check, named)


class Witness(Callback):
    """Sees to it that gradients arrive where they belong, and that what moves is what is trained. `method`: before its training."""

    def __init__(self, method: Any) -> None:
        self.pipeline = digest(*frozen(method))
        self.before = {name: p.detach().clone() for name, p in method.named_parameters()}
        self.following: set[str] = set()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Raises Broken for gradients that are missing, not finite, all 0, or of what is frozen."""
        stray = [name for name, p in pl_module.named_parameters() if p.grad is not None and not p.requires_grad]
        theirs = [p for part in frozen(pl_module) for p in part.parameters()]
        hold(not stray, f"{_some(stray)} is frozen and has a gradient")
        hold(not any(p.requires_grad or p.grad is not None for p in theirs), "the frozen pipeline hears of a loss: ask it under no_grad")
        grads = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
        without = _named(pl_module, [p for p, grad in grads.items() if grad is None])
        hold(not without, f"no gradient arrives at {_some(without)} in a step of its optimiser, for which DDP would wait")
        unsound = _named(pl_module, [p for p, grad in grads.items() if grad is not None and not bool(grad.isfinite().all())])
        hold(not unsound, f"the gradient of {_some(unsound)} is not finite")
        total = sum(float(grad.abs().sum()) for grad in grads.values() if grad is not None)
        hold(total > 0, f"every gradient of an optimiser is 0 at student update {pl_module.student_updates}: its loss hangs on none of it")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Note which roles are made to follow another one, between two batches."""
        self.following |= {name for name, role in pl_module.roles.items() if role.moved or role.follows}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """And within one."""
        self.on_train_batch_start(trainer, pl_module)

    def check(self, method: Any) -> None:
        """Raises Broken, after the training, for what has moved and is not trained, and for a student that has not."""
        parts = frozen(method)
        hold(digest(*parts) == self.pipeline, "the frozen pipeline has moved: something writes into the teacher's network, or trains it")
        hold(not any(m.training for part in parts for m in part.modules()), "a network of the frozen pipeline is in training mode")
        theirs = {p.data_ptr() for part in parts for p in part.parameters()}
        shared = {id(p) for role in method.roles.values() for p in role.shared}  # what lies below adapters is the pipeline's
        kept = [*(p for p in method.parameters() if id(p) not in shared), *method.state_dict().values()]
        hold(not theirs & {x.data_ptr() for x in kept}, "a frozen network is among what the method trains and keeps in checkpoints")
        moved = {name for name, p in method.named_parameters() if name in self.before and not equal(p, self.before[name])}
        trained = {name for name, p in method.named_parameters() if p.requires_grad}
        students = sorted(name for name in trained if name.startswith("student."))
        idle = [name for name in students if name not in moved]
        hold(idle != students, "no weight of the student has moved: its loss does not hang on self.student, or its optimiser has others")
        hold(not idle, f"{_some(idle)} has not moved: the student's loss does not hang on it")
        others = sorted(name for name in moved - trained if name.partition(".")[0] not in {"average", *self.following})
        hold(not others, f"{_some(others)} has moved, which nothing trains: a copy follows by role.follow(other, decay)")
        hold(all(m.training for m in method.student.network.modules()), "the student is not in training mode after its training")


def _named(method: Any, parameters: Sequence[nn.Parameter | Tensor]) -> list[str]:
    names = {id(p): name for name, p in method.named_parameters()}
    return [names.get(id(p), "a weight that is none of the method's") for p in parameters]


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} (and {len(names) - 1} more)" if len(names) > 1 else "".join(names)
