"""Prints constraints for pip: of every library that the package needs the oldest minor version that pyproject.toml allows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import tomllib

FLOOR = re.compile(r"([\w-]+)(?:\[[\w,]+\])?>=(\d+\.\d+)")


def oldest() -> Iterator[str]:
    """`name==X.Y.*` of every requirement that has a floor."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        found = FLOOR.match(line)
        if found:
            yield f"{found[1]}=={found[2]}.*"


if __name__ == "__main__":
    print("\n".join(oldest()))
