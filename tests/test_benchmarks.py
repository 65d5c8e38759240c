"""Every benchmark runs with --quick on a random pipeline, and prints the table that its JSON holds."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of benchmarks/ as its command does: its folder stands first on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield importlib.import_module
    for name in [p.stem for p in BENCHMARKS.glob("*.py")]:
        sys.modules.pop(name, None)


def run(module: ModuleType, tiny: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """The JSON of a quick run, after a look that every cell of the printed tables comes from it."""
    threads = torch.get_num_threads()
    file = folder / "out.json"
    module.main(["--quick", "--json", str(file), "--pipeline", str(tiny), *more])
    torch.set_num_threads(threads)
    report = json.loads(file.read_text())
    assert capsys.readouterr().out.rstrip().endswith(sys.modules["common"].markdown(report))
    assert report["settings"]["quick"] is True and report["machine"]["torch"]
    return report


def test_step_cost(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(script("step_cost"), tiny, tmp_path, capsys, "--threads", "1", "--cpu_time")
    rows = {row["name"]: row for row in report["rows"]}
    student, teacher, target = (rows[name] for name in sys.modules["step_cost"].PARTS)
    assert (student["evaluations"], teacher["evaluations"], target["evaluations"]) == (1, 2, 1)
    # Medians of sums are not sums of medians, but with three rounds they are not far from each other.
    assert rows["floor"]["seconds"] == pytest.approx(student["seconds"] + teacher["seconds"] + target["seconds"], rel=0.5)
    assert rows["Lightning step"]["ratio"] > rows["floor"]["ratio"] == 1
    (goal,) = report["targets"]
    assert goal["value"] == rows["Lightning step"]["ratio"] and goal["met"] is (goal["value"] <= goal["limit"])


def test_overhead(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--set", "data.collect_every=2", "--set", "data.batch_size=8"]
    report = run(script("overhead"), tiny, tmp_path, capsys, "--threads", "1", *more)
    plain, default, *others = report["rows"]
    assert plain["formula"] == plain["counted"] == 0 and plain["prior"] == [1, 0, 0]
    # q c / (u C) with 4 nodes on average: 3 transitions of 8 trajectories every 2 updates, over 6 forwards of 8 samples.
    assert default["formula"] == pytest.approx(3 / (2 * 6)) and default["uses"] == pytest.approx(0.5 * 8 * 2 / (4 * 8))
    by_name = {row["name"]: row for row in others}
    assert by_name["0.25 teacher, every 2"]["formula"] == pytest.approx(2 * default["formula"])
    assert by_name["0.5 student, no buffer"]["formula"] == pytest.approx(0.5 * 1.5 / 6)
    for row in (default, *others):  # lengths of 2, 3 or 4 transitions are drawn: the count lies between the extremes
        if row["collect_every"]:
            assert row["formula"] * 2 / 3 - 1e-9 <= row["counted"] <= row["formula"] * 4 / 3 + 1e-9


def test_overhead_formula_is_the_one_of_the_methods(script: Any) -> None:
    """q c / (u C) for the mixed roll-outs of METHODS 1.7, with the last state stored but not evaluated."""
    module = script("overhead")
    setting = module.Setting("", module.SamplingPrior(0.5, 0.15, 0.35), every=1, buffer=module.ReplayBuffer(1000))
    uses, overhead = module.predicted(setting, batch=40, trajectories=5, nodes=4)
    assert uses == 0.5 * 40 / (4 * 5)
    assert overhead == pytest.approx(0.5 * (3 / 4) * (2 - 0.3) / (6 * uses))


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random features, so that the test needs no trained evaluator."""
    from ddil_lightning.miniature import evaluator as module

    torch.manual_seed(0)
    made = module.Evaluator().requires_grad_(False).eval()
    monkeypatch.setattr(module, "load_evaluator", lambda *args: made)


