"""LoRA roles: networks that share the tensors of one frozen base, each with adapters of its own (PEFT's layers).

One network whose adapters are switched gives silently wrong gradients, above all under gradient checkpointing, which computes again with
the adapter that is active in the backward pass. So every role is a tree of modules of its own, whose frozen parameters *are* the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddil_lightning.bounds import above, within

NAME = "default"
"""What PEFT calls the one adapter of a tree."""


@dataclass(frozen=True)
class Adapter:
    """LoRA (Hu et al. 2021) in the place of whole copies of the network: W + (alpha / rank) B A, with A and B in float32.

    Args:
        rank: of B A; 64 is LCM-LoRA's. Without one there are no adapters, and every role is a whole copy.
        alpha: by default the rank, so that the scale of the adapters is 1.
        dropout: of what A reads, in training alone.
        targets: the layers, by name or by the end of it, such as `to_q` or `ff.net.0.proj`; by default the usual ones of the family.
        full: layers that are trained whole beside them, named likewise. An embedding of the guidance, being new, always is.
        whole: roles that are trained as whole copies nevertheless, such as `critic`.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        within(1, 10**4, **{"adapter.rank": self.rank})
        above(0, **{"adapter.alpha": self.alpha})
        within(0, 0.99, **{"adapter.dropout": self.dropout})
        idle = [name for name, value in vars(self).items() if value != getattr(Adapter, name)]
        if not self.is_on and idle:
            raise ValueError(f"adapter.{idle[0]} without adapters: set adapter.rank, such as 64")

    @property
    def is_on(self) -> bool:
        """Whether there are adapters at all."""
        return self.rank is not None

    @property
    def strength(self) -> float | None:
        """alpha / rank, which is no weight, and a part of what the adapters do; None without them."""
        return None if self.rank is None else (self.rank if self.alpha is None else self.alpha) / self.rank

    def is_for(self, role: str) -> bool:
        """Whether a role that is trained is adapters on the frozen network, and no whole copy."""
        return self.is_on and role not in self.whole


def sharing(network: nn.Module, shared: Iterable[nn.Parameter]) -> nn.Module:
    """A copy of a network whose parameters among `shared` are those very tensors: they are there once, however many networks read them."""
    return copy.deepcopy(network, {id(p): p for p in shared})


def graft(model: nn.Module, other: nn.Module) -> list[str]:
    """Give `model` the modules with weights that only `other`, otherwise its like, has; their weights are zero. Answers their names."""
    known = dict(model.named_modules())
    new = [name for name, _ in other.named_parameters() if name.rpartition(".")[0] not in known]
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in new))
    for name in names:
        module = copy.deepcopy(other.get_submodule(name)).to_empty(device=next(model.parameters()).device)
        for p in module.parameters():
            nn.init.zeros_(p)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return names


def adapt(model: nn.Module, adapter: Adapter, usual: Sequence[str], new: Sequence[str] = ()) -> list[str]:
    """Put adapters on `model`, in place: on `adapter.targets`, or on those of the `usual` ones that it has.

    The layers of `adapter.full`, whose names are answered, and the `new` ones get float32 weights of their own. Raises ValueError for a
    name that fits no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    full = [*new, *_matching(layers, adapter.full, "full")]
    targets = _matching(layers, adapter.targets, "targets") if adapter.targets else [n for n in layers if _fits(n, usual)]
    dtype = next(model.parameters()).dtype
    for name in full:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _own(model.get_submodule(name), dtype))
    targets = [name for name in targets if name not in full]
    if not targets:
        raise ValueError("adapter.targets leaves no layer for an adapter: those of adapter.full are trained whole")
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    config = LoraConfig(r=adapter.rank, lora_alpha=alpha, lora_dropout=adapter.dropout, target_modules=targets)
    inject_adapter_in_model(config, model, NAME)
    if hasattr(model, "_hf_peft_config_loaded"):  # diffusers' own sign of it
        cast(Any, model)._hf_peft_config_loaded = True
    trained = [p for name in full for p in model.get_submodule(name).parameters()]
    for p in (*trained, *(p for name, p in model.named_parameters() if ".lora_" in name)):
        p.data = p.data.float()
        p.requires_grad_(True)
    return full[len(new) :]


def fill(model: nn.Module, layers: Sequence[str], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give the parameters of layers that are trained whole the values that `weights` hold under their names."""
    own = {f"{layer}.{name}": p for layer in layers for name, p in model.get_submodule(layer).named_parameters()}
    with torch.no_grad():
        for name, value in weights:
            if name in own:
                own.pop(name).copy_(value)
    assert not own, own.keys()


def _fits(layer: str, names: Iterable[str]) -> bool:
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _matching(layers: Sequence[str], names: Sequence[str], option: str) -> list[str]:
    for name in names:
        if not any(_fits(layer, [name]) for layer in layers):
            ends = sorted({end for layer in layers for end in _ends(layer)})
            near = get_close_matches(name, ends, 3, 0.6)
            known = f"did you mean {' or '.join(near)}?" if near else f"such as {', '.join(layers[:3])}"
            raise ValueError(f"adapter.{option} has {name!r}, which is the end of no layer's name: {known}")
    return [layer for layer in layers if _fits(layer, names)]


def _ends(layer: str) -> Iterator[str]:
    """to_out.0, attn1.to_out.0 and so on of a layer's name, as far as no number comes first."""
    parts = layer.split(".")
    return (end for end in (".".join(parts[-n:]) for n in (1, 2, 3)) if not end[0].isdigit())


def _own(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A float32 copy with weights of its own, which reads and writes what its neighbours in `dtype` do, a quantised one's plain."""
    if isinstance(module, nn.Linear) and (type(module.weight.data) is not Tensor or not module.weight.is_floating_point()):
        made: nn.Module = nn.Linear(module.in_features, module.out_features, module.bias is not None, device=module.weight.device)
    else:
        made = copy.deepcopy(module).float()
    made.requires_grad_(True)
    if dtype != torch.float32:
        made.register_forward_pre_hook(_widened)
        made.register_forward_hook(partial(_narrowed, dtype))
    return made


def _widened(module: nn.Module, args: Any) -> Any:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def _narrowed(dtype: torch.dtype, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.to(dtype)


def is_adapted(network: nn.Module) -> bool:
    """Whether there are adapters on it."""
    return any(".lora_" in name for name, _ in network.named_parameters())


def merged(model: nn.Module, weights: Iterable[tuple[str, Tensor]], base: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state in `dtype` of a plain network that does as `model`, adapters on `base`: W + (alpha / rank) B A, and what is trained whole.

    `weights`: those of the base as they are stored, by name. They are merged in float32 and rounded one by one, so that there is one
    tensor at a time in another precision. In float32 a layer without an adapter keeps its tensor. All of it stays on their device.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {f"{name}.weight": cast(Any, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    shared, state = {id(p) for p in base.parameters()}, {}
    with torch.no_grad():
        for name, stored in weights:
            weight = stored.float()
            if name in adapted:
                weight = weight + adapted.pop(name).get_delta_weight(NAME).to(weight)
            state[name] = weight.to(dtype)
        assert not adapted, adapted.keys()
        device = next(iter(state.values())).device
        for name, p in model.named_parameters():
            if id(p) not in shared and ".lora_" not in name:
                state[name] = p.detach().float().to(device, dtype)
    return state
