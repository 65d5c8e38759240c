"""Every benchmark runs with --quick on a random pipeline, and prints the table that its JSON holds."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ddil_lightning import assemble

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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
    assert capsys.readouterr().out.rstrip().endswith(sys.modules["tables"].markdown(report))
    assert report["settings"]["quick"] is True and report["machine"]["torch"]
    return report


@pytest.mark.slow
def test_floors(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an LCM step asks for: the student and the target once, and the teacher at both halves of its guidance."""
    options = ["--threads", "1", "--cpu_time", "--methods", "lcm", "tcd"]
    report = run(script("floors"), tiny, tmp_path, capsys, *options)
    lcm, tcd = report["rows"]
    size = lcm["evaluations"] / 4
    assert lcm["updates"] == 3 and size > 1 and lcm["calls"] >= 3
    for row, goal in zip((lcm, tcd), report["targets"], strict=True):
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor"]) and goal["value"] == row["ratio"]
    assert [goal["limit"] for goal in report["targets"]] == [1.05, 1.15]


@pytest.mark.slow
def test_probes(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What ddil-probe says of a student, kept by its cell; a second time nothing is probed."""
    module, options = script("probes"), ["--methods", "lcm", "--variants", "both", "--cache", str(tmp_path / "cache")]
    report = run(module, tiny, tmp_path, capsys, *options)
    (file,) = (tmp_path / "cache" / "probes").glob("*.json")
    kept = json.loads(file.read_text())
    assert [row["t"] for row in report["rows"]] == [row["t"] for row in kept["nodes"][1:]] == [749, 499, 249]
    assert [row["shift"] for row in report["rows"]] == [row["shift"]["teacher"]["energy_distance"] for row in kept["nodes"][1:]]
    mixing, switch = report["parts"]
    assert [row["frechet"] for row in mixing["rows"]] == [row["metrics"]["frechet"] for row in kept["mixing"]]
    assert [row["at"] for row in switch["rows"]][::3] == ["teacher first, down to t = 749", "student first, down to t = 749"]
    texts = [trend["text"] for told in kept["trends"].values() for trend in told]
    assert len(texts) > 5 and all(any(text in note for note in report["notes"]) for text in texts)
    file.write_text(json.dumps(kept | {"machine": kept["machine"] | {"device": "another"}}))
    assert "another" in json.dumps(run(module, tiny, tmp_path, capsys, *options)["notes"])


OWN = ("lcm_flow", "pd_flow", "dmd2_flow", "snapfusion")


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["with another network", "every one"])
def test_the_methods_with_a_floor_are_built_on_their_configs_pipelines(every: bool, script: Any, tiny: Path) -> None:
    """A flow's, whose GAN has layers of its own, and a smaller student's, which it is on another path as well."""
    module = script("floors")
    names, args = module.methods(), module.common.speed_parser("one", "", own=True).parse_args([])
    assert set(OWN) < set(names)
    for name in names if every else OWN:
        backbone = assemble(f"{name}.yaml", *module.words(f"{name}.yaml", (), 1, args))[1].backbone
        assert backbone.path == ("builtin/flow" if name.endswith("_flow") else "builtin")
    backbone = assemble("snapfusion.yaml", *module.words("snapfusion.yaml", module.common.instead(str(tiny)), 1, args))[1].backbone
    assert backbone.path == str(tiny) and backbone.source.networks == {"student": {"mid_block_type": None}}


def test_generation(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The images of ddil-test, kept or not, are those of the pipeline, called plainly."""
    report = run(script("generation"), tiny, tmp_path, capsys, "--threads", "1", "--cpu_time")
    plain, ours, kept = report["rows"]
    assert (plain["speed"], plain["different"], ours["different"], kept["different"]) == (1, 0, 0, 0) and 0.5 < ours["speed"] < 2
    speed, same = report["targets"]
    assert speed["value"] == ours["speed"] and same["met"] is True


@pytest.mark.slow
def test_dmd2_cost(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published sequence in closed form for k = 5: 2.5 k student, k + 1 critic and 2 teacher forwards, 2 k + 1 encoder passes. Here, as
    `scores.share` has it, one forward of the critic serves all its losses of the student's turn."""
    words = ("--set", "data.rollouts.every=1", "--set", "model.init_args.scores.share=true")
    report = run(script("dmd2_cost"), tiny, tmp_path, capsys, *words)
    base, plain, ddil = report["rows"]
    assert [base[key] for key in ("student", "critic", "teacher", "encoder")] == [12.5, 6, 2, 11]
    assert (plain["critic"], plain["teacher"], plain["encoder"]) == (5, 2, 6) and ddil["critic"] == 5 and ddil["teacher"] > 2
    assert plain["student"] == 5 + 3  # a roll-out of three transitions
    share = (base["forwards"] - 20.5) / 11
    assert 0.1 < share < 0.7 and plain["forwards"] == pytest.approx(15 + 6 * share)
    # Backwards: the student's 2, the critic's 2 k, the input's for the GAN 1, the encoder's 2 for every side of the discriminator.
    assert base["units"] == pytest.approx(20.5 + 2 + 10 + share * (11 + 1 + 20))
    assert plain["units"] == pytest.approx(15 + 2 + 10 + share * (6 + 1 + 10))
    assert [t["value"] for t in report["targets"]] == [plain["ratio"], ddil["ratio"]]


def test_a_trained_sample_of_the_shipped_config_asks_for_no_more_than_the_target(script: Any, tiny: Path) -> None:
    """By the formula, with the shares, cadence and buffer that lcm_ddil.yaml has."""
    overhead = script("overhead")
    _, method, data = assemble("lcm_ddil.yaml", f"model.init_args.pipeline={tiny}", "data.captions=Digits")
    own = overhead.Setting("", data.prior, data.collect_every, data.buffer)
    spared = overhead.ends(method)
    _, more = overhead.predicted(own, data.batch_size, data.trajectories, overhead.nodes(method), spared)
    assert 5.2 < (overhead.PLAIN_COST - spared[0]) * (1 + more) < overhead.ASKED


@pytest.mark.slow
def test_overhead(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--set", "data.rollouts.every=2", "--set", "data.batch_size=8", "--set", "data.buffer.answers=none"]
    report = run(script("overhead"), tiny, tmp_path, capsys, "--threads", "1", *more)
    plain, default, *others = report["rows"]
    assert plain["formula"] == plain["counted"] == 0 and plain["prior"] == [1, 0, 0]
    # q c / (u C) with 3.5 nodes on average: 2.5 transitions of 8 trajectories every 2 updates, over forwards of 8 samples: 6, less one for
    # the quarter of forward latents, and the seventh of the roll-outs' states, whose step ends at 0.
    plain_cost, asked = 6 - 1 / 4, 1 / 4 - 1 / 7
    assert default["formula"] == pytest.approx((2.5 / 2 + 0.7 * asked) / plain_cost)
    assert default["uses"] == pytest.approx(0.7 * 8 * 2 / (3.5 * 8))
    by_name = {row["name"]: row for row in others}
    assert by_name["0.25 teacher, every 2"]["formula"] == pytest.approx((2 * 2.5 / 2 + 0.25 * asked) / plain_cost)
    assert by_name["0.7 student, no buffer"]["formula"] == pytest.approx(0.7 * (1.25 + asked) / plain_cost)
    for row in (default, *others):  # lengths of 2 or 3 transitions are drawn, and few nodes: the count is near
        if row["collect_every"]:
            assert row["formula"] * 0.7 - 1e-9 <= row["counted"] <= row["formula"] * 1.3 + 1e-9
    (part,) = report["parts"]
    (own,) = part["rows"]  # asked anew, the teacher has its two and the target one, but at the end; roll-outs are the student's
    assert (own["backward"], own["teacher"]) == (2, 2) and 0.5 < own["target"] < 1
    assert own["formula"] == pytest.approx(plain_cost * (1 + default["formula"]))
    assert 1 + 2 / 2 <= own["student"] <= 1 + 3 / 2 and own["sum"] == pytest.approx(4 + own["target"] + own["student"])
    assert report["targets"][1]["value"] == own["sum"]


def test_exponents_are_those_of_known_costs(script: Any) -> None:
    """3 n^2, of which the peak is a constant but for the largest; and two ranks whose update takes a quarter longer."""
    module = script("growth")
    points = [module.Point(n, wall=[3.0 * n**2, 9e9, 0.0], cpu=[n], peak=2**20 * max(n, 4)) for n in (1, 2, 4, 8)]
    found = module.exponents(points)
    assert found == pytest.approx({"wall": 2, "wall_end": 2, "cpu": 1, "cpu_end": 1, "memory": 0.3, "memory_end": 1})
    one, two = module.Point(1, wall=[1.0, 2.0, 4.0]), module.Point(2, wall=[1.25, 2.5, 8.0])
    assert module.throughput([one, two], "wall") in (None, pytest.approx(1.6))  # None on a machine of one core


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_growth(tmp_path: Path) -> None:
    """From a process of its own, which has had no threads when it forks."""
    file = tmp_path / "out.json"
    words = [sys.executable, str(BENCHMARKS / "growth.py"), "--quick", "--json", str(file), "--pipeline", "random"]
    words += ["--of", "capacity", "ranks", "captions"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert [row["name"].split()[0] for row in report["rows"]] == ["states", "ranks,", *["captions"] * 3]
    points = report["parts"][0]["rows"]
    assert len(points) == 2 * len(report["rows"]) and all(min(p["cpu"], p["wall"], p["memory"]) > 0 for p in points)
    assert all(math.isfinite(row[key]) for row in report["rows"] for key, _ in report["columns"][1:])
    assert "in a folder of ddil-cache" in done.stdout and len(report["targets"]) == 4


def test_overhead_formula_is_the_one_of_the_methods(script: Any) -> None:
    """q c / (u C) for the mixed roll-outs of METHODS 1.7, with the last state stored but not evaluated."""
    module = script("overhead")
    found = {}
    for answers in ("none", "float32"):
        setting = module.Setting("", module.SamplingPrior(0.5, 0.15, 0.35), every=1, buffer=module.ReplayBuffer(1000, answers=answers))
        uses, found[answers] = module.predicted(setting, batch=40, trajectories=5, nodes=4)
        assert uses == 0.5 * 40 / (4 * 5)
    assert found["none"] == pytest.approx(0.5 * (3 / 4) * (2 - 0.3) / (6 * uses))
    # Drawn once on average, a state is not drawn at all with 1 / e: of the draws, as many were of a state that was drawn before.
    assert found["none"] - found["float32"] == pytest.approx(0.5 * 2 * math.exp(-1) / 6)
    # A quarter of forward latents need no target, and of roll-outs' states an eighth.
    spared = module.predicted(setting, batch=40, trajectories=5, nodes=4, ends=(1 / 4, 1 / 8))[1]
    assert spared == pytest.approx((6 * found["float32"] + 0.5 / 8) / (6 - 1 / 4))


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random features, so that the test needs no trained evaluator."""
    from ddil_lightning.miniature import evaluator as module

    torch.manual_seed(0)
    made = module.Evaluator().requires_grad_(False).eval()
    monkeypatch.setattr(module, "load_evaluator", lambda *args: made)


@pytest.mark.slow
@pytest.mark.usefixtures("evaluator")
def test_builtin(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("builtin")
    options = ["--jobs", "1", "--cache", str(tmp_path / "cache"), "--variants", "base", "both", "same_times_reflected"]
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
        ("both", "base"),
        ("same_times_reflected", "base"),
        ("both", "same_times_reflected"),
    }
    records = [json.loads(p.read_text()) for p in (tmp_path / "cache").glob("*-0-*.json")]
    shares = {r["variant"]: r["network_evaluations"] for r in records}
    # The control calls no network for its stand-ins, the roll-outs do.
    assert shares["same_times_reflected"] == shares["base"] and shares["both"]["student"] > shares["base"]["student"]
    monkeypatch.setattr(module, "train", None)
    for file in (tmp_path / "cache").glob("*-0-*.json"):
        file.unlink()  # what other prompts would ask for is not there either: the students are scored anew, and not trained
    anew = run(module, tiny, tmp_path, capsys, *options)
    assert [row["metrics"] for row in anew["rows"]] == [row["metrics"] for row in report["rows"]] and anew["notes"] == report["notes"]
    monkeypatch.setattr(module, "student", None)  # another call reads the cache alone
    again = run(module, tiny, tmp_path, capsys, *options)
    assert again["rows"] == anew["rows"]


def test_builtin_sets_a_method_s_own_options_on_its_students_alone(script: Any, tiny: Path, tmp_path: Path) -> None:
    module = script("builtin")
    common = {"updates": None, "captions": None, "seed": 0, "seeds": 1, "variants": ["both"]}

    def run(method: str, *words: str, n: int = 16) -> Any:
        teacher = module.Teacher(str(tiny), "weights", n, tmp_path)  # it has no words: its rows serve all methods
        (made,) = module.runs(SimpleNamespace(method=method, set=[*words], **common), teacher)
        return made

    own, plain, other = run("pd", "model.init_args.teacher_steps=16"), run("pd"), run("lcm")
    assert own.words[-1] == "model.init_args.teacher_steps=16" and own.file != plain.file and own.students != plain.students
    assert own.teacher.file == other.teacher.file and own.file != other.file
    more = run("pd", "model.init_args.teacher_steps=16", n=32)  # more prompts: other rows of the same student
    assert more.students == own.students != other.students and more.file != own.file and more.teacher.file != own.teacher.file


def test_paired_differences_and_gaps_in_closed_form(script: Any) -> None:
    module = script("builtin_table")
    rest = dict.fromkeys(module.MEASURES)

    def rows(values: dict[int, float], name: str) -> list[dict[str, Any]]:
        known = {k: {**rest, "frechet": v, "all_right": 1 / v, "attribute_accuracy": 0.9} for k, v in values.items()}
        return [{"name": f"{name}@{k}", "steps": k, "metrics": metrics} for k, metrics in known.items()]

    baseline = {"rows": rows({32: 1.0, 4: 2.0, 2: 5.0, 1: 9.0}, "teacher")}
    made = {("base", 0): 4.0, ("base", 1): 5.0, ("both", 0): 2.0, ("both", 1): 4.0}
    records = [
        {"variant": v, "seed": s, "rows": rows({4: 0.9, 2: x, 1: x}, "student"), "seconds": 1.0, "updates": 7}
        | {"network_evaluations": {"student": 1000 * (s + 1), "teacher": 500}}
        for (v, s), x in made.items()
    ]
    report = module.report("lcm", baseline, records, ["base", "both"], {"seeds": 2, "prompts": 16})
    assert "network evaluations of a training, one sample each: base 2,000, both 2,000" in report["notes"]
    mean = next(r for r in report["rows"] if (r["variant"], r["name"]) == ("both", "student@2"))
    assert mean["metrics"]["frechet"] == 3 and mean["se"]["frechet"] == pytest.approx(1.0)
    assert mean["metrics"]["gap_frechet"] == pytest.approx(((5 - 2) / 4 + (5 - 4) / 4) / 2)
    (part,) = report["parts"]
    minus = next(r for r in part["rows"] if r["name"] == "student@2")
    assert (minus["variant"], minus["against"]) == ("both", "base")
    assert minus["metrics"]["frechet"] == pytest.approx(-1.5) and minus["se"]["frechet"] == pytest.approx(0.5)
    met = {t["name"]: t["met"] for t in report["targets"]}
    assert met["Fréchet distance, 4 steps against the teacher's 32"] is True  # 0.9 against 1.0
    assert met["gap closed in frechet, 2 step(s)"] is False and met["gap closed in frechet, 1 step(s)"] is True  # 0.5 and 0.75


def test_paired_scores_the_images_of_the_prompts_alone(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddil_lightning.evaluation.generation import Generation, Source
    from ddil_lightning.evaluation.suite import Suite

    module = script("builtin")
    pictures = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def score(self: Any, sample: Any, processes: Any, look: Any) -> dict[str, Any]:
        sample(["a", "b"], 0), sample(["c"], 2), sample(["probe"], 3)
        return {"frechet": 1.0}

    def measured(suite: Any, sample: Any) -> dict[str, Any]:
        """As a row measures it, which changes the suite's batch."""
        return Generation().measured(suite, Source("x", sample, lambda: 0, dict, 128))[0]

    monkeypatch.setattr(Suite, "score", score)
    first = module.Paired.beside(Suite("x", ["a", "b", "c"]))
    assert measured(first, lambda prompts, seed: pictures[seed : seed + len(prompts)]) == {"frechet": 1.0, "paired": None}
    assert first.images.shape == (3, 3, 4, 4) and (first.images - pictures[:3]).abs().max() <= 1 / 255 + 1e-6
    second = module.Paired.beside(Suite("x", ["a", "b", "c"]), first.images)
    metrics = measured(second, lambda prompts, seed: torch.zeros(len(prompts), 3, 4, 4))
    zero = round(127.5) / 127.5 - 1  # zero as an 8-bit file holds it
    assert metrics["paired"] == pytest.approx(float((first.images.double() - zero).square().mean()), rel=1e-5)


@pytest.mark.usefixtures("evaluator")
@pytest.mark.slow
def test_a_cell_of_the_reproduction(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, scored twice and its pictures taught from; without a place of its own it is none of the repository's cells."""
    module = script("reproduce")
    report = run(module, tiny, tmp_path, capsys, "--cache", str(tmp_path), "--methods", "lcm", "--variants", "base", "--jobs", "1")
    assert [part["title"] for part in report["parts"]] == ["LCM, 4 steps", "LCM, 2 steps", "LCM, 1 step"]
    cell = json.loads((tmp_path / "cells" / "lcm-base-100.json").read_text())
    assert cell["rows"][0]["metrics"]["paired"] > 0 and cell["again"][0]["metrics"]["frechet"] != cell["rows"][0]["metrics"]["frechet"]
    assert set(cell["downstream"]) == {"4", "2", "1"} and cell["network_evaluations"]["student"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("evaluator")
def test_reproduce(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, page = script("reproduce"), tmp_path / "page.md"
    places = ["--cells", str(tmp_path / "cells"), "--cache", str(tmp_path / "cache"), "--page", str(page), "--jobs", "1"]
    options = [*places, "--methods", "lcm", "pd", "--variants", "base", "both"]
    report = run(module, tiny, tmp_path, capsys, *options)
    titles = [part["title"] for part in report["parts"]]
    assert titles[:-2] == ["PD, 4 steps", "PD, 2 steps", "LCM, 4 steps", "LCM, 2 steps", "LCM, 1 step"] and "tell" in titles[-1]
    for part, row in zip(report["parts"][:-2], report["parts"][-2]["rows"], strict=True):
        base, both = part["rows"]
        assert both["evaluations"] > base["evaluations"] and 0 <= both["cas"]["mean"] <= 1 and base["frechet"]["paired"] is None
        difference = both["frechet"]["paired"]["mean"]
        assert difference == pytest.approx(both["frechet"]["mean"] - base["frechet"]["mean"]) == pytest.approx(row["frechet"])
        assert row["name"].startswith(part["title"].split(",")[0]) and row["frechet_again"] != row["frechet"]
    assert "## LCM, 4 steps" in page.read_text() and "| 24.39 |" in page.read_text()
    monkeypatch.setattr(module, "cell", pytest.fail)  # every cell is there, and none is made again
    assert run(module, tiny, tmp_path, capsys, *options)["parts"] == report["parts"]
    file = tmp_path / "cells" / "lcm-both-100.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"depends": "on other settings"}))
    again = run(module, tiny, tmp_path, capsys, *places, "--only_page")
    assert again["notes"][-1] == "left out, because it was made with other settings than today's: lcm both seed 100"


@pytest.mark.parametrize(("page", "words"), [("reproduction.md", []), ("flow.md", ["--pipeline", "builtin/flow"])])
def test_the_page_of_the_reproduction_is_made_of_the_cells(page: str, words: list[str], script: Any, tmp_path: Path) -> None:
    """And every cell was made with the settings that are shipped."""
    report = script("reproduce").main(["--only_page", "--page", str(tmp_path / "page.md"), "--cache", str(tmp_path), *words])
    assert (tmp_path / "page.md").read_text() == (BENCHMARKS.parent / "docs" / page).read_text()
    assert not [note for note in report["notes"] if "left out" in note]


def test_cells_of_the_repository_are_not_replaced_by_smaller_ones(script: Any, tmp_path: Path) -> None:
    module = script("reproduce")
    args = SimpleNamespace(methods=["lcm"], variants=["both"], seed=100, seeds=1, updates=None, captions=None, set=[])
    (run,) = module.wanted(args, module.Teacher("builtin", "weights", 16, tmp_path))
    with pytest.raises(ValueError, match="cells of the repository, of 1000 prompts and whole runs: give these another place"):
        module.check_place([run], module.CELLS, module.LESSON)
    module.check_place([run], tmp_path, module.LESSON)
    module.check_place([dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, n=1000))], module.CELLS, module.LESSON)
    assert len({module.depends(run, lesson) for lesson in ((1000, 300), (64, 5))}) == 2


def test_what_the_reproduction_says_of_its_cells(script: Any) -> None:
    module, names = script("reproduce_table"), ("base", "both")
    frechet = {("base", 100): (1.0, 1.4), ("base", 101): (2.0, 2.0), ("both", 100): (0.5, 0.5), ("both", 101): (1.0, 0.6)}
    cells = [
        {
            "method": "lcm",
            "variant": v,
            "seed": s,
            "updates": 7,
            "seconds_training": 1.0,
            "network_evaluations": {"student": 10 * (v in names)},
        }
        | {"rows": [{"steps": 4, "metrics": {"frechet": a}}], "again": [{"steps": 4, "metrics": {"frechet": b}}]}
        | {"downstream": {"4": {"cas": a / 4}}, "protocol": {"n": 16}, "machine": {"device": "x", "torch": "2", "date": "d"}}
        for (v, s), (a, b) in frechet.items()
    ]
    report = module.report(cells, {"rows": [], "downstream": {"real": {"cas": 0.9}}})
    table, apart, spread = report["parts"]
    assert [(r["frechet"], r["frechet_again"], r["cas"]) for r in apart["rows"]] == [
        (-0.5, pytest.approx(-0.9), -0.125),
        (-1.0, pytest.approx(-1.4), -0.25),
    ]
    base, both = table["rows"]
    assert base["frechet"] == {"mean": 1.5, "se": pytest.approx(0.5), "paired": None} and both["cas"]["mean"] == pytest.approx(0.1875)
    assert both["frechet"]["paired"] == {"mean": -0.75, "t": None, "p": None}  # of -0.5 and -1: two have no t
    (row,) = [r for r in spread["rows"] if r["name"].startswith("Fr")]
    # The second time differs by -0.4, 0, 0 and 0.4: the variance of a single value is half of that of the difference.
    assert row["lcm_within"] == pytest.approx((0.32 / 3 / 2) ** 0.5)
    assert row["lcm_between"] == pytest.approx(((0.5 + 0.125) / 2) ** 0.5) and "pd_between" not in row


def test_a_classifier_is_taught_what_captions_say(script: Any) -> None:
    module = script("downstream")
    told = module.lesson(64)
    open_ones = [c for c, colour in zip(told.captions, told.labels["colour"], strict=True) if colour < 0]
    assert open_ones and all(" and " not in c for c in told.captions)
    assert not any(word in c.split() for c in open_ones for word in ("red", "green", "blue", "yellow", "purple", "cyan"))
    first, second = (module.taught(told.real, told.labels, updates=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    nothing = {name: torch.full_like(values, -1) for name, values in told.labels.items()}
    assert all(bool(p.isfinite().all()) for p in module.taught(told.real, nothing, updates=2).parameters())


@pytest.mark.slow
def test_a_classifier_learns_from_pictures_that_differ(script: Any) -> None:
    module = script("downstream")
    told = module.lesson(64)
    found = module.real(400, 120)
    assert found["cas"] <= min(found[f"cas_{name}"] for name in module.HEADS) and found["cas_background"] > 0.9
    # Pictures that all show one scene teach nothing of the others.
    same = module.score(lambda prompts, seed: told.real[:1].expand(len(prompts), -1, -1, -1), 400, 120)
    assert same["cas_shape"] < 0.5 < found["cas_shape"] and same["cas"] < 0.05


@pytest.mark.parametrize("method", ["pd", "lcm", "dmd2"])
@pytest.mark.parametrize("place", ["", "toy2d/"])
def test_schedules_have_the_mean_prior_of_the_config(script: Any, method: str, place: str) -> None:
    import yaml

    from ddil_lightning.imitation import prior as priors
    from ddil_lightning.packaged import find_config

    module, config = script("schedules"), f"{place}{method}_ddil.yaml"
    found = yaml.safe_load(find_config(config).read_text())
    shipped = found["data"]["prior"]
    told = found["model"]["init_args"]
    lengths = [stage["updates"] for stage in told.get("stages", [{"updates": told.get("updates")}])]
    for name in module.SCHEDULES[1:]:
        said = json.loads(module.of_config(name, config)[-1].removeprefix("trainer.callbacks+="))["init_args"]["schedule"]
        parts = {
            k: [priors.SamplingPrior(**p) for p in v] if k == "priors" else priors.SamplingPrior(**v) if isinstance(v, dict) else v
            for k, v in said["init_args"].items()
        }
        schedule = getattr(priors, said["class_path"])(**parts)
        way = [schedule(clock) for length in lengths for clock in range(length)]
        if "gated" in name:  # they begin where the ramps do, and move as the training goes
            assert way[0].rollouts < 1 - shipped["forward"] < schedule.last.rollouts
            continue
        assert sum(p.rollouts for p in way) / len(way) == pytest.approx(1 - shipped["forward"], abs=0.001)
        if name == "mixed":
            assert {(round(p.forward, 5), round(p.p_student, 5)) for p in way} == {(shipped["forward"], 0.5)}
        elif name in ("piecewise", "dagger"):
            assert way[0].p_student < way[-1].p_student and len({round(p.forward, 5) for p in way}) == 1
        else:
            assert (way[0].rollouts < way[-1].rollouts) is (name != "falling")


def test_no_kept_result_has_a_path_of_the_machine_it_was_made_on() -> None:
    kept = [
        file
        for folder in ("probed", "reproduced", "reproduced_flow", "scheduled", "zoo", "zoo_builtin")
        for file in (BENCHMARKS / folder).glob("*.json")
    ]
    assert len(kept) > 100 and not [file.name for file in kept if '"/' in file.read_text()]


def test_what_is_said_of_the_probed_students_follows_from_their_cells() -> None:
    """docs/results.md names every trend with an interval that shows or does not, and no other."""
    cells = {file.stem: json.loads(file.read_text()) for file in (BENCHMARKS / "probed").glob("*.json")}
    told = {
        (trend["verdict"], trend["key"], sweep, name): trend["difference"]["mean"]
        for name, cell in cells.items() for sweep, made in cell["trends"].items() for trend in made
        if trend["difference"] and trend["verdict"] != "it cannot be told"
    }  # fmt: skip
    shows, not_so, dmd2 = "it shows", "it does not show", ("dmd2-base-100", "dmd2-both-100")
    rise = [told.pop((shows, "clip", "teacher", f"lcm-{variant}-102")) for variant in ("base", "both")]
    clip, right = ([told.pop((not_so, key, "mixing", name)) for name in dmd2] for key in ("clip", "all_right"))
    alone = [told.pop((not_so, key, "student", dmd2[0])) for key in ("clip", "all_right")]
    assert not told
    said = " ".join((BENCHMARKS.parent / "docs" / "results.md").read_text().split())
    assert "CLIP rises for LCM with the teacher first ({:+.3f} and {:+.3f})".format(*rise) in said
    mixed = "(CLIP {:.3f} and {:.3f}, everything right {:.3f} and {:.3f})".format(*clip, *right)
    assert f"both fall for DMD2 in the mixing sweep {mixed} and for DMD2 without DDIL with the student first" in said
    assert "with the student first ({:.3f} and {:.3f}), and all else cannot be told".format(*alone) in said


def test_a_probe_is_of_the_student_that_the_reproduction_has(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the code of a training is another, its config may be the same: a cell that is made anew has other rows."""
    module = script("probes")
    teacher = module.Teacher("builtin", "w", 256, tmp_path)
    args = SimpleNamespace(method="dmd2", variants=["both"], seed=100, seeds=1, updates=None, captions=None, set=[])
    (run,) = module.builtin.runs(args, teacher)
    monkeypatch.setattr(module.reproduce, "CELLS", tmp_path)
    depends = [module.depends(run)]
    for rows in ([{"name": "student@4"}], [{"name": "student@4", "nfe": 4}]):
        module.reproduce.file_of(run, tmp_path).write_text(json.dumps({"rows": rows, "seconds": 1.0}))
        depends.append(module.depends(run))
    assert len(set(depends)) == 3


def test_a_number_without_a_spread_is_told_anew_of_older_cells(script: Any) -> None:
    cell = json.loads((BENCHMARKS / "probed" / "pd-both-100.json").read_text())
    told = [text for text in script("probes").said(cell) if "Fréchet" in text]
    assert len(told) == 3 and all(
        text.endswith("of which no spread is known: it takes 4 images a feature: it cannot be told") for text in told
    )
    assert "mixing: " in told[0] and "0.4216 at p = 0.2 to 0.4200 at p = 0.8" in told[0]


def test_schedules_are_paired_against_cells_of_today(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("schedules")
    monkeypatch.setattr(module.reproduce, "CELLS", tmp_path)
    found, lesson = module.Teacher("builtin", "w", 1000, tmp_path), (1000, 300)
    run = module.Run(found, "lcm", "both", 100, "lcm_ddil.yaml", (module.STATIC,), None)
    for seed, depends in ((100, module.reproduce.depends(run, lesson)), (101, "another")):
        (tmp_path / f"lcm-both-{seed}.json").write_text(json.dumps({"seed": seed, "depends": depends}))
    args = SimpleNamespace(captions=None)
    assert [cell["seed"] for cell in module.constant(args, found, lesson, ())] == [100]


@pytest.mark.slow
def test_schedules(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("schedules")
    report = run(
        module, tiny, tmp_path, capsys, "--methods", "pd", "lcm", "--schedules", "linear", "gated_by", "--jobs", "1", "--seed", "7"
    )
    assert [(r["method"], r["variant"]) for r in report["rows"]] == [
        ("pd", "constant"), ("pd", "linear"), ("lcm", "constant"), ("lcm", "linear"), ("lcm", "gated_by")
    ]  # fmt: skip
    assert report["rows"][0]["coverage"]["paired"] is None and report["rows"][1]["coverage"]["paired"] is not None


def test_cells_of_the_zoo_and_what_costs_nothing_beside_them(script: Any, tmp_path: Path) -> None:
    """Two updates of one method: the student that is sampled anew is the published one, and the page sets it beside DDIL's."""
    module, threads = script("zoo"), torch.get_num_threads()
    args = SimpleNamespace(seed=2000, seeds=2, members=2, methods=["lcm"], quick=True, set=["model.init_args.updates=2"], n=64)
    cells = module.wanted(args, None)
    assert [c.variant for c in cells] == ["base", "reflected", "ddil", "both", "remedied"] and len({c.depends for c in cells}) == 5
    assert [c.variant for c in module.wanted(args, 1000)] == ["base", "reflected", "ddil", "both"]
    made = {c.variant: module.make(c, tmp_path) for c in cells if c.variant in ("base", "ddil", "remedied")}
    torch.set_num_threads(threads)
    assert all(c.known(tmp_path) == json.loads((tmp_path / c.file).read_text()) for c in cells if c.variant in made)
    base, anew = made["base"], made["remedied"]
    assert base["updates"] == anew["updates"] == 2 and anew["scores"] == base["scores"] and "remedied" not in base
    assert all(scores.keys() == base["scores"].keys() and scores != base["scores"] for scores in anew["remedied"].values())
    others = [{**made["ddil"], "variant": variant} for variant in ("reflected", "both")]
    told = module.report([*made.values(), *others], 1000)
    (row,), (first, *_) = told["rows"], [part for part in told["parts"] if part["title"] == "Energy distance ↓, without training"]
    (free,) = first["rows"]
    assert free["ddil"] == row["energy_distance/ddil"] and free["base"] == row["energy_distance/base"]
    mine = [x - y for x, y in zip(*(s["energy_distance"] for s in (anew["remedied"]["es1.05"], base["scores"])), strict=True)]
    assert free["es1.05"]["mean"] == pytest.approx(sum(mine) / 2) and free["es1.05"]["mean"]
    assert "without training: the published student" in told["notes"][-1]
    assert "they are not independent, and t says less than it seems" in module.page(told, module.markdown)
    plain = module.report([base, made["ddil"], *others], 1000)
    assert not any("without training" in part["title"] for part in plain["parts"]) and len(plain["notes"]) == 3


def test_second_sets_of_other_scenes_stand_in_no_table_together(script: Any) -> None:
    """A cell that was made anew has another second set and another lesson than those beside it."""
    table, row = script("reproduce_table"), {"steps": 4, "metrics": {"frechet": 1.0}}
    cells = [
        {"method": "pd", "variant": "base", "seed": seed, "rows": [row], "again": [row], "downstream": {"4": {"cas": 0.5}}, **more}
        for seed, more in ((100, {}), (101, {}), (102, {"sets": 2}))
    ]
    found, again = table.values(cells), table.values(cells, "again")
    assert [at[3] for at in found] == [100, 101, 102] and [at[3] for at in again] == [100, 101]
    assert ["cas" in numbers for numbers in found.values()] == [True, True, False]
    assert table.sets(cells) == 1 and table.sets(cells[2:]) == 2


def test_what_ddil_adds_to_data_at_the_same_times(script: Any) -> None:
    """Seed by seed: of the two groups of base and DDIL the control has one."""
    scores = {"base": [[4.0, 6.0], [0.0, 0.0]], "ddil": [[1.0, 2.0], [9.0, 9.0]], "same_times": [[3.0, 3.0]]}
    cells = [
        {"method": "pd", "variant": variant, "budget": "updates", "seeds": [2000 + 2 * g], "scores": {"mode_kl": values}}
        for variant, groups in scores.items()
        for g, values in enumerate(groups)
    ]
    (row,) = script("zoo_table").controlled(cells, "mode_kl")["rows"]
    assert (row["seeds"], row["base"]["mean"]) == (2, 5.0)
    assert [row[name]["mean"] for name in ("same", "ddil", "latents")] == [-2.0, -3.5, -1.5]
    assert script("zoo_table").controlled(cells[:4], "mode_kl")["rows"] == []  # no control, no row


def test_every_cell_of_equal_evaluations_has_spent_them(script: Any) -> None:
    """Cells of UFOGen had spent two thirds, their length being that of a code with longer roll-outs."""
    zoo, built_in = script("zoo"), script("zoo_builtin")
    cells = [json.loads(file.read_text()) for file in zoo.CELLS.glob("*-evaluations-*.json")]
    spent = {(c["method"], c["variant"], *c["seeds"]): c["evaluations"] / zoo.EVALUATIONS for c in cells}
    cells = [json.loads(file.read_text()) for file in built_in.CELLS.glob("*-evaluations-*.json")]
    spent |= {(c["method"], c["variant"]): sum(c["network_evaluations"].values()) / built_in.EVALUATIONS for c in cells}
    assert len(spent) > 50 and {name: share for name, share in spent.items() if abs(share - 1) > script("zoo_table").NEAR} == {}


def test_a_training_of_other_updates_than_its_trial_is_made_as_long_as_it_says(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imagine Flash + DDIL had spent 13 % more than it was given: its first roll-outs are not those of the whole."""
    module = script("zoo_builtin")
    method, asked = SimpleNamespace(updates=100), list[int]()
    run = module.Run(None, "lcm", "ddil", 100, "lcm_ddil.yaml", (), None)

    def train(run: Any, each: Any) -> tuple[Any, float]:
        asked.append(int(run.words[-1].rpartition("=")[2]))
        return SimpleNamespace(evaluations={"all": asked[-1] * next(each)}, student_updates=asked[-1]), 1.0

    monkeypatch.setattr(module, "lasting", lambda run, spent: (method, spent / (10 * method.updates)))
    monkeypatch.setattr(module, "longer", lambda method, times: f"model.init_args.updates={round(times * method.updates)}")
    for each, trained in (([10], [1000]), ([20, 20], [1000, 500]), ([20, 40], None)):
        asked.clear()
        monkeypatch.setattr(module.builtin, "trained", partial(train, each=iter(each)))
        if trained is None:
            with pytest.raises(ValueError, match="lcm-ddil-evaluations-100.json was given 10,000 evaluations and has spent 20,000"):
                module.trained(module.Cell(run, 10_000))
        else:
            _, made, _ = module.trained(module.Cell(run, 10_000))
            assert asked == trained and made.evaluations == {"all": 10_000}


def test_a_cell_of_another_count_is_made_anew(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the usual one, whose evaluations say how long it is; and where that does not help it is refused, and not kept."""
    zoo = script("zoo")
    words = ("model.init_args.updates=100",)
    cell = zoo.Cell("lcm", "ddil", (2000,), words, 64, 30_000)
    asked, rate = [], {"usual": 300, "equal": 200}

    def train(task: Any, variant: str, config: str, told: Any, remedies: Any) -> dict[str, Any]:
        updates = int(str(told[-1]).rpartition("=")[2]) if "updates=" in str(told[-1]) else 100
        asked.append(updates)
        count = rate["usual" if updates == 100 else "equal"]
        return {"method": "lcm", "variant": variant, "seeds": [2000], "updates": updates, "evaluations": updates * count}

    monkeypatch.setattr(zoo.toy2d, "trained", train)
    zoo.make(cell.usual, tmp_path)
    rate["usual"] = 200
    made = zoo.make(cell, tmp_path)
    assert made["evaluations"] == 30_000 and asked == [100, 100, 100, 150]
    assert cell.known(tmp_path) is not None and cell.usual.known(tmp_path)["evaluations"] == 20_000
    (tmp_path / cell.file).write_text(json.dumps({**made, "evaluations": 20_000}))
    assert cell.known(tmp_path) is None
    rate["equal"] = 400
    with pytest.raises(ValueError, match=r"lcm-ddil-evaluations-2000.json was given 30,000 evaluations and has spent 60,000"):
        zoo.make(cell, tmp_path)


def test_the_zoo_takes_a_pair_of_ones_own(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = script("zoo")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy2d").mkdir()
    for name in ("headed.yaml", "headed_ddil.yaml", "half.yaml"):
        (tmp_path / "toy2d" / name).write_text("")
    assert zoo.pair("headed") == "headed" and zoo.pair("lcm") == "lcm"
    with pytest.raises(zoo.argparse.ArgumentTypeError, match="no config toy2d/half_ddil.yaml"):
        zoo.pair("half")


@pytest.mark.slow
def test_the_zoo_is_made_cell_by_cell(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, threads = script("zoo"), torch.get_num_threads()
    options = ["--quick", "--methods", "sid", "pd", "--jobs", "1", "--cells", str(tmp_path / "cells"), "--page", str(tmp_path / "zoo.md")]
    report = module.main(options)
    torch.set_num_threads(threads)
    assert {(r["method"], r["budget"], r["seeds"]) for r in report["rows"]} == {
        (m, b, 2) for m in ("sid", "pd") for b in ("updates", "evaluations")
    }
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    assert len(files) == 2 * 2 * 4 + 2  # and PD's published student, sampled anew, and its control
    for file in files:  # of the equal budget nobody is given more than a step beyond it, and PD's stages are as long as that allows
        cell = json.loads(file.read_text())
        assert cell["budget"] == "updates" or 0.5 * 20_000 < cell["evaluations"] < 2 * 20_000
    next(iter(files)).unlink()
    capsys.readouterr()
    module.main(options)  # what is there is not made again
    torch.set_num_threads(threads)
    assert sum(file.stat().st_mtime_ns != before for file, before in files.items()) == 1
    page = (tmp_path / "zoo.md").read_text()
    assert "Energy distance ↓, DDIL beside data at the same times" in page
    assert page.startswith("# Every method") and "| sid | 2 |" in page and "Coverage ↑, at equal network evaluations" in page


@pytest.mark.slow
def test_the_zoo_of_the_built_in_pipeline(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both budgets, whole stages or updates; what is there is not made again; and a budget that everybody keeps to."""
    module = script("zoo_builtin")
    options = ["--jobs", "1", "--cache", str(tmp_path), "--evaluations", "4000"]
    short = ["--methods", "tcd", "--set", "model.init_args.updates=40"]
    by_updates, equal = run(module, tiny, tmp_path, capsys, *options, *short)["parts"]
    assert "each at its config's updates" in by_updates["title"] and "at equal network evaluations" in equal["title"]
    assert [(row["name"], row["seeds"], row["updates"]) for row in by_updates["rows"]] == [("tcd", 1, 40), ("+ DDIL", 1, 40)]
    assert by_updates["rows"][1]["evaluations"] > by_updates["rows"][0]["evaluations"] == 40 * 2 * 4
    plain, ddil = equal["rows"]
    assert plain["evaluations"] == 4000 and ddil["evaluations"] == pytest.approx(4000, rel=0.1) and ddil["updates"] < plain["updates"]
    assert ddil["coverage"]["mean"] - plain["coverage"]["mean"] == pytest.approx(ddil["coverage"]["paired"]["mean"])
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    next(iter(files)).unlink()
    run(module, tiny, tmp_path, capsys, *options, *short)  # what is there is not made again
    assert len(files) == 4 and sum(file.stat().st_mtime_ns != before for file, before in files.items()) == 1
    (staged,) = run(module, tiny, tmp_path, capsys, *options, "--methods", "pd", "--budgets", "evaluations")["parts"]
    assert all(row["evaluations"] == pytest.approx(4000, rel=0.1) for row in staged["rows"])


@pytest.mark.slow
def test_toy2d(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, file, picture = script("toy2d"), tmp_path / "out.json", tmp_path / "toy.png"
    options = ["--methods", "pd", "lcm", "--variants", "both", "ddil", "longer_base", "same_times", "--jobs", "1", "--seed", "7"]
    threads = torch.get_num_threads()
    module.main(["--quick", "--json", str(file), "--plot", str(picture), *options])
    torch.set_num_threads(threads)
    report = json.loads(file.read_text())
    assert capsys.readouterr().out.rstrip().endswith(sys.modules["tables"].markdown(report))
    rows = {(r["method"], r["variant"]): r for r in report["rows"]}
    assert [v for m, v in rows if m == "pd"] == ["base", "ddil", "both", "longer_base", "same_times"]
    for method in ("pd", "lcm"):
        base, ddil, longer = (rows[method, v] for v in ("base", "ddil", "longer_base"))
        assert base["energy_distance"]["paired"] is None and base["seeds"] == 2
        for key in ("energy_distance", "coverage", "density", "mode_kl", "high_quality", "teacher_rmse", "shift"):
            pair = ddil[key]["paired"]
            assert pair["mean"] == pytest.approx(ddil[key]["mean"] - base[key]["mean"])
            assert pair["p"] is None or 0 <= pair["p"] <= 1
        nodes = ddil["shift_at"]  # at few samples an energy distance may be below 0
        assert len(nodes) == 3 and ddil["shift"]["mean"] == pytest.approx(sum(v["mean"] for v in nodes.values()) / 3)
        assert rows[method, "same_times"]["evaluations"] == base["evaluations"] < ddil["evaluations"]
        # Whole updates can only come near the evaluations that ddil has spent.
        assert longer["updates"] > base["updates"] and longer["evaluations"] == pytest.approx(ddil["evaluations"], rel=0.35)
    from PIL import Image

    assert Image.open(picture).size[0] > 1000


@pytest.mark.slow
def test_a_prior_of_ones_own_is_of_the_variants_with_ddil(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy2d, seen = script("toy2d"), set()
    assemble = toy2d.assemble

    def watched(config: str, *words: str) -> Any:
        made = assemble(config, *words)
        seen.add((config, "data.rollouts.control=true" in words, dataclasses.astuple(made.data.prior)[:3]))
        return made

    monkeypatch.setattr(toy2d, "assemble", watched)
    variants = ["--variants", "ddil", "same_times", "teacher_rollouts", "student_rollouts"]
    toy2d.main(
        ["--quick", "--methods", "dmd2", *variants, "--prior", "0.5", "0.25", "0.25", "--jobs", "1", "--json", str(tmp_path / "x.json")]
    )
    ddil = "toy2d/dmd2_ddil.yaml"
    ours = {(ddil, False, (0.5, 0.25, 0.25)), (ddil, True, (0.5, 0.25, 0.25)), (ddil, False, (0.5, 0, 0.5)), (ddil, False, (0.5, 0.5, 0))}
    assert seen == {("toy2d/dmd2.yaml", False, (0, 1, 0)), *ours}


@pytest.mark.slow
def test_what_a_group_of_seeds_is_kept_under(script: Any, tmp_path: Path) -> None:
    """Its name follows from every field of the task; a group that is kept is not trained again."""
    toy2d = script("toy2d")
    task = toy2d.Task("lcm", ("base",), (3, 4), (*toy2d.quick("lcm"),), 64, None)
    assert task.said("base") == ("toy2d/lcm.yaml", ("--seed", "3", "data.buffer.answers=none", *task.group, "model.init_args.reflect=off"))
    other = {"method": "pd", "variants": ("base", "ddil"), "seeds": (3,), "words": (), "n": 65, "prior": (0.5, 0.5, 0.0)}
    assert set(other) == {field.name for field in dataclasses.fields(task)}
    names = [task.file, *(dataclasses.replace(task, **{name: value}).file for name, value in other.items())]
    assert len(set(names)) == len(names) and task.file == dataclasses.replace(task).file
    threads = torch.get_num_threads()
    records = toy2d.work(task, tmp_path)
    torch.set_num_threads(threads)
    kept = tmp_path / task.file
    assert records == json.loads(kept.read_text()) and [(r["variant"], r["seeds"]) for r in records] == [("base", [3, 4])]
    kept.write_text("[]")
    assert toy2d.work(task, tmp_path) == []


def test_paired_t_against_scipy_and_a_table(script: Any) -> None:
    from scipy import stats

    paired = script("toy2d_table").paired
    a, b = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).tolist()
    found, known = paired(a, b), stats.ttest_rel(a, b)
    assert found["t"] == pytest.approx(known.statistic) and found["p"] == pytest.approx(known.pvalue)
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t = 3.4641; with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    pair = paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert pair["mean"] == 2 and pair["t"] == pytest.approx(12**0.5) and pair["p"] == pytest.approx(1 - (12 / 14) ** 0.5)
    assert paired([1.0, 1.0], [0.5, 0.5]) == {"mean": 0.5, "t": None, "p": None} and paired([1.0], [0.0])["p"] is None
    assert paired([1.0, 3.0], [0.0, 0.0]) == {"mean": 2.0, "t": None, "p": None}  # one degree of freedom


def test_a_standard_error_has_the_decimals_of_its_value(script: Any) -> None:
    cell = script("tables").cell
    shown = [cell(0.0324, 6e-7), cell(24.58, 0.123), cell(0.008178, 7.9e-5), cell(2e-9, 1e-9), cell(0.5), cell(None, None)]
    assert shown == ["0.032 ± 0.000", "24.58 ± 0.12", "0.008178 ± 0.000079", "2e-09 ± 1e-09", "0.500", "–"]
    near_nothing = ((-9.4e-8, -0.1), (-0.005727, -24.1), (0.0125, 3.0), (0.002, None))
    assert [cell({"mean": mean, "t": t, "p": None}) for mean, t in near_nothing] == [
        "0.0000 [-0.1]",
        "-0.0057 [-24.1]",
        "0.013 [+3.0]",
        "0.0020",
    ]


def test_toy2d_targets_know_their_direction(script: Any) -> None:
    table = script("toy2d_table")

    def records(both: float) -> list[dict[str, Any]]:
        scores = {"base": [0.0, 0.1, 0.2, 0.1], "both": [both + x for x in (0.0, 0.1, 0.21, 0.1)]}
        made = []
        for variant, values in scores.items():
            for k in (0, 2):
                each = dict.fromkeys(table.MEASURES, values[k : k + 2])
                rest = {"seconds": 1.0, "updates": 1, "evaluations": 10}
                made.append({"method": "pd", "variant": variant, "seeds": [k, k + 1], "scores": each, **rest})
        return made

    size = {"seeds": 4, "members": 2, "n": 8}
    worse, better = (table.report(records(d), size)["targets"] for d in (0.5, -0.5))
    # An energy distance should fall and a coverage rise: the same shift can only please one of them.
    assert [t["met"] for t in worse] == [False, True] and [t["met"] for t in better] == [True, False]


ORPHANS = """
import os, sys, time
sys.path.insert(0, {folder!r})
import common

def work(seconds):
    print(os.getpid(), flush=True)
    time.sleep(seconds)
    return seconds

if __name__ == "__main__":
    print(list(common.parallel(work, [float(x) for x in sys.argv[1:]], 2)), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at other processes by /proc")
def test_workers_do_their_part_and_end_with_their_parent(tmp_path: Path) -> None:
    file = tmp_path / "orphans.py"
    file.write_text(ORPHANS.format(folder=str(BENCHMARKS)))
    *_, last = subprocess.run([sys.executable, file, "0.1", "0.2", "0.3"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(ast.literal_eval(last)) == [0.1, 0.2, 0.3]

    parent = subprocess.Popen([sys.executable, file, "300", "300"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    """Whether the process runs: neither gone nor waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def by_itself(module: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """The JSON of a quick run that is given no pipeline, printed as it is written."""
    threads = torch.get_num_threads()
    file = folder / "out.json"
    module.main(["--quick", "--json", str(file), *more])
    torch.set_num_threads(threads)
    report: dict[str, Any] = json.loads(file.read_text())
    assert capsys.readouterr().out.rstrip().endswith(sys.modules["tables"].markdown(report))
    return report


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_first_result(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command in a process of its own, one after the other; those that measure a run can be left out."""
    module, small = script("first_result"), ("--set", f"model.pipeline={tiny}")
    report = by_itself(module, tmp_path, capsys, *small)
    waits = {row["name"]: row["seconds"] for row in report["rows"]}
    first, update, picture, end, *commands = waits.values()
    assert 0 < first <= update < end and picture > 0 and min(commands) > 0
    assert list(waits)[4:] == ["ddil-sample: one picture", "ddil-test: 16 prompts", "ddil-probe: 16 prompts"]
    assert [t["limit"] for t in report["targets"]] == [1, 15, 60, 180, 8, 180, 180]


def test_first_result_reads_the_first_update_and_the_first_sheet_of_a_trained_student(script: Any, tmp_path: Path) -> None:
    module = script("first_result")
    for name in ("000000.png", "000100.png", "000020.png"):
        (tmp_path / name).touch()
    assert module.first_trained(tmp_path).name == "000020.png"
    assert module.UPDATE.match("1/720 updates, loss 0.08") and not module.UPDATE.match("3 updates, 12 s; report x")


def test_first_result_leaves_commands_out(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, called = script("first_result"), []

    def lines(folder: Path, *words: str) -> Any:
        called.append((folder, *words))
        yield 2.0, "said"
        yield 3.0, ""

    monkeypatch.setattr(module, "lines", lines)
    found = {
        without: list(module.looked_into(Path("f/run"), SimpleNamespace(quick=False, without=without)))
        for without in ((), ("test",), ("test", "probe"))
    }
    assert [[row["name"] for row in rows] for rows in found.values()] == [
        ["ddil-test: 1000 prompts", "ddil-probe: 256 prompts"], ["ddil-probe: 256 prompts"], []
    ]  # fmt: skip
    assert called[:2] == [
        (Path("f"), "ddil-test", "f/run", "--n", "1000"),
        (Path("f"), "ddil-probe", "--student", "f/run", "--n", "256"),
    ]
    assert {row["seconds"] for row in found[()]} == {3.0}


@pytest.mark.slow
@pytest.mark.usefixtures("evaluator")
def test_teacher_rows(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick run without a folder leaves alone what ships; one with a folder replaces all that is there."""
    from ddil_lightning.evaluation import known

    module, shipped = script("teacher_rows"), sorted(known.folders()[0].glob("*.json"))
    assert shipped
    monkeypatch.setattr(module, "CONFIGS", {str(tiny): ("lcm.yaml",)})
    report = by_itself(module, tmp_path, capsys)
    assert sorted(known.folders()[0].glob("*.json")) == shipped
    assert [row["name"] for row in report["rows"]] == [f"{tiny} teacher@2", f"{tiny} teacher@1"]
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "of_before.json").write_text("{}")
    again = by_itself(module, tmp_path, capsys, "--folder", str(folder))
    assert len(list(folder.iterdir())) == 2 and not (folder / "of_before.json").exists()
    assert [row["frechet"] for row in again["rows"]] == [row["frechet"] for row in report["rows"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_large(tmp_path: Path) -> None:
    """Each setting in a process of its own, which starts from the script: adapters alone are trained."""
    file = tmp_path / "out.json"
    words = [sys.executable, str(BENCHMARKS / "large.py"), "--quick", "--json", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    lcm, dmd2 = json.loads(file.read_text())["rows"]
    assert (lcm["name"], dmd2["name"]) == ("tiny LCM + DDIL, LoRA 4", "tiny DMD2 + DDIL, LoRA 4")
    assert dmd2["trained"] > lcm["trained"] > 0 and min(lcm["peak"], lcm["seconds"], dmd2["peak"], dmd2["seconds"]) > 0
    assert lcm["updates"] == dmd2["updates"] == 2


def test_the_peak_of_a_flow_has_a_limit(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    module = script("large")
    monkeypatch.setattr(module, "apart", lambda work, *given: None if work is not module.one else made(given[1]))

    def made(cell: Any) -> dict[str, Any]:
        peak = 8.5 if cell.method == "DMD2" else 8.0
        return {"name": cell.name, "trained": 1, "updates": 2, "seconds": 1.0, "peak": peak, "flow": cell.model != "SDXL"}

    report = module.main(["--models", "sdxl", "sd35", "--folder", str(tmp_path)])
    capsys.readouterr()
    assert len(report["rows"]) == 3 and [(goal["limit"], goal["met"]) for goal in report["targets"]] == [(8.0, True), (8.0, False)]


@pytest.mark.slow
def test_real_sizes(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings of the GPU's table on a random miniature: whole copies train all weights, adapters few; all operations are counted."""
    file = tmp_path / "out.json"
    report = script("gpu").main(["--quick", "--json", str(file)])
    capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [row["name"] for row in report["rows"]] and len(rows) == 8
    whole, lora = rows["tiny LCM, whole"], rows["tiny LCM, LoRA 4"]
    assert lora["trained"] < 0.2 * whole["trained"] and rows["tiny DMD2, whole"]["trained"] > 2 * whole["trained"]
    assert all(row["images"] > 0 and row["flops"] > 0 and row["share"] is None for row in rows.values())
    assert rows["tiny DMD2 + DDIL, whole"]["flops"] > rows["tiny LCM, whole"]["flops"]


@pytest.mark.slow
def test_the_plan_of_a_real_network_is_the_peak_of_its_training(tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Any) -> None:
    """Stable Diffusion 1.5 in its real size, by LCM-LoRA: planned and measured within 15 %, below 5 GiB."""
    file = tmp_path / "out.json"
    script("memory").main(["--cases", "lora", "--folder", str(tmp_path), "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert 0.85 < row["ratio"] < 1.15 and row["measured"] < 5
    assert not list(tmp_path.glob("*/sd15"))


@pytest.mark.slow
def test_healthy(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cache", str(tmp_path / "cache"), "--set", "data.batch_size=8", "--cases", "dmd2_ddil"]
    report = run(script("healthy"), tiny, tmp_path, capsys, *options)
    (line,) = report["rows"]
    assert line["updates"] == 4 and f"model.pipeline.path={tiny}" in line["command"] and "model.updates=4" in line["command"]
    (drawn,) = [row for part in report["parts"] for row in part["rows"]]
    (kept,) = [json.loads(p.read_text()) for p in (tmp_path / "cache").glob("*.json")]
    clocks, values = kept["curves"]["denoising"]
    assert clocks == sorted(clocks) and drawn["denoising"] == f"{values[0]:.3g} → {values[-1]:.3g}"
    assert drawn["frechet"].split(" / ")[0] == f"{kept['rows']['student@4']['frechet']:.3g}"


def test_healthy_shortens_a_run_and_its_average_alike(script: Any) -> None:
    scaled = script("healthy").scaled
    assert scaled({"updates": 800, "ema": 0.99}, 0.25) == ["model.updates=200", "model.ema=0.96"]
    plan = {"stages": [{"steps": 4, "updates": 500}, {"steps": 2, "updates": 1650}], "ema": 0.993}
    assert scaled(plan, 0.1) == ["model.stages=[{steps: 4, updates: 50}, {steps: 2, updates: 165}]", "model.ema=0.93"]
