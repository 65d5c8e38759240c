"""What the roles of a method share with the frozen pipeline: it is there once, in no checkpoint, and merged with adapters to go out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def share_buffers(method: Any) -> None:
    """Have the roles on one base read its buffers, such as a table of positions, as they read its weights: moving a module parts them."""
    networks = _on_base(method)
    base = method.backbone.network() if networks else nn.Module()
    for network in networks:
        known = dict(network.named_modules(remove_duplicate=False))
        for name, buffer in base.named_buffers(remove_duplicate=False):
            parent, _, own = name.rpartition(".")
            mine = known[parent]._buffers.get(own) if parent in known else None
            if mine is not None and (mine.shape, mine.dtype, mine.device) == (buffer.shape, buffer.dtype, buffer.device):
                known[parent]._buffers[own] = buffer


def leave_out_shared(method: Any) -> None:
    """Keep what the roles of `method` share with the frozen pipeline out of its checkpoints, which then hold adapters alone."""
    method.register_state_dict_post_hook(_without_shared)
    method.register_load_state_dict_post_hook(_shared_are_there)


def leave_to_each_process(method: Any) -> None:
    """Have DDP leave alone what is shared: every process has read it, no gradient changes it, and it may be quantised. And buffers of
    networks that no step changes, which it would send around in every one; they may rest on the CPU."""
    method._ddp_params_and_buffers_to_ignore = sorted(shared_names(method) | _constant(method))  # torch's own name


def _without_shared(method: Any, state: dict[str, Any], prefix: str, local: Any) -> None:
    for name in shared_names(method):
        state.pop(prefix + name, None)


def _shared_are_there(method: Any, found: Any) -> None:
    shared = shared_names(method)
    found.missing_keys[:] = [name for name in found.missing_keys if name not in shared]


def shared_names(method: Any) -> set[str]:
    """What of a method's weights and buffers is the frozen pipeline's, by the names that a state would have for it."""
    shared = {id(p) for role in method.roles.values() for p in role.shared}
    shared |= {id(b) for b in method.backbone.network().buffers()} if _on_base(method) else set()
    every = (*method.named_parameters(remove_duplicate=False), *method.named_buffers(remove_duplicate=False))
    return {name for name, x in every if id(x) in shared}


def _on_base(method: Any) -> list[nn.Module]:
    """The networks that are adapters on the frozen one."""
    roles = (*method.roles.values(), *filter(None, [method.averaging.role]))
    return [role.network for role in roles if role.shared]


def _constant(method: Any) -> set[str]:
    """The names of the buffers of networks but for those of normalisations, which follow the data."""
    roles = (*method.roles.values(), *filter(None, [method.averaging.role]))
    inside = {id(m) for role in roles for m in role.network.modules() if not isinstance(m, _NormBase)}
    modules = method.named_modules(remove_duplicate=False)
    return {f"{name}.{own}" for name, module in modules if id(module) in inside for own in module._buffers}


@contextmanager
def merged(method: Any, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, the deployed network of `method` has its adapters merged: a plain network in `dtype`, as it is exported, on the CPU."""
    if not method.outgoing.shared or method.shards.whole is not None:
        yield
        return
    with standing_in(method, method.backbone.merged(method.outgoing.network, dtype).cpu()):
        yield


@contextmanager
def standing_in(method: Any, network: nn.Module | None) -> Iterator[None]:
    """Inside, `network` is deployed in the place of the method's own; None: its own is, and no other that stands in for it."""
    before, method.shards.whole = method.shards.whole, network
    try:
        yield
    finally:
        method.shards.whole = before
