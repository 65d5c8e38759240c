"""Several processes end together, in a line, whoever dies and whenever; and a signal is heard by one that waits in native code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import watched
from ddil_lightning.commands import watch
from watched import SAYS


def ends(body: Callable[[Path], None], folder: Path, disturb: Callable[[int], None] = lambda pid: None) -> tuple[int, str, float]:
    """Exit code and stderr of an interpreter that runs `body`, and the seconds from its start on."""
    command = [sys.executable, watched.__file__, body.__name__, str(folder)]
    begun = time.monotonic()
    with (folder / "err").open("w+") as err, subprocess.Popen(command, stderr=err) as process:
        disturb(process.pid)
        code = process.wait(60)
        return code, (folder / "err").read_text(), time.monotonic() - begun


def until(true: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def gone(pid: int) -> bool:
    """Whether a process is no more, or only waits to be collected."""
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_process_that_was_started_and_dies_ends_this_one(tmp_path: Path) -> None:
    """Lightning's own observer would kill it without a word."""
    code, err, seconds = ends(watched.one_of_two_dies, tmp_path)
    assert (code, err) == (2, f"ddil-fit: process 1 of the run has ended with code -9; {SAYS}\n") and seconds < 5
    until(lambda: gone(int((tmp_path / "second").read_text())), 5)  # the others end with it


def test_a_process_beside_this_one_that_dies_ends_it(tmp_path: Path) -> None:
    """As under srun, whose step daemon starts both and outlives them."""
    code, err, seconds = ends(watched.one_beside_it_dies, tmp_path)
    assert (code, err) == (2, f"ddil-fit: another process of the run has ended; {SAYS}\n") and seconds < 5
    assert ends(watched.all_end_well_together, tmp_path)[:2] == (0, "")


def test_a_process_that_hears_of_it_itself_has_the_word(tmp_path: Path) -> None:
    assert ends(watched.hears_of_it_itself, tmp_path)[:2] == (3, "ddil-fit: lost\n")


def test_processes_that_end_well_end_nothing(tmp_path: Path) -> None:
    assert ends(watched.other_ends_well, tmp_path)[:2] == (0, "")


def test_the_death_of_the_process_that_started_this_one_ends_it(tmp_path: Path) -> None:
    code, err, seconds = ends(watched.has_lost_its_parent, tmp_path)
    assert (code, err) == (2, f"ddil-fit: the process that started this one has ended; {SAYS}\n") and seconds < 5


@pytest.mark.parametrize("saving", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_signal_is_heard_in_native_code_but_a_checkpoint_is_not_cut_off(saving: bool, tmp_path: Path) -> None:
    def term(pid: int) -> None:
        until((tmp_path / "ready").exists, 30)
        os.kill(pid, signal.SIGTERM)

    found, err, seconds = ends(watched.hears_a_signal_and_saves if saving else watched.hears_a_signal, tmp_path, term)
    if saving:
        assert (found, err) == (9, "")
    else:
        assert found == 2 and "asked to end, but another process does not answer" in err and seconds < 6


def test_what_the_process_held_is_given_up(tmp_path: Path) -> None:
    assert ends(watched.holds_something, tmp_path)[0] == 2 and not (tmp_path / "held").exists()


def test_what_a_collective_call_says_when_another_is_gone() -> None:
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:48327"
    assert watch.is_lost(RuntimeError(gloo)) and watch.is_lost(RuntimeError("NCCL error: remote process exited"))
    assert not watch.is_lost(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))


# Two processes of a real run ---------------------------------------------------------------------------------------------------------


def run(config: Path, place: Path) -> subprocess.Popen[str]:
    words = ["--config", str(config), "--run_dir", "r", "--updates", "100000", "previews.every=0"]
    words += ["trainer.devices=2", "trainer.accelerator=cpu"]
    command = [str(Path(sys.executable).with_name("ddil-fit")), *words]
    with (place / "err").open("w") as err:
        return subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=err, text=True)


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "ddil-fit"], capture_output=True, text=True)
    return [int(p) for p in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["child", "first", "child at the start", "first at the start", "signal"])
def test_two_processes_end_together(whom: str, tiny_config: Path, tmp_path: Path) -> None:
    process = run(tiny_config, tmp_path)
    (child,) = until(lambda: children(process.pid))
    if "start" not in whom:
        until(lambda: (tmp_path / "r" / "checkpoints" / "updates=8.ckpt").is_file())
    begun = time.monotonic()
    os.kill(child if "child" in whom else process.pid, signal.SIGTERM if whom == "signal" else signal.SIGKILL)
    code = process.wait(60)
    until(lambda: gone(child), 60)
    assert time.monotonic() - begun < 40 and code == {"child": 2, "signal": 143}.get(whom.split()[0], -9)
    said = [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("ddil-fit: ")]
    assert len(said) == 1, said
    if "start" in whom:
        assert "nothing was saved" in said[0]
    else:
        assert "go on with: ddil-fit --config " in said[0] and "/updates=" in said[0]
        assert Path(said[0].split("--ckpt_path ")[1].strip()).name.startswith("updates=")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "warned", "done"])
def test_two_tasks_of_srun_end_together(end: str, tiny_config: Path, tmp_path: Path) -> None:
    """Started as its step daemon does, which watches neither."""
    told = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told |= {"SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = ["--config", str(tiny_config), "--run_dir", "r", "--updates", "8" if end == "done" else "100000", "previews.every=0"]
    command = [str(Path(sys.executable).with_name("ddil-fit")), *words, "trainer.devices=2", "trainer.accelerator=cpu"]
    tasks = []
    for rank in ("0", "1"):
        with (tmp_path / f"err{rank}").open("w") as err:
            own = {**os.environ, **told, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            tasks.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=err, env=own))
    if end != "done":
        until(lambda: (tmp_path / "r" / "checkpoints" / "updates=8.ckpt").is_file())
        for task in tasks[: 1 if end == "killed" else 2]:
            task.send_signal(signal.SIGKILL if end == "killed" else signal.SIGUSR1)
        tasks[0].wait(60)
    codes = [task.wait(120) for task in tasks]
    said = [line for line in (tmp_path / "err1").read_text().splitlines() if line.startswith("ddil-fit: ")]
    assert codes == {"killed": [-9, 2], "warned": [138, 138], "done": [0, 0]}[end] and len(said) == (end == "killed"), (codes, said)
