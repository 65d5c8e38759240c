"""Feedback losses: one file per method. A method never knows where its latents come from."""

from .base import Distillation
from .dmd2 import DMD2
from .lcm import LCM
from .pd import PD
from .plan import Part, Stage

__all__ = ["DMD2", "LCM", "PD", "Distillation", "Part", "Stage"]
