"""Modules from outside that add a family, a metric or a class with a short name to this package, where they are imported.

An installed package names its module among its entry points, in the group `ddil_lightning.plugins`; a file that is not installed is named
in the environment, `DDIL_PLUGINS=pixart,colourfulness`. They are imported when somebody looks for what they may have added, so that a
command without need of them does not wait for them.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module, metadata

from ddil_lightning.errors import one_line

GROUP, VARIABLE = "ddil_lightning.plugins", "DDIL_PLUGINS"

_begun: set[str] = set()


@cache
def installed() -> dict[str, str]:
    """The modules that installed packages name, each with its package."""
    return {entry.module: f"of the package {entry.dist.name if entry.dist else '?'}" for entry in metadata.entry_points(group=GROUP)}


def load() -> None:
    """Import the modules that packages and the environment name, each once. Raises ValueError, naming it, where one cannot be imported."""
    given = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    for name, whose in {**installed(), **{name: f"in {VARIABLE}" for name in given if name}}.items():
        if name in _begun:
            continue
        _begun.add(name)  # before it is imported: on its way it may look at the very list that it adds to
        try:
            import_module(name)
        except Exception as error:  # whatever a stranger's module does
            _begun.discard(name)
            raise ValueError(f"the plugin {name} {whose} cannot be imported ({type(error).__name__}: {one_line(error)})") from error
