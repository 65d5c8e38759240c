"""ddil-dashboard: what it says where something is missing, and what it writes offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddil_lightning.commands import main
from ddil_lightning.runs import workspace


def call(capsys: Any, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main.run(main.command("dashboard"), "ddil-dashboard", list(words))
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(workspace, "find_spec", lambda name: None)
    code, _, err = call(capsys, "--print")
    needs = "a workspace needs wandb-workspaces, which is not installed: pip install 'ddil-lightning[dashboard]'"
    assert (code, err) == (2, f"ddil-dashboard: {needs}\n")
    monkeypatch.setattr(workspace, "find_spec", lambda name: name)
    code, _, err = call(capsys)
    assert code == 2 and err.startswith("ddil-dashboard: a workspace in W&B needs a key: run `wandb login`") and "--print" in err
    code, _, err = call(capsys, "--run", str(tmp_path))
    assert code == 2 and err.count("\n") == 1 and f"--run {tmp_path}: no run that was logged by --wandb offline lies there" in err


def offline(folder: Path) -> Path:
    run = folder / "wandb" / "offline-run-20260101_000000-abc"
    run.mkdir(parents=True)
    return run


def test_how_to_send_a_run_is_said_without_the_package_of_workspaces(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = offline(tmp_path)
    monkeypatch.setattr(workspace, "find_spec", lambda name: None)
    code, out, err = call(capsys, "--print", "--run", str(tmp_path))
    assert (code, out) == (0, "") and f"{tmp_path} was logged offline, and is sent by: wandb sync {run}\n" in err
    assert "no workspace is printed: a workspace needs wandb-workspaces, which is not installed" in err


def test_it_writes_the_workspace_and_how_to_send_a_run(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("wandb_workspaces", reason="no wandb-workspaces: pip install it")
    run = offline(tmp_path / "r")
    code, out, _ = call(capsys, "--entity", "me", "--out", str(tmp_path / "w.json"), "--run", str(tmp_path / "r"))
    assert code == 0 and out.splitlines()[0].endswith(f"is sent by: wandb sync {run}")
    assert json.loads((tmp_path / "w.json").read_text())["entity"] == "me"
    code, out, err = call(capsys, "--print", "--name", "mine", "--run", str(tmp_path / "r"))
    assert code == 0 and json.loads(out)["displayName"] == "mine" and f"is sent by: wandb sync {run}\n" in err
