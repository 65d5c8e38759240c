"""The command ddil-fit, as far as it needs nothing heavy: the command line in full, and what is wrong with it."""

from __future__ import annotations

import os

from ddil_lightning.commands.configs import FIT_SHORT, expand
from ddil_lightning.errors import Refusal
from ddil_lightning.packaged import config_names


def fit(argv: list[str], patience: bool = False) -> int:
    """Train, export and test. `patience`: ask for it, before what takes half a minute on a cold machine."""
    words = expand(argv, FIT_SHORT)
    if "--config" not in words and not any(word == "-h" or word.partition("=")[0].endswith("help") for word in words):
        raise Refusal(
            f"ddil-fit needs --config NAME; packaged are {', '.join(name for name in config_names() if not name.startswith('protocols/'))}"
        )
    asks = ("--help", "-h", "--print_config", "--model.help", "--data.help", "--trainer.help")
    if patience and os.environ.get("LOCAL_RANK", "0") == "0" and not any(word.startswith(asks) or word.endswith(".help") for word in words):
        print("ddil-fit: loading PyTorch and Lightning ...", flush=True)
    if "--plan" in words:
        from ddil_lightning.commands.plan import plan

        return plan([word for word in words if word != "--plan"])
    from ddil_lightning.commands import fitting

    return fitting.fit(words)
