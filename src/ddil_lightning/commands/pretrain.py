"""The command ddil-pretrain: a teacher of the built-in data is trained, measured and written."""

from __future__ import annotations

from ddil_lightning.commands.configs import PRETRAIN_MOVED, expand
from ddil_lightning.errors import Refusal
from ddil_lightning.messages import accepts, explain


def pretrain(argv: list[str]) -> int:
    """Train a teacher, measure it and write it."""
    words = expand(argv, {})
    from jsonargparse import ArgumentError

    from ddil_lightning.miniature import pretrain as training

    try:
        training.main(words)
    except ArgumentError as error:
        raise Refusal(explain(str(error), accepts(training.pretrain), moved=PRETRAIN_MOVED)) from error
    return 0
