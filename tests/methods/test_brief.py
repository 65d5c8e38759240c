"""Every brief entry of the suite, once and tiny: it fits and, where a pipeline can hold its student, is exported as it samples.

The whole behaviour suite puts these through the slow tests alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ddil_lightning.testing import exports, fits
from suite import METHODS, Entry, subject


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in METHODS if entry.brief])
def test_two_updates_and_the_export(entry: Entry, light: Path) -> None:
    """On roll-outs too. What no pipeline can hold is refused with its reason, and nothing is written."""
    method = subject(entry, light)
    run = fits(method, updates=2)
    assert run.method.evaluations["student"] > 0
    exports(method, run)
