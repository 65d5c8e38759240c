"""What a method asks of its frozen networks besides a state: answers that were kept under another question are worth nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

ELSEWHERE = frozenset("updates lr log_every training student_updates stage stage_start has_box box taught loss_is_distance".split())
"""What of a method moves, is no setting of it, or is said by another."""


class Asked:
    """How often modules that a method trains were called, which are no roles and count nothing by themselves; and under which settings
    it asks its frozen networks.

    Counted in a tensor on the CPU, which may be a part of a compiled graph: a number would have torch.compile compile every call anew.
    """

    def __init__(self) -> None:
        self._times = torch.zeros((), dtype=torch.long, device="cpu")
        self._settings: dict[str, Any] = {}

    @property
    def times(self) -> int:
        """The number of calls so far."""
        return int(self._times)

    def listen(self, module: nn.Module) -> None:
        """Count the calls of `module`, unless nothing of it is trained."""
        if any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """One more."""
        self._times.add_(1)

    def begin(self, method: Any) -> None:
        """A training begins: the settings of `method` are those that it has now."""
        self._settings = settings(method)

    def question(self, method: Any) -> str:
        """See `question`: under the settings at the beginning of the training, or as they are now where there is none."""
        return question(method, self._settings or settings(method))


def settings(method: Any) -> dict[str, Any]:
    """A method's settings as they are now, by name: numbers, words, and lists of such in the place of records and dicts.

    Taken at the beginning of a training, when a counter of one's own is what its constructor has made it, in a resumed run too.
    """
    own = {name: value for name, value in vars(method).items() if not name.startswith("_") and name not in ELSEWHERE}
    return {name: _said(value) for name, value in own.items() if value is not None and _plain(value)}


def question(method: Any, settings: Mapping[str, Any]) -> str:
    """A digest of a method's class and `settings`, its frozen network in the precision that it has, its guidance, box and nodes.

    The network is known by its weights and not by its path, where other ones may lie by the time that a run goes on.
    A setting too many costs that a run which goes on with another one asks anew; one too few would have it learn from wrong answers.
    """
    plain = {**settings, "guidance": _said(method.guidance)}  # which a checkpoint may bring
    box, backbone = method.reflection, method.backbone
    null = getattr(getattr(method, "teacher", None), "null", None)  # what guidance is taken away from, by encoders of their own
    said = [type(method).__qualname__, method.taught, sorted(plain.items(), key=lambda item: item[0])]
    said += [str(backbone.dtype), getattr(backbone, "quantize", None)]
    said += [None if x is None else hashlib.sha256(x.detach().float().cpu().numpy().tobytes()).hexdigest() for x in null or ()]
    said += [box.mode, box.quantile, box.lo.tolist(), box.hi.tolist(), method.grid.times.tolist(), backbone.schedule.sigmas.tolist()]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _plain(value: Any) -> bool:
    """Whether a value is a setting through and through: a list of modules or tensors is none."""
    inner = _inner(value)
    return isinstance(value, bool | int | float | str | None) if inner is None else all(_plain(x) for x in inner)


def _said(value: Any) -> Any:
    """A setting in lists of plain values, which are written alike in every process."""
    inner = _inner(value)
    return value if inner is None else [type(value).__qualname__, *map(_said, inner)]


def _inner(value: Any) -> list[Any] | None:
    """What a list, a tuple, a dict or a record of options holds, in order; None of anything else."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return list(value) if isinstance(value, list | tuple) else None
