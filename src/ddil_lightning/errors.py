"""The errors of a user's input, and any error on one line."""

from __future__ import annotations

import errno
import re


class Refusal(Exception):
    """Bad input: one line that names the thing and the remedy; exit code 2."""


EXPECTED = (Refusal, ValueError, FloatingPointError, OSError)
"""Errors whose message is written for the user, so that a command tells it without the type."""


EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def check_exhausted(error: BaseException, name: str) -> None:
    """Raises Refusal where the system could not open `name` for want of what every file needs: that says nothing of the file, which nobody
    who passes over damaged ones may take for one of them."""
    if isinstance(error, Refusal):  # who looks into an archive has been told already
        raise error
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        remedy = "have more of them allowed (ulimit -n), or give fewer data.workers" if error.errno != errno.ENOMEM else "free memory"
        raise Refusal(f"{name} cannot be opened: {error.strerror}; {remedy}") from error


def unexpected(error: BaseException) -> str:
    """One line for an error that nobody has foreseen, with its type and how to see where it happened."""
    return f"{type(error).__name__}: {one_line(error)[:500]} (this was not foreseen: DDIL_DEBUG=1 shows where it happened)"


def one_line(error: BaseException) -> str:
    """An error's message on one line, with the notes that were made on it; of an OSError what happened, then to which file; of a loader's
    worker what it said last."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    if re.match(r"Caught \w+ in DataLoader worker", text):
        text = re.sub(r"^[\w.]+: ", "", text.rstrip().splitlines()[-1])  # the traceback's last line, without the type
    notes = (f"({note})" for note in getattr(error, "__notes__", ()))
    return " ".join((" ".join(text.split()) or type(error).__name__, *notes))
