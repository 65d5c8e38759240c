"""The light front end of the commands: answers what needs no torch at once, and turns every expected error into one line.

`--version`, an unknown config name or an unreadable file must not wait for half a minute of imports.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module, metadata
from typing import Any

from ddil_lightning.errors import EXPECTED, one_line, unexpected
from ddil_lightning.messages import lasting, quiet
from ddil_lightning.signals import Stopped, listening


def run(command: Callable[[list[str]], int | None], name: str, argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, 2 with one line for whatever went wrong, 130 for Ctrl-C and 128 + its number for another signal.

    `DDIL_DEBUG=1` shows the traceback instead. What nobody has thought of is told with the type of the error.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--version" in words:
        print(f"ddil-lightning {metadata.version('ddil-lightning')}")
        raise SystemExit(0)
    quiet()
    try:
        with listening(), lasting():  # the reader of what is told may leave: `ddil-fit ... | head`, a terminal that is closed
            code = command(words) or 0
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        complain(f"\n{name}: {one_line(stop) if stop.args else 'stopped'}")
        code = stop.code if isinstance(stop, Stopped) else 130
    except Exception as error:
        if os.environ.get("DDIL_DEBUG"):
            raise
        complain(f"{name}: {one_line(error) if isinstance(error, EXPECTED) else unexpected(error)}")
        code = 2
    raise SystemExit(code)


def complain(text: str) -> None:
    """Write a line to stderr: letters that it cannot encode are escaped, and nothing is raised where it is closed."""
    with suppress(OSError, ValueError):
        print(text.encode(sys.stderr.encoding or "utf-8", "backslashreplace").decode(sys.stderr.encoding or "utf-8"), file=sys.stderr)


def fit() -> None:
    """The entry point of ddil-fit; exits as `run` does."""
    run(functools.partial(command("fit"), patience=True), "ddil-fit")


def test() -> None:
    """The entry point of ddil-test; exits as `run` does."""
    run(command("test"), "ddil-test")


def sample() -> None:
    """The entry point of ddil-sample; exits as `run` does."""
    run(command("sample"), "ddil-sample")


def export() -> None:
    """The entry point of ddil-export; exits as `run` does."""
    run(command("export"), "ddil-export")


def pretrain() -> None:
    """The entry point of ddil-pretrain; exits as `run` does."""
    run(command("pretrain"), "ddil-pretrain")


def probe() -> None:
    """The entry point of ddil-probe; exits as `run` does."""
    run(command("probe"), "ddil-probe")


def invert() -> None:
    """The entry point of ddil-invert; exits as `run` does."""
    run(command("invert"), "ddil-invert")


def cache() -> None:
    """The entry point of ddil-cache; exits as `run` does."""
    run(command("cache"), "ddil-cache")


def dashboard() -> None:
    """The entry point of ddil-dashboard; exits as `run` does."""
    run(command("dashboard"), "ddil-dashboard")


def command(name: str) -> Callable[..., int]:
    """The function `name` of commands/name.py, which is imported when it is called."""

    def called(argv: list[str], **kwargs: Any) -> int:
        code: int = getattr(import_module(f"ddil_lightning.commands.{name}"), name)(argv, **kwargs)
        return code

    return called
