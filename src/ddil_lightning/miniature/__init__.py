"""The embedded default: two data sets, a teacher for each and an evaluator, none of which needs a download."""

from __future__ import annotations

from pathlib import Path


def weights_path(name: str) -> Path:
    """Folder of the weights that ship with the package: "shapes", "digits" (diffusers pipelines) or "evaluator".

    Raises FileNotFoundError for a folder that this installation does not have.
    """
    path = Path(__file__).parent / "weights" / name
    if not path.is_dir():
        there = sorted(p.name for p in path.parent.glob("*") if p.is_dir())
        raise FileNotFoundError(f"no built-in weights {name!r}; this installation has {', '.join(there) or 'none'}")
    return path
