"""What a network of a suite can be, and what says that one cannot be had here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.digests import weights
from ddil_lightning.texts import json_digest

Features = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] to features [B, D]. Brings its own weights and device."""
Scorer = Callable[[Tensor, Sequence[str]], Tensor]
"""Images [B, 3, H, W] in [-1, 1] and their B prompts to a number each, [B]."""


class Distance(Protocol):
    """A function of paired images that says how far they are apart; `embed`, where it has one, makes pairs cheap (`MapDistance`)."""

    def __call__(self, a: Tensor, b: Tensor, /) -> Tensor:
        """The distance [B] of each image of `a` from its partner in `b`, both [B, 3, H, W] in [-1, 1]."""
        ...


class Absent(ValueError):
    """A network that cannot be had here, for want of a package, of a connection or of a file in the caches: its message is the reason.

    What a user gave himself, a file that is missing or holds something else, is a plain ValueError: it is refused and not left out.
    """


class Unpackaged(Absent):
    """One for want of a package, which no file of weights makes up for: its message says what to install."""


class Named:
    """A function with the name that a protocol gives it. `resizing`: how it brings images to its own size, where that has a name."""

    def __init__(self, about: str, call: Callable[..., Tensor], resizing: str | None = None) -> None:
        self.about, self.call, self.resizing = about, call, resizing

    def __call__(self, *args: Any) -> Tensor:
        """Call the function and answer what it does."""
        return self.call(*args)


def paired(images: Tensor, prompts: Sequence[str], who: str) -> list[str]:
    """The prompts. Raises ValueError where there are not as many of them as images; `who` says whose they are."""
    if len(images) != len(prompts):
        raise ValueError(f"{who}: {len(images)} images and {len(prompts)} prompts; they must be paired")
    return list(prompts)


UNVERIFIED = "unverified"
"""Stands in the words of what is known by its name alone: two of one name can be different."""
OWN = "ddil_lightning.miniature."
"""Networks whose weights the package brings are known by their names."""
_read: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()


def said(net: Any) -> str | None:
    """A network in words: its own (`about`), or those of whose method it is, else the names of class or function; None for none.

    A module's words have a digest of its weights and layers, a `functools.partial`'s those of its function and its arguments. What else can
    differ under one name, a lambda, a function with a closure and an object with attributes, is said to be UNVERIFIED.
    """
    if net is None:
        return None
    owner = getattr(net, "__self__", None)
    for known in (getattr(net, "about", None), getattr(owner, "about", None)):
        if isinstance(known, str):
            return known
    if isinstance(net, partial):
        given = [*map(_value, net.args), *(f"{key}={_value(value)}" for key, value in net.keywords.items())]
        return f"{said(net.func)} with {', '.join(given)}"
    if owner is not None and not isinstance(owner, ModuleType):
        return f"{type(owner).__module__}.{type(owner).__name__}.{net.__name__}" + _held(owner)
    named = net if hasattr(net, "__qualname__") else type(net)
    return f"{named.__module__}.{named.__qualname__}" + (_held(net) if named is not net else _enclosed(net))


def _held(owner: Any) -> str:
    """What tells an object from others of its class, behind its name: a digest of a module, UNVERIFIED for attributes of another."""
    if type(owner).__module__.startswith(OWN):
        return ""
    if isinstance(owner, nn.Module):
        return f" {_digest(owner)}"
    return f" ({UNVERIFIED})" if getattr(owner, "__dict__", None) else ""


def _digest(module: nn.Module) -> str:
    """A short digest of a module's layers and weights, read once until one of these is changed: a suite asks for it at every row."""
    tensors = [*module.parameters(), *module.buffers()]
    state = [(id(x), 0 if x.is_inference() else x._version) for x in tensors]
    if module not in _read or _read[module][0] != state:
        layers = re.sub(r" at 0x[0-9a-f]+", "", repr(module))
        _read[module] = (state, json_digest([layers, weights(module)])[:12])
    return _read[module][1]


def _enclosed(function: Any) -> str:
    """UNVERIFIED behind the name of a function that does not say what it does: a lambda, or one that holds what its maker gave it."""
    inner = inspect.unwrap(function)
    made = "<locals>" in inner.__qualname__ and getattr(inner, "__defaults__", None)
    return f" ({UNVERIFIED})" if inner.__name__ == "<lambda>" or getattr(inner, "__closure__", None) or made else ""


def _value(value: Any) -> str:
    """An argument in words."""
    if isinstance(value, (str, int, float, bool, type(None), torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {json_digest([str(value.dtype), value.detach().cpu().double().flatten().tolist()])[:12]}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value, value))}]"
    return said(value) if callable(value) else f"{type(value).__qualname__} ({UNVERIFIED})"  # type: ignore[return-value]
