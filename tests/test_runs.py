"""Run folders: names, the newest, what to resume, and a metrics.csv that survives."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning import runs


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoints(folder: Path, *clocks: int) -> list[Path]:
    (folder / "checkpoints").mkdir(parents=True)
    made = [folder / "checkpoints" / f"updates={clock}.ckpt" for clock in clocks]
    for path in made:
        torch.save({"ddil": {"student_updates": runs.clock_of(path)}, "state_dict": {}}, path)
    return made


def test_two_runs_of_one_second_get_two_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "2026-01-02_03-04-05")
    (first, made), (second, _) = runs.reserve(None, "toy/pd"), runs.reserve(None, "toy/pd")
    assert first == Path("runs/toy/pd/2026-01-02_03-04-05") and second == Path("runs/toy/pd/2026-01-02_03-04-05-2")
    assert first.is_dir() and second.is_dir() and made[-1] == Path("runs")


def test_a_folder_with_a_run_is_refused_and_any_other_taken(here: Path) -> None:
    Path("empty").mkdir()
    assert runs.reserve("empty", "x") == (Path("empty"), [])
    for name in ("config.yaml", "metrics.csv", "summary.json"):
        Path("empty", name).touch()
        with pytest.raises(ValueError, match="empty already holds a run: choose another --run_dir, or go on with it by --ckpt_path last"):
            runs.reserve("empty", "x")
        Path("empty", name).unlink()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        runs.reserve(__file__, "x")


def test_discard_takes_back_empty_folders_only(here: Path) -> None:
    Path("old").mkdir()
    folder, made = runs.reserve("old/a/b", "x")
    runs.discard(made)
    assert not (here / "old" / "a").exists() and (here / "old").is_dir()
    folder, made = runs.reserve("old/a/b", "x")
    (folder.parent / "other.txt").touch()
    runs.discard(made)
    assert not folder.exists() and (here / "old" / "a" / "other.txt").exists()


def test_latest_is_a_relative_link_to_the_newest(here: Path) -> None:
    for name in ("runs/c/1", "elsewhere/2"):
        Path(name).mkdir(parents=True)
        runs.point_latest(Path(name), "c")
        assert Path("runs/c/latest").resolve() == here / name
    assert not Path("runs/c/latest").readlink().is_absolute()
    assert [p.name for p in sorted(Path("runs/c").iterdir())] == ["1", "latest"]
    Path("runs/d/latest").mkdir(parents=True)
    with pytest.raises(ValueError, match="latest is a folder, not the link"):
        runs.point_latest(Path("runs/c/1"), "d")


def test_latest_without_links(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    checkpoints(here / "somewhere", 4)
    runs.point_latest(Path("somewhere"), "c")
    assert runs.checkpoint("last", None, "c") == here / "somewhere" / "checkpoints" / "updates=4.ckpt"


def test_which_checkpoint(here: Path) -> None:
    made = checkpoints(here / "r", 4, 20, 8)
    for ckpt_path, run_dir in (("last", "r"), ("r", None), ("r/checkpoints", None)):
        assert runs.checkpoint(ckpt_path, run_dir, "c") == made[1]
    assert runs.checkpoint("r/checkpoints/updates=8.ckpt", None, "c") == Path("r/checkpoints/updates=8.ckpt")
    for ckpt_path, run_dir, said in (
        ("last", None, "runs/c/latest does not exist"),
        ("nowhere.ckpt", None, "nowhere.ckpt does not exist"),
        (".", None, "holds no checkpoint"),
    ):
        with pytest.raises(ValueError, match=said):
            runs.checkpoint(ckpt_path, run_dir, "c")


def test_half_a_checkpoint_is_named_and_so_are_the_others(here: Path) -> None:
    old, new = checkpoints(here / "r", 4, 8)
    new.write_bytes(new.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"updates=8.ckpt cannot be read .* half written .*; take another: updates=4.ckpt"):
        runs.load_checkpoint(new)
    assert runs.load_checkpoint(old)["ddil"] == {"student_updates": 4}
    for alien in ({"weights": 1}, [1, 2]):
        torch.save(alien, "alien.ckpt")
        with pytest.raises(ValueError, match=r"alien.ckpt is no checkpoint of this library"):
            runs.load_checkpoint(Path("alien.ckpt"))


def test_weights_that_do_not_fit_are_named(here: Path) -> None:
    method = torch.nn.Linear(2, 3)
    good = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    runs.check_fits(here, {"state_dict": good}, method)
    for state, said in (
        ({"weight": good["weight"]}, "it lacks bias"),
        ({**good, "more": good["bias"]}, "it has more as well"),
        ({**good, "bias": torch.zeros(4)}, "the shape of bias differs"),
    ):
        with pytest.raises(ValueError, match=f"does not fit this config: {said}"):
            runs.check_fits(here, {"state_dict": state}, method)


def test_only_the_newest_checkpoint_is_gone_on_from(here: Path) -> None:
    old, new = checkpoints(here / "r", 4, 8)
    runs.check_newest(new)
    with pytest.raises(ValueError, match=r"updates=4.ckpt is not the newest .* updates=8.ckpt: .*--run_dir"):
        runs.check_newest(old)
    assert runs.folder_of(new) is None
    (here / "r" / "config.yaml").touch()
    assert runs.folder_of(new) == here / "r"


def test_text_is_written_whole_or_not_at_all(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = here / "config.yaml"
    runs.write_text(path, "old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        runs.write_text(path, "new")
    assert path.read_text() == "old" and list(here.iterdir()) == [path]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_file_takes_new_columns(here: Path) -> None:
    log = runs.MetricsFile(here / "r")
    assert not (here / "r").exists() and log.save_dir == str(here / "r")
    log.log_metrics({"student_updates": 1, "loss": torch.tensor(0.5)}, 1)
    log.log_metrics({"student_updates": 2, "loss": 0.25, "a/b": 3.0}, 2)
    log.log_metrics({"student_updates": 3, "loss": 0.125}, 3)
    rows = table(log.path)
    assert list(rows[0]) == ["student_updates", "step", "a/b", "loss"]
    assert [row["loss"] for row in rows] == ["0.5", "0.25", "0.125"] and [row["a/b"] for row in rows] == ["", "3.0", ""]
    assert [p.name for p in (here / "r").iterdir()] == ["metrics.csv"]


def test_metrics_file_goes_on_where_the_checkpoint_was(here: Path) -> None:
    first = runs.MetricsFile(here / "r")
    for clock in range(1, 7):
        first.log_metrics({"student_updates": clock, "loss": clock / 10}, clock)
    with first.path.open("a") as file:
        file.write("7,7,0.")  # the process died in the middle of a row
    for folder in (here / "branch", here / "r"):
        again = runs.MetricsFile(folder, here / "r", upto=4)
        again.log_metrics({"student_updates": 5, "loss": 9.0, "new": 1.0}, 5)
        again.log_metrics({"student_updates": 6, "loss": 9.0, "new": 2.0}, 6)
        assert [(int(row["student_updates"]), float(row["loss"]), row["new"]) for row in table(again.path)] == [
            (1, 0.1, ""), (2, 0.2, ""), (3, 0.3, ""), (4, 0.4, ""), (5, 9.0, "1.0"), (6, 9.0, "2.0"),
        ]  # fmt: skip


def test_metrics_survive_a_full_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = runs.MetricsFile(here)
    log.log_metrics({"student_updates": 1, "loss": 0.5}, 1)
    before = log.path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        log.log_metrics({"student_updates": 2, "other": 0.5}, 2)
    assert log.path.read_bytes() == before and list(here.iterdir()) == [log.path]


def test_wandb_online_needs_a_key_that_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(here / "netrc"))
    with pytest.raises(ValueError, match="--wandb online needs a key"):
        runs.check_wandb_key()
    (here / "netrc").write_text("machine example.org login a password b\n")
    with pytest.raises(ValueError, match="--wandb online needs a key"):
        runs.check_wandb_key()
    (here / "netrc").write_text("machine api.wandb.ai login user password b\n")
    (here / "netrc").chmod(0o600)
    runs.check_wandb_key()
    (here / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    runs.check_wandb_key()
