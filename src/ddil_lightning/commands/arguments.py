"""What several commands share: their parser, the types of its arguments, and what a pipeline answers to them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddil_lightning.errors import Refusal


class Parser(argparse.ArgumentParser):
    """argparse that answers on one line."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Bad usage is bad input like any other."""
        raise Refusal(f"{message}; {self.prog} --help shows the usage")


def place(text: str) -> str:
    """A path as it was meant: `~` is the home folder."""
    if "\0" in text or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """`place` as a Path."""
    return Path(place(text))


def number(low: float, high: float, kind: type = int) -> Any:
    """A type of argparse: a number within these bounds."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = float("nan")
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")
        return value

    return read


STEPS, SEED, SCALE = number(1, 1000), number(0, 2**32 - 1), number(0, 1000, float)


@contextmanager
def advising(option: str) -> Iterator[None]:
    """What the body refuses as too long can be cut by `option`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("or allow truncation", f"or cut it by {option}")) from error


def guidance_scale(backbone: Any, given: float | None) -> float:
    """The guidance_scale to call a pipeline with: as given, or as its card says (1 where guidance is baked in)."""
    if given is not None and backbone.baked:
        raise Refusal(baked(backbone.path, backbone.guidance))
    return float(backbone.about.get("guidance_scale", backbone.guidance)) if given is None else given


def baked(what: Any, g: float) -> str:
    """What a student whose guidance is in its weights answers to another."""
    return f"guidance {g:g} is part of the weights of {what}, and another would come on top of it: leave --guidance out"


def check_steps(backbone: Any, counts: Sequence[int], solvers: Sequence[bool] = (False,)) -> None:
    """Raises Refusal for a step count that the pipeline's scheduler cannot take, before an hour of sampling with another one."""
    for solved in (backbone.with_solver(dpm) for dpm in solvers):
        for n in counts:
            try:
                solved.check_steps(n)
            except ValueError as why:
                raise Refusal(f"--steps {n}: {backbone.path} cannot be sampled in so many steps ({why}): give another number") from why


def device() -> Any:
    """The GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
