"""Averages of a network's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def lerp_(average: nn.Module, online: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) online, all parameters in one fused call; buffers are copied."""
    (mine, copies), (theirs, values) = _tensors(average), _tensors(online)
    torch._foreach_lerp_(mine, theirs, 1 - decay)
    for a, b in zip(copies, values, strict=True):
        a.copy_(b)


def _tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers, each once, in one order for equal architectures: a walk of its own, because `parameters()` and
    `buffers()` take longer than the averaging itself, at every update."""
    parameters: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    left, seen = [module], set()
    while left:
        m = left.pop()
        if id(m) in seen:
            continue
        seen.add(id(m))
        for p in m._parameters.values():
            if p is not None:
                parameters[id(p)] = p
        for b in m._buffers.values():
            if b is not None:
                buffers[id(b)] = b
        left += [child for child in m._modules.values() if child is not None]
    return list(parameters.values()), list(buffers.values())
