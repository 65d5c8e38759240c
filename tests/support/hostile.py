"""Texts that would take a page over if they got in as markup, with words without an end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddil_lightning.runs.probed import write_probe
from ddil_lightning.runs.trends import trends

EVIL = "</title><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">" + "w" * 300


def found() -> dict[str, Any]:
    """What ddil-probe might find of a student in two steps, hostile wherever a text is."""
    shift = {"frechet": 0.5, "mmd": -0.01, "auc": 0.6, "energy_distance": 0.02, "energy": 0.3}
    nodes: list[dict[str, Any]] = [
        {"t": t, "shift": {"teacher": shift, "forward": shift}, "loss": {"on": 0.3, "teacher": 0.2, "forward": 0.1},
         "ratio": {"teacher": 1.5, "forward": None}, "recovery": {"injected": 0.2, "plain": 0.1} if t == 999 else {}, "asked": 32}
        for t in (999, 499)
    ]  # fmt: skip
    mixing = [{"p_teacher": p, "nfe": 8.0, "metrics": {"clip": 0.3 + p / 100, "frechet": 5 - p}} for p in (0.2, 0.5, 0.8)]
    switch = [{"first": who, "at": 499, "nfe": 8.0, "metrics": {"clip": 0.3, "frechet": 5.0}} for who in ("teacher", "student")]
    values = [{"clip": row["metrics"]["clip"] + torch.arange(20) / 1000} for row in mixing + switch]
    protocol = {"student": EVIL, "teacher": EVIL, "name": EVIL, "prompts": EVIL, "left_out": EVIL, "sampler": EVIL, "times": [999, 499, -1]}
    protocol |= {"stamp": "s", "networks": {"features": EVIL}, "changed": {EVIL: EVIL}}
    return {"protocol": protocol, "nodes": nodes, "mixing": mixing, "switch": switch, "trends": trends(mixing + switch, values)}


def probe_page(folder: Path) -> Path:
    """The page of `found` in a folder."""
    return write_probe(folder / "probe.html", found())
