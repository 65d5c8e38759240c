"""Adapters by the names that layers have in the network of a model's authors, `diffusion_model.*`: ComfyUI's, whose network is that one.

What diffusers has as several layers (queries, keys, values) may be one there. Their adapters then are one of as many times the rank: the A
of each below the other, the B of each in rows and columns of its own, so that nothing is lost, and each can be taken out again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.backbones.family import Family

PREFIX = "diffusion_model."
PARTS = {"lora_down.weight": "down", "lora_A.weight": "down", "lora_up.weight": "up", "lora_B.weight": "up", "alpha": "alpha"}
"""Both spellings of the two factors: A is the one that reads, B the one that writes."""


class Pair(NamedTuple):
    """An adapter: B [out, rank] after A [rank, in]."""

    a: Tensor
    b: Tensor


def check(family: type[Family], layers: Iterable[str], others: str) -> None:
    """Raises ValueError, naming the `others` that do, where a layer's name is not known."""
    if family.authors is None:
        raise ValueError(f"--format comfy: how ComfyUI names the layers of a {family.__name__} is not known here: choose {others}")
    for layer in layers:
        if _theirs(family.authors, layer) is None:
            raise ValueError(f"--format comfy: {layer}, which has an adapter, is no layer of its own in ComfyUI: choose {others}")


def named(family: type[Family], model: Any, pairs: Mapping[str, Pair], alpha: float) -> dict[str, Tensor]:
    """The file's content of adapters by layer: factors, and the alpha of each, which ComfyUI divides by the rank.

    `model`: their network in diffusers, which says how wide a layer without an adapter is. They are called lora_down and lora_up: all
    tools read lora_A and lora_B besides, but diffusers does not of Flux.
    """
    table, found = family.authors or {}, {}
    for name in dict.fromkeys(filter(None, (_theirs(table, layer) for layer in pairs))):
        stack = _ours(table, name)
        one = pairs[next(layer for layer in stack if layer in pairs)]
        parts = [pairs[layer] if layer in pairs else _nothing(one, model.get_submodule(layer).out_features) for layer in stack]
        found[f"{PREFIX}{name}.lora_down.weight"] = torch.cat([part.a for part in parts])
        found[f"{PREFIX}{name}.lora_up.weight"] = torch.block_diag(*(part.b for part in parts)) if len(parts) > 1 else one.b
        found[f"{PREFIX}{name}.alpha"] = torch.tensor(alpha * len(parts))
    return found


def translated(family: type[Family], model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A file's content by diffusers' names, with alpha / rank in A; None where there are other names than of the family's table.

    `model`: the network that it is for. An adapter that adds nothing because it is all zeros is left out.
    """
    table, layers = family.authors or {}, dict[str, dict[str, Tensor]]()
    for key, value in state.items():
        name, part = _parted(key)
        if part is None or _numbered(name)[0] not in table:
            return None
        layers.setdefault(name, {})[part] = value
    if not all({"down", "up"} <= layer.keys() for layer in layers.values()):
        return None
    found = {}
    for name, layer in layers.items():
        a, stack = layer["down"], _ours(table, name)
        scaled = (a.float() * (float(layer["alpha"]) / len(a))).to(a.dtype) if "alpha" in layer else a
        for own, pair in zip(stack, _split(stack, Pair(scaled, layer["up"]), model), strict=True):
            if pair.a.any() or pair.b.any():
                found[f"{family.component}.{own}.lora_A.weight"] = pair.a.contiguous()
                found[f"{family.component}.{own}.lora_B.weight"] = pair.b.contiguous()
    return found


def _split(layers: tuple[str, ...], pair: Pair, model: Any) -> list[Pair]:
    """The adapters of the layers in a stack: each its own factors where they are apart, else all of A and its rows of B."""
    if len(layers) == 1:
        return [pair]
    n, rank = len(layers), len(pair.a)
    rows = pair.b.split([model.get_submodule(layer).out_features for layer in layers])
    if rank % n == 0:
        blocks = [row.split(rank // n, 1) for row in rows]
        if not any(bool(block.any()) for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j):
            return [Pair(a, row[i]) for i, (a, row) in enumerate(zip(pair.a.chunk(n), blocks, strict=True))]
    return [Pair(pair.a, row) for row in rows]


def _nothing(like: Pair, width: int) -> Pair:
    return Pair(torch.zeros_like(like.a), like.b.new_zeros(width, like.b.shape[1]))


def _parted(key: str) -> tuple[str, str | None]:
    """The layer of a key, and which part of its adapter it is."""
    for end, part in PARTS.items():
        if key.startswith(PREFIX) and key.endswith(f".{end}"):
            return key[len(PREFIX) : -len(end) - 1], part
    return key, None


def _numbered(layer: str) -> tuple[str, str]:
    """A layer's name with {} in the place of its first number, and that."""
    found = re.search(r"(?<=\.)\d+(?=\.)", layer)
    return (layer, "") if found is None else (f"{layer[: found.start()]}{{}}{layer[found.end() :]}", found.group())


def _theirs(table: Mapping[str, tuple[str, ...]], layer: str) -> str | None:
    """The name of a layer of diffusers in the authors' network."""
    name, number = _numbered(layer)
    if not table:
        return layer
    return next((theirs.format(number) for theirs, ours in table.items() if name in ours), None)


def _ours(table: Mapping[str, tuple[str, ...]], layer: str) -> tuple[str, ...]:
    """The names in diffusers of what the authors' network has as one layer."""
    name, number = _numbered(layer)
    return tuple(ours.format(number) for ours in table[name]) if table else (layer,)
