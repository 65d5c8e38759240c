"""ddil-invert from images to a table: on built-in data, on a folder of pictures, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commandline import called, one_line
from ddil_lightning.backbones import lora
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands import inverting
from ddil_lightning.evaluation.networks import MapDistance, Networks

QUICK = ("--n", "2", "--tokens", "3", "--updates", "10", "--passes", "1", "--teacher_steps", "2", "--seeds", "2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invert(capsys: Any, *words: Any) -> tuple[int, str, str]:
    return called(capsys, "invert", *words)


def refused(capsys: Any, *words: Any) -> str:
    return one_line(capsys, "invert", *words)


def test_a_run_and_a_pipeline_on_built_in_images(finished: Path, tiny: Path, capsys: Any) -> None:
    """The teacher is the one of the run's card; a row each, the teacher's on the true captions besides."""
    code, out, err = invert(capsys, "--student", finished, "--student", tiny, *QUICK)
    assert code == 0, err
    made = json.loads(Path("invert.json").read_text())
    assert list(made) == ["protocol", "prompts", "rows", "recovery"]
    teacher = made["protocol"]["teacher"]
    assert [row["name"] for row in made["rows"]] == [teacher, f"{teacher}, true captions", str(finished), str(tiny)]
    assert [row["nfe"] for row in made["rows"]] == [4, 4, 4, 4]  # two guided steps, and four of a student
    assert made["rows"][0]["guidance_scale"] == 2 and made["rows"][3]["guidance_scale"] == 1
    for row in made["rows"]:
        assert {"similarity", "similarity_others", "lpips", "lpips_diversity", "all_right"} <= set(row["metrics"])
    for prompt in made["prompts"]:
        assert len(prompt["prompt"].split()) == 3 and prompt["caption"].startswith("a handwritten") and prompt["caption"] in out
        assert prompt["trace"][-1] == prompt["loss"] and len(prompt["trace"]) == 3 and prompt["caption_loss"] > 0
    assert "mean loss: random words" in out and "after exchanges" in out and "true captions" in out
    assert set(made["recovery"]["words"]) == {"attributes", "all", "by", "chance"} and len(made["recovery"]["images"]) == 4


def test_the_teacher_is_what_the_card_says_and_a_student_is_a_word(finished: Path, tiny: Path, capsys: Any) -> None:
    shutil.copytree(finished / "pipeline", "student")
    card = json.loads(Path("student/ddil.json").read_text())
    role = Pipeline(str(tiny)).role("student", adapter=Adapter(2))
    lora.write(type(Pipeline(str(tiny)).pipe), Path("style.safetensors"), role.network, torch.float32)
    options = {"lora": [{"path": "style.safetensors", "weight_name": None, "scale": 0.5}]}
    Path("student/ddil.json").write_text(json.dumps(card | {"teacher_options": options}))
    code, _, err = invert(capsys, "--student", "student", "--student", f"{tiny}:lcm@1#2", *QUICK, "--updates", "0", "--passes", "0")
    assert code == 0, err
    made = json.loads(Path("invert.json").read_text())
    assert made["protocol"]["teacher"] == f"{card['teacher']}+style.safetensors*0.5"
    assert (made["rows"][-1]["name"], made["rows"][-1]["nfe"], made["rows"][-1]["guidance_scale"]) == (f"{tiny}:lcm@1#2", 2, 1)


def test_prompts_of_a_call_that_failed_are_not_searched_again(tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last sampler diverged; more images are searched beside them, and another search begins anew."""
    searched: list[int] = []
    real, compared = inverting.invert, inverting.compared
    monkeypatch.setattr(inverting, "invert", lambda *words: searched.append(words[-1]) or real(*words))

    def diverges(*words: Any) -> None:
        raise ValueError("latents of the last student hold NaN")

    words = ("--teacher", tiny, *QUICK, "--updates", 0, "--passes", 0)
    monkeypatch.setattr(inverting, "compared", diverges)
    assert "hold NaN" in refused(capsys, *words)
    assert searched == [0, 1] and len(list(Path("invert.parts").iterdir())) == 2 and not Path("invert.json").exists()
    monkeypatch.setattr(inverting, "compared", compared)
    code, _, err = invert(capsys, *words)
    assert code == 0 and searched == [0, 1] and not Path("invert.parts").exists(), err
    made = json.loads(Path("invert.json").read_text())
    code, _, err = invert(capsys, *words)
    assert code == 0 and searched == [0, 1, 0, 1] and json.loads(Path("invert.json").read_text()) == made, err
    monkeypatch.setattr(inverting, "compared", diverges)
    for more in (("--n", 3), ("--n", 3), ("--tokens", 2)):
        assert "hold NaN" in refused(capsys, *words, *more)
    assert searched[4:] == [0, 1, 2, 0, 1]


