"""Every brief entry of the suite, once and tiny: it fits and, where a pipeline can hold its student, is exported as it samples.

The whole behaviour suite puts these through the slow tests alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ddil_lightning.runs import export
from suite import METHODS, Entry, build, captions, equal, fit, state


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in METHODS if entry.brief])
def test_two_updates_and_the_export(entry: Entry, light: Path, tmp_path: Path) -> None:
    """On roll-outs too. What no pipeline can hold is refused with its reason, and nothing is written."""
    method = build(entry, light, updates=2)
    before = {name: p.detach().clone() for name, p in method.student.network.named_parameters() if p.requires_grad}
    run = fit(method, captions(light))
    assert method.student_updates == 2 and [row["student_updates"] for row in run.rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in run.rows) and state(run)["evaluations"]["student"] > 0
    now = dict(method.student.network.named_parameters())
    assert any(not equal(p.detach(), before[name]) for name, p in now.items() if name in before)
    if why := export.unheld(method):
        with pytest.raises(ValueError, match=why.partition(",")[0]):
            export.deliver(method, tmp_path / "p", ["a handwritten one"], 4)
        assert not (tmp_path / "p").exists()
        return
    steps = method.deployment.steps[0]
    assert export.deliver(method, tmp_path / "p", ["a handwritten one"], steps) < export.LEAST
