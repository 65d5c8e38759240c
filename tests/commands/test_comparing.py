"""ddil-test --compare: pipelines of every origin from one noise, rows that are gone on with, what is left out, and bad input."""

from __future__ import annotations

import json
import shutil
import weakref
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddil_lightning.backbones import lora, sampling
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands import comparing, main
from ddil_lightning.commands.comparing import Job
from ddil_lightning.commands.entries import parsed, read_entries
from ddil_lightning.commands.launched import together
from ddil_lightning.commands.rack import Rack
from ddil_lightning.errors import Refusal
from ddil_lightning.evaluation import rows as rows_module
from ddil_lightning.evaluation.generation import Generation
from ddil_lightning.evaluation.given import Given, Judge
from ddil_lightning.evaluation.suite import Probes, Suite
from ddil_lightning.miniature import digits
from ddil_lightning.runs.comparison import Comparison
from pair import Pair

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light: Path) -> Path:
    """A small pipeline `base`, and a suite with the judge alone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(light, "base")

    def builtin(data: str, n: int, seed: int) -> Suite:
        judge = Judge(digits.judge, digits.mode_coverage, side=32 if data == "shapes" else None)
        return Suite(data, digits.prompts(n, seed), Given(judge=judge), Probes(), seed, batch=8)

    monkeypatch.setattr(Suite, "builtin", staticmethod(builtin))
    return tmp_path


def call(capsys: Any, *words: Any, command: str = "--compare") -> tuple[dict[str, Any], str]:
    """What the JSON file holds, and what was printed; the line of a refusal for what was refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.run(main.command("test"), "ddil-test", [command, *map(str, words), "--n", "16"])
    out, err = capsys.readouterr()
    if stop.value.code:
        assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("ddil-test: "), err
        return {}, err
    return json.loads(Path("compare.json" if command == "--compare" else "metrics.json").read_text()), out


def changed(folder: str, by: float = 0.1) -> None:
    """Other weights in the place of a pipeline's own."""
    weights = load_file(Path(folder) / UNET)
    weights["conv_out.bias"] += by
    save_file(weights, Path(folder) / UNET, {"format": "pt"})


def scheduler(folder: str, kind: str, **settings: Any) -> None:
    """Another scheduler in the files of a pipeline."""
    index = json.loads((Path(folder) / "model_index.json").read_text()) | {"scheduler": ["diffusers", kind]}
    (Path(folder) / "model_index.json").write_text(json.dumps(index))
    file = Path(folder) / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": kind, **settings}))