def test_prompts_are_known_by_the_pixels_of_their_images(tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent may change in its last digits with the batch that it is encoded in."""
    searched: list[int] = []
    real, encode = inverting.invert, Pipeline.encode_images
    monkeypatch.setattr(inverting, "invert", lambda *words: searched.append(words[-1]) or real(*words))

    def diverges(*words: Any) -> None:
        raise ValueError("latents of the last student hold NaN")

    monkeypatch.setattr(inverting, "compared", diverges)
    for rounding in (1.0, 1 + 1e-6):
        monkeypatch.setattr(Pipeline, "encode_images", lambda self, x, rounding=rounding: rounding * encode(self, x))
        assert "hold NaN" in refused(capsys, "--teacher", tiny, *QUICK, "--updates", 0, "--passes", 0)
    assert searched == [0, 1]


@pytest.mark.slow
def test_pictures_of_ones_own(xl: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two text encoders, and by networks of one's own in the place of CLIP and LPIPS; a picture has no caption and no recovery."""
    Path("mine/deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "deep/b.jpg", "deep/c.png")):
        Image.new("RGB", (20, 30), (80 * i, 0, 255)).save(Path("mine") / name)
    monkeypatch.setattr(inverting, "LOOKS", Networks(lambda x: x.mean((2, 3)), distance=MapDistance(lambda x: [x])))
    code, out, err = invert(capsys, "--teacher", xl, "--images", "mine", *QUICK, "--guidance", "2", "--seeds", "1")
    assert code == 0, err
    made = json.loads(Path("invert.json").read_text())
    assert made["recovery"] is None and "recovered" not in out and [p["caption"] for p in made["prompts"]] == [None, None]
    assert {Path(p["image"]).name for p in made["prompts"]} < {"a.png", "b.jpg", "c.png"}
    assert len(made["rows"]) == 1 and made["rows"][0]["metrics"]["lpips_diversity"] is None


@pytest.mark.slow
def test_the_built_in_teacher_gives_back_what_is_in_a_picture(capsys: Any) -> None:
    """A short search of one scene: a loss far below that of the words that it began with."""
    few = ("--n", 1, "--updates", 10, "--passes", 1, "--tokens", 5, "--seeds", 1, "--teacher_steps", 2)
    code, _, err = invert(capsys, "--teacher", "builtin", *few)
    assert code == 0, err
    (prompt,) = json.loads(Path("invert.json").read_text())["prompts"]
    assert prompt["loss"] < 0.6 * prompt["trace"][0] and {"red", "cross", "grey"} & set(prompt["prompt"].split())


@pytest.mark.slow
def test_the_built_in_scenes_are_recovered(capsys: Any) -> None:
    """As the documentation measures it, on some of its scenes: far more than chance, in words and in images."""
    code, _, err = invert(capsys, "--teacher", "builtin", "--n", 6, "--seeds", 2)
    assert code == 0, err
    recovery = json.loads(Path("invert.json").read_text())["recovery"]
    for found in (recovery["words"], recovery["images"][0]):
        assert found["attributes"] > found["chance"]["attributes"] + 0.3


def test_bad_input_is_refused_in_a_line(tiny: Path, sd15: Path, xl: Path, capsys: Any) -> None:
    assert "give --teacher, by which prompts are found" in refused(capsys)
    assert "has no card that names its teacher" in refused(capsys, "--student", sd15)
    assert "--out x.txt: give a file's name that ends in .json" in refused(capsys, "--teacher", tiny, "--out", "x.txt")
    assert "--tokens 15: the text encoder of" in refused(capsys, "--teacher", tiny, "--tokens", 15)
    assert "--timesteps 9 3: give two from 0 to 999" in refused(capsys, "--teacher", tiny, "--timesteps", 9, 3)
    assert "was not made for the built-in data: give a folder" in refused(capsys, "--teacher", sd15)
    assert "nowhere: no such folder" in refused(capsys, "--teacher", tiny, "--images", "nowhere")
    Path("empty").mkdir()
    assert "digits has networks of its own" in refused(capsys, "--teacher", tiny, "--network", "lpips")
    assert "empty holds no pictures" in refused(capsys, "--teacher", tiny, "--images", "empty")
    Path("empty/cut.png").write_bytes(b"x")
    said = refused(capsys, "--teacher", tiny, "--images", "empty")
    assert "cut.png" in said and "repair or remove it" in said and "skip_unreadable" not in said  # which the command has not
    Path("empty/cut.png").unlink()
    Path("empty/a.png").write_bytes(b"no picture")
    assert "a.png: not a readable image" in refused(capsys, "--teacher", tiny, "--images", "empty")
    assert "--n 3: empty holds 1 picture" in refused(capsys, "--teacher", tiny, "--images", "empty", "--n", 3)
    assert "give a student and a teacher of the same latent space" in refused(capsys, "--teacher", tiny, "--student", "builtin")
    Image.new("RGB", (8, 8)).save("empty/a.png")
    assert "name a network for each" in refused(capsys, "--teacher", xl, "--images", "empty", "--network", "features=none")
    assert "network lpips: nowhere is not there" in refused(capsys, "--teacher", xl, "--images", "empty", "--network", "lpips:nowhere")
