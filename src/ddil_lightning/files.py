"""Writing files of weights: safetensors has an error of its own for a full disk, which here becomes the OSError that everybody expects."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes safetensors to `path`, a file or a folder. Raises OSError with that name where the system refuses."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:  # an Exception that carries the system's number in its text alone
        found = re.search(r"(?:os error |code: )(\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error