def test_pipelines_of_every_origin_side_by_side(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("<b>run&").mkdir()
    shutil.copytree("base", "<b>run&/pipeline")
    changed("<b>run&/pipeline")
    Path("<b>run&/config.yaml").touch()
    role = Pipeline("base").role("student", adapter=Adapter(2))
    with torch.no_grad():
        for p in role.weights():
            p.add_(0.05)
    lora.write(type(Pipeline("base").pipe), Path("style.safetensors"), role.network, torch.float32)
    Path("more.yaml").write_text(
        "- {name: tuned, path: base, lora: {path: style.safetensors, scale: 0.5}, sampler: tcd, eta: 0.5, steps: [2]}\n"
    )
    load, loaded = Pipeline.load, []

    def one(self: Pipeline, *args: Any) -> Any:
        """Two large pipelines would not fit beside each other."""
        assert not any(before() for before in loaded)
        pipe = load(self, *args)
        loaded.append(weakref.ref(pipe.unet))
        return pipe

    monkeypatch.setattr(Pipeline, "load", one)
    found, out = call(capsys, "base", "base:lcm@1", "<b>run&", "more.yaml", "--steps", 1, 2)
    assert len(loaded) == 5  # tuned, run, base to be tried, which is then measured as well; run, tuned
    monkeypatch.setattr(Pipeline, "load", load)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["base@1", "base@2", "base:lcm g1@1", "base:lcm g1@2", "-b-run-@1", "-b-run-@2", "tuned@2"]
    assert [row["nfe"] for row in rows.values()] == [2, 4, 1, 2, 2, 4, 4] and all(row["seconds_per_image"] > 0 for row in rows.values())
    made = rows["tuned@2"]["generation"]
    assert (made["sampler"], made["lora"], made["dtype"]) == ("TCDScheduler", ["style.safetensors * 0.5"], "float32")
    assert made["eta"] == 0.5 and "eta" not in rows["base@2"]["generation"]
    assert len({json.dumps(row["metrics"]) for row in rows.values()}) == 7
    alone = call(capsys, "base", "--steps", 2, command="--pipeline")[0]["rows"][0]
    assert (alone["metrics"], alone["protocol"]) == (rows["base@2"]["metrics"], rows["base@2"]["protocol"])
    pairs = {pair["name"]: pair for pair in found["against_first"]}
    assert list(pairs) == list(rows)[2:] and pairs["tuned@2"]["against"] == "base@2"
    for key in ("saturation", "attribute_accuracy", "all_right", "blur"):
        told = rows["tuned@2"]["metrics"][key] - rows["base@2"]["metrics"][key]
        assert pairs["tuned@2"]["differences"][key]["mean"] == pytest.approx(told, abs=1e-6)
    page, text = Path("compare.html").read_text(), Path("compare.md").read_text()
    assert page.count('src="data:image/png;base64,') == 7 * 6 and "<b>run" not in page and "&lt;b&gt;run&amp;" in page
    assert page.count("<svg") >= 2 and "| tuned | base | style.safetensors * 0.5 | TCDScheduler |" in text and "base:lcm g1@2" in out


@pytest.mark.slow
def test_a_comparison_goes_on_with_the_rows_that_are_missing(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("base", "other")
    changed("other")
    words, measured, asked = ("base", "other", "--steps", 1, 2), rows_module.pipeline_row, []

    def once(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["name"])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return measured(*args, **kwargs)

    monkeypatch.setattr(rows_module, "pipeline_row", once)
    with pytest.raises(SystemExit) as stop:
        main.run(main.command("test"), "ddil-test", ["--compare", *map(str, words), "--n", "16"])
    assert stop.value.code == 130 and "compare.json has 2 rows, and the same command goes on" in capsys.readouterr().err
    first = json.loads(Path("compare.json").read_text())["rows"]
    found, out = call(capsys, *words)
    assert asked == ["base@1", "base@2", "other@1", "other@1", "other@2"] and found["rows"][:2] == first
    assert "has 2 of 4 rows already: base@1, base@2" in out
    changed("other")  # other weights at the same place
    Path("compare.rows/base@1.safetensors").write_bytes(b"half")
    again, _ = call(capsys, *words)
    assert asked[5:] == ["base@1", "other@1", "other@2"] and again["rows"][0]["metrics"] == first[0]["metrics"]
    assert again["rows"][3]["metrics"] != found["rows"][3]["metrics"]
    fresh, _ = call(capsys, "base", "other", "--steps", 1, "--fresh")
    assert asked[8:] == [row["name"] for row in fresh["rows"]] == ["base@1", "other@1"]


def test_a_protocol_that_asks_for_more_measures_it(capsys: Any) -> None:
    """And the first numbers stay, for the rows are of the same images."""
    shown = []
    for asked in ("blur", "blur, saturation", "contrast"):
        Path("mine.yaml").write_text(f"prompts: {{source: digits, n: 16}}\nmetrics: [{asked}]\n")
        found, out = call(capsys, "base#1", "base:lcm#1", "--protocol", "mine.yaml")
        shown.append(([row["metrics"] for row in found["rows"]], out))
    ((first, _), (second, out), (third, last)) = shown
    assert all(row["saturation"] is None and row["blur"] is not None for row in first)
    assert all(row["saturation"] is not None and row["contrast"] is not None for row in second)  # two numbers of one measure
    assert [row["blur"] for row in third] == [row["blur"] for row in first] and "Saturation" in out and "Contrast" in last
    assert {row["protocol"]["stamp"] for row in found["rows"]} == {found["rows"][0]["protocol"]["stamp"]}


def measured_by_both(rank: int, folder: str, wrong: type[Exception]) -> Any:
    """What is left out of three rows, the second of which goes wrong in the second process's share, and the rows there are."""
    processes, where = together()
    suite = Suite("digits", digits.prompts(16, 0), Given(judge=Judge(digits.judge, digits.mode_coverage)), Probes(), 0, batch=8)
    comparison, entry = Comparison(Path(folder) / "out.json", ["base"]), parsed(f"base={folder}/base")
    jobs, latents = [Job(entry, n, 1.0, {"digest": None}) for n in (1, 2, 3)], sampling.pipeline_latents

    def broken(backbone: Any, prompts: Any, steps: int, scale: float, seed: int = 0, *rest: Any) -> Any:
        if (rank, steps, seed) == (1, 2, 8) and wrong is not ValueError:
            raise wrong("no memory")
        return latents(backbone, prompts, steps, scale, seed, *rest) * (torch.nan if (steps, seed) == (2, 8) else 1)

    sampling.pipeline_latents = broken
    try:
        measured = Namespace(keep_images=None), Rack(where, {}), suite, jobs, comparison, Generation(processes=processes), None
        comparing._measured(*measured)
    except BaseException as error:
        return type(error).__name__, str(error)
    finally:
        sampling.pipeline_latents = latents
    return comparison.left_out, [row["name"] for row in json.loads(comparison.out.read_text())["rows"]]


def test_a_row_that_fails_in_one_process_is_left_out_by_all(pair: Pair, tmp_path: Path) -> None:
    (left, rows), (other, _) = pair.run(measured_by_both, str(tmp_path), ValueError)
    assert rows == ["base@1", "base@3"] and left == other and list(left) == ["base@2"] and "prompt 8 (from 0)" in left["base@2"]
    first, second = pair.run(measured_by_both, str(tmp_path), MemoryError)  # anything else ends all
    assert (first, second) == (("Elsewhere", "no memory"), ("MemoryError", "no memory"))


@pytest.mark.slow
def test_rows_of_another_protocol_stay_and_are_told(capsys: Any) -> None:
    shutil.copytree("base", "other")
    call(capsys, "base", "other", "--steps", 1)
    found, out = call(capsys, "first=base", "new=base:euler", "--steps", 1, "--seed", 3)
    assert "also has rows that are not asked for, which stay (--fresh leaves them out): base@1, other@1" in out
    assert [row["name"] for row in found["rows"]] == ["first@1", "new@1", "base@1", "other@1"]
    assert "The rows were measured by 2 protocols" in out and "The rows were measured by 2 protocols" in Path("compare.html").read_text()
    assert [pair["name"] for pair in found["against_first"]] == ["new@1"]  # the others have no partner by their protocol


def test_rows_of_another_protocol_are_not_replaced_unasked(capsys: Any) -> None:
    call(capsys, "base#1", "other=base:euler#1")
    before = Path("compare.json").read_bytes()
    refused = call(capsys, "base#1", "other=base:euler#2,1", "--seed", 3)[1]
    assert refused.startswith("ddil-test: compare.json has base@1, other@1 by digits ") and Path("compare.json").read_bytes() == before
    assert refused.endswith(": give another --out, or --fresh to replace what it has\n") and "and not by digits " in refused
    found, _ = call(capsys, "base#1", "new=base:euler#1", "--seed", 3, "--fresh")
    assert [row["name"] for row in found["rows"]] == ["base@1", "new@1"] and found["seed"] == 3


@pytest.mark.slow
def test_what_cannot_be_sampled_is_left_out_and_said(capsys: Any) -> None:
    shutil.copytree("base", "few")
    scheduler("few", "LCMScheduler", original_inference_steps=2)
    found, out = call(capsys, "base", "few", "--steps", 2, 4)
    assert [row["name"] for row in found["rows"]] == ["base@2", "base@4", "few@2"] and list(found["left_out"]) == ["few@4"]
    assert "left out: few@4, LCMScheduler: " in out and "Left out: few@4" in Path("compare.html").read_text()
    assert "ddil-test: few: cannot be sampled in 4 steps: LCMScheduler: " in call(capsys, "base", "few", "--steps", 4)[1]


def test_bad_input_ends_in_a_line_before_anything_is_sampled(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flow", "odd"):
        shutil.copytree("base", name)
    scheduler("flow", "FlowMatchEulerDiscreteScheduler")
    index = json.loads(Path("odd/model_index.json").read_text())
    Path("odd/model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))
    Path("list.yaml").write_text("- {path: base, sampler: lcm, colour: red}\n")
    monkeypatch.setattr(rows_module, "pipeline_row", None)
    for words, told in (
        (["base"], "--compare has one pipeline, base: give another beside it"),
        (["base", "base"], "base and base are both called base: name them, by NAME=base"),
        (["base", "gone/away/it"], "it: no pipeline at gone/away/it"),
        (["base", "base+gone/away/it"], "base+it: no LoRA at gone/away/it"),
        (["base", "base:ddpm"], "no sampler 'ddpm': known are lcm, tcd, ddim, ddim-nc, euler, dpm"),
        (["base", "base@much"], "the guidance after @ is 'much': give a number"),
        (["base", "w" * 101 + "=base"], "a name has 1 to 100 letters, for files are named by it"),
        (["base", "base#0"], "the steps after # are '0': give whole numbers from 1 to 1000"),
        (["base", "list.yaml"], "list.yaml, entry 1: no key 'colour'"),
        (["base", "flow:lcm"], "flow:lcm: the pipeline flow has the scheduler FlowMatchEulerDiscreteScheduler, and its UNet is no flow"),
        (["base", "odd"], "odd: the pipeline odd"),
        (["base", "base:lcm#60"], "base:lcm: cannot be sampled in 60 steps: LCMScheduler"),
        (["base", "builtin"], "measures all by the same prompts (base: digits, builtin: shapes)"),
        (["base", "builtin", "--data", "shapes"], "base: shapes are pictures of 32 pixels and the pipeline base makes 16 x 16"),
        (["base", "base:lcm", "--out", "x.html"], "--out x.html: give a file's name that ends in .json"),
        (["base", "base:lcm", "--dpm"], "leave a run, --ckpt_path, --pipeline and --dpm out"),
    ):
        found, err = call(capsys, *words)
        assert not found and told in err, err
    assert "--fresh is of --compare" in call(capsys, "base", "--fresh", command="--pipeline")[1]


def test_an_entry_in_a_word(here: Path) -> None:
    entry = parsed("mine=base+a/b*0.5+c/d:lcm@1.5#4,2")
    assert (entry.name, entry.source.path, entry.sampler, entry.guidance, entry.steps) == ("mine", "base", "lcm", 1.5, (4, 2))
    assert [(x.path, x.scale) for x in entry.source.lora] == [("a/b", 0.5), ("c/d", 1.0)]
    assert parsed("runs/sd15/latest").name == parsed("runs/sd15/latest/pipeline").name == "sd15"
    assert parsed("owner/model+owner/lcm-lora:lcm@1").name == "model+lcm-lora:lcm g1"
    shutil.copytree("base", "a+b@2")  # taken as it stands
    assert parsed("a+b@2").source.path == "a+b@2" and parsed("a+b@2@3").guidance == 3.0
    etas = ("{path: base, sampler: tcd}", "{path: base, sampler: tcd-es1.01, eta: 0}", "{path: base, sampler: tcd, eta: 0.3, guidance: 1}")
    (here / "etas.yaml").write_text("".join(f"- {line}\n" for line in etas))
    assert [(one.name, one.eta) for one in read_entries(["etas.yaml"])] == [
        ("base:tcd", None),
        ("base:tcd-es1.01 eta0", 0.0),
        ("base:tcd eta0.3 g1", 0.3),
    ]
    for line, told in (
        ("sampler: tcd, eta: 1.5", "from 0 to 1) is 1.5: give a number"),
        ("eta: 0.3", "say sampler: tcd, or leave eta out"),
    ):
        (here / "eta.yaml").write_text(f"- base\n- {{path: base, {line}}}\n")
        with pytest.raises(Refusal) as refused:
            read_entries(["eta.yaml"])
        assert told in str(refused.value)
    (here / "none.yaml").write_text("{}")
    with pytest.raises(Refusal, match="give a list of pipelines"):
        read_entries(["none.yaml"])