@pytest.mark.usefixtures("evaluator")
def test_lcm(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("lcm")
    options = ["--jobs", "1", "--cache", str(tmp_path / "cache"), "--variants", "lcm", "lcm_ddil+R", "same_times+R"]
    report = run(module, tiny, tmp_path, capsys, *options)
    teachers = [row for row in report["rows"] if row["variant"] == "teacher"]
    assert [row["name"] for row in teachers] == ["teacher@32", "teacher@4", "teacher@2", "teacher@1"]
    assert [row["nfe"] for row in teachers] == [64, 8, 4, 2] and teachers[0]["metrics"]["paired"] is None
    means = [row for row in report["rows"] if row["seed"] == "mean"]
    assert [row["name"] for row in means] == ["student@4", "student@2", "student@1"] * 3 and [row["nfe"] for row in means[:3]] == [4, 2, 1]
    for row in means:
        keys = ("frechet", "clip", "density", "coverage", "lpips_diversity", "attribute_accuracy", "all_right", "mode_coverage", "paired")
        assert set(keys) <= {k for k, v in row["metrics"].items() if v is not None}
    assert {(d["variant"], d["against"]) for d in report["parts"][0]["rows"]} == {
        ("lcm_ddil+R", "lcm"),
        ("same_times+R", "lcm"),
        ("lcm_ddil+R", "same_times+R"),
    }
    records = [json.loads(p.read_text()) for p in (tmp_path / "cache").glob("*-0-*.json")]
    shares = {r["variant"]: r["network_evaluations"] for r in records}
    # The control calls no network for its stand-ins, the roll-outs do.
    assert shares["same_times+R"] == shares["lcm"] and shares["lcm_ddil+R"]["student"] > shares["lcm"]["student"]
    monkeypatch.setattr(module, "student", None)  # a second call reads the cache alone
    again = run(module, tiny, tmp_path, capsys, *options)
    assert again["rows"] == report["rows"]


def test_paired_differences_and_gaps_in_closed_form(script: Any) -> None:
    module = script("lcm_table")
    rest = dict.fromkeys(module.MEASURES)

    def rows(values: dict[int, float], name: str) -> list[dict[str, Any]]:
        known = {k: {**rest, "frechet": v, "all_right": 1 / v, "attribute_accuracy": 0.9} for k, v in values.items()}
        return [{"name": f"{name}@{k}", "steps": k, "metrics": metrics} for k, metrics in known.items()]

    baseline = {"rows": rows({32: 1.0, 4: 2.0, 2: 5.0, 1: 9.0}, "teacher")}
    made = {("lcm", 0): 4.0, ("lcm", 1): 5.0, ("lcm_ddil+R", 0): 2.0, ("lcm_ddil+R", 1): 4.0}
    records = [
        {"variant": v, "seed": s, "seconds": 1.0, "updates": 7, "rows": rows({4: 0.9, 2: x, 1: x}, "student")} for (v, s), x in made.items()
    ]
    report = module.report(baseline, records, ["lcm", "lcm_ddil+R"], {"seeds": 2, "prompts": 16})
    mean = next(r for r in report["rows"] if (r["variant"], r["name"]) == ("lcm_ddil+R", "student@2"))
    assert mean["metrics"]["frechet"] == 3 and mean["se"]["frechet"] == pytest.approx(1.0)
    assert mean["metrics"]["gap_frechet"] == pytest.approx(((5 - 2) / 4 + (5 - 4) / 4) / 2)
    (part,) = report["parts"]
    minus = next(r for r in part["rows"] if r["name"] == "student@2")
    assert (minus["variant"], minus["against"]) == ("lcm_ddil+R", "lcm")
    assert minus["metrics"]["frechet"] == pytest.approx(-1.5) and minus["se"]["frechet"] == pytest.approx(0.5)
    met = {t["name"]: t["met"] for t in report["targets"]}
    assert met["Fréchet distance, 4 steps against the teacher's 32"] is True  # 0.9 against 1.0
    assert met["gap closed in frechet, 2 step(s)"] is False and met["gap closed in frechet, 1 step(s)"] is True  # 0.5 and 0.75


def test_paired_scores_the_images_of_the_prompts_alone(script: Any) -> None:
    module = script("lcm")
    pictures = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def score(sample: Any) -> dict[str, Any]:
        sample(["a", "b"], 0), sample(["c"], 2), sample(["probe"], 3)
        return {"frechet": 1.0}

    suite = SimpleNamespace(prompts=["a", "b", "c"], score=score)
    first = module.Paired(suite)
    assert first.score(lambda prompts, seed: pictures[seed : seed + len(prompts)])["paired"] is None
    assert first.images.shape == (3, 3, 4, 4) and (first.images - pictures[:3]).abs().max() <= 1 / 255 + 1e-6
    second = module.Paired(suite, first.images)
    metrics = second.score(lambda prompts, seed: (first.images.repeat(2, 1, 1, 1)[seed : seed + len(prompts)] * 0).add(0.0))
    zero = round(127.5) / 127.5 - 1  # zero as an 8-bit file holds it
    assert metrics["paired"] == pytest.approx(float((first.images.double() - zero).square().mean()), rel=1e-5)
