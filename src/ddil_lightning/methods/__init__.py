"""Feedback losses: one file per method. A method never knows where its latents come from."""

from .base import Distillation
from .lcm import LCM

__all__ = ["LCM", "Distillation"]
