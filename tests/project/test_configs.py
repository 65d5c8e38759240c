"""Every shipped config runs: ddil-fit's for two updates on a random pipeline, ddil-pretrain's for a few steps; protocols elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from ddil_lightning.commands.configs import FIT_SHORT, expand
from ddil_lightning.commands.fitting import fit as ddil_fit
from ddil_lightning.miniature import pretrain
from ddil_lightning.packaged import config_names, configs_folder, find_config

PRETRAIN = [name for name in config_names() if name.startswith("pretrain")]
TOY = [name for name in config_names() if name.startswith("toy2d/")]
LARGE = [
    "dmd2_ddil_ssd1b.yaml",
    "dmd2_lora_flux.yaml",
    "dmd2_lora_sd3.yaml",
    "dmd2_lora_sdxl.yaml",
    "ladd_lora_sd3.yaml",
    "lcm_ddil_sd15.yaml",
    "lcm_lora_pixart.yaml",
    "lcm_lora_qwen.yaml",
    "lcm_lora_sana.yaml",
    "lcm_lora_sd15.yaml",
    "lcm_lora_sd3.yaml",
    "lcm_lora_sdxl.yaml",
    "lcm_lora_zimage.yaml",
    "pd_ddil_sd15.yaml",
]
PROTOCOLS = [name for name in config_names() if name.startswith("protocols/")]  # of ddil-test, in tests/evaluation/test_protocols.py
FIT = [name for name in config_names() if name not in (*PRETRAIN, *TOY, *LARGE, *PROTOCOLS)]
PAIRED = [name for file in config_names() if (name := file.removesuffix(".yaml")) + "_ddil.yaml" in config_names()]
TURNS = ("add", "dmd", "diff_instruct", "emd", "ladd", "moments", "sid", "ufogen")  # of a critic, five to one of the student's


def thinned(names: Sequence[str]) -> list[Any]:
    """Configs to run: those of the main methods with DDIL, from which the plain ones differ in the prior alone, and adapters; and of
    the toy all with DDIL but those that take longest, whose methods train in the ordinary tests of their own files. test_readme.py
    trains lcm_ddil.yaml."""
    longer = ("add", "ctm", "dmd", "ladd", "reflow", "diff_instruct")
    usual = [f"{name}_ddil.yaml" for name in ("pd", "dmd2", "lcm_lora")]
    usual += [name for name in TOY if name.endswith("_ddil.yaml") and not name.startswith(tuple(f"toy2d/{x}_" for x in longer))]
    return [pytest.param(name, marks=() if name in usual else pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", thinned(FIT))
def test_fit(name: str, here: Path, request: pytest.FixtureRequest) -> None:
    teacher = request.getfixturevalue("sd3" if "_flow" in name else "tiny")
    small = "{data: {captions: {class_path: Digits}, batch_size: 4, rollouts: {trajectories: 4}, cache: true, workers: 0}}"
    words = ["--config", str(find_config(name)), "--config", small, f"--model.pipeline={teacher}", "--trainer.fast_dev_run=2", "--test.n=0"]
    words += ["--previews.every=0", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--run_dir=r"]
    if name.startswith(TURNS):  # every batch is the student's, and takes two steps of Lightning's
        words += ["--model.critic.steps=1", "--trainer.fast_dev_run=4"]
    if name.startswith(("dmd.", "dmd_ddil.", "reflow")):
        words += ["--model.pairs.steps=1"]
    if name.startswith("dmd2_flow"):
        words += ["--model.gan.layers=[block1,block2]"]
    assert ddil_fit(words) == 0
    assert json.loads((here / "r" / "summary.json").read_text())["student_updates"] == 2
    told_s = name.startswith("ctm")  # which no pipeline of diffusers can be
    assert (here / "r" / ("student.safetensors" if told_s else "pipeline/model_index.json")).is_file()
    assert (here / "runs" / name.removesuffix(".yaml") / "latest").resolve() == here / "r"


HALVES = "{steps: 16, updates: 1}", "{steps: 8, PARTS}", "{steps: 4, updates: 1, parts: []}", "{steps: 2, updates: 1, parts: []}"
PARTS = "parts: [{updates: 1, forward: 0.5, student: 0.15, teacher: 0.35}, {updates: 1, forward: 0.4, student: 0.42, teacher: 0.18}]"
PLAN = ", ".join(["{kind: eps_to_v, updates: 1}", "{kind: guidance, updates: 1}", *HALVES]).replace("PARTS", PARTS)
OWN = {  # what makes a large run small; everything else of its config stays
    "lcm_ddil_sd15.yaml": ("sd15", ["--updates", "2"]),
    "lcm_lora_sd15.yaml": ("sd15", ["--updates", "2"]),
    "pd_ddil_sd15.yaml": ("sd15", [f"model.stages=[{PLAN}]"]),
    "dmd2_ddil_ssd1b.yaml": ("ssd1b", ["--updates", "2", "model.critic.steps=2"]),
    "dmd2_lora_sdxl.yaml": ("ssd1b", ["--updates", "2", "model.critic.steps=2"]),
    "lcm_lora_sdxl.yaml": ("ssd1b", ["--updates", "2"]),
    "lcm_lora_sd3.yaml": ("sd3", ["--updates", "2"]),
    "lcm_lora_qwen.yaml": ("qwen", ["--updates", "2", "model.optimizer.accumulate=1"]),
    "lcm_lora_zimage.yaml": ("zimage", ["--updates", "2", "model.optimizer.accumulate=1"]),
    "lcm_lora_sana.yaml": ("sana", ["--updates", "2", "data.captions.size=32"]),
    "lcm_lora_pixart.yaml": ("pixart", ["--updates", "2"]),
    "dmd2_lora_flux.yaml": ("flux", ["--updates", "2", "model.critic.steps=2", "model.gan.layers=[block1,block3]"]),
    "dmd2_lora_sd3.yaml": ("sd3", ["--updates", "2", "model.critic.steps=2", "model.gan.layers=[block1,block2]"]),
    "ladd_lora_sd3.yaml": ("sd3", ["--updates", "2", "model.critic.steps=2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_configs_run_to_their_end_on_a_small_pipeline_of_their_layout(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """bfloat16, gradient checkpointing, data from a folder on the fly, captions that are too long, previews, every export of every stage.

    `data.truncate` and one of the first four captions too long: all updates ran, and then the export refused the prompt.
    """
    layout, own = OWN[name]
    (here / "pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 16), (30 * i, 0, 0)).save(here / "pictures" / f"{i}.png")
        (here / "pictures" / f"{i}.txt").write_text("a small red circle " * (1 + 9 * (i % 2)))
    words = ["--config", name, f"model.pipeline={request.getfixturevalue(layout)}", "--run_dir", "r", "data.captions.path=pictures"]
    words += [
        "data.captions.size=16",
        "data.batch_size=4",
        "data.workers=1",
        "previews.every=2",
        "previews.prompts=null",
        "model.optimizer.warmup=0",
    ]
    words += ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "previews.teacher_steps=[2]", *own]
    assert ddil_fit(expand(words, FIT_SHORT)) == 0
    said = capsys.readouterr().out
    assert "export, test and report were tried on the untrained student" in said and "pipeline written and checked: r/pipeline" in said
    summary = json.loads((here / "r" / "summary.json").read_text())
    assert "failed" not in summary and (here / "r" / "report.html").is_file() and list((here / "r" / "samples").glob("*.png"))
    stages = sorted(p.name for p in (here / "r" / "stages").glob("*"))
    assert stages == (["01-eps_to_v", "02-guidance", "03-16-steps", "04-8-steps", "05-4-steps", "06-2-steps"] if "pd" in name else [])
    assert not any("safety" in str(p) or "unverified" in str(p) for p in (here / "r").rglob("*"))
    pipe = DiffusionPipeline.from_pretrained(here / "r" / "pipeline")
    network = pipe.unet if layout in ("sd15", "ssd1b") else pipe.transformer
    assert {x.dtype for x in pipe.vae.parameters()} == {x.dtype for x in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", thinned(TOY))
def test_toy(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(find_config(name)), "--model.pipeline.init_args.width=8", "--model.pipeline.init_args.members=1"]
    assert (
        ddil_fit(
            [
                *words,
                f"--trainer.fast_dev_run={12 if name.removeprefix('toy2d/').startswith(TURNS) else 2}",
                "--test.n=64",
                "--test.teacher_steps=[4]",
                "--run_dir=r",
            ]
        )
        == 0
    )
    assert "no pipeline can hold this student" in capsys.readouterr().out
    summary = json.loads((here / "r" / "summary.json").read_text())
    roles = [row["name"].split("@")[0] for row in summary["rows"]]
    assert roles[:2] == ["teacher", "student"] and set(roles[1:]) == {"student"}
    assert all(row["metrics"]["energy_distance"] is not None for row in summary["rows"])
    assert (
        (here / "r" / "student.safetensors").is_file() and (here / "r" / "report.html").is_file() and not (here / "r" / "pipeline").exists()
    )
    assert (here / "runs" / name.removesuffix(".yaml") / "latest").resolve() == here / "r"


@pytest.mark.parametrize("name", [name for name in TOY if "_ddil" in name])
def test_toy_configs_differ_in_the_prior_alone(name: str) -> None:
    plain, ddil = (yaml.safe_load(find_config(n).read_text()) for n in (name.replace("_ddil", ""), name))
    assert plain["data"].pop("prior") != ddil["data"].pop("prior") and plain == ddil


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAIN)
def test_pretrain(name: str, here: Path) -> None:
    unet = ["--unet.batch_size=8", "--unet.devices=1", "--autoencoder.steps=2", "--autoencoder.decoder_steps=2"]
    words = ["--config", str(find_config(name)), "--images=32"]
    words += ["--transformer.batch_size=8", "--transformer.devices=1", "--transformer.layers=1"] if "flow" in name else unet
    words += [
        "--measurement.prompts=4",
        "--measurement.guidance=[2.0]",
        "--interim.folder=null",
        "--interim.progress=false",
        "--out=out",
    ]
    pretrain.main(words)
    about = json.loads((here / "out" / "ddil.json").read_text())
    assert about["dataset"] == yaml.safe_load(find_config(name).read_text())["dataset"] and about["images"] == 32


@pytest.mark.parametrize("name", PAIRED)
def test_a_method_with_and_without_ddil_differs_in_one_line(name: str) -> None:
    plain, ddil = ((configs_folder() / file).read_text().splitlines() for file in (f"{name}.yaml", f"{name}_ddil.yaml"))
    different = [(a, b) for a, b in zip(plain, ddil, strict=True) if a != b]
    assert len(different) == 1 and all("prior:" in line for line in different[0])
    assert all(line.startswith("#") for line in (plain[0], ddil[0]))  # the first line says what it is


@pytest.mark.parametrize("name", config_names())
def test_configs_are_short_and_named(name: str) -> None:
    text = find_config(name).read_text()
    assert text.startswith("# ") and len(text.splitlines()) <= 60
    assert isinstance(yaml.safe_load(text), dict)
