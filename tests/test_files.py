"""Writing: whole or not at all, beside the destination, and never in the place of a device, a link or a mount."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ddil_lightning import files


def write(path: Path, text: str = "new") -> None:
    with files.replacing(path) as temporary:
        temporary.write_text(text)


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        assert temporary.parent == path.parent  # the same file system: the last step is a rename
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == {"deep", "deep/x.json"}
    write(path)
    assert path.read_text() == "new" and names(tmp_path) == {"deep", "deep/x.json"}


FULL = [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_an_os_error_that_names_the_file(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(OSError) as raised, files.replacing(path):
        raise error
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path) and names(tmp_path) == set()


@pytest.mark.skipif(os.name == "nt", reason="rights of Unix")
def test_who_shares_a_folder_can_read_what_is_written(tmp_path: Path) -> None:
    """safetensors makes files for their owner alone."""
    with files.replacing(tmp_path / "file") as part:
        save_file({"x": torch.zeros(1)}, part)
    with files.replacing_folder(tmp_path / "folder") as work:
        (work / "unet").mkdir()
        save_file({"x": torch.zeros(1)}, work / "unet" / "x.safetensors")
        (work / "run").touch(0o755)
    (tmp_path / "plain").touch()
    rights = [(tmp_path / name).stat().st_mode for name in ("plain", "file", "folder/unet/x.safetensors")]
    assert len(set(rights)) == 1 and (tmp_path / "folder" / "run").stat().st_mode & 0o100


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/target.txt")
    for text in ("first", "second"):  # a link to nothing yet, and to a file
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "target.txt").read_text() == text
    assert names(tmp_path) == {"real", "real/target.txt", "link"}


def test_a_pipe_and_a_device_are_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write(tmp_path / "pipe", "through")
    reader.join(10)
    assert got == ["through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and names(tmp_path) == {"pipe"}
    write(Path(os.devnull))
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left") as raised:
            write(Path("/dev/full"), "x" * 100_000)
        assert raised.value.filename == "/dev/full" and stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as raised:
        write(tmp_path)
    assert raised.value.filename == str(tmp_path)


def mounted(monkeypatch: pytest.MonkeyPatch, point: Path) -> None:
    """`point` is a mount point: the system renames neither it nor onto it."""
    real = os.replace

    def replace(a: Any, b: Any) -> None:
        if point in (Path(a), Path(b)):
            raise OSError(errno.EBUSY, "Device or resource busy", str(a), None, str(b))
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)


def test_a_mounted_file_takes_the_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("a much longer old text")
    inode = path.stat().st_ino
    mounted(monkeypatch, path)
    write(path)
    assert path.read_text() == "new" and path.stat().st_ino == inode and names(tmp_path) == {"x.json"}


def fill(path: Path, *contents: str, fail: bool = False) -> None:
    with files.replacing_folder(path) as temporary:
        for name in contents:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(name)
        if fail:
            raise RuntimeError


def test_a_folder_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    fill(path, "a", "b/c")
    with pytest.raises(RuntimeError):
        fill(path, "half", fail=True)
    assert names(tmp_path) == {"out", "out/a", "out/b", "out/b/c"}
    fill(path, "d")
    assert names(tmp_path) == {"out", "out/d"}


@pytest.mark.parametrize("kind", ["link", "mount"])
def test_a_linked_or_mounted_folder_keeps_its_place(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "old").write_text("old")
    path = real
    if kind == "link":
        (tmp_path / "out").symlink_to("real")
        path = tmp_path / "out"
    else:
        mounted(monkeypatch, real)
        inode = real.stat().st_ino
    fill(path, "a", "b/c")
    assert names(real) == {"a", "b", "b/c"} and {p.name for p in tmp_path.iterdir()} <= {"real", "out"}
    assert (tmp_path / "out").is_symlink() if kind == "link" else real.stat().st_ino == inode


def test_a_folder_for_the_moment_is_gone_afterwards(tmp_path: Path) -> None:
    with files.replacing_folder(tmp_path / "x", keep=False) as place:
        (place / "a").touch()
    assert names(tmp_path) == set()


DIES = """
import os, sys
from pathlib import Path
from ddil_lightning import files

