"""Updates by hand: micro-batches, clipping, the learning rate by the clock, and losses that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import at_least, fraction, lengths, within
from ddil_lightning.records import LatentBatch


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate, by the clock of student updates.

    Args:
        lr: the learning rate, which rises linearly over `warmup` updates and then falls linearly to `final_lr * lr` at the end of the run.
        final_lr: the share of `lr` that is left at the end; 1 keeps it, 0 anneals it away.
        warmup: student updates until `lr` is reached.
        betas: AdamW's decays of the gradient's mean and of its square.
        weight_decay: AdamW's, per step and in units of the learning rate.
        clip: the norm to which gradients are clipped; 0 for no clipping.
        accumulate: micro-batches of `data.batch_size` in one update.
    """

    lr: float = 1e-5
    final_lr: float = 0.05
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        within(0, 10, **{"optimizer.lr": self.lr, "optimizer.final_lr": self.final_lr})
        within(0, 10**9, **{"optimizer.warmup": self.warmup})
        lengths(2, **{"optimizer.betas": self.betas})
        fraction(**{"optimizer.betas": self.betas})
        within(0, 1, **{"optimizer.weight_decay": self.weight_decay})
        at_least(0, **{"optimizer.clip": self.clip})
        within(1, 10**6, **{"optimizer.accumulate": self.accumulate})


class Descent:
    """What turns a loss into an optimiser step, as `optimizer` says: AdamW, clipping, several micro-batches per update.

    `micro`: how many micro-batches of the update under way are done, by the name of the loss; it belongs to a checkpoint. `batch`: the
    latents of the last of them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.betas, self.weight_decay = optimizer.betas, optimizer.weight_decay
        self.clip, self.accumulate = optimizer.clip, optimizer.accumulate
        self.final_lr, self.warmup = optimizer.final_lr, optimizer.warmup
        self.micro: dict[str, int] = {}
        self.last: Tensor | None = None
        self.batch: LatentBatch | None = None

    def adamw(self, parameters: Iterable[nn.Parameter], lr: float, trainer: Any) -> torch.optim.AdamW:
        """AdamW over `parameters`; `base_lr` is what the clock's schedule multiplies."""
        groups = [{"params": list(parameters), "base_lr": lr}]
        # Lightning refuses to clip for fused optimisers under mixed precision, because those may unscale by themselves.
        fused = not isinstance(trainer.precision_plugin, MixedPrecision)
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, weight_decay=self.weight_decay, fused=fused)

    def step(self, method: Any, optimizer: Any, loss: Tensor, name: str) -> bool:
        """One micro-batch of `loss`; True when it completed an update. Raises FloatingPointError for a loss that is not finite.

        `method`: the Distillation in training; its clock gives the learning rate, its networks the suspects.
        """
        fine = bool(torch.isfinite(loss))
        # All processes stop together: one that left alone would leave the others waiting for its gradients.
        if not method.trainer.strategy.reduce_boolean_decision(fine):
            found = f"the {name} is not finite on another process" if fine else f"the {name} is {float(loss.detach())}"
            suspects = self._suspects(method.roles)  # on all processes: a sharded network answers only when all ask
            raise FloatingPointError(f"{found} at student update {method.student_updates}{'' if fine else suspects}")
        self.last = loss.detach()
        method.manual_backward(loss / self.accumulate)
        self.micro[name] = (self.micro.get(name, 0) + 1) % self.accumulate
        if self.micro[name]:
            return False
        if self.clip:
            # By hand, gradients are clipped before a gradient scaler (16-mixed) has unscaled them.
            plugin = method.trainer.precision_plugin
            scaler = getattr(plugin, "scaler", None)
            limit = self.clip if scaler is None else self.clip * scaler.get_scale()
            method.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm="norm")
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor(method.stage_updates, method.stage_length)
        optimizer.step()
        optimizer.zero_grad()
        return True

    def factor(self, updates: int, length: int) -> float:
        """The learning rate's multiple after so many `updates` of a stage's `length`: linear warm-up, then linear to `final_lr`."""
        if updates < self.warmup:
            return (updates + 1) / self.warmup
        return 1 - (1 - self.final_lr) * (updates - self.warmup) / max(length - self.warmup, 1)

    @property
    def loss(self) -> float | None:
        """The loss of the last micro-batch; reading it waits for the device."""
        return None if self.last is None else float(self.last)

    @torch.no_grad()
    def _suspects(self, roles: Mapping[str, Role]) -> str:
        """Which networks answer the last batch with values that are not finite, in words."""
        b = self.batch
        if b is None:
            return ""
        bad = [name for name, role in roles.items() if not bool(role(b.x_t, b.t, b.c).x0.isfinite().all())]
        if not bool(b.x_t.isfinite().all()):
            return ": the latents themselves are not finite"
        return f": not finite is the output of the {' and the '.join(bad)} network" if bad else ": the outputs of all networks are finite"

    @property
    def halfway(self) -> bool:
        """Whether an update is under way: accumulated gradients are in no checkpoint."""
        return any(self.micro.values())
