"""LoRAs that become a part of a pipeline: fused by diffusers, so that what is left is a plain network."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from ddil_lightning.backbones import comfy
from ddil_lightning.backbones.families import FAMILIES
from ddil_lightning.backbones.repositories import DENOISERS, cached, local_folder
from ddil_lightning.backbones.source import Lora
from ddil_lightning.servers import no_hub
from ddil_lightning.texts import place, reason

LOADED = ("unet", "transformer", "text_encoder")
"""Whose part of a LoRA diffusers loads by a method of its own, `load_lora_into_...`."""
USUAL = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA's file."""


def fuse(pipe: Any, loras: Collection[Lora], untouched: Collection[str] = ()) -> None:
    """Add `loras` to the weights of a pipeline's components, in place, but for those that are `untouched`.

    Raises ValueError, naming it, for one that cannot be read, and for one that fits nothing of the pipeline.
    """
    for lora in loras:
        try:
            _fuse(pipe, lora, untouched)
        except Exception as error:  # whatever a library makes of a file that is not as it expects
            raise ValueError(f"the LoRA {lora.path} could not be fused into the pipeline: {reason(error)}") from error


def _fuse(pipe: Any, lora: Lora, untouched: Collection[str]) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"diffusers loads none into a {type(pipe).__name__}")
    # A copy of the pipeline, of which a component can be closed without the pipeline being another one.
    open_ = copy.copy(pipe)
    seen: list[str] = []
    for name in LOADED:
        load = getattr(open_, f"load_lora_into_{name}", None)
        if load is not None:
            setattr(open_, f"load_lora_into_{name}", _into(load, seen, name, untouched))
    where, file = _file(lora)
    found = None if file is None or not Path(where, file).is_file() else by_authors(open_, Path(where, file))
    if found is None:
        open_.load_lora_weights(where, weight_name=file, use_safetensors=True)
    else:
        open_.load_lora_weights(found)
    if not seen:
        raise ValueError("it has no weights for any of its networks")
    modules = [name for name in open_._lora_loadable_modules if name not in untouched and getattr(open_, name, None) is not None]
    if modules:
        open_.fuse_lora(components=modules, lora_scale=lora.scale)
        open_.unload_lora_weights()


def by_authors(pipe: Any, file: Path) -> dict[str, Tensor] | None:
    """What a file of `diffusion_model.*` is by diffusers' names, of which diffusers reads not all; None where it is another format.

    Raises safetensors' error for a file that is none.
    """
    from safetensors.torch import load_file

    network = next((network for name in DENOISERS if (network := getattr(pipe, name, None)) is not None), None)
    family = FAMILIES.get(type(network).__name__)
    if family is None or not family.authors:
        return None  # diffusers has the same names, or nobody here knows theirs: its reader is the only one
    return comfy.translated(family, network, load_file(file))


def _file(lora: Lora) -> tuple[str, str | None]:
    """The folder or hub id of a LoRA, and its file there. Raises ValueError where that cannot be known, or only fetched."""
    path = place(lora.path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError("it is a pickled file, which may run code when it is read: give a .safetensors file")
        return str(path.parent), path.name
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        known = [name for name in (lora.weight_name, USUAL) if name in names]
        if lora.weight_name not in (None, *names) or not (known or len(names) == 1):
            raise ValueError(f"the folder has the files {', '.join(names) or '(none)'}: say by weight_name which of them it is")
        return str(path), known[0] if known else names[0]
    why = no_hub() if local_folder(lora.path, "LoRA") is None else None
    if why is not None:
        folder = cached(lora.path, lora.weight_name or USUAL, why)
        return str(folder), lora.weight_name or USUAL
    return lora.path, lora.weight_name


def _into(load: Any, seen: list[str], name: str, untouched: Collection[str]) -> Any:
    """diffusers' loader of a component, which leaves out what it has no weights for, and components that are `untouched`."""

    def guarded(state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        part = kwargs.get("prefix") or name
        if any(key.startswith(f"{part}.") for key in state):
            seen.append(part)
            if part not in untouched:
                load(state, *args, **kwargs)

    return guarded
