"""The images of ddil-test: kept and gone on with, shared by torchrun, in other precisions, and refused where nothing can be scored."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commandline import called
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands import main
from ddil_lightning.evaluation import rows as rows_module
from ddil_lightning.evaluation.given import Given, Judge
from ddil_lightning.evaluation.suite import Probes, Suite
from ddil_lightning.miniature import digits


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)

    def builtin(data: str, n: int, seed: int) -> Suite:
        """Without its evaluator, which is not what is tested here: seconds."""
        judge = Judge(digits.judge, digits.mode_coverage)
        return Suite(data, digits.prompts(n, seed), Given(judge=judge), Probes(digits.partial_prompts(), 8), seed, batch=8)

    monkeypatch.setattr(Suite, "builtin", staticmethod(builtin))
    return tmp_path


def call(capsys: Any, *words: Any, n: int = 16) -> tuple[list[dict[str, Any]], str]:
    """The rows of ddil-test, and what it has printed; the line of a refusal for what was refused."""
    capsys.readouterr()
    Path("metrics.json").unlink(missing_ok=True)
    with pytest.raises(SystemExit) as stop:
        main.run(main.command("test"), "ddil-test", [str(word) for word in ("--steps", 2, "--n", n, *words)])
    out, err = capsys.readouterr()
    if stop.value.code:
        assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("ddil-test: "), err
        return [], err
    return json.loads(Path("metrics.json").read_text())["rows"], out


def test_rows_that_are_done_stay_where_a_later_one_fails(light: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = rows_module.pipeline_row

    def third(suite: Suite, backbone: Any, n: int, *rest: Any) -> Any:
        if n == 1:
            raise ValueError("teacher@1: images that are not finite")
        return measured(suite, backbone, n, *rest)

    monkeypatch.setattr(rows_module, "pipeline_row", third)
    with pytest.raises(SystemExit) as stop:
        main.run(main.command("test"), "ddil-test", ["--pipeline", str(light), "--steps", "3", "2", "1", "--n", "16"])
    out, err = capsys.readouterr()
    names = ["teacher@3", "teacher@2"]
    assert stop.value.code == 2 and err == "ddil-test: teacher@1: images that are not finite\n"
    assert [row["name"] for row in json.loads(Path("metrics.json").read_text())["rows"]] == names
    assert all(f"{name} " in out for name in names) and out.endswith("metrics.json\n")


def test_kept_images_are_gone_on_with(tiny: Path, capsys: Any) -> None:
    (plain,), out = call(capsys, "--pipeline", tiny)
    made = plain["generation"]
    assert (made["dtype"], made["batch"], made["processes"]) == ("float32", 8, 1) and "teacher@2: 24 images, " in out
    (first,), out = call(capsys, "--pipeline", tiny, "--keep_images", "kept")
    folder = Path("kept/teacher@2")
    assert sorted(p.name for p in folder.iterdir()) == ["generation.json", "probes", "prompts"] and re.search(r": 24 images, \d+ s", out)
    lines = [json.loads(line) for line in (folder / "prompts" / "metadata.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(16)) and [line["text"] for line in lines] == digits.prompts(16, 0)
    for file in ("prompts/00003.png", "prompts/00004.png", "probes/00002.png"):
        (folder / file).write_bytes((folder / file).read_bytes()[:50])
    (again,), out = call(capsys, "--pipeline", tiny, "--keep_images", "kept", "--batch", 3)
    assert "teacher@2: 24 images, 3 of them drawn now" in out and again["generation"]["batch"] == 3
    for row in (first, again):
        assert [row[key] for key in ("metrics", "protocol", "nfe", "n")] == [plain[key] for key in ("metrics", "protocol", "nfe", "n")]
    assert (
        "kept/teacher@2 holds images of another seed (0, not 1)"
        in call(capsys, "--pipeline", tiny, "--keep_images", "kept", "--seed", 1)[1]
    )
    other = Path(shutil.copytree(tiny, "other"))
    weights = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] += 0.1
    save_file(weights, other / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert "images of another sampler network: give another folder" in call(capsys, "--pipeline", other, "--keep_images", "kept")[1]


def test_a_row_says_of_what_pipeline_it_is(tiny: Path, capsys: Any) -> None:
    """Where it lies, its sampler, size and weights, as rows of --compare do; without a card of ours it is called by its folder."""
    other = Path(shutil.copytree(tiny, "somebody-s"))
    (other / "ddil.json").unlink()
    (row,), _ = call(capsys, "--pipeline", other, "--data", "digits", "--guidance", 2)
    made = {key: row["generation"][key] for key in ("pipeline", "lora", "sampler", "size", "latents")}
    shape = {"size": [16, 16], "latents": [4, 8, 8]}
    assert row["name"] == "somebody-s@2" and made == {"pipeline": "somebody-s", "lora": [], "sampler": "DDIMScheduler", **shape}
    weights = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] += 0.1
    save_file(weights, other / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (first,), _ = call(capsys, "--pipeline", tiny, "--data", "digits", "--guidance", 2)
    (second,), _ = call(capsys, "--pipeline", other, "--data", "digits", "--guidance", 2)
    mine, same, changed = (one["generation"] for one in (row, first, second))
    assert (mine["weights"], mine["digest"]) == (same["weights"], same["digest"])
    assert mine["weights"] != changed["weights"] and mine["digest"] != changed["digest"]


@pytest.mark.parametrize(("word", "name"), [("bf16", "bfloat16"), ("float16", "float16")])
def test_a_pipeline_in_half_precision(word: str, name: str, tiny: Path, capsys: Any) -> None:
    (row,), _ = call(capsys, "--pipeline", tiny, "--dtype", word)
    assert row["generation"]["dtype"] == name and row["metrics"]["contrast"] > 0


@pytest.mark.slow
def test_several_samples_of_a_prompt_as_benchmarks_have_them(tiny: Path, here: Path, capsys: Any) -> None:
    (here / "texts").mkdir()
    for i in range(16):
        (here / "texts" / f"whoops-{i:02d}.txt").write_text(f"{digits.prompts(16, 0)[i]}\n")
    lines = [{"tag": "counting", "include": [i], "prompt": prompt} for i, prompt in enumerate(digits.prompts(16, 0))]
    (here / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (here / "p.yaml").write_text("{prompts: {source: lines.jsonl}, references: {source: null}, probes: {prompts: 0, seeds: 0}}")
    none = ["--pipeline", tiny, "--samples", 2, "--network", "clip=none", "distance=none"]
    (row,), _ = call(capsys, *none, "--data", "texts", "--keep_images", "d", "--layout", "dpg")
    assert row["n"] == row["protocol"]["n"] == 32 and row["protocol"]["seeds"]["per_prompt"] == 2
    assert sorted(p.stem for p in Path("d/teacher@2/prompts").iterdir()) == [f"whoops-{i:02d}" for i in range(16)]
    call(capsys, *none[:4], "--protocol", "p.yaml", "--keep_images", "g", "--layout", "geneval")
    folders = sorted(Path("g/teacher@2/prompts").iterdir())
    assert [f.name for f in folders] == [f"{i:05d}" for i in range(16)]
    assert [json.loads((f / "metadata.jsonl").read_text()) for f in folders] == lines
    assert (
        "has no tag: give its evaluation_metadata" in call(capsys, *none, "--data", "texts", "--keep_images", "e", "--layout", "geneval")[1]
    )
    assert not list(Path("e").rglob("*.png"))


def test_images_that_are_not_finite_name_the_sampler_and_the_prompt(tiny: Path, here: Path, capsys: Any) -> None:
    broken = shutil.copytree(tiny, here / "broken")
    weights = load_file(broken / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] += 3e38  # which the check of stored weights lets pass: each is finite
    save_file(weights, broken / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    told = f"teacher@2: images: 8 of 8 hold NaN or infinity, the first that of prompt 0 (from 0), {digits.prompts(1, 0)[0]!r}"
    assert told in call(capsys, "--pipeline", broken)[1]
    assert told in call(capsys, "--pipeline", broken, "--keep_images", "kept")[1] and not list(Path("kept").rglob("*.png"))


def test_options_that_do_not_go_together(tiny: Path, here: Path, capsys: Any) -> None:
    (here / "file").touch()
    for words, told in (
        (["--layout", "dpg"], "--layout dpg is of kept images: say where, by --keep_images DIR"),
        (["--layout", "dpg", "--keep_images", "d", "--samples", 5], "--samples 5: a picture of DPG-Bench holds at most 4 images"),
        (["--keep_images", "file"], "--keep_images file is a file: give a folder"),
        (["--dtype", "int8"], "argument --dtype: 'int8' is none of fp32, fp16, bf16"),
        (["--batch", 0], "argument --batch: '0' is not a whole number"),
    ):
        assert told in call(capsys, "--pipeline", tiny, *words)[1]
    assert "--dtype is of a pipeline" in call(capsys, "--ckpt_path", here, "--dtype", "bf16")[1]


WORDS = ["--pipeline", "builtin/digits", "--steps", "2", "--n", "64", "--batch", "8"]
TEST = "import sys; from ddil_lightning.commands import main; main.run(main.command('test'), 'ddil-test', sys.argv[1:])"


def started(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    Path("main.py").write_text(TEST)
    return subprocess.Popen(
        [sys.executable, *launcher, "main.py", *WORDS, *words], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def rows_of(process: subprocess.Popen[str], file: str) -> tuple[Any, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    (row,) = json.loads(Path(file).read_text())["rows"]
    return (row["metrics"], row["protocol"], row["nfe"]), out


@pytest.mark.slow
def test_torchrun_and_kills_end_with_the_numbers_of_one_process() -> None:
    one, _ = rows_of(started("--out", "one.json"), "one.json")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")
    both, out = rows_of(started("--out", "two.json", launcher=torchrun), "two.json")
    # There are fewer batches than processes here, so networks read other batches, and round otherwise.
    torch.testing.assert_close(both[0], one[0], rtol=1e-5, atol=1e-6)
    assert both[1:] == one[1:] and out.count("teacher@2: ") == out.count("written to") == 1
    draw = random.Random(0)
    for k in range(2):
        process = started("--out", "three.json", "--keep_images", "kept")
        before, end = len(list(Path().glob("kept/*/*/*.png"))), time.monotonic() + 120
        while len(list(Path().glob("kept/*/*/*.png"))) <= before + 8 * k and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.communicate()
    there = len(list(Path().glob("kept/*/*/*.png")))
    found, out = rows_of(started("--out", "three.json", "--keep_images", "kept"), "three.json")
    assert found == one and there > 8 and f", {94 - there} of them drawn now" in out
    assert not list(Path("kept").rglob(".*"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sample", ["--pipeline", "builtin/digits", "--prompt", "a two", "--out", "x.png"]),
        ("probe", ["--student", "builtin/digits", "--teacher", "builtin/digits"]),
        ("invert", ["--teacher", "builtin/digits"]),
        ("test", ["--pipeline", "builtin/digits"]),
    ],
)
def test_every_command_that_samples_has_the_precision_that_is_asked_for(
    name: str, words: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def loaded(self: Pipeline, source: Any, dtype: Any, vae_dtype: Any, bare: bool) -> Any:
        asked.append((dtype, vae_dtype))
        raise ValueError("not now")

    monkeypatch.setattr(Pipeline, "load", loaded)
    for more in ([], ["--dtype", "bf16"]):
        assert called(capsys, name, *words, *more)[0] == 2
    assert asked == [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
