"""Adapters as files: diffusers' format, with rank and alpha in its header, kohya's, which ComfyUI and A1111 read, and ComfyUI's own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones import comfy
from ddil_lightning.backbones.adapters import NAME, is_adapted
from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.loras import by_authors
from ddil_lightning.backbones.weights import hushed


def check(network: nn.Module, shared: Iterable[nn.Parameter], told: bool = False) -> None:
    """Raises ValueError, naming formats that do, for a network that is more than adapters on the `shared` parameters, or none at all.

    `told`: whether the guidance is told to the frozen network too, so that its embedding lies below the adapters.
    """
    if not isinstance(network, Family) or not is_adapted(network):
        raise ValueError("this student has no adapters, which --format lora, kohya and comfy hold: choose diffusers or single-file")
    base = {id(p) for p in shared}
    whole = [name for name, p in network.named_parameters() if id(p) not in base and ".lora_" not in name]
    if network.w_conditioned and not told:
        raise ValueError(
            "this student is told its guidance by an embedding that is trained whole, which no file of adapters holds: choose --format "
            "diffusers, or train with model.w_conditioned=false"
        )
    if whole:
        layer = whole[0].removeprefix(f"{network.component}.").rpartition(".")[0]
        raise ValueError(
            f"this student has layers that are trained whole ({layer}, by adapter.full), which no file of adapters holds: choose --format "
            "diffusers or single-file"
        )


def parameters(network: nn.Module) -> list[nn.Parameter]:
    """Those of its adapters."""
    return [p for name, p in network.named_parameters() if ".lora_" in name]


def write(kind: Any, file: Path, network: Family, dtype: torch.dtype) -> None:
    """The adapters in `dtype` as a pipeline of class `kind` loads them by `load_lora_weights`.

    The header says of them what every version of PEFT knows, and no more: one that meets an unknown word refuses the file.
    """
    config = network.model.peft_config[NAME]
    about = {"r": config.r, "lora_alpha": _alpha(config), "target_modules": layers(network)}
    weights = {key: value.detach().to("cpu", dtype).contiguous() for key, value in _state(network).items()}
    given = {f"{network.component}_lora_layers": weights, f"{network.component}_lora_adapter_metadata": about}
    kind.save_lora_weights(file.parent, weight_name=file.name, safe_serialization=True, **given)


def write_kohya(file: Path, network: Family, dtype: torch.dtype) -> None:
    """The same under kohya's names, each layer with its alpha: W + (alpha / rank) up down.

    They are made of diffusers' names (lora_unet_down_blocks_...), for Stable Diffusion and SDXL alike, which ComfyUI, A1111 and diffusers
    all read. diffusers' own converter takes the rank for alpha, so the alphas are written here.
    """
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    config = network.model.peft_config[NAME]
    made = convert_state_dict_to_kohya({f"{network.component}.{key}": value for key, value in _state(network).items()})
    alpha = float(_alpha(config))
    own = {key: value.detach().to("cpu", dtype).contiguous() for key, value in made.items() if not key.endswith(".alpha")}
    alphas = {key: torch.tensor(alpha) for key in made if key.endswith(".alpha")}
    header = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(config.r), "ss_network_alpha": f"{alpha:g}"}
    save_file({**own, **alphas}, file, metadata=header)


def write_comfy(file: Path, network: Family, dtype: torch.dtype) -> None:
    """The same under the names of its authors, `diffusion_model.*`, each layer with its alpha (`comfy.named`)."""
    from safetensors.torch import save_file

    state = {key: value.detach().to("cpu", dtype) for key, value in _state(network).items()}
    pairs = {layer: comfy.Pair(state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]) for layer in layers(network)}
    made = comfy.named(type(network), network.model, pairs, float(_alpha(network.model.peft_config[NAME])))
    save_file({key: value.contiguous() for key, value in made.items()}, file, metadata={"format": "pt"})


def layers(network: Family) -> list[str]:
    """The names in diffusers of those that have adapters."""
    return sorted({key.split(".lora_")[0] for key in _state(network)})


def _alpha(config: Any) -> float:
    return int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else float(config.lora_alpha)


def _state(network: Family) -> dict[str, Tensor]:
    """The adapters' weights by PEFT's own reading of them: `mid_block.attentions.0.proj_in.lora_A.weight` and so on."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(network.model, adapter_name=NAME)
    return found


def load(pipe: Any, file: Path) -> Any:
    """The pipeline, after diffusers has put the adapters of a file, of any format, on it."""
    found = by_authors(pipe, file)
    with hushed():
        if found is None:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        else:
            pipe.load_lora_weights(found)
    return pipe


def check_equal(loaded: nn.Module, trained: nn.Module, dtype: torch.dtype) -> None:
    """Raises ValueError, naming the layer, unless a model has the adapters of another as `dtype` holds them, with the same scale.

    The scale may be in A, as it is where a file's alpha was multiplied into it, and then rounded.
    """
    from peft.tuners.lora import LoraLayer

    theirs = {name: module for name, module in loaded.named_modules() if isinstance(module, LoraLayer)}
    mine = {name: module for name, module in trained.named_modules() if isinstance(module, LoraLayer)}
    lost = sorted(mine.keys() ^ theirs.keys())
    for name in [] if lost else mine:
        (its,), same = theirs[name].scaling.values(), mine[name].scaling[NAME]
        for part in ("lora_A", "lora_B"):
            (other,) = getattr(theirs[name], part).values()
            stored = getattr(mine[name], part)[NAME].weight.detach().to(dtype).to(other.weight)
            if part == "lora_A" and abs(its - same) > 1e-3 * same:
                close = torch.allclose(its * other.weight, same * stored, rtol=2 * torch.finfo(dtype).eps, atol=0)
            else:
                close = torch.equal(other.weight, stored)
            lost += [] if close else [name]
    if lost:
        raise ValueError(f"the adapter of {lost[0]} is another one when diffusers reads the file")
