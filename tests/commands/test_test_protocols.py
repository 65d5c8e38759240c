"""ddil-test by a protocol: packaged or of one's own, with data, overrides and statistics from the command line."""

from __future__ import annotations

import functools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commandline import called, one_line
from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands import protocols
from ddil_lightning.commands.test import _parser as parser
from ddil_lightning.diffusion.gaussians import frechet_distance
from ddil_lightning.evaluation import networks
from ddil_lightning.evaluation.batches import as_saved
from ddil_lightning.evaluation.networks import Named
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.training.method import Distillation
from pictured import captioned_set, parquet

MINE = """
prompts: {source: captions.jsonl, images: pictures}
networks: {features: inception, clip: open_clip}
resize: torch-fidelity
size: 16
probes: {prompts: 2, seeds: 3}
metrics: [frechet, kid, clip]
"""


def colours(images: Tensor) -> Tensor:
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def cosines(images: Tensor, prompts: Any) -> Tensor:
    return images.mean((1, 2, 3)).clamp(-1, 1)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty captioned pictures in `set`, a protocol of them, and small networks by the names of large ones."""
    monkeypatch.chdir(tmp_path)
    captioned_set(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(MINE)
    made = {"inception": Named("colours", colours, "small"), "open_clip": Named("brightness", cosines)}
    for name, net in made.items():
        entry = networks.NETWORKS[name]
        monkeypatch.setitem(networks.NETWORKS, name, entry._replace(make=lambda path, device, net=net: net))
    return tmp_path


def call(capsys: Any, *words: Any) -> tuple[int, str, str]:
    return called(capsys, "test", *words)


def refused(capsys: Any, *words: Any) -> str:
    return one_line(capsys, "test", *words)


def scored(capsys: Any, *words: Any) -> tuple[dict[str, Any], str]:
    code, out, err = call(capsys, *words)
    assert code == 0, err
    return json.loads(Path("metrics.json").read_text())["rows"][0], out


@pytest.mark.slow
def test_a_protocol_of_one_s_own(tiny: Path, here: Path, capsys: Any) -> None:
    """Its stamp is in the row, with what the command line changes; statistics that were written give the same numbers and stamp."""
    words = ["--pipeline", tiny, "--steps", 1, "--protocol", "mine.yaml", "--data", "set"]
    row, _ = scored(capsys, *words)
    assert row["n"] == 20 and row["protocol"]["name"] == "mine" and "changed" not in row["protocol"]
    assert row["metrics"]["density"] is None and row["metrics"]["frechet"] > 0 and row["protocol"]["resize"].endswith("small")
    few, _ = scored(capsys, *words, "--n", 16, "--seed", 3)
    assert few["protocol"]["changed"] == {"n": 16, "seed": 3} and few["protocol"]["stamp"] != row["protocol"]["stamp"]
    code, out, _ = call(capsys, "--protocol", "mine.yaml", "--data", "set", "--save_reference", "real.safetensors")
    assert code == 0 and out == "statistics of 20 images: real.safetensors\n"
    again, _ = scored(capsys, *words[:-1], "set/captions.jsonl", "--images", "nowhere", "--reference", "real.safetensors")
    assert again["metrics"] == row["metrics"] and again["protocol"]["stamp"] == row["protocol"]["stamp"]
    assert again["protocol"]["changed"] == {"reference": "real.safetensors"}
    call(capsys, "--protocol", "mine.yaml", "--data", "set", "--save_reference", "real.npz")
    less, out = scored(capsys, *words, "--reference", "real.npz")
    assert out.count("left out: kid, for the images of these prompts hold mean and covariance alone") == 1
    (here / "more.yaml").write_text(MINE.replace("clip: open_clip", "embed: inception").replace("clip]", "cmmd]"))
    _, out = scored(capsys, *words[:5], "more.yaml", *words[6:], "--reference", "real.safetensors")
    assert "left out: cmmd, for the statistics of the images of these prompts hold no embeddings\n" in out
    assert less["metrics"]["frechet"] == pytest.approx(row["metrics"]["frechet"], rel=1e-9) and less["metrics"]["kid"] is None


def test_statistics_take_the_place_of_a_split(here: Path, capsys: Any) -> None:
    """They have neither split nor column, whatever the protocol says of its data set, and its row has the same stamp by them."""
    parquet(here / "real", rows=12)
    (here / "p.yaml").write_text(MINE + "references: {source: real, split: train, image: image}\n")
    words = ["--protocol", "p.yaml", "--data", "set"]
    code, _, err = call(capsys, *words, "--save_reference", "real.safetensors")
    assert code == 0, err
    found = []
    for more in ([], ["--reference", "real.safetensors"]):
        plan = protocols.planned(parser().parse_args([*words, *more]))
        found.append(Suite.of(plan.protocol, plan.networks).protocol)
    assert found[0]["stamp"] == found[1]["stamp"] and found[0]["reference"]["images"] == 12


def test_prompts_alone(tiny: Path, here: Path, capsys: Any) -> None:
    (here / "few.txt").write_text("a handwritten one\n" * 17)
    networks = ["--pipeline", tiny, "--steps", 1, "--data", "few.txt"]
    (here / "p.yaml").write_text(MINE.replace("captions.jsonl, images: pictures", "few.txt") + "references: {source: null}\n")
    row, out = scored(capsys, *networks[:-2], "--protocol", "p.yaml")
    assert out.count("left out: frechet, kid, for there are no real images") == 1
    assert row["n"] == 17 and row["metrics"]["clip"] is not None and row["metrics"]["frechet"] is row["metrics"]["kid"] is None
    assert "--images set: few.txt names no images" in refused(capsys, *networks, "--images", "set")
    (here / "few.txt").write_text("a handwritten one\n" * 3)
    assert "few.txt holds 3 captions: at least 16 prompts" in refused(capsys, *networks)


def test_what_is_asked_for_and_cannot_be_measured(tiny: Path, here: Path, capsys: Any) -> None:
    """Each is named with what it lacks; under --strict, and where nothing is left, nothing is drawn."""
    (here / "few.txt").write_text("a handwritten one\n" * 16)
    text = "{prompts: {source: few.txt}, references: {source: null}, probes: {prompts: 0, seeds: 0}, networks: {clip: open_clip}, "
    (here / "some.yaml").write_text(text + "metrics: [clip, frechet, hps, all_right]}")
    words = ["--pipeline", tiny, "--steps", 1, "--protocol"]
    row, out = scored(capsys, *words, "some.yaml")
    assert row["metrics"]["clip"] is not None and "left out: hps, for there is no network for hps\n" in out
    assert "left out: frechet, for there is no network for features\n" in out and ", all_right, for there is no judge\n" in out
    said = refused(capsys, *words, "some.yaml", "--strict")
    assert "some asks for what cannot be measured: frechet, for there is no network for features; " in said
    (here / "none.yaml").write_text(text + "metrics: [hps]}")
    assert "none asks for what cannot be measured: hps, for there is no network for hps: give" in refused(capsys, *words, "none.yaml")


def test_what_the_command_line_changes_is_told(tiny: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--pipeline", tiny, "--steps", 1, "--protocol", "mine.yaml", "--data", "set"]
    row, out = scored(capsys, *words, "--network", "clip=none", "--samples", 2, "--n", 16)
    assert row["protocol"]["changed"] == {"n": 16, "network": "clip=none", "samples": 2} and row["n"] == 32
    assert "measured by mine (n = 16, network = clip=none, samples = 2) " in out
    said = refused(capsys, *words, "--network", "hps")
    assert "--network hps=hps: protocol mine asks for none of its numbers (hps): leave it out" in said
    assert "--out set is a folder: give the name of a file, such as set/metrics.json" in refused(capsys, *words, "--out", "set")
    monkeypatch.setattr(Suite, "of", lambda *_: pytest.fail("real images were read first"))
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a handwritten one " * 40}) for i in range(20)]
    (here / "set" / "captions.jsonl").write_text("\n".join(rows))
    assert "cut it by --truncate" in refused(capsys, *words)


@pytest.mark.parametrize("told", ["by_option", pytest.param("by_card", marks=pytest.mark.slow)])
def test_distances_to_the_teacher(told: str, tiny: Path, light: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a teacher that is named, or that the card names where a protocol asks: drawn from noise of its own, once for all rows."""
    monkeypatch.setenv("DDIL_CACHE", str(here / "cache"))
    shutil.copytree(tiny, "student")
    card = Path("student/ddil.json")
    card.write_text(json.dumps(json.loads(card.read_text()) | {"teacher": str(light)}))
    shutil.copytree("student", "other")
    (here / "asks.yaml").write_text(MINE.replace("clip]", "clip, frechet_teacher]"))
    words = ["--steps", 1, "--protocol", "mine.yaml", "--data", "set", "--teacher_steps", 2]
    words += ["--teacher", light] if told == "by_option" else ["--protocol", "asks.yaml"]
    row, out = scored(capsys, "--pipeline", "student", *words)
    assert "the teacher: 20 images, " in out and "drawn now" not in out
    set_apart, backbones = 20 + 2 * 3, [Pipeline(str(light)), Pipeline(str(tiny))]
    theirs, mine = (
        sampling.decoded(b, sampling.pipeline_latents(b, [f"a handwritten {'two' if i % 2 else 'one'}" for i in range(20)], n, 2.0, seed))
        for b, n, seed in zip(backbones, (2, 1), (set_apart, 0), strict=True)
    )
    expected = frechet_distance(*(colours(as_saved(x)) for x in (mine, theirs)))
    assert row["metrics"]["frechet_teacher"] == pytest.approx(expected, rel=1e-3)
    about, protocol = f"{light} in 2 steps, guidance_scale 2", row["protocol"]
    assert protocol["reference"]["teacher"] == about and protocol.get("changed") == ({"teacher": about} if told == "by_option" else None)
    code, out, err = call(capsys, "--compare", "student", "other", *words)
    assert code == 0 and "the teacher: 20 images, 0 of them drawn now" in out, err
    for other in json.loads(Path("compare.json").read_text())["rows"]:
        assert other["metrics"]["frechet_teacher"] == row["metrics"]["frechet_teacher"] and other["protocol"] == protocol
    _, out, _ = call(capsys, "--compare", "student", "other", *words)
    assert "has 2 of 2 rows already" in out and "the teacher: " not in out
    again, _ = scored(capsys, "--pipeline", "student", *words, "--teacher_steps", 3)
    assert again["protocol"]["stamp"] != protocol["stamp"]
    card.write_text(json.dumps(json.loads(card.read_text()) | {"method": "LCM", "guidance": 1.5}))  # as the student was distilled
    for more, g in (([], "1.5"), (["--teacher_guidance", 3], "3")):
        again, _ = scored(capsys, "--pipeline", "student", *words, *more)
        assert again["protocol"]["reference"]["teacher"] == f"{light} in 2 steps, guidance_scale {g}"


