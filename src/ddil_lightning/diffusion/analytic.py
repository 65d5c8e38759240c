"""Exact denoisers of laws whose posterior mean E[x0 | x_t] has a closed form (METHODS 0.7): teachers and fixtures without training.

Each is a *network* `(x_t [B, ...], t [B], c) -> x0 [B, ...]`, to be wrapped as `Denoiser(network, schedule, predicts="x0")`. They hold for
latents [B, C, H, W] and points [B, D], and for any schedule, also where alpha is 0 (zero terminal SNR) and at END, where sigma is 0.
Parameters of the laws are float64 buffers and set the precision of the arithmetic; the answer has x_t's type, float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import Context

Values = Tensor | float | Sequence[float]
FLOOR = 1e-20
"""Least variance that is divided by: a component without width, met at END, then answers with its mean instead of 0 / 0."""


class Analytic(nn.Module):
    """A network without parameters. Subclasses keep their law in buffers and answer in `posterior_mean`."""

    def __init__(self, schedule: NoiseSchedule, **values: Values) -> None:
        super().__init__()
        self.schedule = schedule
        for name, value in values.items():
            # A copy: the law must not change under the module when the caller reuses the tensor.
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64).detach().clone())

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """E[x0 | x_t, c] [B, ...]."""
        x = self._wide(x_t)
        alpha, sigma = self.schedule.at(t, x)
        return self.posterior_mean(x, alpha, sigma, c).to(torch.promote_types(x_t.dtype, torch.float32))

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, c: Context) -> Tensor:
        """The closed form at x [B, ...], with `alpha`, `sigma` [B, 1, ...]."""
        raise TypeError(f"{type(self).__name__} has no closed form: give it a posterior_mean(x, alpha, sigma, c)")

    def _wide(self, x_t: Tensor) -> Tensor:
        law = next(x for x in self.buffers() if x.is_floating_point())
        return x_t.to(torch.promote_types(torch.promote_types(x_t.dtype, law.dtype), torch.float32))


class PointMass(Analytic):
    """All data at `mu` (a number, or broadcastable to a sample): x0 = mu, and DDIM is exact on every grid."""

    mu: Tensor

    def __init__(self, mu: Values, schedule: NoiseSchedule) -> None:
        super().__init__(schedule, mu=mu)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, c: Context) -> Tensor:
        """The point, wherever x is."""
        # 0 * x keeps the answer in the graph of x (a zero gradient, not a missing one).
        return self.mu.to(x.dtype) + 0 * x


class Gaussian(Analytic):
    """N(mu, diag std^2); `mu`, `std` >= 0: numbers, or broadcastable to a sample. Raises ValueError for a negative std."""

    mu: Tensor
    std: Tensor

    def __init__(self, mu: Values, std: Values, schedule: NoiseSchedule) -> None:
        super().__init__(schedule, mu=mu, std=std)
        if bool((self.std < 0).any()):
            raise ValueError("a Gaussian's std must not be negative")

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, c: Context) -> Tensor:
        """One Gaussian's posterior mean, `_shrink`."""
        return _shrink(x, alpha, sigma, self.mu, self.std)

    def flow(self, x_t: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
        """The exact map of the probability-flow ODE from time t to s ([B] or one int), the limit of DDIM with infinitely many steps.

        x_s = alpha_s mu + sqrt((alpha_s^2 S^2 + sigma_s^2) / (alpha_t^2 S^2 + sigma_t^2)) (x_t - alpha_t mu)   (METHODS 2.3)
        """
        x = self._wide(x_t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.schedule.at(t, x), self.schedule.at(s, x)
        var_t, var_s = ((a * self.std).square() + b.square() for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
        x_s = alpha_s * self.mu + (var_s / var_t.clamp(min=FLOOR)).sqrt() * (x - alpha_t * self.mu)
        return x_s.to(torch.promote_types(x_t.dtype, torch.float32))


class Mixture(Analytic):
    """sum_k weights_k N(means_k, diag stds_k^2), with a class label on every component.

    `weights` [K] > 0 (normalised here), `means` [K, ...] of the rank of a batch, `stds` a number, [K] or like `means`, `classes` [K]
    integers that cover 0 .. n-1. The condition is `c.text` [B, 1, n]: a one-hot class leaves the components of that class, all zeros
    (unconditional) leaves all. So guidance, mode coverage and mode collapse can be tested in two dimensions.
    Raises ValueError where shapes or labels do not fit.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    classes: Tensor

    def __init__(self, weights: Values, means: Tensor, stds: Values, classes: Tensor | Sequence[int], schedule: NoiseSchedule) -> None:
        super().__init__(schedule, weights=weights, means=means, stds=stds)
        labels = torch.as_tensor(classes, dtype=torch.long)
        k = len(self.weights)
        if self.means.ndim < 2 or len(self.means) != k or labels.shape != (k,):
            got = f"got {tuple(self.means.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"a mixture of {k} weights needs means [{k}, ...] and classes [{k}], {got}")
        if bool((self.weights <= 0).any()) or bool((self.stds < 0).any()):
            raise ValueError("a mixture's weights must be positive and its stds must not be negative")
        self.num_classes = int(labels.max()) + 1
        if labels.unique().tolist() != list(range(self.num_classes)):
            raise ValueError(f"a mixture's classes must cover 0 .. {self.num_classes - 1} without a gap, got {labels.tolist()}")
        self.weights /= self.weights.sum()
        if self.stds.ndim <= 1:
            self.stds = self.stds.expand(k).reshape(-1, *(1,) * (self.means.ndim - 1)).clone()
        try:  # not broadcast_shapes: its first call imports half a second of symbolic shapes
            self._shape = torch.broadcast_tensors(self.means, self.stds)[0].shape[1:]
        except RuntimeError:
            raise ValueError(f"a mixture's stds {tuple(self.stds.shape)} do not fit its means {tuple(self.means.shape)}") from None
        self.register_buffer("classes", labels)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, c: Context) -> Tensor:
        """The components' posterior means, weighted by their responsibilities."""
        r = self._responsibilities(x, alpha, sigma, c)
        means = _shrink(x[:, None], alpha[:, None], sigma[:, None], self.means, self.stds)
        return (r.view(*r.shape, *(1,) * (x.ndim - 1)) * means).sum(1)

    def responsibilities(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, K] posterior probabilities of the components: r_k proportional to pi_k N(x_t; alpha mu_k, alpha^2 S_k^2 + sigma^2)."""
        x = self._wide(x_t)
        return self._responsibilities(x, *self.schedule.at(t, x), c)

    def _responsibilities(self, x: Tensor, alpha: Tensor, sigma: Tensor, c: Context) -> Tensor:
        if x.ndim != self.means.ndim:
            raise ValueError(f"a mixture with means {tuple(self.means.shape)} cannot denoise x_t {tuple(x.shape)}: the ranks differ")
        alpha, sigma = alpha[:, None], sigma[:, None]
        var = ((alpha * self.stds).square() + sigma.square()).clamp(min=FLOOR)
        distance = (x[:, None] - alpha * self.means).square() / var + var.log()
        log_r = self.weights.log() - distance.flatten(2).sum(2) / 2
        # softmax subtracts the maximum: the log-sum-exp that keeps far-away points from 0 / 0.
        return log_r.masked_fill(~self._allowed(c.text), -math.inf).softmax(1)

    def _allowed(self, text: Tensor) -> Tensor:
        if text.ndim != 3 or text.shape[1:] != (1, self.num_classes):
            raise ValueError(f"a mixture of {self.num_classes} classes needs c.text of [B, 1, {self.num_classes}], got {tuple(text.shape)}")
        allowed = text[:, 0].to(self.classes.device)[:, self.classes] > 0.5
        return allowed | ~allowed.any(1, keepdim=True)

    def sample(self, n: int, cls: Tensor | int | None, generator: torch.Generator) -> Tensor:
        """x0 [n, ...] of class `cls` ([n], one for all, or None for all) in the default float type, on the buffers' device."""
        weights = self.weights.expand(n, -1)
        if cls is not None:
            wanted = torch.as_tensor(cls, device=self.classes.device).expand(n)
            if n and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.num_classes:
                raise ValueError(f"a mixture of {self.num_classes} classes cannot sample class {wanted.unique().tolist()}")
            weights = weights * (self.classes == wanted[:, None])
        k = torch.multinomial(weights.to(generator.device), 1, generator=generator)[:, 0].to(self.means.device)
        noise = torch.randn(n, *self._shape, generator=generator, device=generator.device, dtype=torch.float32).to(self.means.device)
        return (self.means[k] + self.stds[k] * noise).to(torch.get_default_dtype())


class UniformBox(Analytic):
    """Uniform on the box [lo, hi] (numbers, or broadcastable to a sample): the bounded data for which reflection is exact.

    The posterior of a coordinate is a normal law truncated to the box. Raises ValueError unless lo < hi.
    """

    lo: Tensor
    hi: Tensor

    def __init__(self, lo: Values, hi: Values, schedule: NoiseSchedule) -> None:
        super().__init__(schedule, lo=lo, hi=hi)
        if not bool((self.lo < self.hi).all()):
            raise ValueError("a box needs lo < hi in every dimension")

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, c: Context) -> Tensor:
        """The mean of the truncated normal posterior, inside the box."""
        centre, half = (self.lo + self.hi) / 2, (self.hi - self.lo) / 2
        noisy = sigma > 0
        safe = torch.where(noisy, sigma, torch.ones_like(sigma))
        # In units of the half width the posterior is exp(beta k u - k^2 u^2 / 2) on [-1, 1]: nothing is divided by alpha.
        beta, k = (x - alpha * centre) / safe, alpha * half / safe
        inside = centre + half * _truncated_mean(beta, k.expand_as(beta))
        clean = x / torch.where(noisy, torch.ones_like(alpha), alpha)
        return torch.where(noisy, inside, clean).clamp(self.lo, self.hi)


class Corrupted(nn.Module):
    """A student with a known error: `scale` * network(x_t, t, c) + `bias`; in a roll-out, a covariate shift that can be computed."""

    def __init__(self, network: Callable[[Tensor, Tensor, Context], Tensor], scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.scale = scale
        self.bias = bias

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """The network's raw output [B, ...], scaled and shifted."""
        return self.scale * self.network(x_t, t, c) + self.bias


def _shrink(x: Tensor, alpha: Tensor, sigma: Tensor, mu: Tensor, std: Tensor) -> Tensor:
    """mu + alpha S^2 / (alpha^2 S^2 + sigma^2) (x - alpha mu): the posterior mean of one Gaussian."""
    gain = alpha * std.square() / ((alpha * std).square() + sigma.square()).clamp(min=FLOOR)
    return mu + gain * (x - alpha * mu)


# The mean of a truncated normal law. The textbook form m + tau (pdf(A) - pdf(B)) / (cdf(B) - cdf(A)) is 0 / 0 far outside the box and
# loses all digits for a flat posterior (alpha near 0), also with log-cdf differences. The three forms below hold where the others cancel.

_NODES, _WEIGHTS = (v.tolist() for v in np.polynomial.legendre.leggauss(16))


def _truncated_mean(beta: Tensor, k: Tensor) -> Tensor:
    """E[u] for the density exp(beta k u - k^2 u^2 / 2) on [-1, 1]; `k` >= 0 of beta's shape, both finite."""
    flip = torch.where(beta < 0, -1.0, 1.0).to(beta.dtype)  # not sign(): its 0 would cut the gradient at the centre
    beta = flip * beta
    flat = (k <= 0.5) & (beta * k <= 8)
    low = beta < k  # the untruncated mean is inside the box
    one = torch.ones_like(k)
    mean = torch.where(low, _mean_inside(torch.where(low & ~flat, beta, 0 * one), torch.where(low & ~flat, k, one)), 0 * one)
    high = ~low & ~flat
    mean = torch.where(high, _mean_beyond(torch.where(high, beta, 2 * one), torch.where(high, k, one)), mean)
    return flip * torch.where(flat, _mean_flat(torch.where(flat, beta * k, 0 * one), torch.where(flat, k, one)), mean)


def _mean_flat(b: Tensor, k: Tensor) -> Tensor:
    """b <= 8, k <= 0.5: 16 Gauss-Legendre nodes reach the last digit of float64 for so smooth a density."""
    total, first = torch.zeros_like(b), torch.zeros_like(b)
    for u, w in zip(_NODES, _WEIGHTS, strict=True):
        p = w * (b * (u - 1) - (k * u).square() / 2).exp()
        total, first = total + p, first + u * p
    return first / total


def _mean_inside(beta: Tensor, k: Tensor) -> Tensor:
    """beta < k: the box holds the peak, so the difference of the cdfs is no small number."""
    cdf = torch.special.ndtr(k - beta) - torch.special.ndtr(-k - beta)
    pdf = (-(k - beta).square() / 2).exp() / math.sqrt(2 * math.pi)
    return (beta + pdf * torch.expm1(-2 * beta * k) / cdf) / k


def _mean_beyond(beta: Tensor, k: Tensor) -> Tensor:
    """beta >= k: the peak is at or beyond the border u = 1, and with z = beta - k the mean is 1 - (E[Z | z < Z < z + 2k] - z) / k."""
    z = beta - k
    drop = (-2 * beta * k).exp()
    mills_low, mills_high = _mills(z), _mills(beta + k)
    # 1 - z mills(z) is about 1 / z^2: a difference that cancels for large z.
    excess = _mills_gap(z, mills_low) - drop * (1 - z * mills_high)
    return 1 - excess / (mills_low - drop * mills_high) / k


def _mills(z: Tensor) -> Tensor:
    """Mills' ratio of a standard normal, (1 - cdf(z)) / pdf(z)."""
    return math.sqrt(math.pi / 2) * torch.special.erfcx(z / math.sqrt(2))


def _mills_gap(z: Tensor, mills: Tensor) -> Tensor:
    """1 - z mills(z), by its asymptotic series 1/z^2 - 3/z^4 + 15/z^6 - ... from z = 16 on (12 terms: 1e-15 relative)."""
    far = z > 16
    q = torch.where(far, z, 16 * torch.ones_like(z)).square().reciprocal()
    series = torch.zeros_like(q)
    for n in range(12, 0, -1):
        series = (2 * n - 1) * q * (1 - series)
    return torch.where(far, series, 1 - z * mills)
