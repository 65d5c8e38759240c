"""The built-in data sets under one interface: streams of images with captions, held-out prompts, an exact judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ddil_lightning.miniature import digits, judge, shapes

HELD_OUT = 1 << 31
"""Scenes of seeds from here on, and those of seed 0, are never trained on. Torch's generator on the CPU reads 32 bits of a seed."""


def held_out(seed: int) -> int:
    """The seed of the scenes that a suite of this `seed` holds out. Those of 0 are the ones of every published table, and of no offset."""
    return HELD_OUT | seed if seed else 0


class Source(NamedTuple):
    """A built-in data set by its four functions and its words: training data, held-out prompts, the exact judge."""

    draw: Callable[[int, int], tuple[Tensor, list[str]]]  # (n, seed) -> images [n, 3, H, W] in [-1, 1], captions
    prompts: Callable[[int, int], list[str]]  # (n, seed) -> held-out prompts with every attribute
    judge: Callable[..., judge.Judgement]  # (images, captions) -> Judgement
    words: tuple[str, ...]  # the vocabulary of the captions


def draw_shapes(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """Images [n, 3, 32, 32] in [-1, 1] of `n` newly drawn scenes, and their captions."""
    scenes = shapes.draw_scenes(n, seed)
    return shapes.render(scenes), shapes.captions(scenes, seed)


def shapes_prompts(n: int, seed: int) -> list[str]:
    """`n` held-out prompts that mention every attribute."""
    return shapes.captions(shapes.draw_scenes(n, held_out(seed)), seed, full=True)


def load_source(name: str) -> Source:
    """The data set called "shapes" or "digits". Raises ValueError for another name."""
    if name == "shapes":
        return Source(draw_shapes, shapes_prompts, judge.judge, shapes.WORDS)
    if name == "digits":
        return Source(digits.draw, digits.prompts, digits.judge, digits.WORDS)
    raise ValueError(f"unknown built-in data set {name!r}; choose shapes or digits")