@pytest.mark.parametrize("of", ["pipeline", "ckpt_path"])
def test_student_and_teacher_are_on_the_device_in_turn(
    of: str, tiny: Path, light: Path, finished: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two large pipelines would not fit beside each other, nor would a method and its teacher."""
    load, places = Pipeline.load, {name: getattr(Distillation, name) for name in ("to", "cpu")}
    loaded: list[Any] = []
    moves: list[str] = []

    def one(self: Pipeline, source: Any, dtype: Any, vae_dtype: Any, bare: bool) -> Any:
        assert not any(before() for before in loaded) and moves[-1:] != ["to"]
        pipe = load(self, source, dtype, vae_dtype, bare)
        loaded.extend([] if bare else [weakref.ref(pipe.unet)])  # a bare one is the method's own
        return pipe

    def moved(self: Any, *args: Any, name: str) -> Any:
        assert not any(before() for before in loaded)
        moves.append(name)
        return places[name](self, *args)

    monkeypatch.setattr(Pipeline, "load", one)
    for name in places:
        monkeypatch.setattr(Distillation, name, functools.partialmethod(moved, name=name))
    words = ["--steps", 1, "--protocol", "mine.yaml", "--data", "set", "--teacher", light, "--teacher_steps", 2]
    words += ["--out", "metrics.json"]
    row, _ = scored(capsys, f"--{of}", tiny if of == "pipeline" else finished, *words)
    assert row["metrics"]["frechet_teacher"] > 0
    # The teacher is looked at, then the student; it draws, and then the student does.
    assert (len(loaded), moves) == ((4, []) if of == "pipeline" else (2, ["to", "cpu", "to"]))


def test_a_teacher_that_cannot_be_had(tiny: Path, here: Path, capsys: Any) -> None:
    (here / "asks.yaml").write_text(MINE.replace("clip]", "clip, frechet_teacher]"))
    words = ["--pipeline", tiny, "--steps", 1, "--data", "set", "--protocol"]
    _, out = scored(capsys, *words, "asks.yaml")
    assert "left out: frechet_teacher, for there are no images of a teacher (ddil-test --teacher PIPELINE draws them)\n" in out
    assert "the teacher gone/away/it: no pipeline at gone/away/it" in refused(capsys, *words, "mine.yaml", "--teacher", "gone/away/it")
    shutil.copytree(tiny, "student")
    card = Path("student/ddil.json")
    card.write_text(json.dumps(json.loads(card.read_text()) | {"teacher": "sd15"}))  # a released student's: its teacher's place is not told
    words[1] = "student"
    _, out = scored(capsys, *words, "asks.yaml")
    assert "left out: the distances to the teacher sd15, for no pipeline at sd15" in out
    assert "the teacher sd15: no pipeline at sd15" in refused(capsys, *words, "asks.yaml", "--strict")
    words[1] = str(tiny)
    assert "--teacher_steps is of --teacher: name" in refused(capsys, *words, "mine.yaml", "--teacher_steps", 4)
    blind = ["--network", "features=none", "--teacher", tiny]
    assert "a distance to the teacher is one of features, and there is no network" in refused(capsys, *words, "mine.yaml", *blind)


def test_a_benchmark_is_of_all_its_prompts(here: Path) -> None:
    (here / "many.jsonl").write_text("".join(json.dumps({"item_id": f"x{i}", "prompt": "a cat"}) + "\n" for i in range(1065)))
    words = ["--pipeline", "x", "--data", "many.jsonl"]
    for more, n in (
        ([], 1000),
        (["--layout", "dpg", "--keep_images", "d"], 1065),
        (["--layout", "dpg", "--keep_images", "d", "--n", "20"], 20),
    ):
        plan = protocols.planned(parser().parse_args([*words, *more]))
        assert plan is not None and plan.protocol.prompts.n == n


def test_data_that_are_not_there(tiny: Path, here: Path, capsys: Any) -> None:
    words = ["--pipeline", tiny, "--steps", 1, "--protocol"]
    said = refused(capsys, *words, "coco2017_5k")
    assert "protocol coco2017_5k: no annotations/captions_val2017.json, no val2017; give --data DIR" in said and "cocodataset.org" in said
    assert "protocol hpsv2: no set/benchmark/anime.json" in refused(capsys, *words, "hpsv2", "--data", "set")
    assert "did you mean protocols/shapes.yaml" in refused(capsys, *words, "shape")
    assert "protocol shapes is of shapes, not of set: leave --data out" in refused(capsys, *words, "shapes", "--data", "set")
    (here / "wrong.yaml").write_text("prompts: {source: a}\nsed: 1\n")
    assert "wrong.yaml: unknown key sed: did you mean seed?" in refused(capsys, *words, "wrong.yaml")
    assert "leave the pipeline out" in refused(capsys, *words, "mine.yaml", "--data", "set", "--save_reference", "x.npz")
    (here / "set" / "pictures" / "7.png").write_text("no picture")
    assert "pictures/7.png: not a readable image" in refused(capsys, *words, "mine.yaml", "--data", "set")
    row, _ = scored(capsys, *words, "mine.yaml", "--data", "set", "--skip_unreadable")
    assert row["protocol"]["reference"]["unreadable"] == 1 and row["protocol"]["reference"]["images"] == 19


def test_a_packaged_protocol_is_its_built_in_data(tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--pipeline", tiny, "--steps", 1, "--n", 16]
    assert "shapes are pictures of 32 pixels" in refused(capsys, *words, "--protocol", "shapes")
