"""Numbers that are not finite end a run, at once or, where reading them would have the host wait, a batch later."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddil_lightning.training import watch
from ddil_lightning.training.optimisation import spared
from ddil_lightning.training.watch import Watch
from suite import BY_NAME, FORWARD, build, captions, fit


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device whose answers are on their way for a while; what was waited for."""
    waited: list[str] = []
    event = SimpleNamespace(synchronize=lambda: waited.append("event"))
    monkeypatch.setattr(watch, "sent_home", lambda x: (x.clone(), event))
    return waited


def fault(name: str) -> Any:
    return lambda mine: f"{name} {'here' if mine else 'elsewhere'}"


def test_on_the_cpu_a_fault_is_said_at_once() -> None:
    asked = Watch()
    assert float(asked.ask(torch.tensor(True), fault("a"))) == 1
    with pytest.raises(FloatingPointError, match="^b here$"):
        asked.ask(torch.tensor(False), fault("b"))
    asked.read(all_of_them=True)  # and not again


def test_on_a_gpu_it_is_said_one_batch_later_and_nothing_is_waited_for_before(late: list[str]) -> None:
    asked = Watch()
    assert float(asked.ask(torch.tensor(False), fault("a"))) == 0
    asked.ask(torch.tensor(True), fault("b"))
    asked.read()
    assert late == []
    asked.ask(torch.tensor(False), fault("c"))
    with pytest.raises(FloatingPointError, match="^a here$"):
        asked.read()
    assert late == ["event"]
    asked.read(all_of_them=True)


def test_the_end_of_a_run_waits_for_all(late: list[str]) -> None:
    asked = Watch()
    asked.ask(torch.tensor(True), fault("a"))
    asked.read()
    asked.ask(torch.tensor(False), fault("b"))
    with pytest.raises(FloatingPointError, match="^b here$"):
        asked.read(all_of_them=True)
    assert len(late) == 2


@pytest.mark.parametrize(("kind", "spares"), [("AdamW", True), ("RMSprop", False)])
def test_a_loss_that_is_not_finite_is_named_and_a_fused_optimiser_does_not_take_it(
    kind: str, spares: bool, tiny: Path, late: list[str]
) -> None:
    method = build(BY_NAME["lcm"], tiny, optimizer={"kind": kind}, updates=9)
    usual = method.distance
    method.distance = lambda y, target: usual(y, target) * (math.nan if method.student_updates == 2 else 1.0)
    with pytest.raises(FloatingPointError, match=r"^the loss is nan at student update 2"):
        fit(method, captions(tiny, FORWARD))
    assert method.student_updates == 4
    assert all(bool(p.isfinite().all()) for p in method.student.weights()) == spares


def test_a_fault_of_the_last_batch_is_not_lost(tiny: Path, late: list[str]) -> None:
    method = build(BY_NAME["lcm"], tiny, updates=3)
    usual = method.distance
    method.distance = lambda y, target: usual(y, target) * (math.nan if method.student_updates == 2 else 1.0)
    with pytest.raises(FloatingPointError, match=r"^the loss is nan at student update 2: the outputs of all networks are finite"):
        fit(method, captions(tiny, FORWARD))


@pytest.mark.parametrize("unsound", [0.0, 1.0])
def test_a_fused_step_is_spared_on_the_device(unsound: float) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], 0.1, fused=True)
    p.grad = torch.full((3,), math.nan if unsound else 1.0)
    with spared(optimizer, torch.tensor(unsound)):
        optimizer.step()
    assert bool((p == 1).all()) == bool(unsound) and not hasattr(optimizer, "found_inf")
    assert float(optimizer.state[p]["step"]) == 1 - unsound
