"""The laws of the toy: Gaussian mixtures in the plane with classes, and points drawn from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddil_lightning.diffusion.analytic import Mixture


class Problem(NamedTuple):
    """A law in the plane: K modes of standard deviation `sd`, each with a class."""

    means: Tensor  # [K, 2]
    weights: Tensor  # [K], sum 1
    classes: Tensor  # [K]
    sd: float

    @property
    def second_moment(self) -> float:
        """The second moment of a coordinate, E|x|^2 / 2."""
        return float((self.weights * self.means.square().mean(1)).sum()) + self.sd**2


def ring8c(scale: float) -> Problem:
    """Eight modes on a circle of radius `scale`, sd 0.06 `scale`; a class is two neighbours of unequal weight (ratio 3 to 5)."""
    angle = torch.arange(8) * (math.pi / 4)
    weights = torch.tensor([0.25, 0.05, 0.15, 0.05, 0.2, 0.05, 0.2, 0.05])
    return Problem(scale * torch.stack([angle.cos(), angle.sin()], 1), weights, torch.arange(8) // 2, 0.06 * scale)


def grid25c(scale: float) -> Problem:
    """Five by five modes on [-`scale`, `scale`]^2, sd 0.05 `scale`; a class is a row, whose outer modes are rare."""
    x = torch.linspace(-scale, scale, 5)
    row = torch.tensor([0.05, 0.2, 0.5, 0.2, 0.05]) / 5
    return Problem(torch.cartesian_prod(x, x).flip(1), row.repeat(5), torch.arange(5).repeat_interleave(5), 0.05 * scale)


PROBLEMS = {"ring8c": ring8c, "grid25c": grid25c}


def sample(mixture: Mixture, classes: Tensor, seeds: Sequence[int]) -> Tensor:
    """[N, 2, S] points of `classes` [N] on the CPU, wherever the mixture is; member s from the seed `seeds[s]`."""
    every = [mixture.sample(len(classes), classes, torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(every, 2).float().cpu()
