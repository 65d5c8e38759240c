"""ddil-fit called in this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ddil_lightning.commands import fit_cli, main


def fit(capsys: Any, *words: str) -> tuple[int, str, str]:
    """ddil-fit in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.run(main.command("fit"), "ddil-fit", list(words))
    return (stop.value.code, *capsys.readouterr())


def refused(capsys: Any, *words: str) -> str:
    """The one line of an error that left nothing behind."""
    before = sorted(Path().rglob("*"))
    code, out, err = fit(capsys, *words)
    assert code == 2 and out == "" and err.startswith("ddil-fit: ") and err.count("\n") == 1, (code, out, err)
    assert sorted(Path().rglob("*")) == before and fit_cli.RUN_DIR not in os.environ
    return err.removeprefix("ddil-fit: ").rstrip()
