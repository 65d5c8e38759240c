"""What the tests of methods train."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """These wait for calls of the U-Net more than for anything else. No fixture of tests/conftest.py that takes `tiny` is used here."""
    return light
