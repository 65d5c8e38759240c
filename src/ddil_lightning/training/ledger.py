"""What a training step holds in memory: it is taken on tensors that have shapes and no memory, whose bytes are counted."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from ddil_lightning.feed import Feed
from ddil_lightning.records import FORWARD, Context, LatentBatch, Origin
from ddil_lightning.training.measures import Measures
from ddil_lightning.training.repeats import Repeats

MICRO = 2
"""Micro-batches of an update that are tried: the second finds the gradients of the first, and so do all others."""
STEPS = 16
"""Batches after which a method that has not updated its student will not."""

DENIED = (torch.ops.aten.any, torch.ops.aten.eq)
"""What a tensor without values says no to."""


class Step(NamedTuple):
    """What one training step holds, in bytes, besides the weights.

    `optimizer`: by parameter, of the tensors in the method that was measured. `activations`: the most that there ever is of what is neither
    gradient nor state: what is saved for the backward pass, and what passes. `peak`: the most of everything together, gradients and states
    included; activations have partly gone when the gradients are complete, so it is less than the sum.
    """

    optimizer: dict[nn.Parameter, int]
    gradients: int
    activations: int
    peak: int


class Ledger(FakeTensorMode):
    """Inside, tensors have shapes and no values; the bytes of their storages are counted, and forgotten when they are let go.

    Gradients are told apart (`gradient`). A tensor that has no values answers 1 where it is asked for one; whether any is so, or two are
    equal, it answers no, and everything else yes: then all numbers are finite and no rule is broken.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.live, self.gradients, self.peak, self.activations, self.states = 0, 0, 0, 0, 0
        self._crest = (0, 0)
        self._known: dict[int, tuple[Any, int]] = {}
        self._graded: set[int] = set()
        self._denied: set[int] = set()
        self._inner = False

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What every operation goes through. What it makes on its way, of others, is not counted: kernels do without."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked more often than anything is computed
        if self._inner:
            return super().dispatch(func, types, args, kwargs)
        self._inner = True
        try:
            out = super().dispatch(func, types, args, kwargs)
        except DataDependentOutputException:
            return _answer(args[0].dtype, args[0].untyped_storage()._cdata not in self._denied)
        finally:
            self._inner = False
        for value in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(value, Tensor):
                self._note(value, func.overloadpacket in DENIED)
        return out

    def _note(self, value: Tensor, denied: bool) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if denied:
            self._denied.add(key)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._let_go(key)), size)
        self.live += size
        self.lift()

    def lift(self, by: tuple[int, int] = (0, 0)) -> None:
        """There was as much more than there is, of everything and of activations, for a moment."""
        most, active = self.live + by[0], self.live - self.gradients - self.states + by[1]
        self.peak, self.activations = max(self.peak, most), max(self.activations, active)
        self._crest = max(self._crest[0], most), max(self._crest[1], active)

    def mark(self) -> tuple[int, int]:
        """What there is now; `risen` counts from here on."""
        self._crest = self.live, self.live - self.gradients - self.states
        return self._crest

    def risen(self, since: tuple[int, int]) -> tuple[int, int]:
        """How far everything, and activations, were above what there was at the last `mark`."""
        return self._crest[0] - since[0], self._crest[1] - since[1]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, nothing is a peak."""
        before = self.peak, self.activations, self._crest
        try:
            yield
        finally:
            self.peak, self.activations, self._crest = before

    def _let_go(self, key: int) -> None:
        size = self._known.pop(key)[1]
        self._denied.discard(key)
        self.live -= size
        if key in self._graded:
            self._graded.discard(key)
            self.gradients -= size

    def gradient(self, parameter: nn.Parameter) -> None:
        """The gradient of a parameter has been added to: what holds it is no activation."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self._known and key not in self._graded:
            self._graded.add(key)
            self.gradients += self._known[key][1]

    def begin(self) -> None:
        """What is there now stays: it is no activation. Peaks are counted from now on."""
        self.states = self.peak = self.live
        self.activations = 0


def _answer(dtype: torch.dtype, yes: bool) -> bool | int | float:
    """What a tensor says that has no values."""
    return yes if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


class Precision:
    """What a method asks of its trainer's precision: the autocast of `trainer.precision`, and whether gradients are scaled."""

    def __init__(self, precision: str) -> None:
        self.dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        self.scaler = SimpleNamespace(get_scale=lambda: 1.0) if precision == "16-mixed" else None

    def forward_context(self) -> Any:
        """Inside, networks compute in it; weights are cast at every use, as Lightning has it."""
        return nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype, cache_enabled=False)


class Alike(Feed):
    """The feed of a plan's step, whose batches are `latents`: what they hold is known, and their tensors could not say it."""

    def origin(self, batch: LatentBatch) -> Origin:
        """Forward latents at the first node, all of them."""
        n = len(batch.t)
        return Origin((FORWARD,) * n, (0,) * n, (-1,) * n, (FORWARD,) * n)


