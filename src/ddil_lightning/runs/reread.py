"""A student's pipeline that is read again, as its users read it, beside the method that it came from: what is frozen is there once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ddil_lightning.backbones.loading import load_pipeline

if TYPE_CHECKING:
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.training.method import Distillation


class NotAsTrained(ValueError):
    """An exported pipeline that does not sample as the trainer does. It is not deleted."""


def is_lean(method: Distillation) -> bool:
    """Whether the student is adapters on a network in half precision, as large models are trained: see `export.confirm`."""
    return bool(method.outgoing.shared) and method.backbone.dtype != torch.float32


def loads(method: Distillation) -> torch.dtype:
    """The precision that pipelines are compared in."""
    return method.backbone.dtype if is_lean(method) else torch.float32


def reloaded(method: Distillation, folder: Path) -> Pipeline:
    """A student's pipeline from its folder, in the place of the method's own (`beside`)."""
    return beside(method, load_pipeline(folder, loads(method)), f"the pipeline {folder.name}")


def beside(method: Distillation, pipe: Any, what: str) -> Pipeline:
    """A pipeline of diffusers that was read again on the CPU, called `what`, in the place of the method's own (`Pipeline.sharing`).

    Raises NotAsTrained, naming the tensor, unless its encoders are those of the method, which take their place.
    """
    backbone = cast("Pipeline", method.backbone)
    for name, own in backbone.frozen().items():
        if getattr(pipe, name) is not own:
            _check_frozen(getattr(pipe, name), own, f"the {name} in {what}")
    return backbone.sharing(pipe, method.deployment.called_with)


ROUNDED = 2**-7
"""How far a frozen weight may be from the same one, relative to its tensor's largest: each may have been rounded to half precision."""


def _check_frozen(its: nn.Module, own: nn.Module, what: str) -> None:
    theirs = its.state_dict()
    for name, value in own.state_dict().items():
        read = theirs.get(name)
        if read is None or read.shape != value.shape:
            raise NotAsTrained(f"{what} is not as it was written: it lacks {name} when it is read again")
        mine = value.to(read.device)
        if read.numel() and not (read.double() - mine.double()).abs().max() <= ROUNDED * mine.double().abs().max():
            raise NotAsTrained(f"{what} is not as it was written: {name} is another tensor when it is read again")


def check_weights(made: nn.Module, kept: nn.Module, dtype: torch.dtype, what: str) -> None:
    """Raises NotAsTrained, naming the tensor, unless a reloaded network is, bit by bit, the one that was written in `dtype`."""
    theirs = made.state_dict()
    for name, value in kept.state_dict().items():
        if name not in theirs or not torch.equal(theirs[name], value.to(dtype).to(theirs[name])):
            raise NotAsTrained(f"{what} is not as it was written: {name} is another tensor when it is read again")


def check_settings(made: Any, kept: Any, what: str) -> None:
    """Raises NotAsTrained, naming the setting, unless a reloaded network of diffusers has the configuration of the one that was written."""
    said, read = ({key: json.dumps(value, default=str) for key, value in x.config.items() if key[0] != "_"} for x in (kept, made))
    other = sorted(key for key in {*said, *read} if said.get(key) != read.get(key))
    if other:
        raise NotAsTrained(f"{what} is not as it was written: its network has another {other[0]} when it is read again")
