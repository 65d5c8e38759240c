"""Lightning callbacks: DAgger scheduling, checkpoints, previews, progress, the shift probe, stages, validation."""

from ddil_lightning.callbacks.alerts import Alerts
from ddil_lightning.callbacks.annealing import AnnealPrior, Cadence, FlushBuffer
from ddil_lightning.callbacks.checkpoints import Checkpoints
from ddil_lightning.callbacks.previews import Previews
from ddil_lightning.callbacks.profile import Profile
from ddil_lightning.callbacks.progress import Progress
from ddil_lightning.callbacks.shift_probe import ShiftProbe
from ddil_lightning.callbacks.stages import Stages
from ddil_lightning.callbacks.validation import Validation

__all__ = [
    "Alerts",
    "AnnealPrior",
    "Cadence",
    "Checkpoints",
    "FlushBuffer",
    "Previews",
    "Profile",
    "Progress",
    "ShiftProbe",
    "Stages",
    "Validation",
]
