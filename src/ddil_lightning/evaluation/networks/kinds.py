"""What a network of a suite can be, and what says that one cannot be had here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

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


def said(net: Any) -> str | None:
    """A network in words: its own (`about`), or those of whose method it is, else the names of class or function; None for none."""
    if net is None:
        return None
    owner = getattr(net, "__self__", None)
    for known in (getattr(net, "about", None), getattr(owner, "about", None)):
        if isinstance(known, str):
            return known
    if owner is not None:
        return f"{type(owner).__module__}.{type(owner).__name__}.{net.__name__}"
    named = net if hasattr(net, "__qualname__") else type(net)
    return f"{named.__module__}.{named.__qualname__}"
