"""Commands called in this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ddil_lightning.commands import fit_cli, main


def called(capsys: Any, name: str, *words: Any) -> tuple[int, str, str]:
    """ddil-NAME in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.run(main.command(name), f"ddil-{name}", [str(word) for word in words])
    return (stop.value.code, *capsys.readouterr())


def one_line(capsys: Any, name: str, *words: Any) -> str:
    """What a command says that refuses what it was told."""
    code, _, err = called(capsys, name, *words)
    assert code == 2 and err.count("\n") == 1, err
    return err


def fit(capsys: Any, *words: str) -> tuple[int, str, str]:
    """ddil-fit."""
    return called(capsys, "fit", *words)


def refused(capsys: Any, *words: str) -> str:
    """The one line of an error that left nothing behind."""
    before = sorted(Path().rglob("*"))
    code, out, err = fit(capsys, *words)
    assert code == 2 and out == "" and err.startswith("ddil-fit: ") and err.count("\n") == 1, (code, out, err)
    assert sorted(Path().rglob("*")) == before and fit_cli.RUN_DIR not in os.environ
    return err.removeprefix("ddil-fit: ").rstrip()
