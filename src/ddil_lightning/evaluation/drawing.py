"""Asking a sampler for images: which of which prompt, from which seed, by which process, and what an image costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddil_lightning.messages import shorten

Sampler = Callable[[list[str], int], Tensor]
"""(prompts, seed) -> images [N, 3, H, W] in [-1, 1], one per prompt, whose noise is drawn from the seed alone."""


class Pass(NamedTuple):
    """Images that are asked of a sampler: number i is of the prompt `asked[i]` and has the seed `seed` + i.

    `seeds`: so many in a row are of one prompt, and in one call. `size`: at most so many are asked for at a time.
    """

    name: str
    asked: Sequence[str]
    seeds: int
    seed: int
    size: int

    def calls(self, rank: int = 0, world: int = 1) -> Sequence[range]:
        """The numbers of the images of each call that one of `world` processes makes.

        The shares follow one another in the order of the processes, so that what they find stands in the order of the images when it is put
        together; the first has never less than another.
        """
        size = min(self.size, -(-len(self.asked) // world))
        size = self.seeds * max(1, size // self.seeds)
        starts = range(0, len(self.asked), size)
        mine = starts[-(-rank * len(starts) // world) : -(-(rank + 1) * len(starts) // world)]
        return [range(start, min(start + size, len(self.asked))) for start in mine]

    def named(self, first: int, i: int) -> str:
        """The prompt of the image number `first` + `i`, in words."""
        k = (first + i) // self.seeds
        what = "probe" if self.name == "probes" else "prompt"
        return f"{what} {k} (from 0), {shorten(repr(self.asked[first + i]), 80)}"


@dataclass(frozen=True)
class Cost:
    """What images took. The `warm` ones are those after the first call of their size, in which a GPU chooses its kernels."""

    images: int = 0
    seconds: float = 0.0
    warm_images: int = 0
    warm_seconds: float = 0.0
    evaluations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + more for mine, more in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def seconds_per_image(self) -> float | None:
        """Of the warm images; None where none was."""
        return self.warm_seconds / self.warm_images if self.warm_images else None

    @property
    def nfe(self) -> int | None:
        """Network evaluations for one image; None before the first call."""
        return round(self.evaluations / self.images) if self.images else None


class Timed:
    """A sampler that measures itself: its `cost` over all calls.

    `evaluations`: a function that counts the network evaluations so far, of a sample each; without it they are 0. `chunk`: the sampler is
    asked for so many images at a time, which is what it would do by itself.
    """

    def __init__(self, sample: Sampler, evaluations: Callable[[], int] = lambda: 0, chunk: int | None = None) -> None:
        self.sample, self.evaluations, self.chunk, self.cost = sample, evaluations, chunk, Cost()
        self._sizes: set[int] = set()
        self._first: tuple[list[str], int] | None = None

    def __call__(self, prompts: list[str], seed: int) -> Tensor:
        """The sampler's images, whose number and time are added; a GPU is waited for."""
        size = self.chunk or len(prompts)
        made = [self._call(prompts[i : i + size], seed + i) for i in range(0, len(prompts), size)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def repeat(self) -> None:
        """Make the first call again, which is warm now, for its time alone: where no size came twice. Nothing without a call."""
        if self._first is not None:
            images, seconds = self._timed(*self._first)
            self.cost += Cost(warm_images=len(images), warm_seconds=seconds)

    def _call(self, prompts: list[str], seed: int) -> Tensor:
        self._first, before = self._first or (prompts, seed), self.evaluations()
        images, seconds = self._timed(prompts, seed)
        n = len(images)
        warm = n in self._sizes
        self._sizes.add(n)
        self.cost += Cost(n, seconds, n if warm else 0, seconds if warm else 0.0, self.evaluations() - before)
        return images

    def _timed(self, prompts: list[str], seed: int) -> tuple[Tensor, float]:
        start = time.perf_counter()
        images = self.sample(prompts, seed)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return images, time.perf_counter() - start

    @property
    def images(self) -> int:
        """How many it has drawn."""
        return self.cost.images

    @property
    def seconds_per_image(self) -> float | None:
        """Seconds that an image takes once the sampler is warm; None before the second call of a size."""
        return self.cost.seconds_per_image


def runs(numbers: Sequence[int], size: int) -> Iterator[range]:
    """Rising numbers as the ranges of those that follow one another, of at most `size`."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1 or i - start == size:
            yield range(numbers[start], numbers[i - 1] + 1)
            start = i
