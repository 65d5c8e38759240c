"""Paired differences: against closed forms, and which row is set against which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from ddil_lightning.diffusion.gaussians import moments
from ddil_lightning.evaluation.given import Given, Judge
from ddil_lightning.evaluation.intervals import interval
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.evaluation.metrics.frechet import Frechet
from ddil_lightning.evaluation.networks import Networks
from ddil_lightning.evaluation.paired import against, difference, each, every, grouped, paired_distance
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
    for key, value in values.items():
        assert len(value) == 30 and float(value.nanmean()) == pytest.approx(found[key], abs=1e-12)


def test_a_difference_of_uneven_groups_is_the_gap_of_their_rows() -> None:
    """Half of the pictures have one caption and half have five: the mean of the groups' means is that of no row."""
    sizes = [1, 5] * 20
    groups = [i for i, size in enumerate(sizes) for _ in range(size)]
    shown = [0.1 + 0.01 * (g % 7) if sizes[g] == 1 else 0.5 + 0.02 * (g % 5) for g in groups]

    def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    rows, values, held = [], [], []

    def look(metrics: Sequence[Metric]) -> None:
        values.append(each(metrics))
        held.append(grouped(metrics))

    suite = Suite("s", [str(i) for i in range(len(groups))], Given(Networks(clip=brightness)), groups=groups)
    for scale in (1.0, 0.5):
        drawn = torch.tensor(shown) * scale
        rows.append(
            suite.score(lambda prompts, seed, x=drawn: x[[int(p) for p in prompts]][:, None, None, None].repeat(1, 3, 4, 4), look=look)
        )
    found = difference(values[0]["clip"], values[1]["clip"], held[0])
    assert found is not None and found["n"] == len(groups) and found["mean"] == pytest.approx(rows[0]["clip"] - rows[1]["clip"], abs=1e-12)
    assert found["interval"] == interval(values[0]["clip"].double() - values[1]["clip"].double(), torch.tensor(groups))
    alone = difference(values[0]["clip"], values[1]["clip"])
    assert alone is not None and alone["mean"] == found["mean"] and alone["interval"] != found["interval"]
    missing = values[0]["clip"].clone()
    missing[:6] = torch.nan  # what is not asked goes with its group's number
    some = difference(missing, values[1]["clip"], held[0])
    assert (
        some is not None
        and some["n"] == len(groups) - 6
        and some["interval"] == interval((values[0]["clip"].double() - values[1]["clip"].double())[6:], torch.tensor(groups)[6:])
    )
    ours, first = {"name": "b@1", "steps": 1, "protocol": {}}, {"name": "a@1", "steps": 1, "protocol": {}}
    told = against([first, ours], "a", {"b@1": values[0], "a@1": values[1]}, {"b@1": held[0], "a@1": held[1]})
    assert told[0]["differences"]["clip"] == found


def test_a_distance_is_the_mean_of_its_images_values_whatever_their_groups() -> None:
    real, mine = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (200, 90))
    metric = Frechet()
    metric.rows, metric.held, metric.groups = [mine], {"reference": moments(real)}, torch.arange(90) // 3 * (torch.arange(90) % 2)
    (number,) = metric.compute().values()
    assert float(every([metric])["frechet"].mean()) == pytest.approx(number, abs=1e-9)


def test_paired_distance() -> None:
    a = torch.zeros(2, 3, 4, 4)
    assert paired_distance(a, a + 0.5) == 0.25
    with pytest.raises(ValueError, match="paired"):
        paired_distance(a, a[:1])