class Planned:
    """A method on tensors without memory, ready for steps: a copy of `method`, which is not touched and need not have weights."""

    def __init__(self, method: Any, precision: str, batch: int, cuda: bool) -> None:
        self.batch, self.precision, self.ledger = batch, Precision(precision), Ledger()
        null = method.teacher.null if method.teacher.null is not None else method.backbone.null()
        with self.ledger:
            self.of = {id(p): (p, _empty(p)) for p in _parameters(method)}
        memo: dict[int, Any] = {key: made for key, (_, made) in self.of.items()}
        memo |= _untouched(method)
        self.method = copy.deepcopy(method, memo)
        self.method.descent.accumulate = min(self.method.descent.accumulate, MICRO)
        self.context = null
        self.foreach = cuda

    def encode(self) -> int:
        """What passes, in bytes, while the images of a batch are encoded, by as many at a time as the backbone takes."""
        size = self.method.backbone.size
        if size is None:
            return 0
        with self.ledger, torch.no_grad():
            self.ledger.begin()
            self.method.backbone.encode_images(torch.zeros(self.batch, 3, *size))
        return self.ledger.activations

    def step(self) -> Step:
        """The memory of an update of the student, with what else belongs to it."""
        method, ledger = self.method, self.ledger
        with ledger, _uncollected():
            Repeats(ledger, self._networks())
            weights = ledger.live
            optimizers = self._optimizers()
            for p in _trained(optimizers):
                p.grad = torch.empty_like(p)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            ledger.begin()
            handles = [p.register_post_accumulate_grad_hook(ledger.gradient) for p in _trained(optimizers)]
            method.train()
            method.teacher.eval()
            method.on_student_turn()
            before = method.student_updates
            batch = latents(method, self.batch, self.context)
            for i in range(STEPS):
                with self.precision.forward_context():
                    method.training_step(batch, i)
                if method.student_updates > before:
                    break
            for handle in handles:
                handle.remove()
        states = {made: sum(_bytes(v) for v in state.values()) for o in optimizers for made, state in o.state.items()}
        gradients = sum(_bytes(p) for p in _trained(optimizers))
        own = {p: states[made] for p, made in self.of.values() if made in states}
        return Step(own, gradients, ledger.activations, ledger.peak - weights)

    def _networks(self) -> list[nn.Module]:
        """Those that a step asks, each once."""
        found = [self.method.backbone.network(), *(role.network for role in self.method.roles.values())]
        return list({id(network): network for network in found}.values())

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """The method's own, as a trainer has them."""
        strategy = SimpleNamespace(
            backward=lambda loss, *args: loss.backward(), reduce_boolean_decision=lambda fine: fine, root_device=torch.device("cpu")
        )
        self.method.trainer = SimpleNamespace(
            precision_plugin=self.precision, strategy=strategy, global_rank=0, world_size=1, is_global_zero=True, training=True
        )
        made = self.method.configure_optimizers()
        strategy._lightning_optimizers = list(made) if isinstance(made, list | tuple) else [made]
        if self.foreach:  # a GPU's default, whose copies a CPU does not make
            for group in chain.from_iterable(o.param_groups for o in strategy._lightning_optimizers):
                if "foreach" in group and not group.get("fused"):
                    group["foreach"] = True
        return strategy._lightning_optimizers


def latents(method: Any, n: int, null: Context) -> LatentBatch:
    """A batch as the data would hand it over, of no particular values."""
    x, c = torch.zeros(n, *method.backbone.latent_shape), null.expand(n)
    times = method.grid.times.tolist()
    t, s, node = (torch.full((n,), value) for value in (times[0], times[1], 0))
    c = c.guided(torch.zeros(n))
    tag, slot = torch.full((n,), FORWARD), torch.full((n,), -1)
    return LatentBatch(x, t, s, node, c, x.clone(), tag, torch.ones(n), slot, c.guided(None), x.clone(), x.clone(), tag.clone())


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, Python does not look for garbage in cycles: it would take a quarter of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _empty(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_strided(p.size(), p.stride(), dtype=p.dtype), requires_grad=p.requires_grad)


def _parameters(method: Any) -> Iterator[nn.Parameter]:
    """Every parameter of the method and of its frozen parts, once."""
    seen: set[int] = set()
    for p in chain(method.parameters(), *(part.parameters() for part in (method.backbone.network(), *method.backbone.parts()))):
        if id(p) not in seen:
            seen.add(id(p))
            yield p


def _untouched(method: Any) -> dict[int, Any]:
    """What a copy for a plan has in common with the method, because no step changes it, and what stands in for its run, by identity."""
    pipe = getattr(method.backbone, "pipe", None)
    same = [] if pipe is None else [part for part in vars(pipe).values() if part is not None and not isinstance(part, nn.Module)]
    return {id(thing): thing for thing in same} | {
        id(method.feed): Alike(),
        id(method.measures): Measures(),
        id(method._trainer): None,
    }


def _trained(optimizers: Iterable[torch.optim.Optimizer]) -> list[nn.Parameter]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def _bytes(value: Any) -> int:
    return value.untyped_storage().nbytes() if isinstance(value, Tensor) else 0
