"""ddil-pretrain: a teacher of the built-in data."""

from __future__ import annotations

import inspect

from ddil_lightning.commands.configs import expand
from ddil_lightning.errors import Refusal
from ddil_lightning.messages import explain


def pretrain(argv: list[str]) -> int:
    """Train a teacher, measure it and write it."""
    words = expand(argv, {})
    from jsonargparse import ArgumentError

    from ddil_lightning.miniature import pretrain as training

    try:
        training.main(words)
    except ArgumentError as error:
        raise Refusal(explain(str(error), list(inspect.signature(training.pretrain).parameters))) from error
    return 0
