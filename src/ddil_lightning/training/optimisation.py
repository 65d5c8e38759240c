"""Updates by hand: micro-batches, clipping, the learning rate by the clock, and losses that are not finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from ddil_lightning.bounds import at_least, fraction, lengths, within


class Descent:
    """What turns a loss into an optimiser step: AdamW's `betas` and `weight_decay`, the norm `clip`, `accumulate` micro-batches per update.

    `micro`: how many micro-batches of the update under way are done, by the name of the loss; it belongs to a checkpoint.
    """

    def __init__(self, betas: tuple[float, float], weight_decay: float, clip: float, accumulate: int) -> None:
        within(1, 10**6, accumulate=accumulate)
        at_least(0, clip=clip)
        within(0, 1, weight_decay=weight_decay)
        lengths(2, betas=betas)
        fraction(betas=betas)
        self.betas, self.weight_decay, self.clip, self.accumulate = betas, weight_decay, clip, accumulate
        self.micro: dict[str, int] = {}
        self.last: Tensor | None = None

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
            suspects = method.suspects()  # on all processes: a sharded network answers only when all ask
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
            group["lr"] = group["base_lr"] * method.lr_factor()
        optimizer.step()
        optimizer.zero_grad()
        return True

    @property
    def halfway(self) -> bool:
        """Whether an update is under way: accumulated gradients are in no checkpoint."""
        return any(self.micro.values())
