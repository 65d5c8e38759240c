"""The profiler traces the updates it was asked for, and nothing else of a run changes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from ddil_lightning.callbacks import Profile
from suite import BY_NAME, build, captions, equal, fit, state


def train(tiny: Path, folder: Path, *callbacks: Callback, updates: int = 5) -> Any:
    return fit(build(BY_NAME["lcm"], tiny, updates=updates), captions(tiny), *callbacks, default_root_dir=folder)


def test_some_updates_are_traced_and_the_run_is_the_same(light: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(light, tmp_path, Profile(updates=1, after=1), updates=3)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "1-2.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"]]
    assert sum("Optimizer.step" in name for name in names) == 1 and any("conv" in name for name in names)
    assert "Self CPU" in (tmp_path / "profile" / "1-2.txt").read_text() and "updates 1 to 2 were profiled" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == ["1-2.json.gz", "1-2.txt"]
    assert equal(state(run)["weights"], state(train(light, tmp_path, updates=3))["weights"])


def test_nothing_is_traced_unless_asked_for(light: Path, tmp_path: Path) -> None:
    train(light, tmp_path, Profile(), updates=2)
    assert not (tmp_path / "profile").exists()


@pytest.mark.slow
def test_a_run_that_ends_before_leaves_what_was_traced(light: Path, tmp_path: Path) -> None:
    train(light, tmp_path, Profile(updates=9, after=0), updates=1)
    assert (tmp_path / "profile" / "0-1.json.gz").is_file()


class Break(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.student_updates == 2:
            raise KeyError("broken")


def test_a_run_that_breaks_traces_no_more(light: Path, tmp_path: Path) -> None:
    profile = Profile(updates=9, after=0)
    with pytest.raises(KeyError, match="broken"):
        train(light, tmp_path, profile, Break())
    assert profile._profiler is None


def test_numbers_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="profile.updates"):
        Profile(updates=-1)
