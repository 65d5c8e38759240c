"""ddil-lightning: few-step students of diffusers pipelines by imitation learning (DDIL, arXiv 2410.11971).

Names are loaded when they are first used, so that `import ddil_lightning` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbones import Backbone
    from .buffer import ReplayBuffer
    from .callbacks import AnnealPrior, Cadence, Checkpoints, FlushBuffer, Previews, Progress, ShiftProbe, Stages
    from .captions import Captions, Digits, Images, Prompts, Shapes
    from .datamodule import DDILDataModule
    from .denoiser import Denoiser
    from .methods import DMD2, LCM, PD, Distillation, Part, Stage
    from .prior import Cosine, Exponential, Gated, Linear, Piecewise, SamplingPrior, Schedule
    from .reflect import Reflection
    from .rollout import draw, roll
    from .schedule import Grid, NoiseSchedule
    from .solver import Policy

_HOME = {
    "backbones": ("Backbone",),
    "buffer": ("ReplayBuffer",),
    "callbacks": ("AnnealPrior", "Cadence", "Checkpoints", "FlushBuffer", "Previews", "Progress", "ShiftProbe", "Stages"),
    "captions": ("Captions", "Digits", "Images", "Prompts", "Shapes"),
    "datamodule": ("DDILDataModule",),
    "denoiser": ("Denoiser",),
    "methods": ("DMD2", "LCM", "PD", "Distillation", "Part", "Stage"),
    "prior": ("Cosine", "Exponential", "Gated", "Linear", "Piecewise", "SamplingPrior", "Schedule"),
    "reflect": ("Reflection",),
    "rollout": ("draw", "roll"),
    "schedule": ("Grid", "NoiseSchedule"),
    "solver": ("Policy",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DMD2",
    "LCM",
    "PD",
    "AnnealPrior",
    "Backbone",
    "Cadence",
    "Captions",
    "Checkpoints",
    "Cosine",
    "DDILDataModule",
    "Denoiser",
    "Digits",
    "Distillation",
    "Exponential",
    "FlushBuffer",
    "Gated",
    "Grid",
    "Images",
    "Linear",
    "NoiseSchedule",
    "Part",
    "Piecewise",
    "Policy",
    "Previews",
    "Progress",
    "Prompts",
    "Reflection",
    "ReplayBuffer",
    "SamplingPrior",
    "Schedule",
    "Shapes",
    "ShiftProbe",
    "Stage",
    "Stages",
    "draw",
    "roll",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
