"""Feedback losses: one file per method. A method never knows where its latents come from."""

from ddil_lightning.methods.add import ADD
from ddil_lightning.methods.dmd2 import DMD2
from ddil_lightning.methods.imagine_flash import ImagineFlash
from ddil_lightning.methods.ladd import LADD
from ddil_lightning.methods.lcm import LCM
from ddil_lightning.methods.moments import MomentMatching
from ddil_lightning.methods.pd import PD
from ddil_lightning.methods.ufogen import UFOGen
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.plan import Part, Stage

__all__ = ["ADD", "DMD2", "LADD", "LCM", "PD", "Distillation", "ImagineFlash", "MomentMatching", "Part", "Stage", "UFOGen"]
