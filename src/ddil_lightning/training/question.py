"""What a method asks of its frozen networks besides a state: answers that were kept under another question are worth nothing."""

from __future__ import annotations

import hashlib
from typing import Any

from ddil_lightning.diffusion.losses import Distance

ELSEWHERE = frozenset("updates lr log_every training student_updates stage stage_start has_box".split())
"""Numbers of a method that move, or that no answer depends on."""
PLAIN = (bool, int, float, str, Distance)


def question(method: Any) -> str:
    """A digest of a method's class and plain settings, its pipeline, its box and its nodes.

    A setting too many costs that a run which goes on with another one asks anew; one too few would have it learn from wrong answers.
    """
    own = {name: value for name, value in vars(method).items() if not name.startswith("_") and name not in ELSEWHERE}
    plain = {name: value for name, value in own.items() if isinstance(value, PLAIN) or _plain(value)}
    box = method.reflection
    said = [type(method).__qualname__, method.backbone.path, method.backbone.predicts, sorted(plain.items(), key=lambda item: item[0])]
    said += [box.mode, box.quantile, box.lo.tolist(), box.hi.tolist(), method.grid.times.tolist(), method.backbone.schedule.sigmas.tolist()]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _plain(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(x, PLAIN) for x in value)
