"""Paired differences: against closed forms, and which row is set against which."""

from __future__ import annotations

import pytest
import torch

from ddil_lightning.evaluation.intervals import interval
from ddil_lightning.evaluation.paired import against, difference


def test_a_difference_is_of_the_pairs_that_both_have() -> None:
    theirs = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 10
    better = theirs + 0.25 + 0.01 * torch.randn(200, generator=torch.Generator().manual_seed(1))
    better[3] = torch.nan
    found = difference(better, theirs)
    assert found is not None and found["n"] == 199 and found["mean"] == pytest.approx(0.25, abs=0.003)
    low, high = found["interval"]
    # The noise that both share has gone: 1.96 * 0.01 / sqrt(199), where the means alone have 1.96 * 10 / sqrt(200).
    assert high - low == pytest.approx(2 * 1.96 * 0.01 / 199**0.5, rel=0.15)
    whole = interval(theirs)
    assert whole is not None and whole[1] - whole[0] > 2
    assert difference(theirs, theirs) == {"mean": 0.0, "interval": None, "n": 200}
    assert difference(torch.full((2,), torch.nan), torch.zeros(2)) is None
    with pytest.raises(ValueError, match="must be paired"):
        difference(theirs, theirs[:3])


def test_a_row_is_set_against_the_first_entry_in_its_steps_or_in_its_most() -> None:
    rows = [
        {"name": name, "steps": int(name.rpartition("@")[2]), "protocol": {"stamp": stamp}}
        for name, stamp in (("a@2", "s"), ("a@8", "s"), ("b@2", "s"), ("b@4", "s"), ("b@8", "other"), ("c@1", "s"))
    ]
    values = {row["name"]: {"clip": torch.arange(3.0) + row["steps"]} for row in rows} | {"c@1": {"blur": torch.ones(3)}}
    found = against(rows, "a", values)
    assert [(x["name"], x["against"], x["differences"]["clip"]["mean"]) for x in found] == [("b@2", "a@2", 0.0), ("b@4", "a@8", -4.0)]
