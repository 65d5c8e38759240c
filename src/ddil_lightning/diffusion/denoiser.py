"""The one boundary between networks and algorithms: `(x_t, t, c) -> Prediction`.

Guidance, conversion and reflection happen here and nowhere else, in this order: guidance in the network's own space, one conversion, one
reflection. Within one x_t the maps eps <-> v <-> x0 are affine and the guidance weights sum to 1, so guidance is the same in every space;
where its norm is set (`normed`), that is in the network's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddil_lightning.bounds import above
from ddil_lightning.diffusion.reflection import Reflection
from ddil_lightning.diffusion.schedule import NoiseSchedule, Predicts
from ddil_lightning.records import Context, Prediction, cat, to


def to_w(g: float) -> float:
    """The weight w of guidance g = 1 + w: configs and pipelines say g, contexts and networks w. The one place where it is converted."""
    return g - 1


W_EMBEDDING = 256
"""The width of the embedding of w that a student is told by."""
S_EMBEDDING = 128
"""That of the embedding of s, the time that a jump ends at. It is another one, so that a width says what a network is told."""


def w_embedding(w: Tensor, dim: int = W_EMBEDDING) -> Tensor:
    """[B, dim] sinusoids of guidance w [B]: sin then cos of 1000 w 10000^(-j / (dim / 2 - 1)) (LCM's embedding, METHODS 0.4)."""
    rate = torch.exp(
        torch.arange(dim // 2, device=w.device, dtype=torch.float32) * (-torch.log(torch.full((), 1e4, device=w.device)) / (dim // 2 - 1))
    )
    angle = 1000.0 * w.float()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def s_embedding(s: Tensor) -> Tensor:
    """[B, S_EMBEDDING] sinusoids of times s [B], whole and END among them, as networks are told the time: sin then cos of s rate_j."""
    return w_embedding(s / 1000, S_EMBEDDING)


class Denoiser(nn.Module):
    """A network that speaks `Prediction`.

    `predicts`: the space of the network's output. `null`: the context of the empty prompt, one sample; with it, `c.w` means
    classifier-free guidance in one batched call of twice the size (out_c + w (out_c - out_u), w = g - 1; `normed` by patches where the
    network has a `norm_patch`). Without it, `c.w` is the network's own business (a w-conditioned student) or ignored. `reflection`:
    applied to x0; eps and v are re-derived.
    `evaluations` counts network evaluations of one sample each, guidance included: the NFE of every table.
    """

    unguided: bool = False
    """Whether every `c.w` that it is given is known to be 0, a guidance of 1: then the empty prompt is not asked, whose share is 0."""

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        predicts: Predicts = "eps",
        null: Context | None = None,
        reflection: Reflection | None = None,
    ) -> None:
        super().__init__()
        self.network, self.schedule, self.predicts = network, schedule, predicts
        self.null, self.reflection = null, reflection
        self.evaluations = 0

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Prediction:
        """The prediction at x_t [B, ...], t [B] (integers), in float32 or wider."""
        out = self._guided(x_t, t, c)
        p = self.schedule.prediction(self.predicts, x_t, t, out)
        return p if self.reflection is None else self.reflected(x_t, t, p, self.reflection)

    @property
    def s_conditioned(self) -> bool:
        """Whether the network is told, besides the time of x_t, the one that is jumped to: its answer then is a jump, `c.s` its end."""
        return bool(getattr(self.network, "s_conditioned", False))

    def features(self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """The network's features [B, ...] at `layers` (its bottleneck), unguided, without its output; counted as an evaluation."""
        self.evaluations += len(x_t)
        return self.network.features(x_t, self.schedule.time(t), c, layers)  # type: ignore[operator]

    def with_features(self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str] = ()) -> tuple[Prediction, tuple[Tensor, ...]]:
        """The prediction, unguided and not reflected, and the features, from one forward."""
        self.evaluations += len(x_t)
        out, features = self.network.with_features(x_t, self.schedule.time(t), c, layers)  # type: ignore[operator]
        return self.schedule.prediction(self.predicts, x_t, t, out), features

    def output(self, p: Prediction) -> Tensor:
        """What the network itself would have said, of a prediction: the hub, walked back."""
        return self.schedule.output(self.predicts, p)

    def reflected(self, x_t: Tensor, t: Tensor, p: Prediction, reflection: Reflection) -> Prediction:
        """`p` with its x0 inside the box and eps, v re-derived, so that alpha x0 + sigma eps = x_t still holds."""
        return p if reflection.mode == "off" else self.schedule.from_x0(x_t, t, reflection(p.x0))

    def _guided(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        time = self.schedule.time(t)
        if self.null is None or c.w is None or self.unguided:
            self.evaluations += len(x_t)
            return self.network(x_t, time, c if self.null is None else c.guided(None))
        self.evaluations += 2 * len(x_t)
        w = c.w.view(-1, *(1,) * (x_t.ndim - 1))
        self.null = to(self.null, x_t.device)
        both = cat([c.guided(None), _like(self.null, c).guided(None)])
        out = self.network(torch.cat([x_t, x_t]), torch.cat([time, time]), both)
        # Upcast before the extrapolation: w multiplies the rounding of a half-precision network.
        out_c, out_u = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2)
        guided, patch = out_c + w * (out_c - out_u), getattr(self.network, "norm_patch", None)
        return guided if patch is None else normed(guided, out_c, patch)


def normed(x: Tensor, like: Tensor, patch: int) -> Tensor:
    """`x` [B, C, H, W] with the norm of `like` in every `patch` x `patch` places, all channels together (METHODS 0.4)."""

    def norm(tokens: Tensor) -> Tensor:
        return torch.linalg.vector_norm(tokens, dim=(1, 3, 5), keepdim=True)

    x, like = (y.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)) for y in (x, like))  # [B, C, h, patch, w, patch]
    scale = norm(like) / norm(x).clamp_min(torch.finfo(x.dtype).tiny)
    return (x * scale).flatten(4, 5).flatten(2, 3)


