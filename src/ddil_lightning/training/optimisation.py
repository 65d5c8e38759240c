"""Updates by hand: micro-batches, clipping, losses that are not finite, and what a loss tells the buffer and the curves on its way."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from ddil_lightning.bounds import at_least, fraction, lengths, within
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.feed import Feed
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.clock import Means


class Descent(LightningModule):
    """What turns the per-sample losses of a method into optimiser steps. The clock, and so the learning rate, is the method's."""

    student_updates: int

    def __init__(self, betas: tuple[float, float], weight_decay: float, clip: float, accumulate: int) -> None:
        super().__init__()
        within(1, 10**6, accumulate=accumulate)
        at_least(0, clip=clip)
        within(0, 1, weight_decay=weight_decay)
        lengths(2, betas=betas)
        fraction(betas=betas)
        self.automatic_optimization = False
        self.betas, self.weight_decay, self.clip, self.accumulate = betas, weight_decay, clip, accumulate
        self.feed = Feed()
        self._micro: dict[str, int] = {}
        self._by_source: dict[str, tuple[Tensor, Tensor]] = {}
        self._last: Tensor | None = None
        self._batch: LatentBatch | None = None
        self.means = Means()

    def denoisers(self) -> dict[str, Denoiser]:
        """The networks by role."""
        raise NotImplementedError

    def lr_factor(self) -> float:
        """The learning rate's multiple at the present clock."""
        raise NotImplementedError

    def adamw(self, net: nn.Module, lr: float) -> torch.optim.AdamW:
        """AdamW over the trainable parameters of `net`; `base_lr` is what the clock's schedule multiplies."""
        groups = [{"params": [p for p in net.parameters() if p.requires_grad], "base_lr": lr}]
        # Lightning refuses to clip for fused optimisers under mixed precision, because those may unscale by themselves.
        fused = not isinstance(self.trainer.precision_plugin, MixedPrecision)
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, weight_decay=self.weight_decay, fused=fused)

    def descend(self, optimizer: Any, loss: Tensor, name: str = "loss") -> bool:
        """One micro-batch of `loss`; True when it completed an update. Clips, sets the learning rate, refuses a loss that is not finite."""
        fine = bool(torch.isfinite(loss))
        # All processes stop together: one that left alone would leave the others waiting for its gradients.
        if not self.trainer.strategy.reduce_boolean_decision(fine):
            found = f"the {name} is not finite on another process" if fine else f"the {name} is {float(loss.detach())}"
            suspects = self._suspects()  # on all processes: a sharded network answers only when all ask
            raise FloatingPointError(f"{found} at student update {self.student_updates}{'' if fine else suspects}")
        self._last = loss.detach()
        self.record(**{name: loss})
        self.manual_backward(loss / self.accumulate)
        self._micro[name] = (self._micro.get(name, 0) + 1) % self.accumulate
        if self._micro[name]:
            return False
        if self.clip:
            # By hand, gradients are clipped before a gradient scaler (16-mixed) has unscaled them.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            limit = self.clip if scaler is None else self.clip * scaler.get_scale()
            self.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm="norm")
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.lr_factor()
        optimizer.step()
        optimizer.zero_grad()
        return True

    def halfway(self) -> bool:
        """Whether an update is under way: accumulated gradients are in no checkpoint."""
        return any(self._micro.values())

    @property
    def last_loss(self) -> float | None:
        """The loss of the last micro-batch."""
        return None if self._last is None else float(self._last)

    def record(self, **values: Tensor | float) -> None:
        """Add to the running means that the Clock callback writes to the loggers every `log_every` student updates."""
        for name, value in values.items():
            self.means.add(name, value.detach().float().mean() if isinstance(value, Tensor) else value)

    @property
    def source_losses(self) -> dict[str, float]:
        """The mean loss by the source of the latents, over all processes and the micro-batches of the last update or of the one under way.

        All processes must ask together.
        """
        if not self._by_source:
            return {}
        sums = torch.stack([torch.stack([total.float(), n.float()]) for total, n in self._by_source.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)  # a schedule that hears them must come to the same prior on every process
        return {name: total / n for name, (total, n) in zip(self._by_source, sums.tolist(), strict=True) if n}

    def feedback(self, b: LatentBatch, loss: Tensor) -> Tensor:
        """The scalar loss of per-sample losses [B]; the buffer's priorities and the per-source means hear of it on the way."""
        self._batch = b
        sums = self.means.by_source(loss.detach(), b.source)
        for name, (_, n) in sums.items():
            self.means.add(f"drawn/share_{name}", n, len(loss))
        if self._by_source and self._micro.get("loss"):  # an update is under way, to which this micro-batch belongs
            sums = {name: (total + self._by_source[name][0], n + self._by_source[name][1]) for name, (total, n) in sums.items()}
        self._by_source = sums
        self.feed.observe(b, loss)
        return (b.weight * loss).mean()

    @torch.no_grad()
    def _suspects(self) -> str:
        """Which networks answer the last batch with values that are not finite, in words."""
        b = self._batch
        if b is None:
            return ""
        bad = [name for name, d in self.denoisers().items() if not bool(d(b.x_t, b.t, b.c).x0.isfinite().all())]
        if not bool(b.x_t.isfinite().all()):
            return ": the latents themselves are not finite"
        return f": not finite is the output of the {' and the '.join(bad)} network" if bad else ": the outputs of all networks are finite"
