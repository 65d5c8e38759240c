"""Blocks that are alike, as a transformer's are: a plan runs some of them, and takes the others to need what those needed.

Of a row the last is run, of whose answers some are read by nobody, and the first that is told what none before it was, with what they make
measured: what passes while a block computes, what stays for its backward pass, and what passes in that. Any other is a function that makes
tensors of the same sizes, holds as many bytes, and lifts the peak as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ddil_lightning.backbones.network import Network


@dataclass
class Output:
    """A tensor that a block answers with; `same`: which of the tensors that it was told it is, if it is one of them.

    Else it lies at an `offset` in what has so many bytes (`size`), which others of its answers may lie in too, by its number (`inside`).
    """

    shape: Sequence[int]
    stride: Sequence[int]
    offset: int
    dtype: torch.dtype
    trained: bool
    same: int | None
    inside: int
    size: int


@dataclass
class Record:
    """What a block needed, in bytes: the rise above what there was, of everything and of activations alone.

    `held`: what stays after it besides its answers. `stay`: which of the tensors that it was told. `backward`: by which of its outputs had
    no gradient.
    """

    outputs: list[Output]
    spec: TreeSpec
    forward: tuple[int, int]
    held: int
    stay: tuple[int, ...]
    backward: dict[tuple[bool, ...], tuple[int, int]] = field(default_factory=dict)


class Repeats:
    """Puts itself in the place of the blocks of `networks`, whose memory a `ledger` counts."""

    def __init__(self, ledger: Any, networks: Iterable[nn.Module]) -> None:
        self.ledger, self.inside = ledger, False
        self.known: dict[Any, Record] = {}
        for network in networks:
            rows: dict[Any, list[nn.Module]] = {}
            for block in network.blocks() if isinstance(network, Network) else []:
                rows.setdefault(_kind(block), []).append(block)
            long = {kind: row for kind, row in rows.items() if len(row) > 2}
            for kind, row in long.items():
                for i, block in enumerate(row):
                    inner = i < len(row) - 1
                    block.forward = partial(self.call, block, (kind, False), inner, block.forward)
            if long:
                self._checkpointed(network, {id(block): (kind, i, len(row)) for kind, row in long.items() for i, block in enumerate(row)})

    def _checkpointed(self, network: nn.Module, places: dict[int, Any]) -> None:
        """Have what computes blocks again ask here too."""
        for module in network.modules():
            again = getattr(module, "_gradient_checkpointing_func", None)
            if again is not None:
                module._gradient_checkpointing_func = partial(self._again, again, places)  # type: ignore[assignment]

    def _again(self, again: Callable[..., Any], places: dict[int, Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(again, _Through(self, block))
        if id(block) not in places or block._forward_hooks:  # hooks are for what computes
            return run(*args, **kwargs)
        kind, i, n = places[id(block)]
        return self.call(block, (kind, True), i < n - 1, run, *args, **kwargs)

    def call(self, block: nn.Module, kind: Any, inner: bool, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a block answers: by itself, measured, or by what is known of others."""
        if self.inside:
            return run(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        told = [x for x in leaves if isinstance(x, Tensor)]
        trained = tuple(p.requires_grad for p in block.parameters())
        marks = tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in told)
        key = (kind, trained, block.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), marks)
        graded = torch.is_grad_enabled() and any(x.requires_grad for x in told)
        record = self.known.get(key)
        if record is not None and (inner or not graded) and (graded or not torch.is_grad_enabled() or not any(trained)):
            if graded and not record.backward:
                self._try(record, block, run, leaves, spec)
            return tree_unflatten(self._repeat(record, block, told, graded), record.spec)
        return self._measured(key, block, run, leaves, spec, graded)

    def _measured(self, key: Any, block: nn.Module, run: Callable[..., Any], leaves: list[Any], spec: TreeSpec, graded: bool) -> Any:
        """The block's own answer; what it needed is noted, of its backward pass when that is over."""
        told = [x for x in leaves if isinstance(x, Tensor)]
        state: dict[str, Any] = {}
        if graded:
            leaves = _passed(_Enter, self, state, leaves)
        args, kwargs = tree_unflatten(leaves, spec)
        storages, kept = [x.untyped_storage()._cdata for x in told], set[int]()

        def keep(x: Tensor) -> Tensor:
            kept.add(x.untyped_storage()._cdata)
            return x.detach()  # an output that is kept as it is would keep itself

        again = key[0][1]  # keeps all that it was told, and has hooks of its own
        start = self.ledger.mark()
        with self.through(), nullcontext() if again else torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = run(*args, **kwargs)
        answers, out_spec = tree_flatten(out)
        if not all(isinstance(x, Tensor) for x in answers):
            return out
        outputs, fresh = [], dict[int, int]()
        for x in answers:
            cdata, size = x.untyped_storage()._cdata, x.untyped_storage().nbytes()
            same = storages.index(cdata) if cdata in storages else None
            outputs.append(Output(x.shape, x.stride(), x.storage_offset(), x.dtype, x.requires_grad, same, cdata, size))
            if same is None:
                fresh[cdata] = size
        held = self.ledger.live - start[0] - sum(fresh.values())
        if all(one.same is None or told[one.same].shape == one.shape for one in outputs):
            rise = self.ledger.risen(start)
            stay = tuple(i for i, cdata in enumerate(storages) if again or cdata in kept)
            record = self.known.setdefault(key, Record(outputs, out_spec, rise, held, stay))
            state["record"] = record
        if graded:
            answers = _passed(_Exit, self, state, answers)
        return tree_unflatten(answers, out_spec)

    def _try(self, record: Record, block: nn.Module, run: Callable[..., Any], leaves: list[Any], spec: TreeSpec) -> None:
        """Note a backward pass before anybody comes to one: the last blocks of a row are not asked where features lie before them."""
        params = [p for p in block.parameters() if p.requires_grad]
        grads = [p.grad for p in params]
        with self.ledger.aside():
            apart = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
            args, kwargs = tree_unflatten(apart, spec)
            with self.through():
                answers = [x for x in tree_flatten(run(*args, **kwargs))[0] if x.requires_grad]
            for p in params:
                p.grad = None
            told = [torch.empty_like(x) for x in answers]
            start = self.ledger.mark()
            torch.autograd.backward(answers, told)
            record.backward[(False,) * len(answers)] = self.ledger.risen(start)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad

    def _repeat(self, record: Record, block: nn.Module, told: list[Tensor], graded: bool) -> list[Tensor]:
        """What it answers by a record."""
        if graded:
            return list(_Repeated.apply(self, record, block, *told))  # type: ignore[no-untyped-call]
        self.ledger.lift(record.forward)
        return _made(record, told)

    @contextmanager
    def through(self) -> Iterator[None]:
        """Inside, blocks compute."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


class _Through:
    """A block that computes whoever asks: what checkpoints are made of, and asked again in the backward pass."""

    def __init__(self, repeats: Repeats, block: nn.Module) -> None:
        self.repeats, self.block = repeats, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.repeats.through():
            return self.block(*args, **kwargs)


def _kind(block: nn.Module) -> Any:
    return type(block), tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())


def _made(record: Record, told: Sequence[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    whole: dict[int, Tensor] = {}
    for one in record.outputs:
        if one.same is not None:
            found.append(told[one.same].view_as(told[one.same]))
            continue
        if one.inside not in whole:
            whole[one.inside] = torch.empty(one.size // one.dtype.itemsize, dtype=one.dtype)
        found.append(whole[one.inside].as_strided(one.shape, one.stride, one.offset))
    return found


def _passed(through: Any, repeats: Repeats, state: dict[str, Any], leaves: list[Any]) -> list[Any]:
    """The same, with those that have gradients handed `through` a function."""
    graded = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    found = dict(zip(graded, through.apply(repeats, state, *(leaves[i] for i in graded)) if graded else (), strict=True))
    return [found.get(i, x) for i, x in enumerate(leaves)]


class _Passed(torch.autograd.Function):
    """Tensors as they are, with the state of the block that they belong to."""

    @staticmethod
    def forward(ctx: Any, repeats: Repeats, state: dict[str, Any], *tensors: Tensor) -> Any:
        """Views of them."""
        ctx.repeats, ctx.state = repeats, state
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)


class _Enter(_Passed):
    """The inputs of a block as they are; its backward pass ends here."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """What has risen since `_Exit` is what it needed."""
        state = ctx.state
        if "since" in state and "record" in state:
            state["record"].backward[state["pattern"]] = ctx.repeats.ledger.risen(state["since"])
        return (None, None, *grads)


class _Exit(_Passed):
    """The outputs of a block as they are; its backward pass begins here."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Where it stands before."""
        ctx.state["pattern"] = tuple(grad is None for grad in grads)
        ctx.state["since"] = ctx.repeats.ledger.mark()
        return (None, None, *grads)


