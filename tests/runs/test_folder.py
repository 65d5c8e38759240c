"""Run folders: to whom they belong, what a run may write into them, the newest."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddil_lightning.runs import folder as run_folder

GONE = 2**22 + 1  # more than any process is numbered


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_runs_of_one_second_get_two_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "2026-01-02_03-04-05")
    first, second = run_folder.reserve(None, "toy/pd"), run_folder.reserve(None, "toy/pd")
    assert first.folder == Path("runs/toy/pd/2026-01-02_03-04-05") and second.folder == Path("runs/toy/pd/2026-01-02_03-04-05-2")
    assert first.folder.is_dir() and second.folder.is_dir() and first.made[-1] == Path("runs")


@pytest.mark.parametrize("name", [name for name in run_folder.WRITTEN if name != "config.yaml"])
def test_a_folder_that_holds_anything_of_a_name_that_we_write_is_refused(name: str, here: Path) -> None:
    """A user's own pipeline/ was deleted, and a report.html overwritten."""
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("other files are no hindrance")
    claim = run_folder.reserve("mine", "x")
    assert claim.folder == Path("mine") and claim.made == []
    claim.release(started=False)
    (here / "mine" / name).mkdir() if "." not in name else (here / "mine" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"mine already holds {name}, which a run would overwrite: choose another --run_dir"):
        run_folder.reserve("mine", "x")
    assert {p.name for p in (here / "mine").iterdir()} == {"notes.txt", name}


def test_a_folder_with_a_run_and_a_file_are_refused(here: Path) -> None:
    (here / "r" / "checkpoints").mkdir(parents=True)
    (here / "r" / "config.yaml").touch()
    with pytest.raises(ValueError, match="r already holds a run: choose another --run_dir, or go on with it by --ckpt_path last"):
        run_folder.reserve("r", "x")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        run_folder.reserve(__file__, "x")


def test_a_run_begins_anew_where_one_has_left_no_checkpoint(here: Path) -> None:
    """That which runs and its results leave behind is never begun over."""
    Path("r/checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv", "checkpoints/.updates=4.ckpt.99999999.ddil-part"):
        Path("r", name).touch()
    for refused in ("r/pipeline", "r/checkpoints/updates=4.ckpt", "r/checkpoints/mine.ckpt"):
        Path(refused).touch()
        with pytest.raises(ValueError, match="r already holds a run"):
            run_folder.reserve("r", "x", anew=True)
        Path(refused).unlink()
    claim = run_folder.reserve("r", "x", anew=True)
    assert sorted(p.name for p in Path("r").iterdir()) == [".lock", "checkpoints", "config.yaml", "metrics.csv"]
    assert list(Path("r/checkpoints").iterdir()) == []
    claim.release(started=False)
    (here / "killed" / "tensorboard").mkdir(parents=True)  # before config.yaml was there
    run_folder.reserve("killed", "x", anew=True).release(started=False)
    (here / "mine" / "samples").mkdir(parents=True)  # somebody's own
    with pytest.raises(ValueError, match="mine already holds samples, which a run would overwrite"):
        run_folder.reserve("mine", "x", anew=True)


def test_a_run_that_never_started_takes_back_empty_folders_only(here: Path) -> None:
    Path("old").mkdir()
    run_folder.reserve("old/a/b", "x").release(started=False)
    assert not (here / "old" / "a").exists() and (here / "old").is_dir()
    claim = run_folder.reserve("old/a/b", "x")
    (claim.folder.parent / "other.txt").touch()
    claim.release(started=False)
    assert not claim.folder.exists() and (here / "old" / "a" / "other.txt").exists()
    run_folder.reserve("old/c", "x").release(started=True)
    assert list((here / "old" / "c").iterdir()) == []


TAKES = {"reserve": lambda: run_folder.reserve("r", "x"), "take_up": lambda: run_folder.take_up(Path("r"))}
ELSEWHERE = """
import os, sys
from pathlib import Path
from ddil_lightning.runs import folder

folder.PATIENCE = 0.3
claim = folder.reserve("r", "x") if sys.argv[1] == "reserve" else folder.take_up(Path("r"))
os._exit(0)  # without a release
"""


