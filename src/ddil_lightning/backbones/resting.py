"""Modules whose weights lie elsewhere, and come for their calls: what is asked seldom need not fill the memory all the time.

Those of a GPU rest on the CPU, those of the CPU in a mapped file, whose pages the system reads when they are asked for.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.texts import reason

log = logging.getLogger(__name__)

LARGE = 2**20
"""Bytes of a tensor from which on a file is worth it."""
ALIGNED = 64
"""Bytes at whose multiples tensors begin in a file, as an allocator would place them."""


def apart(device: torch.device) -> bool:
    """Whether a device has memory of its own."""
    return device.type != "cpu"


class Resting:
    """Puts `module` to rest, all of it but the tensors that it shares with others (`shared`).

    What it is called with says on which device it works; copies go there, so that nothing is ever copied back. It must not be trained.
    Where gradients pass through a call, the backward pass will need the weights where they were: it is woken then, for good. `home`: where
    they belong, of a module that has not been there yet.
    """

    def __init__(self, module: nn.Module, shared: Iterable[Tensor] = (), home: torch.device | None = None) -> None:
        self.module = module
        self._shared = {id(x) for x in shared}
        self.home = next((table[name].device for table, name in self._own()), torch.device("cpu")) if home is None else home
        self._resting: list[tuple[Any, str, Tensor]] = []
        self._handles: tuple[Any, ...] = (
            module.register_forward_pre_hook(self._called, with_kwargs=True),
            module.register_forward_hook(self._answered, always_call=True),
        )
        self._move(torch.device("cpu"))

    def wake(self, place: torch.device | None = None) -> None:
        """The weights go where they were, or to another `place`, and stay."""
        for handle in self._handles:
            handle.remove()
        self._move(self.home if place is None else place)

    def _own(self) -> list[tuple[Any, str]]:
        """The places of its tensors: a table of a submodule, and a name."""
        tables = [table for m in self.module.modules() for table in (m._parameters, m._buffers)]
        return [(table, name) for table in tables for name, x in table.items() if x is not None and id(x) not in self._shared]

    def _move(self, device: torch.device) -> None:
        for table, name in self._own():
            table[name].data = table[name].data.to(device)

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = list(_tensors((args, kwargs)))
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            self.wake()
        elif given:
            self._resting = [(table, name, table[name]) for table, name in self._own()]
            for table, name, x in self._resting:
                there = x.to(given[0].device, non_blocking=True)
                table[name] = nn.Parameter(there, requires_grad=False) if isinstance(x, nn.Parameter) else there

    def _answered(self, module: nn.Module, args: Any, out: Any) -> None:
        for table, name, x in self._resting:
            table[name] = x
        self._resting = []


@contextmanager
def visiting(guest: nn.Module, others: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the network `guest` is on `device`, and the frozen `others`, which nobody asks meanwhile, are on the CPU.

    A guest that is there already stays, and they do. None of them may be trained: gradients find a parameter where they left it.
    """
    if next(guest.parameters()).device == device:
        yield
        return
    # Quantised weights have more to them than one tensor, and stay.
    away = [(x, x.device) for other in others for x in _tensors_of(other) if type(x.data) is Tensor]
    brought = [(x, x.data) for x in _tensors_of(guest)]
    for x, _ in away:
        x.data = x.data.cpu()
    for x, value in brought:
        x.data = value.to(device)
    try:
        yield
    finally:
        for x, value in brought:
            x.data = value
        for x, place in away:
            x.data = x.data.to(place)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def to_file(modules: Iterable[nn.Module], folder: Path) -> None:
    """Give the large tensors of modules that are not trained to a file in `folder`, which goes with the last of them.

    They are what they were, on the CPU, and take memory again when they are read, which the system may take back at any time.
    Where the file finds no room, all stays as it is, and a line says so.
    """
    every = {id(x): x for module in modules for x in (*module.parameters(), *module.buffers())}
    moved = [x for x in every.values() if x.nbytes >= LARGE and _dense(x)]
    if not moved:
        return
    starts = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".resting-", dir=folder) as file:
            for x in moved:
                starts.append(file.seek(-(-file.tell() // ALIGNED) * ALIGNED))
                file.write(_flat(x).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=False, size=file.tell(), dtype=torch.uint8).untyped_storage()
    except (OSError, RuntimeError) as error:  # no room, no right, or a system that cannot map a file that it will remove
        log.warning(f"weights that nobody asks stay in memory, a file in {folder} cannot hold them: {reason(error)}")
        return
    for x, start in zip(moved, starts, strict=True):
        x.data = torch.empty(0, dtype=x.dtype).set_(mapped, start // x.itemsize, x.shape, x.stride())


def _dense(x: Tensor) -> bool:
    """Whether its elements fill their stretch of memory, in whatever order."""
    dims = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in dims:
        if stride != expected:
            return False
        expected *= size
    return True


def _flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory."""
    return x.detach().as_strided((x.numel(),), (1,))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)
