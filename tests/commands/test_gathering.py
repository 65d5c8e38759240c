"""ddil-probe by the protocols of ddil-test: what it reads, measures and leaves out, and what it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from commandline import called, one_line
from ddil_lightning.commands import gathering
from ddil_lightning.evaluation import networks
from ddil_lightning.evaluation.networks import Absent, Named
from ddil_lightning.streams import apart
from pictured import captioned_set

MINE = """
prompts: {source: captions.jsonl, images: pictures}
networks: {features: inception, clip: open_clip, distance: lpips}
size: 16
probes: {prompts: 2, seeds: 3}
seed: 5
metrics: [frechet, clip, lpips_diversity]
"""
BACKBONE: Any = SimpleNamespace(size=(16, 16), path="here", about={})


def absent(*_: Any, **__: Any) -> Any:
    raise Absent("no connection")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty captioned pictures in `set`, a protocol of them, small networks by the names of large ones, and no LPIPS."""
    monkeypatch.chdir(tmp_path)
    captioned_set(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(MINE)

    def colours(images: Tensor) -> Tensor:
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)

    def brightness(images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3)).clamp(-1, 1)

    made: dict[str, Any] = {"inception": Named("colours", colours, "small"), "open_clip": Named("brightness", brightness)}
    for name in ("inception", "open_clip", "lpips"):
        make = (lambda path, device, net=made[name]: net) if name in made else absent
        monkeypatch.setitem(networks.NETWORKS, name, networks.NETWORKS[name]._replace(make=make))
    return tmp_path


def arguments(**said: Any) -> argparse.Namespace:
    """The arguments of a ddil-probe that says nothing but this."""
    names = ("protocol", "data", "images", "n", "seed", "reference", "image_column", "caption_column", "split")
    none = dict.fromkeys(names)
    return argparse.Namespace(**none | {"network": [], "strict": False, "skip_unreadable": False, "truncate": False} | said)


def gathered(**said: Any) -> gathering.Material:
    args = arguments(**said)
    return gathering.material(args, gathering.asked(args), BACKBONE)


def red(material: gathering.Material, size: int = 6) -> list[int]:
    """The amount of red in each picture, in the order of the prompts."""
    assert material.pictures is not None, material.without
    parts = list(material.pictures(size))
    assert all(len(part) <= size and part.shape[1:] == (3, 16, 16) for part in parts)
    return [round(float(x[0].mean() + 1) * 127.5) for x in torch.cat(parts)]


def probe(capsys: Any, *words: Any) -> tuple[int, str, str]:
    return called(capsys, "probe", *words)


def refused(capsys: Any, *words: Any) -> str:
    return one_line(capsys, "probe", *words)


