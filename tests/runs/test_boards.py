"""W&B and TensorBoard, read back from what they have written without a network."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddil_lightning.runs import boards
from ddil_lightning.runs.workspace import CURVES, spec, workspace
from offline import read_back

ROWS = [
    {"name": "teacher@32", "steps": 32, "metrics": {"frechet": 0.5, "intervals": {"frechet": [0.4, 0.6]}}, "protocol": {"n": 16}},
    {"name": "student@4 dpm++", "steps": 4, "metrics": {"frechet": 0.75, "coverage": 0.9}},
]
PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def test_a_name_without_a_group_is_in_train() -> None:
    assert boards.grouped({"student_updates": 3, "loss": 1.0, "loss/student": 2.0}) == {"train/loss": 1.0, "loss/student": 2.0}


@pytest.mark.slow
def test_wandb_has_everything_over_student_updates_and_goes_on(tmp_path: Path, silent: None) -> None:
    """A run to update 20, of which its last checkpoint is at 10, and the one that goes on from there under the same id."""
    folder, now = tmp_path / "my run", 0
    config = {"wandb": "offline", "tensorboard": False, "model": {"lr": 0.5}}
    made = boards.boards(folder, "lcm", lambda: now, config)
    (board,) = made
    assert not (folder / "wandb" / "latest-run").exists()  # it begins when it is first asked for
    now = 1
    boards.show(made, "previews/sheet", [PICTURE], ["rows <b>"], 0)  # of an update that is past, as the first sheet is
    board.log_metrics({"student_updates": 10, "loss": 0.5, "shift/teacher@749": 0.25}, step=10)
    now = 15
    board.log_metrics({"lr-AdamW": 0.125}, step=70)  # of a callback of Lightning's, which counts batches
    board.log_metrics({"student_updates": 20, "loss": 0.25}, step=20)
    board.close()
    (first,) = (folder / "wandb").glob("offline-run-*")
    (again,) = boards.boards(folder, "lcm", lambda: now, config, resumed=10)
    again.log_metrics({"student_updates": 15, "loss": 0.25, "prior/student": 0.5}, step=15)
    boards.alert([again, object()], "coverage falls", "to 0", 15)
    boards.conclude([again, object()], ROWS, 20)
    (second,) = set((folder / "wandb").glob("offline-run-*")) - {first}
    written = [read_back(next(path.glob("*.wandb"))) for path in (first, second)]
    assert written[0].run.run_id == written[1].run.run_id and written[0].run.display_name == "lcm/my run"
    assert all(w.axes == [("student_updates", ""), ("*", "student_updates")] for w in written)
    rows = [{key: row[key] for key in sorted(row) if key[0] != "_" and "previews" not in key} for row in written[0].history]
    assert rows == [
        {"student_updates": 0},
        {"shift/teacher@749": 0.25, "student_updates": 10, "train/loss": 0.5},
        {"student_updates": 15, "train/lr-AdamW": 0.125},
        {"student_updates": 20, "train/loss": 0.25},
    ]
    assert written[0].history[0]["previews/sheet/captions"] == ["rows <b>"] and written[1].alerts == [("coverage falls", "to 0")]
    assert all(row["_step"] == row["student_updates"] for w in written for row in w.history)
    last = written[1].history[-1]
    assert (last["eval/frechet_teacher_32"], last["eval/frechet_student_4_dpm"], last["student_updates"]) == (0.5, 0.75, 20)
    table = json.loads(next(second.rglob("*.table.json")).read_text())
    assert table["columns"] == ["name", "steps", "frechet", "coverage"]
    assert table["data"] == [["teacher@32", 32, 0.5, None], ["student@4 dpm++", 4, 0.75, 0.9]]
    assert boards.sync_line(folder) == f"wandb sync '{first}' '{second}'" or boards.sync_line(folder) == f"wandb sync '{second}' '{first}'"
    assert boards.sync_line(tmp_path) == ""


def test_the_id_that_is_kept_is_the_one_that_an_agent_of_a_sweep_gave(
    tmp_path: Path, silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B then ignores ours, and a run that goes on outside of the sweep goes on under the agent's."""
    config = {"wandb": "offline", "tensorboard": False}
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "xyz123")
    ids = []
    for _ in range(2):
        (board,) = boards.boards(tmp_path, "lcm", lambda: 0, config)
        ids.append(board.experiment.id)
        board.close()
        monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    assert ids == ["xyz123"] * 2 and (tmp_path / "wandb" / "id").read_text() == "xyz123"


class Steps:
    """A W&B run as its service keeps it: rows by their steps, of which a lesser one than its own is dropped. `fault`: what it raises."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.step, self.fault = 0, False

    def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
        if self.fault:
            raise RuntimeError("the mailbox is closed")
        if step >= self.step:
            self.rows.setdefault(step, {}).update(values)
            self.step = step + commit

    def finish(self) -> None:
        self.log({}, 0, True)


@pytest.fixture
def online() -> tuple[boards.Wandb, Steps]:
    board, run = boards.Wandb(lambda: 0), Steps()
    board._experiment = run
    return board, run


def test_updates_that_are_made_again_are_rows_of_their_own(online: tuple[boards.Wandb, Steps]) -> None:
    """A run that broke off at 390 goes on from its checkpoint of 200: W&B's own step is at 390 by then."""
    board, run = online
    clocks = [*range(10, 391, 10), *range(210, 601, 10)]
    for clock in clocks:
        board.log_metrics({"student_updates": clock, "loss": 0.5})
        board.log_metrics({"student_updates": clock, "shift/teacher@749": 0.25})
    assert sorted({row["student_updates"] for row in run.rows.values()}) == sorted(set(clocks))
    again = [row["student_updates"] for step, row in run.rows.items() if step > 390]
    assert list(dict.fromkeys(again)) == [*range(210, 601, 10)]
    assert run.rows[600] == {"student_updates": 600, "train/loss": 0.5, "shift/teacher@749": 0.25}  # on the axis again


