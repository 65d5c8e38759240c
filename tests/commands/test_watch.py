"""Several processes end together, in a line, whoever dies and whenever; and a signal is heard by one that waits in native code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddil_lightning.commands import watch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a second process")
SAYS = "the last good checkpoint is x"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LOOK": 0.05, "PATIENCE": 0.3, "GRACE": 0.5}.items():
        monkeypatch.setattr(watch, name, seconds)


def ends(body: Callable[[], Any], err: Path, disturb: Callable[[int], None] = lambda pid: None) -> tuple[int, str, float]:
    """Exit code and stderr of a process that runs `body`, and the seconds from `disturb` on."""
    pid = os.fork()
    if not pid:
        code = 7
        try:
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = os.fdopen(2, "w")
            body()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    begun = time.monotonic()
    disturb(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, err.read_text(), time.monotonic() - begun


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


def blocked() -> None:
    """As in a collective call: native code that hears neither signals nor exceptions, and that a child's end does not wake."""
    import ctypes

    left = 30
    while left:
        left = ctypes.CDLL(None).sleep(left)


def watching(launcher: Any = None, parent: int | None = None, alive: Any = (0.0, 0.0), left: list[int] | None = None) -> watch.Watch:
    return watch.Watch(launcher, parent, lambda: SAYS, lambda: alive, lambda: left.append(1) if left is not None else None)


def test_a_process_that_was_started_and_dies_ends_this_one(tmp_path: Path) -> None:
    """Lightning's own observer would kill it without a word."""

    def body() -> None:
        others = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
        launcher = SimpleNamespace(procs=list(others))
        (tmp_path / "second").write_text(str(others[1].pid))
        with watching(launcher):
            others[0].kill()
            blocked()

    code, err, seconds = ends(body, tmp_path / "err")
    assert (code, err) == (2, f"ddil-fit: process 1 of the run has ended with code -9; {SAYS}\n") and seconds < 5
    until(lambda: gone(int((tmp_path / "second").read_text())), 5)  # the others end with it


def test_a_process_that_hears_of_it_itself_has_the_word(tmp_path: Path) -> None:
    def body() -> None:
        other = subprocess.Popen(["sleep", "60"])
        with watching(SimpleNamespace(procs=[other])):
            other.kill()
            time.sleep(0.2)
            print("ddil-fit: lost", file=sys.stderr, flush=True)
            raise SystemExit(3)

    assert ends(body, tmp_path / "err")[:2] == (3, "ddil-fit: lost\n")


def test_processes_that_end_well_end_nothing(tmp_path: Path) -> None:
    def body() -> None:
        other = subprocess.Popen(["true"])
        with watching(SimpleNamespace(procs=[other])):
            time.sleep(0.8)

    assert ends(body, tmp_path / "err")[:2] == (0, "")


def test_the_death_of_the_process_that_started_this_one_ends_it(tmp_path: Path) -> None:
    def body() -> None:
        with watching(parent=os.getppid() + 1):  # as it is once the parent is gone
            blocked()

    code, err, seconds = ends(body, tmp_path / "err")
    assert (code, err) == (2, f"ddil-fit: the process that started this one has ended; {SAYS}\n") and seconds < 5


@pytest.mark.parametrize(("saving", "code"), [(False, 2), (True, 9)])
def test_a_signal_is_heard_in_native_code_but_a_checkpoint_is_not_cut_off(saving: bool, code: int, tmp_path: Path) -> None:
    def body() -> None:
        signal.signal(signal.SIGTERM, lambda *args: None)
        with watching(alive=None if saving else (time.monotonic(), 0.0)):
            (tmp_path / "ready").touch()
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                blocked() if not saving else time.sleep(0.1)
            raise SystemExit(9)

    def term(pid: int) -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(pid, signal.SIGTERM)

    found, err, seconds = ends(body, tmp_path / "err", term)
    if saving:
        assert (found, err) == (9, "")
    else:
        assert found == 2 and "asked to end, but another process does not answer" in err and seconds < 6


def test_what_the_process_held_is_given_up(tmp_path: Path) -> None:
    def body() -> None:
        other = subprocess.Popen(["sleep", "60"])
        held = tmp_path / "held"
        held.touch()
        with watch.Watch(SimpleNamespace(procs=[other]), None, lambda: SAYS, lambda: (0.0, 0.0), held.unlink):
            other.kill()
            blocked()

    assert ends(body, tmp_path / "err")[0] == 2 and not (tmp_path / "held").exists()


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
