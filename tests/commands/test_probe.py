"""ddil-probe on students of every method and on pipelines from elsewhere: what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddil_lightning.backbones import lora
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands import main, probing
from ddil_lightning.commands.probing import Window
from ddil_lightning.evaluation.given import Given, Judge
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.miniature import digits
from ddil_lightning.runs import export
from suite import BY_NAME, build

NODES = ("--n", "16", "--teacher_steps", "8", "--only", "nodes")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in suite without its evaluator: the judge alone, which needs no weights."""

    def builtin(data: str, n: int, seed: int) -> Suite:
        return Suite(data, digits.prompts(n, seed), Given(judge=Judge(digits.judge)), seed=seed, batch=8)

    monkeypatch.setattr(Suite, "builtin", staticmethod(builtin))


def probe(capsys: Any, *words: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.run(main.command("probe"), "ddil-probe", [str(word) for word in words])
    return (stop.value.code, *capsys.readouterr())


def found(capsys: Any, *words: Any, out: str = "probe.json") -> dict[str, Any]:
    code, _, err = probe(capsys, *words)
    assert code == 0, err
    return json.loads(Path(out).read_text())


def refused(capsys: Any, *words: Any) -> str:
    code, _, err = probe(capsys, *words)
    assert code == 2 and err.count("\n") == 1, err
    return err


def test_a_run_is_probed_in_all_parts(finished: Path, judged: None, capsys: Any) -> None:
    code, out, err = probe(capsys, "--student", finished, "--n", 16, "--teacher_steps", 8, "--out", "p.json")
    assert code == 0, err
    made = json.loads(Path("p.json").read_text())
    assert list(made) == ["protocol", "nodes", "mixing", "switch", "trends"]
    said = made["protocol"]
    assert (said["times"], said["substeps"], said["student_guidance_scale"]) == ([999, 759, 499, 259, -1], 2, 2.0)
    assert [row["t"] for row in made["nodes"]] == [999, 759, 499, 259]
    assert set(made["nodes"][1]["shift"]) == {"teacher", "forward"} == set(made["nodes"][1]["ratio"])
    # Two evaluations a guided step of the teacher, two steps an interval; a student's step is one evaluation.
    cost = {row["p_teacher"]: row["nfe"] for row in made["mixing"]}
    assert (
        list(cost) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] and (cost[0.0], cost[1.0]) == (4, 16) and list(cost.values()) == sorted(cost.values())
    )
    turns = {(row["first"], row["at"]): row["nfe"] for row in made["switch"]}
    assert turns["teacher", 759] == turns["student", 259] == 3 + 4 and turns["teacher", 259] == turns["student", 759] == 1 + 12
    assert len(turns) == 6 and all("all_right" in row["metrics"] for row in (*made["mixing"], *made["switch"]))
    assert "paper's FID" in out and "23.14" in out and "Of the first 16 samples." in out
    (trend,), share = made["trends"]["mixing"], [row["metrics"]["all_right"] for row in made["mixing"]]
    assert trend["difference"]["mean"] == pytest.approx(share[-2] - share[1]) and trend["difference"]["n"] == 16
    page = Path("p.html").read_text()
    for text in (out, page):  # all three say the same
        assert all(said["text"] in text for told in made["trends"].values() for said in told)
    assert page.count("<svg") >= 5 and "Teacher first, from the time t on the student" in page and "<script" not in page


