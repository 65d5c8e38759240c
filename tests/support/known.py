"""Backbones whose networks are known in closed form, and batches for them: what the mathematics of a method is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones import LatentsAlone
from ddil_lightning.backbones.roles import Role
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import END, FORWARD, Context, LatentBatch

SD = NoiseSchedule.scaled_linear()


class Known(LatentsAlone):
    """A teacher and, by their roles' names, the networks of others, all of which predict x0 in `dims` dimensions."""

    def __init__(self, teacher: nn.Module, *, schedule: NoiseSchedule = SD, dims: int = 1, **others: nn.Module) -> None:
        super().__init__("known", schedule, "x0", (dims,), {"guidance": 1.0})
        self.teacher, self.others = teacher, others

    def network(self) -> Any:
        return self.teacher

    def role(self, name: str, **kwargs: Any) -> Role:
        if name == "teacher":
            return super().role(name, reflection=kwargs.get("reflection"))
        return Role(name, self.others[name], self.schedule, self.predicts, reflection=kwargs.get("reflection"))

    def head(self, layers: Sequence[str] = (), name: str = "teacher") -> nn.Module:
        return self.others["head"]

    def null(self) -> Context:
        return Context(torch.zeros(1, 1, 1))


class Affine(nn.Module):
    """x0 = a + b x_t: of pure noise, a generator of the law N(a, b^2)."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        return self.a + self.b * x_t


def latents(x_t: Tensor, t: Tensor | int, real: Tensor | None = None, source: int = FORWARD, **kwargs: Any) -> LatentBatch:
    """Latents [n, D] at times `t`, all of one source, unguided."""
    n = len(x_t)
    t = torch.full((n,), t) if isinstance(t, int) else t
    c, zero = Context(torch.zeros(n, 1, 1)), torch.zeros_like(t)
    own = {
        "s": zero + END,
        "node": zero,
        "c": c.guided(0.0),
        "real": real,
        "source": zero + source,
        "weight": torch.ones(n),
        "slot": zero - 1,
        "real_c": None if real is None else c,
    }
    return LatentBatch(x_t, t, **{**own, **kwargs})


def noise(n: int, dims: int = 1, seed: int = 3) -> Tensor:
    """[n, dims] standard normal numbers in float64."""
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int, columns: int, seed: int = 0) -> Tensor:
    """[n, columns] numbers whose first two sample moments are those of a standard normal law, so that means of quadratics are exact."""
    raw = noise(n, columns, seed)
    return torch.linalg.qr(raw - raw.mean(0))[0] * n**0.5