place = Path(sys.argv[1])
with files.replacing(place / "x.json") as temporary, files.replacing_folder(place / "out") as folder:
    temporary.write_text("half")
    (folder / "half").write_text("half")
    os._exit(9)
"""


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", DIES, str(tmp_path)]) as process:
        assert process.wait(60) == 9
    pid = process.pid
    assert len(names(tmp_path)) == 3
    deep = tmp_path / "runs" / "other" / "checkpoints"  # of a run that may be alive elsewhere
    deep.mkdir(parents=True)
    kept = {".mine.ddil-part", f".x.{os.getppid()}.ddil-part", "runs"}  # the second is of a process that lives
    for path in (*(tmp_path / name for name in kept - {"runs"}), deep / f".x.{pid}.ddil-part", tmp_path / "runs" / f".x.{pid}.ddil-part"):
        path.touch()
    files.sweep(tmp_path, inside=False)
    assert {p.name for p in tmp_path.iterdir()} == kept and len(names(tmp_path)) == 7
    files.sweep(tmp_path)
    assert not (tmp_path / "runs" / f".x.{pid}.ddil-part").exists() and (deep / f".x.{pid}.ddil-part").exists()


def test_what_another_machine_writes_is_left_alone(tmp_path: Path) -> None:
    """It may live, whatever lives here by its number; a week later it does not, nor in a folder that is held by this process."""
    theirs, old = tmp_path / ".x.999999999-elsewhere-0a.ddil-part", tmp_path / ".y.999999999-elsewhere-0a.old.ddil-part"
    mine = tmp_path / f".z.999999999-{files.HOST}-0a.ddil-part"
    for path in (theirs, old, mine):
        path.touch()
    os.utime(old, (0, 0))
    files.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [theirs]
    files.sweep(tmp_path, alone=True)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_of_one_number_do_not_write_into_each_other(tmp_path: Path) -> None:
    """As two containers on two machines may be; each has names of its own."""
    told = "import os; os.getpid = lambda: 7; from pathlib import Path; from ddil_lightning import files; print(files._beside(Path('x')))"
    names = {subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(names) == 2 and all(name.startswith(".x.7-") for name in names)


def test_an_empty_folder_stays_the_folder_that_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may stand in it, as in `--out .`, and has given it its rights."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o2770)
    before = tmp_path.stat()
    with files.replacing_folder(Path()) as folder:
        (folder / "a").touch()
    assert names(tmp_path) == {"a"} and (tmp_path.stat().st_ino, tmp_path.stat().st_mode) == (before.st_ino, before.st_mode)


def test_a_link_is_switched_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        files.switch(tmp_path / "latest", name)
        assert os.readlink(tmp_path / "latest") == name and names(tmp_path) == {"latest"}


def test_what_could_not_be_written_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files.check_writable(tmp_path / "new" / "deep" / "x.json")
    files.check_writable(tmp_path / "file")
    with pytest.raises(IsADirectoryError):
        files.check_writable(tmp_path)
    with pytest.raises(NotADirectoryError) as raised:
        files.check_writable(tmp_path / "file" / "x.json")
    assert raised.value.filename == str(tmp_path / "file" / "x.json")


def test_what_is_kept_for_good_gets_a_name_of_its_own(tmp_path: Path) -> None:
    """The settings before update 4 were lost when a run went on from there twice."""
    for k in range(3):
        path = files.unused(tmp_path / "config.before-4.yaml")
        path.write_text(str(k))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "config.before-4.yaml": "0", "config.before-4-2.yaml": "1", "config.before-4-3.yaml": "2",
    }  # fmt: skip
