"""Noise schedules: the one hub between eps, v and x0. The times that a student steps on are `grid.Grid`.

Conventions (METHODS 0.1): `x_t = alpha_t x0 + sigma_t eps`, `SNR = alpha^2 / sigma^2`, times are integers 0..T-1 and `END`.
Tables are float64 and used in float32 or higher: bf16(0.99915) is 1, which makes sigma 0 and every division by it infinite.
What a network is told of a time is another thing, where it is a flow: `NoiseSchedule.time`.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor

from ddil_lightning.diffusion.betas import betas_of, is_flow
from ddil_lightning.records import END, Prediction

Predicts = Literal["eps", "v", "x0", "flow"]
"""What a network predicts. `flow` is the velocity eps - x0 of the linear path."""


class NoiseSchedule:
    """The tables alpha_t and sigma_t of a forward process, and everything that follows from them at fixed (x_t, t).

    `alphas`, `sigmas`: [T], any float type, kept as float64. `variance_preserving` says that alpha^2 + sigma^2 = 1, which
    is what the rotation form of DDIM needs. `told` [T]: what a network is told at each time; None where that is the time itself.
    Build one with `from_scheduler`, `scaled_linear` or `flow`.
    """

    def __init__(self, alphas: Tensor, sigmas: Tensor, told: Tensor | None = None) -> None:
        if alphas.shape != sigmas.shape or alphas.ndim != 1:
            raise ValueError(f"alphas {tuple(alphas.shape)} and sigmas {tuple(sigmas.shape)} must be two vectors of the same length")
        self.steps = len(alphas)
        self.told = told
        # One more row for END, so that the index -1 reads (1, 0).
        self.alphas = torch.cat([alphas.double(), torch.ones(1, dtype=torch.float64)])
        self.sigmas = torch.cat([sigmas.double(), torch.zeros(1, dtype=torch.float64)])
        self.variance_preserving = bool((self.alphas.square() + self.sigmas.square() - 1).abs().max() < 1e-9)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_betas(cls, betas: Tensor, *, zero_terminal_snr: bool = False) -> NoiseSchedule:
        """VP tables of `betas` [T]. `zero_terminal_snr` shifts and scales sqrt(alpha_bar) to alpha_{T-1} = 0 (Lin et al. 2023, Alg. 1)."""
        root = (1 - betas.double()).cumprod(0).sqrt()
        if zero_terminal_snr:
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return cls(root, (1 - root.square()).sqrt())

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012, *, zero_terminal_snr: bool = False
    ) -> NoiseSchedule:
        """Stable Diffusion's schedule: betas linear in their square root."""
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
        return cls.from_betas(betas, zero_terminal_snr=zero_terminal_snr)

    @classmethod
    def flow(cls, steps: int = 1000, shift: float = 1.0, *, told: bool = False) -> NoiseSchedule:
        """The linear path x_t = (1 - sigma) x0 + sigma eps of flow matching (SD3, Flux), with their timestep `shift`; sigma_{T-1} = 1.

        sigma = shift r / (1 + (shift - 1) r) at r = (t + 1) / T. The path is the same whatever the shift: it says where times, and so the
        nodes of every grid, lie on it. `told`: a network is told sigma T, as diffusers' flow schedulers tell it, and not the time itself.
        """
        r = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        return cls.through(shift * r / (1 + (shift - 1) * r), steps if told else None)

    @classmethod
    def through(cls, sigmas: Tensor, told: int | None = None) -> NoiseSchedule:
        """The linear path at given `sigmas` [T] alone, which rise: the nodes of somebody else's sampler, exactly.

        A network is told sigma `told`; None: the time. In float32, as diffusers multiplies it.
        """
        return cls(1 - sigmas, sigmas, None if told is None else sigmas.float() * told)

    @classmethod
    def from_scheduler(cls, scheduler: Any, shift: float | None = None) -> NoiseSchedule:
        """The forward process of a diffusers scheduler, recomputed in float64 from its configuration.

        diffusers keeps float32 tables; they only serve to check the recomputation. `shift`: of a flow's times, by default its scheduler's;
        one whose shift depends on the size of the image has none. Raises ValueError for that, and for an unknown beta schedule.
        """
        config, name = scheduler.config, type(scheduler).__name__
        # By the class first: a configuration may have kept what another class once said.
        if is_flow(scheduler):
            if shift is None and config.get("use_dynamic_shifting"):
                raise ValueError(f"the shift of the {name} depends on the size of the image (use_dynamic_shifting): say which")
            own = config.get("shift" if "Flow" in name else "flow_shift") or 1.0
            return cls.flow(config["num_train_timesteps"], own if shift is None else shift, told=True)
        if "EDM" in name or "beta_schedule" not in config:
            raise ValueError(f"the scheduler {type(scheduler).__name__} has neither betas nor a flow: use DDIM, DPM-Solver++ or LCM")
        betas = betas_of(config)
        # Of a class that does not rescale, a configuration may still say that another one did.
        rescales = "rescale_betas_zero_snr" in inspect.signature(type(scheduler)).parameters
        return cls.from_betas(betas, zero_terminal_snr=rescales and bool(config["rescale_betas_zero_snr"]))

    def time(self, t: Tensor) -> Tensor:
        """[B] what a network is told at times t [B]: t itself, or of a flow sigma_t T in float32."""
        if self.told is None:
            return t
        if self.told.device != t.device:
            with torch.inference_mode(False):
                self.told = self.told.to(t.device)
        return self.told[t]

    def mean_square(self, t: Tensor | int, moment: float) -> Tensor:
        """E |x_t|^2 / d in float64 at times `t`, on the CPU or one int, of data whose mean square is `moment`."""
        return self.alphas[t].square() * moment + self.sigmas[t].square()

    def at(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times `t` ([B] or one int), shaped to multiply `like` [B, ...], in float32 or like's wider type."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (like.device, dtype)
        if key not in self._tables:
            # A preview under inference_mode must not leave tables behind that training cannot differentiate through.
            with torch.inference_mode(False):
                self._tables[key] = (self.alphas.to(like.device, dtype), self.sigmas.to(like.device, dtype))
        alphas, sigmas = self._tables[key]
        if isinstance(t, int):
            # Not 0-dimensional: such a tensor does not raise the type of a half-precision `like`.
            return alphas[t].view((1,) * like.ndim), sigmas[t].view((1,) * like.ndim)
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alphas[t].view(shape), sigmas[t].view(shape)

    def rates(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt) at `t` in units of 1 / T, so that t / T runs from 0 to 1; shaped like `at`. Not for END.

        By central differences of the tables, one-sided at both ends: exact for the linear path, to second order in 1 / T for others. Along
        the probability flow dx / dt = alpha' x0 + sigma' eps (the velocity that rectified flows regress on).
        """
        if bool(torch.as_tensor(t).lt(0).any()):
            raise ValueError("the rates of a schedule are those of its times 0 to T - 1, not of END")
        alpha, sigma = (torch.gradient(table[:-1] * self.steps)[0] for table in (self.alphas, self.sigmas))
        dtype = torch.promote_types(like.dtype, torch.float32)
        where = torch.as_tensor(t)
        shape = (1,) * like.ndim if isinstance(t, int) else (-1, *(1,) * (like.ndim - 1))
        a, s = (table[where.cpu()].to(like.device, dtype).view(shape) for table in (alpha, sigma))
        return a, s

    def snr(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha^2 / sigma^2 at `t`, shaped like `at`; infinite at END."""
        alpha, sigma = self.at(t, like)
        return (alpha / sigma).square()

    def half_log_snr(self, t: Tensor | int) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t) in float64, the shape of `t`."""
        return (self.alphas[t] / self.sigmas[t]).log()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | int, since: Tensor | int = END) -> Tensor:
        """q(x_t | x0): alpha_t x0 + sigma_t eps. Of an `x0` that is a state x_s of the time `since` <= t, q(x_t | x_s).

        That is r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) eps with r = alpha_t / alpha_s.
        """
        alpha, sigma = self.at(t, x0)
        if isinstance(since, int) and since == END:
            return alpha * x0 + sigma * eps
        alpha_s, sigma_s = self.at(since, x0)
        ratio = alpha / alpha_s
        return ratio * x0 + (sigma.square() - (ratio * sigma_s).square()).clamp(min=0).sqrt() * eps

    def prediction(self, kind: Predicts, x_t: Tensor, t: Tensor | int, out: Tensor) -> Prediction:
        """A network's output of `kind` at (x_t, t) in all three spaces (METHODS 0.1; valid for VP and linear paths alike).

        Raises ValueError for an eps output where alpha is 0 (zero terminal SNR): x0 is not determined there.
        """
        x_t, out = x_t.to(torch.promote_types(x_t.dtype, torch.float32)), out.to(torch.promote_types(out.dtype, torch.float32))
        alpha, sigma = self.at(t, x_t)
        if kind == "x0":
            return self.from_x0(x_t, t, out)
        if kind == "eps":
            if self.alphas.min() == 0 and bool((alpha == 0).any()):
                raise ValueError(
                    "an eps prediction does not determine x0 where alpha_t = 0 (zero terminal SNR): convert the network to v first"
                )
            x0, eps = (x_t - sigma * out) / alpha, out
        elif kind == "v":
            norm = 1.0 if self.variance_preserving else alpha.square() + sigma.square()
            x0, eps = (alpha * x_t - sigma * out) / norm, (sigma * x_t + alpha * out) / norm
            return Prediction(x0, eps, out)
        elif kind == "flow":
            x0, eps = (x_t - sigma * out) / (alpha + sigma), (x_t + alpha * out) / (alpha + sigma)
        else:
            raise ValueError(f"a network predicts 'eps', 'v', 'x0' or 'flow', not {kind!r}")
        return Prediction(x0, eps, alpha * eps - sigma * x0)

    def output(self, kind: Predicts, p: Prediction) -> Tensor:
        """What a network of `kind` says where another one's answer is `p`: the inverse of `prediction`."""
        return p.eps - p.x0 if kind == "flow" else {"x0": p.x0, "eps": p.eps, "v": p.v}[kind]

    def target(self, kind: Predicts, x0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """What a network of `kind` should answer at x_t = alpha x0 + sigma eps: the target of a denoising loss."""
        alpha, sigma = self.at(t, x0)
        known = {"x0": lambda: x0, "eps": lambda: eps, "v": lambda: alpha * eps - sigma * x0, "flow": lambda: eps - x0}
        return known[kind]()

    def from_x0(self, x_t: Tensor, t: Tensor | int, x0: Tensor) -> Prediction:
        """eps and v re-derived from an x0 estimate, alpha x0 + sigma eps = x_t. At END, where sigma is 0: eps = x_t (METHODS 0.6)."""
        alpha, sigma = self.at(t, x_t)
        safe = torch.where(sigma == 0, torch.ones_like(sigma), sigma)
        eps = torch.where(sigma == 0, x_t, (x_t - alpha * x0) / safe)
        return Prediction(x0, eps, alpha * eps - sigma * x0)

    def rotation(self, t: Tensor | int, s: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the angle phi_t - phi_s: DDIM is x_s = cos x_t - sin v (METHODS 0.2). VP schedules only."""
        if not self.variance_preserving:
            raise ValueError("the rotation form of DDIM holds for variance-preserving schedules only")
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.at(t, like), self.at(s, like)
        return alpha_t * alpha_s + sigma_t * sigma_s, sigma_t * alpha_s - alpha_t * sigma_s
