"""ddil-lightning: few-step students of diffusers pipelines by imitation learning (DDIL, arXiv 2410.11971).

The public names are those that `__init__.pyi` imports. They are loaded when they are first used, so that `import ddil_lightning` costs
nothing.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(str(_HOME[name])), name)


def __dir__() -> list[str]:
    return __all__
