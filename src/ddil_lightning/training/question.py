"""What a method asks of its frozen networks besides a state: answers that were kept under another question are worth nothing."""

from __future__ import annotations

import hashlib
from typing import Any

from ddil_lightning.diffusion.losses import Distance

ELSEWHERE = frozenset("updates lr log_every training student_updates stage stage_start has_box taught".split())
"""What of a method moves, or is no setting of it."""
PLAIN = (bool, int, float, str, Distance)


def question(method: Any) -> str:
    """A digest of a method's class and plain settings, its frozen network in the precision that it has, its box and its nodes.

    The network is known by its weights and not by its path, where other ones may lie by the time that a run goes on.
    A setting too many costs that a run which goes on with another one asks anew; one too few would have it learn from wrong answers.
    """
    own = {name: value for name, value in vars(method).items() if not name.startswith("_") and name not in ELSEWHERE}
    plain = {name: value for name, value in own.items() if isinstance(value, PLAIN) or _plain(value)}
    box, backbone = method.reflection, method.backbone
    null = getattr(getattr(method, "teacher", None), "null", None)  # what guidance is taken away from, by encoders of their own
    said = [type(method).__qualname__, method.taught, sorted(plain.items(), key=lambda item: item[0])]
    said += [str(backbone.dtype), getattr(backbone, "quantize", None)]
    said += [None if x is None else hashlib.sha256(x.detach().float().cpu().numpy().tobytes()).hexdigest() for x in null or ()]
    said += [box.mode, box.quantile, box.lo.tolist(), box.hi.tolist(), method.grid.times.tolist(), backbone.schedule.sigmas.tolist()]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _plain(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(x, PLAIN) for x in value)
