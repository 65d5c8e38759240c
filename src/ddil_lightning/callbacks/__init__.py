"""Lightning callbacks: DAgger scheduling, checkpoints, previews, progress, the shift probe."""

from .checkpoints import Checkpoints
from .dagger import AnnealPrior, Cadence, FlushBuffer
from .previews import Previews
from .progress import Progress
from .shift_probe import ShiftProbe

__all__ = ["AnnealPrior", "Cadence", "Checkpoints", "FlushBuffer", "Previews", "Progress", "ShiftProbe"]
