"""What a run has cost, and how its student is used, as sections of its page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from ddil_lightning.evaluation.table import CLOCK, cell
from ddil_lightning.runs.bands import table
from ddil_lightning.runs.charts import ROLE_COLOURS


def number_of(value: Any) -> TypeGuard[float]:
    """Whether a value of a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def duration(seconds: float) -> str:
    """A time in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def cost(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Latents, time and memory as tiles, and the network evaluations by role as a table with bars; nothing where nothing is known."""
    tiles = "".join(
        f'<div class="tile"><h3>{escape(name)}</h3><div class="big">{escape(value)}</div><p>{escape(more)}</p></div>'
        for name, value, more in _amounts(summary, config)
    )
    body = (f'<div class="tiles small">{tiles}</div>' if tiles else "") + _evaluations(summary.get("network_evaluations"))
    return f"<h2>What it cost</h2>{body}" if body else ""


def _amounts(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, how much, and in other words) of all that is known."""
    found = []
    clock, batch = summary.get(CLOCK), table(config, "data").get("batch_size")
    if number_of(clock) and number_of(batch):
        micro = table(config, "model", "init_args", "optimizer").get("accumulate", 1)
        micro = micro if number_of(micro) else 1
        each = f"{cell(batch)} a device" + (f", {micro} times before an update" if micro != 1 else "")
        found.append(("Latents the student trained on, a device", cell(clock * batch * micro), f"{cell(clock)} updates of {each}"))
    counts = summary.get("network_evaluations")
    total = sum(v for v in counts.values() if number_of(v)) if isinstance(counts, Mapping) else 0
    if total:
        each = f"{total / clock:.0f} an update" if number_of(clock) and clock > 0 else ""
        found.append(("Network evaluations", cell(total), each))
    seconds, training = summary.get("seconds"), summary.get("seconds_training")
    if number_of(training) and number_of(seconds):
        rate = f"{1000 * training / clock:.0f} ms an update, " if number_of(clock) and clock > 0 else ""
        found.append(("Time of training", duration(training), f"{rate}{duration(seconds)} with all else"))
    elif number_of(seconds):
        found.append(("Time", duration(seconds), ""))
    if number_of(summary.get("peak_memory_gib")):
        planned = summary.get("planned_memory_gib")
        found.append(("Peak memory", f"{summary['peak_memory_gib']:.2f} GiB", f"planned {planned:.2f} GiB" if number_of(planned) else ""))
    return found


def _evaluations(counts: Any) -> str:
    """The counts of network evaluations by role, as a table with bars; nothing where there are none."""
    pairs = [(str(k), v) for k, v in counts.items() if number_of(v)] if isinstance(counts, Mapping) else []
    if not pairs:
        return ""
    top = max((v for _, v in pairs), default=0) or 1
    bar = '<div style="width:{:.1%};background:var(--c{})"></div>'
    lines = [[escape(k), cell(v), bar.format(v / top, ROLE_COLOURS.get(k, 8))] for k, v in pairs]
    cells = "".join(f'<tr><td>{k}</td><td>{v}</td><td class="bar">{b}</td></tr>' for k, v, b in lines)
    return f'<div class="scroll"><table class="bars"><tr><th>Network evaluations by</th><th></th><th></th></tr>{cells}</table></div>'


def use(run_dir: Path) -> str:
    """The code of the card of the run's pipeline, with what the card says below it; nothing where there is none."""
    card = run_dir / "pipeline" / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^```python\n(.*?)^```\n+([^\n`#][^#]*?)?(?=\n\n|\Z)", text, re.M | re.S)
    if found is None:
        return ""
    place = "pipeline" if run_dir.is_absolute() else f"{run_dir.as_posix()}/pipeline"
    code = (
        found[1]
        .replace('from_pretrained(".")', f'from_pretrained("{place}")')
        .replace('from_pretrained(".",', f'from_pretrained("{place}",')
    )
    note = f'<p class="note">{escape(" ".join(found[2].split()).replace("`", ""))}</p>' if found[2] else ""
    return f"<h2>Use it</h2><pre>{escape(code.strip())}</pre>{note}"