class _Repeated(torch.autograd.Function):
    """A block by a record of another."""

    @staticmethod
    def forward(ctx: Any, repeats: Repeats, record: Record, block: nn.Module, *told: Tensor) -> Any:
        """As much passes and stays as in that."""
        ctx.repeats, ctx.record, ctx.graded = repeats, record, [(i, x.shape, x.dtype) for i, x in enumerate(told) if x.requires_grad]
        ctx.held, ctx.n = [told[i] for i in record.stay], len(told)
        ctx.params = [p for p in block.parameters() if p.requires_grad]
        ctx.set_materialize_grads(False)
        repeats.ledger.lift(record.forward)
        ctx.held.append(torch.empty(max(record.held, 0), dtype=torch.uint8))
        made = _made(record, told)
        ctx.mark_non_differentiable(*(x for x, one in zip(made, record.outputs, strict=True) if not one.trained))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Likewise of what passes; gradients are there afterwards."""
        record, ledger = ctx.record, ctx.repeats.ledger
        pattern = tuple(grad is None for grad, one in zip(grads, record.outputs, strict=True) if one.trained)
        rise = record.backward.get(pattern) or next(iter(record.backward.values()))
        ledger.lift(rise if any(p.grad is None for p in ctx.params) else (rise[1], rise[1]))
        for p in ctx.params:
            if p.grad is None:
                p.grad = torch.empty_like(p)
                ledger.gradient(p)
        made = {i: torch.empty(shape, dtype=dtype) for i, shape, dtype in ctx.graded}
        ctx.held = None
        return (None, None, None, *(made.get(i) for i in range(ctx.n)))
