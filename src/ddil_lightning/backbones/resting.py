"""Modules whose weights lie on the CPU and come to the device for their calls: what is asked seldom need not fill it all the time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Resting:
    """Puts `module` to rest, all of it but the tensors that it shares with others (`shared`).

    What it is called with says on which device it works; copies go there, so that nothing is ever copied back. It must not be trained.
    Where gradients pass through a call, the backward pass will need the weights where they were: it is woken then, for good.
    """

    def __init__(self, module: nn.Module, shared: Iterable[Tensor] = ()) -> None:
        self.module = module
        self._shared = {id(x) for x in shared}
        self.home = next((table[name].device for table, name in self._own()), torch.device("cpu"))
        self._resting: list[tuple[Any, str, Tensor]] = []
        self._handles: tuple[Any, ...] = (
            module.register_forward_pre_hook(self._called, with_kwargs=True),
            module.register_forward_hook(self._answered, always_call=True),
        )
        self._move(torch.device("cpu"))

    def wake(self) -> None:
        """The weights go where they were, and stay."""
        for handle in self._handles:
            handle.remove()
        self._move(self.home)

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


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)
