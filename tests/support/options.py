"""Keywords as a config says them: tables in the place of records, of which a table changes only what it names."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass, replace
from typing import Any


def options(cls: type, *settings: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a constructor from several settings, the later ones over the earlier ones."""
    defaults = {p.name: p.default for base in reversed(cls.__mro__[:-1]) for p in inspect.signature(base).parameters.values()}
    made: dict[str, Any] = {}
    for name, value in (item for given in settings for item in given.items()):
        before = made.get(name, defaults.get(name))
        made[name] = replace(before, **value) if is_dataclass(before) and isinstance(value, dict) else value  # type: ignore[type-var]
    return made
