"""Paired differences: against closed forms, and which row is set against which."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from ddil_lightning.evaluation.given import Given, Judge
from ddil_lightning.evaluation.intervals import interval
from ddil_lightning.evaluation.networks import Networks
from ddil_lightning.evaluation.paired import against, difference, paired_distance
from ddil_lightning.evaluation.suite import Suite


class Verdict(NamedTuple):
    correct: dict[str, torch.Tensor]
    residual: torch.Tensor


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


def test_what_each_image_has_is_what_a_metric_is_the_mean_of() -> None:
    def seen(images: torch.Tensor, prompts: list[str]) -> Verdict:
        right = (images[:, 0, 0, 0] > 0).double()
        right[::3] = torch.nan  # of which nothing was asked
        return Verdict({"bright": right}, images.flatten(1).std(1))

    def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    def sample(prompts: list[str], seed: int) -> torch.Tensor:
        return torch.rand(len(prompts), 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    values: dict[str, torch.Tensor] = {}
    suite = Suite("s", ["a"] * 30, Given(Networks(clip=brightness, hps=brightness), judge=Judge(seen)), batch=7)
    found = suite.score(sample, look=lambda metrics: [values.update(metric.each()) for metric in metrics])  # type: ignore[func-returns-value]
    assert set(values) == {"clip", "hps", "saturation", "contrast", "attribute_accuracy", "all_right", "blur"}
    for key, each in values.items():
        assert len(each) == 30 and float(each.nanmean()) == pytest.approx(found[key], abs=1e-12)


def test_paired_distance() -> None:
    a = torch.zeros(2, 3, 4, 4)
    assert paired_distance(a, a + 0.5) == 0.25
    with pytest.raises(ValueError, match="paired"):
        paired_distance(a, a[:1])
