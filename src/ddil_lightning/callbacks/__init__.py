"""Lightning callbacks: DAgger scheduling, checkpoints, previews, progress, the shift probe, stages."""

from .checkpoints import Checkpoints
from .dagger import AnnealPrior, Cadence, FlushBuffer
from .previews import Previews
from .progress import Progress
from .shift_probe import ShiftProbe
from .stages import Stages

__all__ = ["AnnealPrior", "Cadence", "Checkpoints", "FlushBuffer", "Previews", "Progress", "ShiftProbe", "Stages"]
