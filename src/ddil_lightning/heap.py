"""Freed memory that the C library keeps for itself, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any


def give_back() -> None:
    """Have what is freed leave the process too; nothing where the C library is not glibc.

    glibc keeps freed blocks of up to 32 MiB, images and activations among them, wherever anything small that lives on lies above them, and
    the process grows from batch to batch though nothing more is in use (malloc_trim(3)). A call takes some 2 ms.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], Any] | None:
    """glibc's malloc_trim, which Windows, macOS and musl do not have."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
