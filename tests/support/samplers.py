"""Networks and schedules for tests of samplers, and diffusers' own samplers beside them, on the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import Context

SD = NoiseSchedule.scaled_linear()
ZERO = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
FLOW = NoiseSchedule.flow()
SCHEDULES = pytest.mark.parametrize("schedule", [SD, ZERO, FLOW], ids=["sd", "zero-snr", "flow"])
SD_CONFIG: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS: dict[str, Any] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
C = Context(torch.zeros(3, 1, 1))


def noise(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Curved(nn.Module):
    """A nonlinear network of its own, that counts its calls and remembers their times."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        assert t.dtype == torch.long and len(t) == len(x_t) and len(t.unique()) == 1
        self.times.append(int(t[0]))
        return torch.tanh(x_t + t.view(-1, 1, 1, 1) / 1000) + 0.3 * x_t.roll(1, 1)


def theirs(name: str, steps: int, exact: bool = True, **config: Any) -> Any:
    import diffusers

    clip = {} if name.startswith("DPM") else {"clip_sample": False}
    scheduler = getattr(diffusers, name)(**SD_CONFIG, **clip, **config)
    if exact:  # diffusers keeps float32 tables; with ours the algorithms can be compared to the last digits
        scheduler.alphas_cumprod = SD.alphas[:-1].square()
    scheduler.set_timesteps(steps)
    return scheduler


def run(scheduler: Any, network: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(3), C), t, x, return_dict=False, **kwargs)[0]
        states.append(x)
    return states
