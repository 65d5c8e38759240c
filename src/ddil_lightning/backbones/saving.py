"""A student's pipeline on the disk: its own network and scheduler, with the teacher's other components."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddil_lightning.backbones.interface import Dtypes
from ddil_lightning.backbones.loading import load_pipeline


def write(backbone: Any, folder: Path, own: Mapping[str, Any], dtype: Dtypes, safety_checker: bool) -> None:
    """The pipeline of `backbone`, a Pipeline, with the components `own` in the place of its, all of it in `dtype`.

    Frozen parts that were trained with in half precision are read again, each as it is stored, rounded to `dtype` alone.
    """
    kinds = {"default": dtype} if isinstance(dtype, torch.dtype) else dtype
    network = backbone.network().model
    whole = {part.dtype for part in backbone.parts() if part is not network} == {torch.float32}
    if safety_checker or not whole:
        parts = load_pipeline(backbone.source, dict(kinds), spare=not safety_checker, **own).components
    else:
        parts = {**backbone.pipe.components, **own}
    narrow = {name: kinds.get(name, kinds["default"]) for name, part in parts.items() if isinstance(part, nn.Module)}
    parts = {**parts, **{name: halved(parts[name], kind) for name, kind in narrow.items() if kind != torch.float32}}
    extra = {"requires_safety_checker": parts["safety_checker"] is not None} if "safety_checker" in parts else {}
    type(backbone.pipe)(**parts, **extra).save_pretrained(folder, safe_serialization=True)


def halved(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a component in `dtype`, made without a second one in its own precision."""
    narrow: dict[int, Any] = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad) for p in part.parameters()}
    return nn.Module.to(copy.deepcopy(part, narrow), dtype)  # its own `to` warns of layers that there are not
