"""Gaussians in one dimension with everything known: a teacher N(mu, S^2), a generator a + b z, and the critic that knows its law."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from backbones import LatentsAlone
from ddil_lightning.backbones.roles import Role
from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import Context, LatentBatch

SD = NoiseSchedule.scaled_linear()


class Affine(nn.Module):
    """A generator in one dimension, x0 = a + b z of pure noise z."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        return self.a + self.b * x_t


class Exact(LatentsAlone):
    """A teacher N(mu, S^2), a generator a + b z, and the critic that knows the law of the latter."""

    def __init__(self, mu: float, s: float, a: float, b: float, schedule: NoiseSchedule = SD, critic: nn.Module | None = None) -> None:
        super().__init__("gaussian", schedule, "x0", (1,), {"guidance": 1.0})
        self.real, self.net = Gaussian(mu, s, schedule), Affine(a, b)
        self.fake = critic or Gaussian(a, b, schedule)

    def network(self) -> Any:
        return self.real

    def role(self, name: str, **kwargs: Any) -> Role:
        kwargs.pop("recompute", None)
        if name == "teacher":
            return super().role(name, **kwargs)
        return Role(name, self.fake if name == "critic" else self.net, self.schedule, self.predicts)

    def null(self) -> Context:
        return Context(torch.zeros(1, 1, 1))


def noise(n: int, seed: int = 3) -> LatentBatch:
    """Pure noise [n, 1] at the noisiest time."""
    z = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    t, c = torch.full((n,), 999), Context(torch.zeros(n, 1, 1)).guided(0.0)
    return LatentBatch(z, t, t - 250, torch.zeros_like(t), c, None, t * 0 + 1, torch.ones(n), t * 0 - 1)