def _like(null: Context, c: Context) -> Context:
    """The null context for every sample of `c`, with the sizes that this sample is told: in the pipelines of SDXL both branches are told
    the same ones."""
    many = null.expand(len(c.text))
    return many if c.ids is None else many._replace(ids=c.ids)


@dataclass(frozen=True)
class Boundary:
    """The boundary conditions of a consistency function: c_skip = sd^2 / ((k t)^2 + sd^2), c_out = k t / sqrt((k t)^2 + sd^2).

    Args:
        scaling: k, of the time t (an index into the schedule).
        sigma_data: sd, the standard deviation that the data are taken to have.
    """

    scaling: float = 10.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        above(0, **{"boundary.scaling": self.scaling, "boundary.sigma_data": self.sigma_data})

    @property
    def timestep_scaling(self) -> float:
        """That of diffusers' LCMScheduler, whose sigma_data is 0.5 and no option: both conditions depend on k / sd alone."""
        return self.scaling * 0.5 / self.sigma_data


class Consistency(nn.Module):
    """LCM's consistency function f = c_skip x_t + c_out x0 around a denoiser (METHODS 3), itself a denoiser: f(x, 0) = x."""

    def __init__(self, denoiser: Denoiser, boundary: Boundary = Boundary()) -> None:
        super().__init__()
        self.denoiser, self.scaling, self.sigma_data = denoiser, boundary.scaling, boundary.sigma_data
        self.schedule = denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Prediction:
        """The prediction whose x0 is f(x_t, t)."""
        return self.bounded(x_t, t, self.denoiser(x_t, t, c))

    def bounded(self, x_t: Tensor, t: Tensor, p: Prediction) -> Prediction:
        """The boundary scalings applied to an existing prediction."""
        k = (self.scaling * t.to(torch.float32)).view(-1, *(1,) * (x_t.ndim - 1))
        norm = k.square() + self.sigma_data**2
        x0 = self.sigma_data**2 / norm * x_t + k / norm.sqrt() * p.x0
        return self.schedule.from_x0(x_t, t, x0)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside (no dropout in roll-outs), every submodule's own flag restored afterwards."""
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag
