"""What ddil-probe tells: which trends show, by closed forms, and a page of whatever names and protocols hold."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning.diffusion.gaussians import moments
from ddil_lightning.evaluation.metrics.frechet import Frechet
from ddil_lightning.runs.probed import write_probe
from ddil_lightning.runs.trends import trends
from hostile import EVIL, found, probe_page

N = 256


def sweep(key: str, ends: tuple[float, float], noise: float = 0.0, **said: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Three mixtures whose images' values rise evenly from one to the other and differ by `noise` besides; both alone are no mixtures."""
    rng, rows, values = torch.Generator().manual_seed(0), [], []
    base = torch.randn(N, generator=rng)
    for i, p in enumerate((0.2, 0.5, 0.8)):
        own = base + noise * torch.randn(N, generator=rng)
        own += ends[0] + (ends[1] - ends[0]) * i / 2 - own.mean()
        rows.append({"p_teacher": p, "metrics": {key: float(own.mean())}})
        values.append({key: own})
    alone = [{"p_teacher": p, "metrics": {key: 9 - 99 * p}} for p in (0.0, 1.0)]
    return [alone[0], *rows, alone[1]], [values[0], *values, values[0]]


@pytest.mark.parametrize(
    ("ends", "noise", "verdict"),
    [
        ((0.3, 0.31), 0.01, "it shows"),
        ((0.3, 0.29), 0.01, "it does not show"),
        ((0.3, 0.3001), 0.01, "it cannot be told"),  # as 0.0001 of 256 prompts did, though every step goes up
        ((0.3, 0.29), 1.0, "it cannot be told"),
    ],
)
def test_a_trend_of_images_is_judged_by_the_paired_interval_of_the_ends(ends: Any, noise: float, verdict: str) -> None:
    rows, values = sweep("clip", ends, noise)
    (trend,) = trends(rows[::-1], values[::-1])["mixing"]  # in any order
    assert trend["verdict"] == verdict and trend["text"].endswith(f"over {N} pairs of images: {verdict}")
    assert f"from {ends[0]:.4f} at p = 0.2 to {ends[1]:.4f} at p = 0.8, by {ends[1] - ends[0]:+.4f} [" in trend["text"]
    low, high = trend["difference"]["interval"]
    apart = values[-2]["clip"] - values[1]["clip"]
    assert trend["difference"]["mean"] == pytest.approx(ends[1] - ends[0], abs=1e-6)
    assert high - low == pytest.approx(2 * 1.96 * float(apart.std()) / N**0.5, rel=0.1)  # of the pairs, not of the images' own spread


def test_images_that_are_all_alike_tell_nothing() -> None:
    (trend,) = trends(*sweep("all_right", (0.5, 0.5)))["mixing"]
    assert trend["verdict"] == "it cannot be told" and "by +0.0000 without an interval over" in trend["text"]


@pytest.mark.parametrize("values", [(22.42, 21.92, 21.95, 22.33, 23.14, 22.50), (0.4237, 0.422, 0.408, 0.415, 0.420, 0.4289)])
def test_a_number_without_a_spread_tells_nothing(values: tuple[float, ...]) -> None:
    """The paper's own sweep between its student and its teacher, and one that is flat: no difference alone says which is which."""
    rows = [{"p_teacher": p, "metrics": {"frechet": v}} for p, v in zip((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), values, strict=True)]
    (trend,) = trends(rows, [{}] * 6)["mixing"]
    assert trend["difference"] is None and trend["verdict"] == "it cannot be told" and " at p = 0.2 to " in trend["text"]


def distances(shifts: dict[Any, float], name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows whose features lie so far from the reference's mean, from the same noise, as the metric itself has them."""
    rng = torch.Generator().manual_seed(0)
    real, base = (torch.randn(n, 8, generator=rng) for n in (2000, N))
    rows, values = [], []
    for at, shift in shifts.items():
        metric = Frechet()
        metric.rows, metric.held = [base * 0.9 + shift], {"reference": moments(real)}
        rows.append({**(dict(zip(("first", "at"), at, strict=True)) if name == "switch" else {name: at}), "metrics": metric.compute()})
        values.append(metric.linear())
        assert float(values[-1]["frechet"].mean()) == pytest.approx(rows[-1]["metrics"]["frechet"])
    return rows, values


def test_a_distance_is_judged_by_how_each_image_moves_it() -> None:
    (rises,) = trends(*distances({0.2: 0.3, 0.5: 0.3, 0.8: 0.4}, "p_teacher"))["mixing"]
    assert rises["verdict"] == "it shows" and rises["difference"]["n"] == N
    (flat,) = trends(*distances({0.2: 0.02, 0.5: 0.3, 0.8: 0.03}, "p_teacher"))["mixing"]
    assert flat["verdict"] == "it cannot be told"
    orders = {(who, t): 0.3 + 0.2 * (who == "teacher") for t in (749, 250) for who in ("student", "teacher")}
    told = trends(*distances(orders, "switch"))["student"]
    assert told[-1]["text"].endswith("here at 2 of 2 nodes, by its interval at 2: it shows")
    told = trends(*distances(orders | {("student", 250): 0.9}, "switch"))["student"]
    assert told[-1]["text"].endswith("here at 1 of 2 nodes, by its interval at 1: it does not show")


def test_a_distance_of_few_images_has_no_interval_and_no_verdict() -> None:
    """Of 48 images in 64 features the interval of the difference lay on the wrong side of 0, by a bias that no resample shows.

    The true distances fall, from 64 * 0.4^2 of images that are too narrow to 64 * 0.39^2 of those that lie elsewhere.
    """
    rng, n, wide = torch.Generator().manual_seed(0), 48, 64
    rows, values, real = [], [], (torch.zeros(wide), torch.eye(wide))
    for p, scale, shift in ((0.2, 0.6, 0.0), (0.8, 1.0, 0.39)):
        metric = Frechet()
        metric.rows, metric.held = [torch.randn(n, wide, generator=rng) * scale + shift], {"reference": real}
        rows.append({"p_teacher": p, "metrics": metric.compute()})
        values.append(metric.linear())
    (told,) = trends(rows, values)["mixing"]
    assert told["difference"] is None and told["text"].endswith(
        "of which no spread is known: it takes 4 images a feature: it cannot be told"
    )
    for name, many in (("255", 4 * wide - 1), ("256", 4 * wide)):
        metric.rows = [torch.randn(many, wide, generator=rng)]
        assert (set(metric.linear()) == {"frechet"}) == (name == "256"), name  # the built-in evaluator's features, and the probe's prompts


def test_more_teacher_is_a_later_switch_where_it_is_first() -> None:
    rows = [{"first": who, "at": t, "metrics": {"clip": t / 1000, "frechet": t}} for who in ("student", "teacher") for t in (749, 500, 250)]
    values = [{"clip": torch.arange(20) / 100 + row["metrics"]["clip"] + torch.arange(20) % 2 / 1000} for row in rows]
    for i, v in enumerate(values):
        v["clip"][i] += 0.001  # else the pairs are all alike
    made = trends(rows, values)
    assert "from 0.2500 at t = 250 to 0.7490 at t = 749" in made["student"][0]["text"] and made["student"][0]["verdict"] == "it shows"
    assert "from 0.7490 at t = 749 to 0.2500" in made["teacher"][0]["text"] and made["teacher"][0]["verdict"] == "it does not show"
    assert [trend["key"] for trend in made["student"]] == ["clip", "frechet"]  # the second of who had better be first
    assert made["student"][1]["text"].endswith(
        "here at 0 of 3 nodes, of which no spread is known: it takes 4 images a feature: it cannot be told"
    )
    assert made["mixing"] == []


def test_texts_are_escaped(tmp_path: Path) -> None:
    page = probe_page(tmp_path).read_text()
    assert "<script" not in page and "<img" not in page and EVIL not in page and escape(EVIL) in page
    assert all(trend["text"] in page for told in found()["trends"].values() for trend in told)


def test_every_measure_has_a_chart_and_most_lie_in_a_fold(tmp_path: Path) -> None:
    page = probe_page(tmp_path).read_text()
    seen, fold = page.split("<summary>More of the nodes</summary>")
    fold = fold.split("</details>")[0]
    assert re.findall(r"<b>(.*?)</b>(?=<span|</fig)", fold) == [
        "Fréchet",
        "MMD",
        "energy",
        "Loss on its own latents over that on others",
        "Recovery after one step of whom",
    ]
    assert seen.count("<svg") == 3 + 4 and "energy distance over time t" in seen  # and both sweeps of two metrics
    assert fold.count("student: 0.2 at 999 time t") == 1 and "at 499" not in fold.split("Recovery")[1]  # none is left at the last node
    made = found()
    for row in made["nodes"]:  # a student of one step
        row["recovery"] = {}
    made["nodes"] = made["nodes"][:1]
    assert write_probe(tmp_path / "one.html", made).read_text().count("<svg") == 7 + 4
    bare = write_probe(tmp_path / "none.html", made | {"nodes": []}).read_text()
    assert bare.count("<svg") == 4 and "More of the nodes" not in bare
