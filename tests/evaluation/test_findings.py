"""What a long measurement keeps for a call that goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning.evaluation import findings
from ddil_lightning.evaluation.findings import Findings
from ddil_lightning.signals import Stopped


def test_a_question_is_answered_once_and_another_anew(tmp_path: Path) -> None:
    asked: list[Any] = []

    def make(value: Any) -> Any:
        asked.append(value)
        return value

    def call(seed: int) -> tuple[Any, torch.Tensor]:
        kept = Findings(tmp_path / "out.json")
        return kept.answer({"seed": seed}, lambda: make({"seed": seed, "loss": 0.1})), kept.tensor(
            {"latents": seed}, lambda: make(torch.full((2, 3), float(seed)).T)
        )

    first, again, other = call(1), call(1), call(2)
    assert first[0] == again[0] == {"seed": 1, "loss": 0.1} and torch.equal(first[1], again[1]) and float(other[1][0, 0]) == 2
    assert len(asked) == 4
    for file in (tmp_path / "out.parts").iterdir():
        file.write_bytes(b"damaged")
    assert call(1)[0] == first[0] and len(asked) == 6


def test_a_signal_says_that_the_call_goes_on_and_the_end_removes_what_it_asked_for(tmp_path: Path) -> None:
    kept = Findings(tmp_path / "out.json")
    with pytest.raises(KeyboardInterrupt) as nothing, kept.going_on():
        raise KeyboardInterrupt
    assert not isinstance(nothing.value, Stopped)
    with pytest.raises(Stopped, match="what was found stays in .*out.parts, and the same command goes on"), kept.going_on():
        kept.answer({"seed": 1}, lambda: 1)
        raise KeyboardInterrupt
    other = Findings(tmp_path / "out.json")
    other.answer({"seed": 2}, lambda: 2)
    with kept.going_on():
        assert kept.answer({"seed": 1}, lambda: 0) == 1
    assert not (tmp_path / "out.parts").exists()  # nor what was asked before, by a call that nobody has gone on with
    other.answer({"seed": 2}, lambda: 2)
    (tmp_path / "out.parts" / "notes.json").write_text("somebody's own")
    with Findings(tmp_path / "out.json").going_on():
        pass
    assert [file.name for file in (tmp_path / "out.parts").iterdir()] == ["notes.json"]


def test_answers_of_another_version_are_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Findings(tmp_path / "out.json")
    assert made.answer({"seed": 1}, lambda: 1) == 1
    monkeypatch.setattr(findings, "VERSION", "2")
    assert made.answer({"seed": 1}, lambda: 2) == 2


def test_what_cannot_be_kept_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "out.parts").write_text("a file, where the folder would be")
    kept = Findings(tmp_path / "out.json")
    with caplog.at_level(logging.WARNING), kept.going_on():
        assert [kept.answer({"seed": seed}, lambda seed=seed: seed) for seed in (1, 2)] == [1, 2]
    assert len(caplog.messages) == 1 and "is not kept for a call that goes on" in caplog.messages[0]