def test_a_service_that_is_dead_ends_no_run(online: tuple[boards.Wandb, Steps], caplog: pytest.LogCaptureFixture) -> None:
    board, run = online
    run.fault = True
    board.log_metrics({"student_updates": 10, "loss": 0.5})
    boards.show([board], "previews/sheet", [PICTURE], ["rows"], 10)
    boards.conclude([board], ROWS, 20)
    assert [record.message for record in caplog.records if "the run goes on" in record.message] == [
        "W&B could not be told, and may lack what comes from here on; the run goes on: the mailbox is closed"
    ]
    assert board._experiment is None


@pytest.mark.slow
def test_the_service_of_wandb_may_be_killed(tmp_path: Path, silent: None, caplog: pytest.LogCaptureFixture) -> None:
    """By the SIGTERM that schedulers send to every process of a job."""
    import wandb

    (board,) = boards.boards(tmp_path, "lcm", lambda: 0, {"wandb": "offline", "tensorboard": False})
    board.log_metrics({"student_updates": 10, "loss": 0.5})
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, check=True).stdout
    os.kill(int(found), signal.SIGTERM)
    time.sleep(2)
    boards.show([board], "previews/sheet", [PICTURE], ["rows"], 20)
    board.log_metrics({"student_updates": 20, "loss": 0.5})
    board.close()
    with suppress(Exception):  # the next run of W&B in this process has a service of its own
        wandb.teardown()
    assert "the run goes on" in caplog.text


def test_tensorboard_has_the_same_names_and_captions(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard: pip install it")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)

    def read() -> Any:
        found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
        return found.Reload()

    config = {"wandb": "off", "tensorboard": True}
    made = boards.boards(tmp_path, "lcm", lambda: 7, config)
    (board,) = made
    for clock in (10, 20, 30):
        board.log_metrics({"student_updates": clock, "loss": 1 / clock, "shift/teacher@749": 0.5}, step=3)
    board.log_metrics({"lr-AdamW": 0.5}, step=70)
    boards.show(made, "previews/student_4", [PICTURE, PICTURE], ["a <b>", "a *red* one"], 10)
    board.finalize("success")
    again = boards.boards(tmp_path, "lcm", lambda: 20, config, resumed=20)
    again[0].log_metrics({"student_updates": 30, "loss": 5.0}, step=1)
    boards.alert(again, "loss gap", "9 times", 30)
    boards.conclude(again, ROWS, 30)
    found = read()
    assert [(e.step, round(e.value, 3)) for e in found.Scalars("train/loss")] == [(10, 0.1), (20, 0.05), (30, 5.0)]
    assert [e.step for e in found.Scalars("train/lr-AdamW")] == [7] and [e.step for e in found.Scalars("shift/teacher@749")] == [10, 20]
    assert [e.value for e in found.Scalars("eval/frechet_student_4_dpm")] == [0.75]
    said = {tag: found.SummaryMetadata(tag).summary_description for tag in ("previews/student_4/0", "previews/student_4/1")}
    assert list(said.values()) == ["a \\<b\\>", "a \\*red\\* one"]
    text = lambda tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode()  # noqa: E731
    assert text("alerts/text_summary") == "**loss gap**: 9 times" and "| teacher@32 |" in text("eval/rows/text_summary")


def test_tensorboard_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^trainer\.logger needs TensorBoard, which is not installed: pip install 'ddil-lightning\[tens"):
        boards.check_tensorboard("trainer.logger")


def test_the_workspace_has_what_runs_log_over_student_updates() -> None:
    pytest.importorskip("wandb_workspaces", reason="no wandb-workspaces: pip install it")
    made = spec(workspace("me", "mine", "all of it"))
    section = made["spec"]["section"]
    assert (made["entity"], made["project"], made["displayName"]) == ("me", "mine", "all of it")
    assert section["settings"]["xAxis"] == "student_updates"
    panels = {s["name"]: [p["config"] for p in s["panels"]] for s in section["panelBankConfig"]["sections"]}
    assert list(panels) == ["Previews", *CURVES, "Validation", "Results"] and panels["Previews"][0]["mediaKeys"] == ["previews/sheet"]
    curves = [config for name in CURVES for config in panels[name]]
    assert {config["xAxis"] for config in curves} == {"student_updates"}
    assert {"train/loss", "prior/student", "buffer/size", "shift/teacher"} <= {m for config in curves for m in config["metrics"]}
    (measured,) = [config for config in panels["Validation"] if "frechet_" in json.dumps(config)]
    assert measured["xAxis"] == "student_updates" and measured["metricRegex"] == r"^validation/frechet_\d+$"
    assert "eval/frechet_student_4" in json.dumps(panels["Results"]) and "eval/rows" in json.dumps(panels["Results"])
