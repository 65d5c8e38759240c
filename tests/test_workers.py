"""The processes that run functions of tests (support/workers.py): no task passes that did not run, and none leaves a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workers import WorkerError, Workers


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    made = Workers(tmp_path_factory.mktemp("workers"))
    yield made
    made.close()


def is_gone(pid: int) -> bool:
    """Whether a process is no more, or only waits to be collected."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return not state or state.startswith("Z")


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def about(rank: int, *given: Any) -> dict[str, Any]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MINE")
    return {"rank": rank, "pid": os.getpid(), "given": given, "cwd": os.getcwd(), "names": [os.environ.get(name) for name in names]}


def spoil(rank: int) -> None:
    os.chdir("/")
    os.environ["MINE"] = "spoilt"
    sys.path.clear()


def test_every_process_answers(workers: Workers) -> None:
    found = workers.run(about, "x", (1, 2))
    assert [x["rank"] for x in found] == [0, 1] and all(x["given"] == ("x", (1, 2)) for x in found)
    assert [x["names"] for x in found] == [["0", "0", "2", None], ["1", "1", "2", None]]
    assert len({os.getpid(), *(x["pid"] for x in found)}) == 3
    assert [x["pid"] for x in workers.run(about)] == [x["pid"] for x in found]  # one start serves many tasks


def test_a_task_starts_from_the_world_of_its_test(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers.run(spoil)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", "yes")
    assert all(x["cwd"] == str(tmp_path) and x["names"][3] == "yes" for x in workers.run(about))
    monkeypatch.undo()
    assert all(x["cwd"] == os.getcwd() and x["names"][3] is None for x in workers.run(about))


def failing(rank: int, how: str, folder: Path) -> Any:
    """The second process starts another and fails; the first waits for it for ever."""
    (folder / f"{rank}").write_text(str(os.getpid()))
    if rank == 0:
        time.sleep(600)
    until((folder / "0").exists)  # or it is ended before it has said who it is
    (folder / "2").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    print("the last words")
    if how == "raises":
        raise ValueError("no such thing")
    if how == "crashes":
        os.abort()
    if how == "leaves":
        os._exit(0)
    if how == "is late":
        time.sleep(600)
    return lambda: "what cannot be sent"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "process 1 failed: ValueError: no such thing"),
        ("crashes", "process 1 ended with code -6 and without an answer"),
        ("leaves", "process 1 ended with code 0 and without an answer"),
        ("says nothing", "process 1 ended with code 1 and without an answer"),
        pytest.param("is late", r"no answer within 2 s from process \[0, 1\]", marks=pytest.mark.slow),
    ],
)
def test_one_that_fails_fails_its_test_alone(how: str, words: str, workers: Workers, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(WorkerError, match=words):
        workers.run(failing, how, tmp_path, timeout=2 if how == "is late" else 60)
    said = capsys.readouterr().out
    assert "--- process 1\nthe last words\n" in said and ("Fatal Python error: Aborted" in said) == (how == "crashes")
    pids = [int((tmp_path / name).read_text()) for name in "012"]
    until(lambda: all(map(is_gone, pids)))
    assert {x["pid"] for x in workers.run(about)}.isdisjoint(pids)
    assert capsys.readouterr().out == ""  # what the others said is theirs


@pytest.mark.parametrize("python", ["false", "true"])
def test_one_that_never_starts_is_no_success(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(WorkerError, match=r"process \d ended with code [01] and without an answer"):
        Workers(tmp_path).run(about)


def test_none_outlives_who_started_it(tmp_path: Path) -> None:
    code = "import os, sys; sys.path[:] = eval(sys.argv[2]); from pathlib import Path; from test_workers import about; from workers import "
    code += "Workers; print(*(x['pid'] for x in Workers(Path(sys.argv[1])).run(about)), flush=True); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), repr(sys.path)], capture_output=True, text=True, check=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    until(lambda: all(map(is_gone, pids)))
