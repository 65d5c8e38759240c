"""Feedback losses: one file per method. A method never knows where its latents come from."""

from ddil_lightning.methods.boot import BOOT
from ddil_lightning.methods.dmd import DMD
from ddil_lightning.methods.dmd2 import DMD2
from ddil_lightning.methods.lcm import LCM
from ddil_lightning.methods.pd import PD
from ddil_lightning.methods.reflow import Reflow
from ddil_lightning.methods.snapfusion import SnapFusion
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.plan import Part, Stage

__all__ = ["BOOT", "DMD", "DMD2", "LCM", "PD", "Distillation", "Part", "Reflow", "SnapFusion", "Stage"]