def elsewhere(take: str) -> str:
    """What another interpreter says that takes the folder r in the same way, "" where it may."""
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, take], capture_output=True, text=True, timeout=60)
    assert done.returncode == (1 if done.stderr else 0)
    return done.stderr


@pytest.mark.parametrize("take", TAKES)
def test_a_folder_belongs_to_one_process(take: str, here: Path) -> None:
    """Also before config.yaml is there, also for two that go on with the same run; a process that is gone holds nothing."""
    (here / "r").mkdir()
    claim = TAKES[take]()
    for other in TAKES:
        assert elsewhere(other).endswith("\nValueError: another process is writing to the run folder r: wait for its end\n")
    claim.release(started=True)
    assert elsewhere(take) == ""
    TAKES[take]().release(started=True)
    assert [p.name for p in (here / "r").iterdir()] == []


def test_a_run_that_goes_on_sweeps_and_replaces_only_what_a_run_wrote(here: Path) -> None:
    (here / "r" / "checkpoints").mkdir(parents=True)
    (here / "r" / "pipeline").mkdir()
    for name in (
        f"checkpoints/.updates=4.ckpt.{GONE}.ddil-part",
        f".pipeline.{GONE}.ddil-part",
        f"stages/.01-8-steps.{GONE}.old.ddil-part",
    ):
        (here / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "r" / name).mkdir() if "pipeline" in name else (here / "r" / name).touch()
    (here / "r" / ".mine.ddil-part").touch()  # no name of ours
    with pytest.raises(ValueError, match=r"r/pipeline was not written by a run, and would be replaced at its end: move it away"):
        run_folder.take_up(Path("r"))
    (here / "r" / "pipeline" / "ddil.json").write_text('{"method": "LCM", "student_updates": 4}')
    run_folder.take_up(Path("r")).release(started=True)
    assert {str(p.relative_to(here / "r")) for p in (here / "r").rglob("*") if not p.is_dir()} == {".mine.ddil-part", "pipeline/ddil.json"}


def test_results_are_complete_by_their_clock(here: Path) -> None:
    for written in (None, "", "[1]", '{"student_updates": 2}', '{"student_updates": 4, "failed": {"test": "x"}}'):
        if written is not None:
            (here / "summary.json").write_text(written)
        assert not run_folder.is_complete(here, 4)
    (here / "summary.json").write_text('{"student_updates": 4}')
    (here / "pipeline").mkdir()
    (here / "pipeline" / "ddil.json").write_text('{"student_updates": 2}')
    assert not run_folder.is_complete(here, 4)  # the pipeline of update 2: the run was killed before the new one was there
    (here / "pipeline" / "ddil.json").write_text('{"student_updates": 4}')
    assert run_folder.is_complete(here, 4) and not run_folder.is_complete(here, 6)


def test_latest_is_a_relative_link_to_the_newest(here: Path) -> None:
    for name in ("runs/c/1", "elsewhere/2"):
        Path(name).mkdir(parents=True)
        run_folder.point_latest(Path(name), "c")
        assert Path("runs/c/latest").resolve() == here / name
    assert not Path("runs/c/latest").readlink().is_absolute()
    assert [p.name for p in sorted(Path("runs/c").iterdir())] == ["1", "latest"]
    Path("runs/d/latest").mkdir(parents=True)
    with pytest.raises(ValueError, match="latest is a folder, not the link"):
        run_folder.check_latest("d")
    run_folder.check_latest("c"), run_folder.check_latest("new")


def test_a_link_that_cannot_be_set_is_said_and_no_more(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The run itself is elsewhere: a read-only working directory does not stop it."""

    def refuse(self: Path, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    run_folder.point_latest(here / "elsewhere", "c")
    assert capsys.readouterr().out == "runs/c/latest could not be set (Read-only file system): --ckpt_path last will not find this run\n"
