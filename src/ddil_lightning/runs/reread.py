"""A student's pipeline that is read again, as its users read it, beside the method that it came from: what is frozen is there once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

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
            check_settings(getattr(pipe, name), own, f"the {name} in {what}")
    return backbone.sharing(pipe, method.deployment.called_with)


ROUNDED = 2**-7
"""How far a frozen weight may be from the same one, relative to its tensor's largest: each may have been rounded to half precision."""


PIECE = 2**24
"""How many numbers of a tensor are compared at a time."""


def _check_frozen(its: nn.Module, own: nn.Module, what: str) -> None:
    theirs = its.state_dict()
    for name, value in own.state_dict().items():
        read = theirs.get(name)
        if read is None or read.shape != value.shape:
            raise NotAsTrained(f"{what} is not as it was written: it lacks {name} when it is read again")
        if not _near(read, value.to(read.device)):
            raise NotAsTrained(f"{what} is not as it was written: {name} is another tensor when it is read again")


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one but for rounding; in pieces, for the largest would take gigabytes in another precision."""
    if a.numel() == 0 or (a.dtype == b.dtype and torch.equal(a, b)):
        return True
    pieces = list(zip(a.flatten().split(PIECE), b.flatten().split(PIECE), strict=True))
    # torch's largest of numbers one of which is none is none, and Python's is not
    off = torch.stack([(x.float() - y.float()).abs().max() for x, y in pieces]).max()
    return bool(off <= ROUNDED * torch.stack([y.float().abs().max() for _, y in pieces]).max())


def check_weights(made: nn.Module, kept: nn.Module, dtype: torch.dtype, what: str) -> None:
    """Raises NotAsTrained, naming the tensor, unless a reloaded network is, bit by bit, the one that was written in `dtype`."""
    theirs = made.state_dict()
    for name, value in kept.state_dict().items():
        if name not in theirs or not torch.equal(theirs[name], value.to(dtype).to(theirs[name])):
            raise NotAsTrained(f"{what} is not as it was written: {name} is another tensor when it is read again")


def check_settings(made: Any, kept: Any, what: str) -> None:
    """Raises NotAsTrained, naming the setting, unless a reloaded network has the configuration of the one that was written."""
    said, read = ({key: json.dumps(value, default=str) for key, value in _settings(x).items()} for x in (kept, made))
    other = sorted(key for key in {*said, *read} if said.get(key) != read.get(key))
    if other:
        raise NotAsTrained(f"{what} is not as it was written: it has another {other[0]} when it is read again")


def _settings(network: Any) -> dict[str, Any]:
    """The configuration of a network of diffusers or transformers, without where, by which version and in which precision it was read."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items() if str(key)[:1] != "_" and key not in OF_READING}
        return x

    config = network.config
    return dict(plain(config.to_dict() if hasattr(config, "to_dict") else dict(config)))


OF_READING = ("dtype", "torch_dtype", "transformers_version", "architectures")
