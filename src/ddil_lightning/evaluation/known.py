"""Rows of frozen teachers: the same in every run, so that they are measured once and kept by all that decides on them.

Kept in the user's cache, and shipped for the built-in pipelines (`benchmarks/teacher_rows.py` makes those). A row that is kept says so.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddil_lightning.evaluation.registry import keys
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.files import cache_folder, read_table
from ddil_lightning.miniature import weights_path
from ddil_lightning.texts import json_digest, reason

VERSION = 1
"""Of how rows are measured: raised where a change of the code changes their numbers, it forgets all that were kept."""

log = logging.getLogger(__name__)


def key_of(about: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """What a row is kept under: `about` its sampler, weights included, the protocol's stamp, the metrics there are and those asked for."""
    asked = [sorted(protocol["metrics"])] if protocol.get("metrics") is not None else []
    told = [VERSION, about, protocol["stamp"], list(keys()), *asked]
    return json_digest(told)[:32]


def recalled(key: str, measure: Callable[[], dict[str, Any]], fresh: bool = False, folder: Path | None = None) -> dict[str, Any]:
    """The row that is kept under `key`, which says from when; else, or if it is to be `fresh`, the one that `measure` makes.

    Seconds are of a machine: those of another one are left out. `folder`: where it is then kept, by default the user's cache.
    """
    found = None if fresh else next(filter(None, (_whole(place / f"{key}.json") for place in folders())), None)
    if found is not None:
        row: dict[str, Any] = {**found["row"], "generation": {**found["row"]["generation"], "kept": found["date"]}}
        return row if found["machine"] == machine() else {**row, "seconds_per_image": None}
    row = measure()
    try:
        keep(folder or cache_folder() / "rows", key, row)
    except OSError as error:
        log.warning(f"the teacher's row {row['name']} is not kept for the next run: {reason(error)}")
    return row


def _whole(file: Path) -> dict[str, Any] | None:
    """What `keep` wrote; None for a file that is missing, damaged or none of ours: the row is measured again."""
    found = read_table(file)
    row = found.get("row")
    whole = isinstance(row, dict) and {"name", "metrics", "protocol", "generation"} <= row.keys() and {"machine", "date"} <= found.keys()
    return found if whole else None


def folders() -> list[Path]:
    """Where rows are kept: those that ship, and the user's."""
    return [weights_path("rows"), cache_folder() / "rows"]


def keep(folder: Path, key: str, row: Mapping[str, Any]) -> None:
    """Put a row into a folder. Raises OSError where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / f"{key}.json", {"row": row, "machine": machine(), "date": time.strftime("%Y-%m-%d")})  # type: ignore[arg-type]


def machine() -> str:
    """What seconds belong to: a digest, for these rows are handed on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {platform.machine()}"
    return hashlib.sha256(f"{device} of {platform.node()}".encode()).hexdigest()[:12]
