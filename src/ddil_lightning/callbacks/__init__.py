"""Lightning callbacks: DAgger scheduling, checkpoints, previews, progress."""

from .checkpoints import Checkpoints
from .dagger import AnnealPrior, Cadence, FlushBuffer
from .previews import Previews
from .progress import Progress

__all__ = ["AnnealPrior", "Cadence", "Checkpoints", "FlushBuffer", "Previews", "Progress"]
