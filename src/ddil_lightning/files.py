"""Writing files and folders: whole or not at all, beside their destination, and never in the place of a device, a link or a mount.

Every writer of the library goes through here. What a killed process leaves behind is named `.NAME.PID-HOST-TOKEN.ddil-part`, for `sweep` to
find.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ddil_lightning.signals import lives
from ddil_lightning.texts import from_json

PART = "ddil-part"
UNUSED = 8 * 7 * 24 * 3600
"""Seconds after which what is kept and not used goes."""
HOST = re.sub(r"\W", "_", socket.gethostname())[:24]
_TOKEN = secrets.token_hex(4)
_MASK = os.umask(0)
os.umask(_MASK)
READERS = 0o666 & ~_MASK
"""The rights of a new file, as this process was started; safetensors' are its owner's alone, whoever shares the folder."""


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary name beside the file `path` and, when the body has written it, gives it that name.

    If the body raises, nothing is left and an older file stays. A link's target is replaced, not the link. A device, a pipe or a file that
    is mounted is written to. `durable`: on the disk before the name, for what must survive a loss of power.
    Raises OSError that names `path` whenever the system refuses, also through safetensors, and for a folder.
    """
    target = path.resolve() if path.is_symlink() else path.absolute()
    special = target.exists() and not stat.S_ISREG(target.stat().st_mode)
    temporary = _beside(target)
    with _naming(path, temporary):
        if target.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if special:
            # Not beside it: nothing else belongs into /dev.
            temporary = Path(f"{_scratch()}/{temporary.name}")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _readable(temporary)
            if durable:
                _sync(temporary)
            if special:
                _pour(temporary, target)
            else:
                _rename(temporary, target, lambda: _pour(temporary, target))
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, keep: bool = True) -> Iterator[Path]:
    """Yields a new folder beside `path` and, when the body has filled it, gives it that name; else nothing is left and an older one stays.

    A folder that is linked to or mounted keeps its place, and takes the new contents for its old ones: the caller knows those to be its
    own. So does an empty one, in which somebody may stand, with its rights. `keep`: if not, the folder is for the body alone, and gone
    afterwards.
    """
    target = path.resolve() if path.is_symlink() else path.absolute()
    temporary, former = _beside(target), _beside(target, "old")
    with _naming(path, temporary):
        for leftover in (temporary, former):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _readable(file)
            if keep and target.is_dir() and not any(target.iterdir()):
                move_contents(temporary, target)
            elif keep:
                if target.exists():
                    _rename(target, former, lambda: _empty(target))
                _rename(temporary, target, lambda: move_contents(temporary, target))
        except BaseException:
            if former.exists() and not target.exists():
                os.replace(former, target)
            raise
        finally:
            for leftover in (temporary, former):
                shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises OSError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_table(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where the file is missing, is a device or a pipe, is no JSON, or holds something else."""
    if not file.is_file():
        return {}
    try:
        found = from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def unused(path: Path) -> Path:
    """`path`, or with -2, -3, ... behind its stem the first name that nothing has: what is kept for good is not overwritten."""
    names = (path, *(path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(2, 10_000)))
    return next(p for p in names if not p.exists())


def switch(link: Path, target: Path | str) -> None:
    """Make `link` a symbolic link to `target`, in one step also where it leads elsewhere. Raises OSError where links are not allowed."""
    temporary = _beside(link)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
        os.replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, inside: bool = True, alone: bool = False) -> None:
    """Remove what processes that were killed have left half written in `folder` and, if `inside`, in the folders in it.

    What belongs to a process that lives is left alone, and so is everything further down: other runs may lie there. Whether one on another
    machine lives is not known: what it has left goes when it is a week old, or at once where the folder is this process's `alone`.
    """
    found = [*folder.glob(f".*.{PART}"), *(folder.glob(f"*/.*.{PART}") if inside else [])]
    for leftover in found:
        name = re.fullmatch(rf"\..+\.(\d+)(?:-(\w+)-[0-9a-f]+)?(\.old)?\.{PART}", leftover.name)
        if name is None:
            continue
        here = name[2] in (None, HOST)  # versions before this one named no machine
        if (here and int(name[1]) != os.getpid() and lives(int(name[1]))) or not (here or alone or _is_old(leftover)):
            continue
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def holds_anything(folder: Path) -> bool:
    """Whether anything lies in `folder`, if there is one, besides what another process is just writing or has left half written."""
    return folder.is_dir() and any(not file.name.endswith(f".{PART}") for file in folder.iterdir())


def cache_folder() -> Path:
    """Where is kept what takes long to find out: DDIL_CACHE, else ddil-lightning in XDG_CACHE_HOME or ~/.cache. It may be deleted at any
    time."""
    own = os.environ.get("DDIL_CACHE")
    return Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddil-lightning"


def mark_used(file: Path) -> None:
    """Note that what is kept in a file was used just now, for `tidy`."""
    with suppress(OSError):  # of another user, who shares the folder
        os.utime(file)


def tidy(folder: Path) -> None:
    """Remove from a folder in `cache_folder` what was left half written, and what nobody has used for weeks: data are copied, renamed and
    deleted, and nobody deletes what is known of them."""
    sweep(folder, inside=False)
    for file in folder.glob("*"):
        with suppress(OSError):  # gone by now, or of another user
            if time.time() - file.stat().st_mtime > UNUSED:
                file.unlink()


def lock(path: Path) -> IO[bytes] | None:
    """The file `path`, open and locked until it is closed or the process ends; None where the file system knows no locks.

    Raises BlockingIOError while another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        file = path.open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:  # who had it before may have removed it
                return file
        except OSError as error:
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(errno.EAGAIN, "another process has it", str(path)) from error
            return None
        file.close()


@contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Inside, whether this process has the lock `path`, or the file system knows none; the file is gone afterwards."""
    try:
        held = lock(path)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        if held is not None:
            path.unlink(missing_ok=True)
            held.close()


def check_writable(path: Path) -> None:
    """Raises OSError now for a file that could not be written later: a folder, or one in a place where nothing may be made."""
    target = path.resolve() if path.is_symlink() else path
    if target.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    above = target if target.exists() else next(p for p in target.absolute().parents if p.exists())
    if not os.access(above, os.W_OK) or (above != target and not above.is_dir()):
        reason = errno.EACCES if above.is_dir() or above == target else errno.ENOTDIR
        raise OSError(reason, os.strerror(reason), str(path))


def _beside(target: Path, kind: str = "") -> Path:
    # The name of the process: two that write the same file at the same time must not write into each other. Those of two containers may
    # have one number.
    return target.with_name(f".{target.name}.{os.getpid()}-{HOST}-{_TOKEN}{'.' + kind if kind else ''}.{PART}")


def _readable(path: Path) -> None:
    if path.is_file() and not path.is_symlink():
        with suppress(OSError):  # of a file system without rights
            path.chmod(stat.S_IMODE(path.stat().st_mode) | READERS)


def _is_old(leftover: Path) -> bool:
    try:
        return time.time() - leftover.lstat().st_mtime > 7 * 24 * 3600
    except OSError:  # gone by now
        return False


def _scratch() -> str:
    import tempfile

    return tempfile.gettempdir()


def _rename(source: Path, target: Path, otherwise: Callable[[], None]) -> None:
    """Rename, or do `otherwise` where the system refuses because a place is mounted, on another disk or not empty."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY):
            raise
        otherwise()


def _pour(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("r+b" if target.is_file() else "wb") as writer:
        shutil.copyfileobj(reader, writer)
        if target.is_file():
            writer.truncate()


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def move_contents(source: Path, target: Path) -> None:
    """Move everything in the folder `source` into the folder `target`."""
    for child in source.iterdir():
        shutil.move(str(child), str(target / child.name))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Every refusal of the system as an OSError about `path`: safetensors raises an Exception of its own with the number in its text."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"(?:os error |code: )(\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error
    except OSError as error:
        mine = error.filename is None or str(error.filename).startswith((str(temporary), str(path)))
        if error.errno is None or not mine:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
