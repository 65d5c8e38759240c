"""A step on a GPU that is not there: tensors have its device and no values, and what would have the host wait for it is written down."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.utils._pytree import tree_leaves

import ddil_lightning
from ddil_lightning.feed import Feed
from ddil_lightning.records import LatentBatch, Origin, send
from ddil_lightning.streams import Streams
from ddil_lightning.training import ledger
from ddil_lightning.training.gan import LogitNormal
from ddil_lightning.training.ledger import Ledger, Planned, latents
from ddil_lightning.training.vision import Vision

GPU = torch.device("cuda", 0)
PACKAGE = str(Path(ddil_lightning.__file__).parent)


class Watched(Ledger):
    """Notes, with the line of ours that asked, every value that is read, every copy between CPU and GPU that blocks, and every operation
    whose result's size the host must know."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: set[int] = set()
        self._depth = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        if func is torch.ops.aten.is_pinned.default:
            return id(args[0].untyped_storage()) in self._pinned
        if func is torch.ops.aten._pin_memory.default:
            made = args[0].clone()
            self._pinned.add(made.untyped_storage()._cdata)
            return made
        on = any(_there(x) for x in given)
        self._depth += 1
        try:
            out = super().dispatch(func, types, args, kwargs)
        except DynamicOutputShapeException:
            if self._depth == 1:
                self._note(f"{func} has a size of its own", on)
            raise
        finally:
            self._depth -= 1
        if self._depth:
            return out
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self._note("a value is read", on)
        moved = out if isinstance(out, Tensor) else None
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and moved is not None:
            source = given[-1] if func is torch.ops.aten.copy_.default else given[0]
            here = source.untyped_storage()._cdata in self._pinned
            if _there(moved) != _there(source) and not ((kwargs or {}).get("non_blocking") and (here or _there(source))):
                self._note("a copy blocks", True)
        elif func is torch.ops.aten.index.Tensor and _there(args[0]) and not all(x is None or _there(x) for x in args[1]):
            self._note("a GPU's tensor is indexed by one of the CPU", True)
        return out

    def _note(self, what: Any, really: Any = False, *rest: Any) -> None:  # type: ignore[override]
        if isinstance(what, Tensor):
            super()._note(what, really)
        elif really:
            ours = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
            self.waits.append(f"{what} in {ours[-1] if ours else 'none of ours'}")


class Beside(Watched):
    """The same, with a host that computes: what is of the CPU alone has values, so that a buffer can be drawn from."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pinning = func in (torch.ops.aten.is_pinned.default, torch.ops.aten._pin_memory.default)
        fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs or {})))
        if pinning or fake or (kwargs or {}).get("device") == GPU:
            return super().dispatch(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


class Told(Feed):
    """A feed whose batches come from where it was told."""

    def __init__(self, origin: Origin) -> None:
        self.told = origin

    def origin(self, batch: LatentBatch) -> Origin:
        return self.told


def _there(x: Any) -> bool:
    device = x.fake_device if isinstance(x, FakeTensor) else x.device
    return bool(device.type == "cuda")


def _listed(inputs: Any) -> Any:
    return [inputs] if isinstance(inputs, Tensor) else inputs


@contextmanager
def without_one() -> Iterator[None]:
    """Inside, what needs a GPU's driver is done without it: generators are the CPU's, whose numbers nobody reads."""
    number = Streams.local
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streams, "local", lambda self, purpose, device="cpu": number(self, purpose))
        patch.setattr(LogitNormal, "__call__", lambda self, n, *_: torch.zeros(n, dtype=torch.long, device=GPU))
        patch.setattr(Vision, "to", lambda self, *_: self)  # it is there already
        patch.setattr(torch.autograd, "grad", lambda outputs, inputs, *rest, **kw: tuple(map(torch.empty_like, _listed(inputs))))
        arrived = SimpleNamespace(synchronize=lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(record_event=lambda: arrived, synchronize=lambda: None))
        yield


def waits(method: Any, origin: Origin | None = None, batch: int = 2, updates: int = 1) -> list[str]:
    """What has the host wait in so many updates of the student, those of a critic between them included; the first, in which tables are
    copied, is not counted. `origin` of the batch: by default all are forward latents. Gradients are taken for granted: autograd's engine
    asks for the driver, and nothing of ours is in it."""
    watched = Watched()
    with pytest.MonkeyPatch.context() as patch, without_one():
        patch.setattr(ledger, "Ledger", lambda: watched)
        patch.setattr(ledger, "_empty", lambda p: torch.nn.Parameter(torch.empty_like(p, device=GPU), requires_grad=p.requires_grad))
        patch.setattr(type(method), "device", property(lambda self: GPU))
        planned = Planned(method, "32-true", batch, True)
        made = planned.method
        made.feed = made.feed if origin is None else Told(origin)
        parts = (made, made.backbone.network(), *made.backbone.parts())
        with watched:
            for module in chain.from_iterable(part.modules() for part in parts):
                for name, buffer in list(module._buffers.items()):
                    if buffer is not None:
                        module._buffers[name] = buffer.to(GPU)
            for module in getattr(getattr(made, "adversary", None), "vision", torch.nn.Module()).modules():  # a network of no role
                module._parameters = {name: torch.nn.Parameter(p.to(GPU), requires_grad=False) for name, p in module._parameters.items()}
            trained = ledger._trained(planned._optimizers())
            made.trainer.strategy.backward = lambda loss, *rest: [setattr(p, "grad", torch.empty_like(p)) for p in trained]
            made.train()
            b = send(latents(made, batch, planned.context), GPU)
            for first in (True, False):
                watched.waits.clear()
                before = made.student_updates
                while made.student_updates < before + (1 if first else updates):
                    made.training_step(b, 0)
                    made.descent.watch.read()
    return watched.waits
