"""Gaussians in one dimension with everything known: a teacher N(mu, S^2), a generator a + b z, and the critic that knows its law."""

from __future__ import annotations

import torch
from torch import nn

import known
from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import STUDENT, LatentBatch
from known import SD, Affine, Known


class Exact(Known):
    """A teacher N(mu, S^2), a generator a + b z, and the critic that knows the law of the latter."""

    def __init__(self, mu: float, s: float, a: float, b: float, schedule: NoiseSchedule = SD, critic: nn.Module | None = None) -> None:
        self.fake = critic or Gaussian(a, b, schedule)
        super().__init__(Gaussian(mu, s, schedule), schedule=schedule, student=Affine(a, b), critic=self.fake)


def noise(n: int, seed: int = 3) -> LatentBatch:
    """Pure noise [n, 1] at the noisiest time."""
    return known.latents(known.noise(n, seed=seed), 999, source=STUDENT, s=torch.full((n,), 749))
