"""What the settings of a diffusers scheduler say of its forward process: its betas, or that it is a flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's network is a velocity of the linear path: those of flow matching, and others whose settings say so.

    `use_flow_sigmas` alone is a way to sample any network.
    """
    return "Flow" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"


def betas_of(config: Mapping[str, Any]) -> Tensor:
    """[T] the betas of a scheduler's settings, in float64. Raises ValueError for a schedule that is not known."""
    steps, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    kind = config["beta_schedule"]
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "squaredcos_cap_v2":
        bar = ((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * torch.pi / 2).cos().square()
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise ValueError(f"the scheduler's beta_schedule is {kind!r}: known are linear, scaled_linear, squaredcos_cap_v2 and trained_betas")
