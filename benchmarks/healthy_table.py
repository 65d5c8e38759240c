"""The tables and the picture of benchmarks/healthy.py."""
from __future__ import annotations
from typing import Any
Record = dict[str, Any]


def plot(*a): ...
def report(records):
    return {"benchmark": "healthy", "columns": [("case", "case"), ("updates", "updates"), ("failed", "failed")], "rows": [{k: r[k] for k in ("case", "updates", "failed")} for r in records]}
