"""The exact teacher and the ensemble of students as networks `(x_t, t, c) -> v`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_lightning.backbones.network import Heads, Network
from ddil_lightning.diffusion.analytic import Mixture
from ddil_lightning.diffusion.denoiser import W_EMBEDDING, w_embedding
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import Context

FREQUENCIES = 16


class Exact(Network):
    """`Mixture` for every member: [B, 2, S] in, v [B, 2, S] out, in the space in which the students predict."""

    def __init__(self, mixture: Mixture, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """The exact v = (alpha x_t - E[x0 | x_t, c]) / sigma, [B, 2, S]."""
        points = x_t.transpose(1, 2).flatten(0, 1)
        every = Context(c.text.repeat_interleave(x_t.shape[2], 0))
        x0 = self.mixture(points, t.repeat_interleave(x_t.shape[2]), every)
        return self.schedule.from_x0(x_t, t, x0.unflatten(0, (len(x_t), -1)).transpose(1, 2)).v


class Ensemble(Network):
    """S MLPs in one call: member s reads and answers column s of [B, 2, S] with weights of its own; the output is v.

    Input and output are scaled by the standard deviations of x_t and v (`moment` = E|x0|^2 / 2). Every member is told the time (Fourier
    features, t, log-SNR), the class and, with `w_conditioned`, the guidance by a layer that starts at zero; with `s_conditioned` so the
    time that is jumped to, by the features of the time. `seeds` [S]: of the weights.
    """

    scales: Tensor
    times: Tensor

    def __init__(
        self,
        seeds: Sequence[int],
        classes: int,
        moment: float,
        schedule: NoiseSchedule,
        width: int,
        depth: int,
        w_conditioned: bool = False,
        s_conditioned: bool = False,
    ) -> None:
        super().__init__()
        self.w_conditioned, self.s_conditioned, self.width, self.seeds = w_conditioned, s_conditioned, width, tuple(seeds)
        a2, s2 = schedule.alphas.square(), schedule.sigmas.square()
        scales, times = torch.stack([(a2 * moment + s2).sqrt(), (a2 + s2 * moment).sqrt()], 1), time_features(schedule)
        self.register_buffer("scales", scales.float(), persistent=False)
        self.register_buffer("times", times, persistent=False)
        sizes = [2 + classes + times.shape[1], *[width] * depth, 2]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        pairs = [_linear(a, b, generators) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.weights = nn.ParameterList([w for w, _ in pairs])
        self.biases = nn.ParameterList([b for _, b in pairs])
        self.guidance = nn.Parameter(torch.zeros(len(seeds), W_EMBEDDING, width)) if w_conditioned else None
        self.jump = nn.Parameter(torch.zeros(len(seeds), times.shape[1], width)) if s_conditioned else None

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """v [B, 2, S]. Raises ValueError when a w-conditioned ensemble is not told w."""
        return self.with_features(x_t, t, c)[0]

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        """hidden0 ...: what leaves each hidden layer, [B, width, S]."""
        return tuple(f"hidden{i}" for i in range(len(self.weights) - 1))

    def with_features(self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """v [B, 2, S] and what leaves `layers`, [B, width, S] each, by default the last hidden one."""
        asked = self.named(layers, self.layers[-1])
        kept: dict[str, Tensor] = {}
        size_in, size_out = self.scales[t].view(-1, 2, 1, 1).unbind(1)
        told = torch.cat([self.times[t], c.text[:, 0]], 1)
        x = (x_t / size_in).permute(2, 0, 1)
        h = torch.cat([x, told.expand(len(x), -1, -1)], 2)
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for i, (w, b) in enumerate(hidden):
            z = torch.baddbmm(b, h, w)
            h = F.silu(z if i else self._told(z, c))
            kept[f"hidden{i}"] = h
        w, b = last
        features = tuple(kept[name].permute(1, 2, 0) for name in asked)
        return torch.baddbmm(b, h, w).permute(1, 2, 0) * size_out, features

    def head(self, layers: Sequence[str] = ()) -> nn.Module:
        """One logit per member and layer."""
        made = [Head(self.seeds, self.width) for _ in self.named(layers, self.layers[-1])]
        return made[0] if len(made) == 1 else Heads(made)

    def _told(self, z: Tensor, c: Context) -> Tensor:
        """z [S, B, width] with what comes of guidance and of the end of the jump."""
        if self.guidance is not None:
            if c.w is None:
                raise ValueError("this student is conditioned on guidance, but the context carries no w: give it guidance g (w = g - 1)")
            z = z + w_embedding(c.w) @ self.guidance
        if self.jump is not None:
            if c.s is None:
                raise ValueError("this student is told the time that is jumped to, but the context carries no s: ask it by a policy")
            z = z + self.times[c.s] @ self.jump
        return z

    def last_layer(self) -> nn.Parameter:
        """The weights of the last linear layer of all members."""
        return self.weights[-1]


class Head(nn.Module):
    """One logit per member of features [B, width, S]: a hidden layer of `width`, then [B, 1, S]."""

    def __init__(self, seeds: Sequence[int], width: int) -> None:
        super().__init__()
        generators = [torch.Generator().manual_seed(int(seed) + 1) for seed in seeds]
        (self.w1, self.b1), (self.w2, self.b2) = _linear(width, width, generators), _linear(width, 1, generators)

    def forward(self, features: Tensor) -> Tensor:
        """The logits [B, 1, S] of features [B, width, S], a column a member."""
        h = F.silu(torch.baddbmm(self.b1, features.permute(2, 0, 1), self.w1))
        return torch.baddbmm(self.b2, h, self.w2).permute(1, 2, 0)


def time_features(schedule: NoiseSchedule) -> Tensor:
    """[T + 1, 34] float32: sin and cos of 16 frequencies, t / T and a tame log-SNR; the last row is END's."""
    t = torch.cat([torch.arange(schedule.steps), torch.tensor([-1])]) / schedule.steps
    angle = t[:, None].double() * math.pi * 2 ** (torch.arange(FREQUENCIES) / 2)
    snr = (schedule.half_log_snr(torch.arange(schedule.steps + 1)) / 4).clamp(max=2)
    return torch.cat([angle.sin(), angle.cos(), t[:, None], snr[:, None]], 1).float()


def _linear(fan_in: int, fan_out: int, generators: Sequence[torch.Generator]) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights [S, in, out] and biases [S, 1, out] as torch's Linear draws them, every member from its own generator."""
    bound = fan_in**-0.5
    w = torch.stack([torch.rand(fan_in, fan_out, generator=g) for g in generators])
    b = torch.stack([torch.rand(1, fan_out, generator=g) for g in generators])
    return nn.Parameter((2 * w - 1) * bound), nn.Parameter((2 * b - 1) * bound)
