"""Runs that are logged elsewhere too: W&B, read back from what it wrote offline, and TensorBoard."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from commandline import fit
from ddil_lightning.commands.configs import expand
from offline import read_back


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", None)  # nobody is there to answer
    return tmp_path


@pytest.mark.slow
def test_wandb_offline_needs_no_key_and_no_network_and_goes_on(tiny_config: Path, capsys: Any) -> None:
    """A run is raised from 2 updates to 3: two files of one W&B run, along one axis."""
    small = ["model.log_every=1", "checkpoints.every=1", "--wandb", "offline"]
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "--updates", "2", *small)
    assert code == 0, err
    code, out, err = fit(capsys, "--config", str(tiny_config), "--ckpt_path", "r", "--updates", "3")
    assert code == 0, err
    first, second = sorted(Path("r/wandb").glob("offline-run-*"))
    assert f"W&B has this run by: wandb sync {first.resolve()} {second.resolve()}" in out.splitlines()
    before, after = (read_back(next(path.glob("*.wandb"))) for path in (first, second))
    assert before.run.run_id == after.run.run_id and ("*", "student_updates") in after.axes
    clocks = [[row["student_updates"] for row in written.history if "train/loss" in row] for written in (before, after)]
    assert clocks == [[1, 2], [3]]
    (captions,) = [row["previews/sheet/captions"] for row in after.history if "previews/sheet/captions" in row]
    assert captions[0].startswith("rows: teacher@")


@pytest.mark.slow
def test_numbers_that_break_a_run_off_are_an_alert(tiny_config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddil_lightning.methods import LCM

    advance = LCM.advance

    def blown(self: LCM) -> None:
        advance(self)
        self.student.network.unet.conv_in.weight.data.fill_(1e30)

    monkeypatch.setattr(LCM, "advance", blown)
    words = ["--config", str(tiny_config), "--run_dir", "r", "previews.every=0", "data.prior={forward: 1.0, student: 0.0}"]
    code, _, err = fit(capsys, *words, "--wandb", "offline")
    assert code == 2 and "at student update 1" in err
    import wandb

    wandb.finish()
    (title, text), *_ = read_back(next(Path("r/wandb").glob("offline-run-*/*.wandb"))).alerts
    assert title == "the run has broken off" and "at student update 1" in text


@pytest.mark.slow
def test_tensorboard_lies_in_the_run_folder(tiny_config: Path, capsys: Any) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("no tensorboard: pip install it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "--updates", "2", "model.log_every=1", "--tensorboard")
    assert code == 0, err
    found = EventAccumulator("r/tensorboard").Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2] and "previews/sheet" in found.Tags()["images"]


def test_the_switch_of_tensorboard_takes_a_value_and_needs_none() -> None:
    yes, no = "--tensorboard=true", "--tensorboard=false"
    said = [["--tensorboard"], ["--tensorboard", "model.ema=0.9"], ["--tensorboard", "false"], [no], ["tensorboard=true"]]
    meant = [[yes], [yes, "--model.ema=0.9"], ["--tensorboard", "false"], [no], [yes]]
    assert [expand(words, {}) for words in said] == meant
