"""Rows of frozen teachers: the same in every run, so that they are measured once and kept by all that decides on them.

Kept in the user's cache, and shipped for the built-in pipelines (`benchmarks/teacher_rows.py` makes those). A row that is kept says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddil_lightning.evaluation.references import cache_folder
from ddil_lightning.evaluation.registry import keys
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.files import read_table
from ddil_lightning.miniature import weights_path
from ddil_lightning.texts import reason

VERSION = 1
"""Of how rows are measured: raised where a change of the code changes their numbers, it forgets all that were kept."""

log = logging.getLogger(__name__)


def key_of(about: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """What a row is kept under: `about` its sampler, weights included, the protocol's stamp, and which metrics there are."""
    told = [VERSION, about, protocol["stamp"], list(keys())]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def recalled(key: str, measure: Callable[[], dict[str, Any]], fresh: bool = False, folder: Path | None = None) -> dict[str, Any]:
    """The row that is kept under `key`, which says from when; else, or if it is to be `fresh`, the one that `measure` makes.

    Seconds are of a machine: those of another one are left out. `folder`: where it is then kept, by default the user's cache.
    """
    found = {} if fresh else next(filter(None, (read_table(folder / f"{key}.json") for folder in folders())), {})
    if found.get("row"):
        row = found["row"]
        row["generation"] = {**row["generation"], "kept": found["date"]}
        return row if found["machine"] == machine() else {**row, "seconds_per_image": None}
    row = measure()
    try:
        keep(folder or cache_folder() / "rows", key, row)
    except OSError as error:
        log.warning(f"the teacher's row {row['name']} is not kept for the next run: {reason(error)}")
    return row


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


def told(rows: list[dict[str, Any]]) -> str:
    """Which rows of a table were kept and since when, in a line; empty where none was."""
    kept = [row for row in rows if (row.get("generation") or {}).get("kept")]
    if not kept:
        return ""
    dates = sorted({row["generation"]["kept"] for row in kept})
    since = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    names = ", ".join(row["name"] for row in kept)
    return f"Of {since}, by the same weights, prompts and metrics: {names} (test.fresh=true measures them now).\n"