def test_a_probe_that_failed_late_goes_on(finished: Path, judged: None, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was sampled is sampled again; the nodes are in the file before the sweeps, and another question is answered anew."""
    asked: list[str] = []

    def counting(name: str) -> None:
        real = getattr(probing, name)
        monkeypatch.setattr(probing, name, lambda *words: asked.append(name) or real(*words))

    def fails(*words: Any) -> None:
        raise ValueError("the disk of the last mixture burns")

    counting("see"), counting("mix_all")
    costs, words = probing.Contest.costs, ("--student", finished, "--n", 16, "--teacher_steps", 4, "--out", "probe.json")
    words += ("--only", "nodes", "mixing")
    monkeypatch.setattr(probing.Contest, "costs", fails)
    assert "burns" in refused(capsys, *words)
    early = json.loads(Path("probe.json").read_text())
    assert len(early["nodes"]) == 4 and early["mixing"] == [] and early["protocol"]["unfinished"] == ["mixing"]
    assert asked == ["see", "mix_all"] and {file.suffix for file in Path("probe.parts").iterdir()} == {".json", ".safetensors"}
    monkeypatch.setattr(probing.Contest, "costs", costs)
    made = found(capsys, *words)
    assert asked == ["see", "mix_all"] and made["nodes"] == early["nodes"] and "unfinished" not in made["protocol"]
    assert len(made["mixing"]) == 6 and not Path("probe.parts").exists()
    assert found(capsys, *words) == made and asked == ["see", "mix_all"] * 2  # the whole of it, in one go


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pd", pytest.param("dmd2", marks=pytest.mark.slow)])
def test_students_of_other_methods(name: str, tiny: Path, capsys: Any) -> None:
    method = build(BY_NAME[name], tiny).eval()
    steps = method.deployment.steps[0]
    export.export(method, Path("student"), steps)
    made = found(capsys, "--student", "student", *NODES)
    assert [row["t"] for row in made["nodes"]] == method.deployment.grid(steps).nodes.tolist()
    assert made["mixing"] == [] == made["switch"] and made["protocol"]["student_guidance_scale"] == (2.0 if name == "pd" else 1.0)
    assert all(row["ratio"]["forward"] > 0 for row in made["nodes"])


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [pytest.param("tcd", marks=pytest.mark.slow), "euler"])
def test_a_pipeline_from_elsewhere_by_the_name_of_its_sampler(sampler: str, tiny: Path, capsys: Any) -> None:
    shutil.copytree(tiny, "other")
    Path("other/ddil.json").unlink()
    made = found(capsys, "--student", "other", "--teacher", tiny, "--sampler", sampler, "--steps", 2, "--student_guidance", 2, *NODES)
    said = made["protocol"]
    assert (said["sampler"].lower().startswith(sampler), said["guidance"], said["student_guidance_scale"], said["substeps"]) == (
        True,
        2,
        2,
        4,
    )
    assert len(made["nodes"]) == 2


def test_a_lora_on_a_base_is_a_student(tiny: Path, capsys: Any) -> None:
    """As ddil-test --compare has them; and in a file, where more can be said."""
    role = Pipeline(str(tiny)).role("student", adapter=Adapter(2))
    with torch.no_grad():
        for p in role.weights():
            p.add_(0.05)
    lora.write(type(Pipeline(str(tiny)).pipe), Path("style.safetensors"), role.network, torch.float32)
    nodes = ("--teacher", tiny, "--n", 16, "--teacher_steps", 2, "--only", "nodes")
    made = found(capsys, "--student", f"mine={tiny}+style.safetensors*0.5:tcd@2#2", *nodes)
    said = made["protocol"]
    assert (said["student"], said["teacher"]) == (f"{tiny}+style.safetensors*0.5", str(tiny)) and len(made["nodes"]) == 2
    assert (said["sampler"], said["student_guidance_scale"]) == ("TCDScheduler", 2)
    assert float(made["nodes"][0]["loss"]["on"]) > 0  # the base alone would answer as its teacher does
    Path("one.yaml").write_text(f"- {{path: {tiny}, size: 32, sampler: lcm}}\n")
    assert "give a student and a teacher of the same latent space" in refused(capsys, "--student", "one.yaml", *nodes)
    Path("two.yaml").write_text(f"- {tiny}\n- {tiny}\n")
    for word, told in (("two.yaml", "it lists 2 pipelines: give a"), (f"{tiny}#4,2", "say one after #"), (f"{tiny}:dpm", "take turns")):
        assert told in refused(capsys, "--student", word, *nodes)
    assert "leave sampler, guidance and steps out of it" in refused(capsys, "--student", tiny, "--teacher", f"{tiny}@3")


@pytest.mark.slow
def test_captions_with_images_and_without(tiny: Path, capsys: Any) -> None:
    Path("pictures").mkdir()
    for i in range(16):
        Image.new("RGB", (16, 16), (16 * i, 0, 0)).save(f"pictures/{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"a handwritten {digits.NUMBERS[i % 10]}"}) for i in range(16)]
    Path("captions.jsonl").write_text("\n".join(rows))
    words = ("--student", tiny, "--teacher", tiny, "--steps", 2, "--teacher_steps", 4, "--only", "nodes", "--protocol", "captions.jsonl")
    made = found(capsys, *words, "--images", "pictures")
    assert set(made["nodes"][1]["shift"]) == {"teacher", "forward"} and made["protocol"]["n"] == 16
    code, out, err = probe(capsys, *words)
    without = json.loads(Path("probe.json").read_text())
    assert code == 0 and "left out: distances and losses against forward latents: captions.jsonl has captions without images" in out, err
    assert set(without["nodes"][1]["shift"]) == {"teacher"} == set(without["nodes"][1]["ratio"])


def test_wrong_input_is_one_line(tiny: Path, sd15: Path, finished: Path, capsys: Any, tmp_path: Path) -> None:
    pair = ("--student", tiny, "--teacher", tiny)
    assert "'2' is not a whole number from 16" in refused(capsys, *pair, "--n", 2)
    assert "PNDMScheduler" in refused(capsys, "--student", sd15, "--teacher", tiny, *NODES)
    assert "give it, by --teacher" in refused(capsys, "--student", tiny)
    assert "latents [4, 8, 8] and builtin" in refused(capsys, "--student", tiny, "--teacher", "builtin", *NODES)
    assert "give a file's name that ends in .json" in refused(capsys, *pair, "--out", "x.txt")
    assert "--teacher_steps 2 are fewer than the student's 4" in refused(capsys, *pair, "--teacher_steps", 2)
    assert "nowhere" in refused(capsys, *pair, "--protocol", "nowhere")
    assert "give that file too, by --protocol" in refused(capsys, *pair, "--images", tmp_path)
    Path("few.txt").write_text("a handwritten one\n" * 3)
    assert "few.txt holds 3 captions: at least 16 prompts" in refused(capsys, *pair, "--protocol", "few.txt")
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "config.yaml", "run/config.yaml")
    assert "run holds no exported pipeline" in refused(capsys, "--student", "run")


def test_latents_of_a_sweep_are_made_as_they_are_scored_and_forgotten() -> None:
    """Calls of 5 on parts of 3, by three mixtures in turn: no part is made before it is asked for."""
    made, whole = [], torch.randn(3, 12, 2)

    def parts() -> Iterator[torch.Tensor]:
        for part in whole.split(3, 1):
            made.append(part)
            yield part

    window = Window(parts())
    for start, n, so_far in ((0, 5, 2), (5, 5, 4), (10, 2, 4)):
        for k in range(3):
            assert torch.equal(window(k, start, n), whole[k, start : start + n]) and len(made) == so_far
        assert window.held.shape[1] <= 5 + 3 - 1