def test_a_protocol_of_one_s_own(tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward latents of its pictures, sweeps by its networks and seed, without what several images of a prompt would be needed for."""
    words = ["--student", tiny, "--teacher", tiny, "--steps", 2, "--teacher_steps", 4, "--protocol", "mine.yaml", "--data", "set"]
    code, out, err = probe(capsys, *words)
    assert code == 0, err
    made = json.loads(Path("probe.json").read_text())
    said = made["protocol"]
    assert (said["name"], said["n"], said["seed"], said["changed"]) == ("mine", 20, 5, {"probes": 0})
    assert said["networks"]["features"] == "colours" and said["reference"]["images"] == 20 and said["seeds"]["first"] == apart(5)
    assert set(made["nodes"][1]["shift"]) == {"teacher", "forward"} and "left_out" not in said
    for row in (*made["mixing"], *made["switch"]):
        assert row["metrics"]["frechet"] > 0 and row["metrics"]["clip"] is not None and "lpips_diversity" not in row["metrics"]
    # LPIPS is of nothing that is measured, so that its weights need not be there.
    assert out.count("left out: lpips_diversity, for ddil-probe draws one image of a prompt") == 1 and "lpips" not in err
    entry = networks.NETWORKS["open_clip"]
    monkeypatch.setitem(networks.NETWORKS, "open_clip", entry._replace(make=absent))
    said_so = refused(capsys, *words, "--only", "switch", "--strict")
    assert "the network open_clip, which clip look through, cannot be had: no connection" in said_so


def test_what_is_no_protocol_is_refused(tiny: Path, here: Path, capsys: Any) -> None:
    pair = ["--student", tiny, "--teacher", tiny, "--protocol"]
    (here / "captions.yaml").write_text("a handwritten one\n" * 20)
    assert "captions.yaml" in refused(capsys, *pair, "captions.yaml")
    (here / "list.yml").write_text("- a handwritten one\n" * 20)
    assert "list.yml" in refused(capsys, *pair, "list.yml")
    (here / "wrong.yaml").write_text("prompts: {source: a}\nsed: 1\n")
    assert "wrong.yaml: unknown key sed: did you mean seed?" in refused(capsys, *pair, "wrong.yaml")
    assert "no config nowhere.yaml" in refused(capsys, *pair, "nowhere.yaml")
    said = refused(capsys, *pair, "coco2017_5k")
    assert "protocol coco2017_5k: no annotations/captions_val2017.json, no val2017; give --data DIR" in said
    assert "protocols are coco2014_30k, coco2017_5k" in refused(capsys, *pair, "coco2017_5")
    assert "say which, by --protocol NAME" in refused(capsys, *pair[:-1], "--data", "set")
    assert "holds the files of a protocol, and set is none" in refused(capsys, *pair, "set", "--data", "set")
    assert "--network hps: digits has networks of its own" in refused(capsys, *pair, "digits", "--network", "hps")
    assert "asks for none of its numbers" in refused(capsys, *pair, "mine.yaml", "--data", "set", "--network", "hps")
    assert "no network 'nets'" in refused(capsys, *pair, "set/captions.jsonl", "--network", "nets")
    (here / "few.yaml").write_text(MINE.replace("pictures}", "pictures, n: 8}"))
    assert "few asks for 8 prompts: at least 16" in refused(capsys, *pair, "few.yaml", "--data", "set")
    (here / "several.yaml").write_text(MINE.replace("frechet, clip, ", ""))
    said = refused(capsys, *pair, "several.yaml", "--data", "set", "--only", "mixing")
    assert "protocol several asks for nothing but lpips_diversity, for ddil-probe draws one image of a prompt" in said


def test_pictures_are_read_by_parts_in_the_order_of_the_prompts(here: Path) -> None:
    assert red(gathered(protocol="mine.yaml", data="set")) == [12 * i for i in range(20)]
    own = gathered(protocol="set/captions.jsonl", images="set/pictures", n=16, seed=3)
    named = gathered(protocol="mine.yaml", data="set", n=16, seed=3)
    assert len(own.prompts) == 16 == len(named.prompts) and (own.seed, named.seed) == (3, 3)
    rows = [json.loads(line) for line in (here / "set" / "captions.jsonl").read_text().splitlines()]
    (here / "set" / "captions.jsonl").write_text("\n".join(json.dumps(r | {"text": [r["text"], f"again {i}"]}) for i, r in enumerate(rows)))
    (here / "all.yaml").write_text(MINE.replace("pictures}", "pictures, captions: all, n: 12}"))
    several = gathered(protocol="all.yaml", data="set")
    seen = red(several, 5)
    assert len(several.prompts) == 24 and seen[::2] == seen[1::2] == sorted(set(seen))
    assert several.prompts[1::2] == [f"again {value // 12}" for value in seen[::2]]


def test_data_sets_keep_their_images(here: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    files = [str(here / "set" / "pictures" / f"{i}.png") for i in range(20)]
    columns = Features({"image": Picture(), "caption": Value("string")})
    made = Dataset.from_dict({"image": files, "caption": [f"a {i}" for i in range(20)]}, features=columns)
    made.save_to_disk("saved")
    made.to_parquet("all.parquet")
    for found in (gathered(protocol="saved", caption_column="caption"), gathered(protocol="all.parquet")):
        assert red(found) == [12 * i for i in range(20)] and found.prompts == [f"a {i}" for i in range(20)]
    with pytest.raises(ValueError, match="has no column picture"):
        gathered(protocol="all.parquet", image_column="picture")


def test_prompts_without_pictures_say_why(here: Path) -> None:
    (here / "lines.txt").write_text("a handwritten one\n" * 300)
    alone = gathered(protocol="lines.txt")
    assert len(alone.prompts) == 256 and alone.pictures is None and alone.without == "lines.txt has captions without images"
    gone = gathered(protocol="set/captions.jsonl", images="nowhere")
    assert gone.without.startswith("set/captions.jsonl has captions without images (") and "20 of 20 images are missing" in gone.without
    assert gone.without.endswith("; say where by --images (in a protocol prompts.images))")  # as the command has it
    (here / "none.yaml").write_text(MINE.replace("images: pictures", "images: nowhere") + "references: {source: null}\n")
    assert "20 of 20 images are missing" in gathered(protocol="none.yaml", data="set").without


def test_a_picture_that_cannot_be_read(here: Path) -> None:
    (here / "set" / "pictures" / "7.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"7\.png: not a readable image"):
        red(gathered(protocol="mine.yaml", data="set"))
    left = gathered(protocol="mine.yaml", data="set", skip_unreadable=True)
    assert len(red(left)) == 19 and left.unread().startswith("1 of 20 pictures cannot be read, first ")
