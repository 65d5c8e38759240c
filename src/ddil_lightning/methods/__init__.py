"""Feedback losses: one file per method. A method never knows where its latents come from."""

from ddil_lightning.methods.add import ADD
from ddil_lightning.methods.boot import BOOT
from ddil_lightning.methods.ctm import CTM
from ddil_lightning.methods.dmd import DMD
from ddil_lightning.methods.dmd2 import DMD2
from ddil_lightning.methods.emd import EMD
from ddil_lightning.methods.imagine_flash import ImagineFlash
from ddil_lightning.methods.ladd import LADD
from ddil_lightning.methods.lcm import LCM
from ddil_lightning.methods.moments import MomentMatching
from ddil_lightning.methods.pcm import PCM
from ddil_lightning.methods.pd import PD
from ddil_lightning.methods.reflow import Reflow
from ddil_lightning.methods.sid import SiD
from ddil_lightning.methods.snapfusion import SnapFusion
from ddil_lightning.methods.tcd import TCD
from ddil_lightning.methods.ufogen import UFOGen
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.plan import Part, Stage

__all__ = [
    "ADD",
    "BOOT",
    "CTM",
    "DMD",
    "DMD2",
    "EMD",
    "LADD",
    "LCM",
    "PCM",
    "PD",
    "TCD",
    "Distillation",
    "ImagineFlash",
    "MomentMatching",
    "Part",
    "Reflow",
    "SiD",
    "SnapFusion",
    "Stage",
    "UFOGen",
]
