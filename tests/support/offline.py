"""What a W&B run has written offline, read back: the records of its `.wandb` file, a log of LevelDB's kind with protocol buffers in it."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK, HEAD, OPENING = 32768, 7, 7
FULL, LAST = 1, 4


class Written(NamedTuple):
    """`history`: rows in order. `axes`: (a metric's name or pattern, its axis). `alerts`: (title, text). `run`: the record of the run."""

    history: list[dict[str, Any]]
    axes: list[tuple[str, str]]
    alerts: list[tuple[str, str]]
    run: Any


def records(path: Path) -> Iterator[Any]:
    """Every record of a `.wandb` file: its payload is cut into pieces that never cross a block of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), OPENING, b""
    while at + HEAD <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEAD:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEAD])
        whole += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def complete(path: Path, patience: float = 20.0) -> list[Any]:
    """The records of a run that has ended, once its end is among them: W&B's service may write on when `finish` is back."""
    deadline = time.monotonic() + patience
    while True:
        found = list(records(path))
        if "exit" in [record.WhichOneof("record_type") for record in found]:
            return found
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)


def read_back(path: Path) -> Written:
    """A `.wandb` file as a person would ask for it."""
    found = Written([], [], [], None)
    for record in complete(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found.history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        elif kind == "metric":
            found.axes.append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "alert":
            found.alerts.append((record.alert.title, record.alert.text))
        elif kind == "run":
            found = found._replace(run=record.run)
    return found
