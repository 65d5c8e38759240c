"""Protocols: what a file can say, which prompts and images it takes, and what its stamp knows."""

from __future__ import annotations

import gc
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from ddil_lightning.data.pictures import read_picture
from ddil_lightning.evaluation import galleries
from ddil_lightning.evaluation.captioned import choice, read_set
from ddil_lightning.evaluation.galleries import Gallery
from ddil_lightning.evaluation.given import Given, View
from ddil_lightning.evaluation.material import material, named
from ddil_lightning.evaluation.networks import Networks
from ddil_lightning.evaluation.protocols import BUILTIN, ProbePlan, PromptSource, Protocol, ReferenceSource, protocol
from ddil_lightning.evaluation.registry import wanted
from ddil_lightning.evaluation.stamps import comparable, covers, note, stamp
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.evaluation.views import Crops
from ddil_lightning.packaged import config_names, find_config

PACKAGED = [name for name in config_names() if name.startswith("protocols/")]


def read(name: str) -> Protocol:
    return protocol(yaml.safe_load(find_config(name).read_text()), str(find_config(name)))


def picture(path: Path, seed: int, size: tuple[int, int] = (20, 24)) -> Path:
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Six images of COCO's layout with two captions each, of which the one with the lower id stands last."""
    images = [{"id": 10 * i, "file_name": f"{i:03d}.png"} for i in range(6, 0, -1)]
    notes = [
        {"id": 100 - k, "image_id": 10 * i, "caption": f"image {i}, {'late' if k < 50 else 'early'}"}
        for i in range(1, 7)
        for k in (i, 50 + i)
    ]
    file = tmp_path / "coco" / "annotations" / "captions_val2017.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"images": images, "annotations": notes}))
    for i in range(1, 7):
        picture(tmp_path / "coco" / "val2017" / f"{i:03d}.png", i)
    return file


# files


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_protocols_name_what_there_is(name: str) -> None:
    made = read(name)
    assert made.name == Path(name).stem and wanted(made.metrics)
    assert set(named(made).named) == set(made.networks) and (made.prompts.source in BUILTIN or made.obtain)


def test_the_conventions_that_numbers_are_published_by() -> None:
    assert {Path(name).stem for name in PACKAGED} == set("coco2017_5k coco2014_30k sdxl_10k diversity_50x10 hpsv2 shapes digits".split())
    five, thirty, sdxl, many = (read(f"protocols/{n}") for n in ("coco2017_5k", "coco2014_30k", "sdxl_10k", "diversity_50x10"))
    assert [p.prompts.n for p in (five, thirty, sdxl)] == [5000, 30000, 10000] and [p.size for p in (five, thirty, sdxl)] == [256, 256, 512]
    assert {named(p).named["features"].name for p in (five, thirty, sdxl)} == {"inception_clean_fid"} and sdxl.crops == Crops(299, None)
    assert (many.probes.prompts, many.probes.seeds, many.references.source) == (50, 10, None)


@pytest.mark.parametrize(
    "text, said",
    [
        ("prompts: {source: a, m: 3}", "unknown key prompts.m: did you mean prompts.n?"),
        ("promts: {source: a}", "unknown key promts.source: did you mean prompts.source?"),
        ("seed: 1", "it needs prompts.source"),
        ("prompts: {source: a, n: x}", "prompts.n takes int or null, not x"),
        ("prompts: {source: a, captions: any}", "prompts.captions takes lowest_id or first or all, not any"),
        ("{prompts: {source: shapes}, size: 256, references: {source: null}}", "probes of its own: leave size, references out, of a"),
        ("{prompts: {source: digits, choice: 3}}", "leave prompts.choice out, of a protocol of it are prompts.source, prompts.n, seed"),
        ("{prompts: {source: a}, seed: -1}", "seed is -1: give a whole number"),
        ("{prompts: {source: a}, resize: bicubic}", "resize takes clean-fid or torch-fidelity or null, not bicubic"),
        ("{prompts: {source: a}, resize: clean-fid}", "resize clean-fid is a convention of inception, and features are None"),
        ("{prompts: {source: a}, crops: {side: 9, at: 8}}", "Crops(side=9, at=8, grid=1): give 1 <= side <= at"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_in_a_line(text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        protocol(yaml.safe_load(text), "mine.yaml")
    assert str(error.value).startswith("mine.yaml: ") and said in str(error.value) and "\n" not in str(error.value)


def test_the_built_in_data_heed_nothing_else() -> None:
    for changes in ({"size": 64}, {"probes": ProbePlan(3, 3)}, {"networks": {"clip": "open_clip"}}, {"crops": Crops(9, 9)}):
        with pytest.raises(ValueError, match=f"shapes brings real images, .*: leave {next(iter(changes))} out"):
            Protocol(PromptSource("shapes"), **changes)  # type: ignore[arg-type]


def test_a_metric_and_a_network_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="no metric 'frechett': did you mean frechet"):
        material(Protocol(PromptSource("nothing"), metrics=["frechett"]))
    with pytest.raises(ValueError, match="networks has no feature: known are features, clip"):
        Suite.of(
            replace(read("protocols/diversity_50x10"), prompts=PromptSource(str(find_config("lcm"))), networks={"feature": "x"}, name="p")
        )


# prompts


def taken(file: Path, **options: Any) -> list[str]:
    source = PromptSource(str(file), **options)
    return choice(read_set(source), source).prompts


def test_of_several_captions_the_lowest_id_unless_the_protocol_says_otherwise(coco: Path) -> None:
    assert taken(coco) == [f"image {i}, early" for i in range(1, 7)]
    assert taken(coco, captions="first") == [f"image {i}, late" for i in range(1, 7)]
    assert taken(coco, captions="all", n=2, choice=1) == [f"image {i}, {w}" for i in (2, 5) for w in ("early", "late")]
    assert taken(coco, n=3, choice=0) == taken(coco, n=3, choice=0) != taken(coco, n=3, choice=3)
    with pytest.raises(ValueError, match="n=7: choose 2 to 6 of the 6 images"):
        taken(coco, n=7)


def test_a_list_says_which_images_and_in_which_order(coco: Path, tmp_path: Path) -> None:
    only = tmp_path / "only.txt"
    only.write_text("40\n002.png\n")
    assert taken(coco, only=str(only)) == ["image 4, early", "image 2, early"]
    only.write_text("40\n002.png\n60\n")
    listed = Protocol(PromptSource(str(coco), only=str(only)))
    few, changed = listed.differing(n=2)
    assert changed == {"n": 2} and few.prompts.only == str(only)
    found = choice(read_set(few.prompts), few.prompts)
    assert found.about == f"2 chosen by seed 0 of those that {only} names" and set(found.prompts) < {f"image {i}, early" for i in (4, 2, 6)}
    for text, said in (
        ("40\n004.png", "line 2: '004.png' is the image of line 1 again"),
        ("7", "line 1: no images of the set are called '7'"),
    ):
        only.write_text(text)
        with pytest.raises(ValueError, match=said):
            taken(coco, only=str(only))


def test_rows_of_one_file_are_captions_of_one_image(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / f"{i}.png", i)
    rows = [{"file_name": f"{i}.png", "text": f"{i} {w}"} for w in "ab" for i in range(2)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert taken(tmp_path / "list.jsonl") == ["0 a", "1 a"] and taken(tmp_path / "list.jsonl", captions="all") == [
        "0 a",
        "0 b",
        "1 a",
        "1 b",
    ]
    found = read_set(PromptSource(str(tmp_path / "list.jsonl")))
    assert found.pictures is not None and len(found.pictures) == 2


def test_prompts_alone(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = ["a red circle", "two cats"]
    (tmp_path / "a.txt").write_text("a red circle\n\ntwo cats\n")
    (tmp_path / "a.json").write_text(json.dumps(texts))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": t}) for t in texts))
    Dataset.from_dict({"Prompt": texts}).to_parquet(tmp_path / "a.parquet")
    for name, options in (("a.txt", {}), ("a.json", {}), ("a.jsonl", {}), ("a.parquet", {"image": None, "caption": "Prompt"})):
        source = PromptSource(str(tmp_path / name), **options)
        assert read_set(source).pictures is None and taken(tmp_path / name, **options) == texts
    both = PromptSource([str(tmp_path / "a.txt"), str(tmp_path / "a.json")])
    assert choice(read_set(both), both).prompts == texts * 2
    made = Protocol(PromptSource(str(tmp_path / "a.txt")), name="mine")
    with pytest.raises(
        ValueError, match=r"a.txt has captions without images, and protocol mine compares with images: give them, a file of"
    ):
        material(made, Networks())
    suite = Suite.of(replace(made, references=ReferenceSource(None)), Networks())
    assert suite.given.reference.images is None and suite.protocol["prompts"] == f"{tmp_path / 'a.txt'}, all"


def test_a_column_or_a_split_that_is_not_there_is_refused(coco: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"file_name": "coco/val2017/001.png", "text": "a cat"}))
    for file, options, said in (
        (coco, {"caption": "b"}, "captions_val2017.json has no columns and no splits: leave caption b out"),
        (coco, {"split": "test", "image": "i"}, "no columns and no splits: leave split test, image i out"),
        (tmp_path / "a.txt", {"caption": "text"}, "a.txt has no columns and no splits: leave caption text out"),
        (tmp_path / "a.jsonl", {"split": "test"}, "a.jsonl has no splits: leave split test out"),
        (tmp_path / "a.jsonl", {"image": "i"}, "a.jsonl has no column i: it has file_name, text"),
        (tmp_path / "a.jsonl", {"caption": "t"}, "a.jsonl has no column t: it has file_name, text"),
        (tmp_path / "a.jsonl", {"image": None, "caption": "t"}, "it has file_name, text; name another by --caption_column"),
        (coco.parent.parent / "val2017", {"split": "test"}, "val2017 has no columns and no splits: leave split test out"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            read_set(PromptSource(str(file), **options))  # type: ignore[arg-type]
    assert read_set(PromptSource(str(coco), image=None)).pictures is None


def test_data_sets_of_hugging_face(tmp_path: Path) -> None:
    """Parquet and save_to_disk, columns by name, several captions in a cell; the pictures are those of the files that they were made of."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Pictures

    files = [str(picture(tmp_path / "in" / f"{i}.png", i)) for i in range(3)]
    kinds = Features({"img": Pictures(), "captions": List(Value("string"))})
    data = Dataset.from_dict({"img": files, "captions": [[f"{i} a", f"{i} b"] for i in range(3)]}, features=kinds)
    data.to_parquet(tmp_path / "set.parquet")
    data.save_to_disk(tmp_path / "saved")
    expected = torch.cat(list(Gallery.of_files([Path(f) for f in files]).squares(16)))
    for name in ("set.parquet", "saved"):
        source = PromptSource(str(tmp_path / name), image="img", caption="captions")
        chosen = choice(read_set(source), source)
        assert chosen.prompts == ["0 a", "1 a", "2 a"] and chosen.pictures is not None
        assert torch.equal(torch.cat(list(chosen.pictures.squares(16))), expected)
        assert chosen.pictures.digest() == Gallery.of_files([Path(f) for f in files]).digest()
    with pytest.raises(
        ValueError, match="has no column image or text: it has img, captions; name them by --image_column and --caption_column"
    ):
        read_set(PromptSource(str(tmp_path / "set.parquet")))


def test_crops_at_full_resolution_resize_nothing(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png", 0, (40, 60))
    whole = torch.from_numpy(__import__("numpy").asarray(Image.open(file)).copy()).permute(2, 0, 1).float() / 127.5 - 1
    (cut,) = Gallery.of_files([file]).crops(Crops(20, None))
    assert torch.equal(cut[0], whole[:, 10:30, 20:40]) and torch.equal(Crops(20, None)(whole[None])[0], cut[0])
    (small,) = Gallery.of_files([file]).crops(Crops(48, None))
    assert small.shape == (1, 3, 48, 48)
    with pytest.raises(ValueError, match="crops of 48 pixels: the images have 40 x 60"):
        Crops(48, None)(whole[None])


def test_large_pictures_are_held_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 photographs of a megapixel were 800 MB, twice while they became a batch, beside those of the batch before."""
    sizes = [(8, 8)] * 5 + [(16, 20)] * 3 + [(40, 40)] * 2 + [(8, 8)]
    gallery = Gallery.of_files([picture(tmp_path / f"{i}.png", i, size) for i, size in enumerate(sizes)])
    monkeypatch.setattr(galleries, "PIXELS", 4 * 8**2)
    held, real = list[int](), galleries.centre

    def there() -> int:
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if type(x) is Tensor and x.ndim in (3, 4) and x.dtype == torch.float32)

    def counted(image: Any, side: int) -> Tensor:
        held.append(there())
        return real(image, side)

    monkeypatch.setattr(galleries, "centre", counted)
    before = there()
    made = [(len(batch), batch.shape[-1]) for batch in gallery.whole()]
    assert made == [(4, 8), (1, 8), (1, 16), (1, 16), (1, 16), (1, 40), (1, 40), (1, 8)]
    assert [len(batch) for batch in gallery.whole(batch=3)][:2] == [3, 2] and [len(batch) for batch in gallery.squares(16)] == [1] * 11
    assert max(held) - before <= 3 * 40 * 40 * 2  # a picture and the batch before
    expected = [real(read_picture(tmp_path / f"{i}.png"), min(size)) for i, size in enumerate(sizes)]
    assert all(torch.equal(a, b) for a, b in zip((x for batch in gallery.whole() for x in batch), expected, strict=True))


# suites and their stamps


def red(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def suite_of(coco: Path, images: Path | None = None, **options: Any) -> Suite:
    made = Protocol(PromptSource(str(coco), None if images is None else str(images)), size=16, name="mine")
    return Suite.of(replace(made, **options), Networks(red))


def test_a_stamp_knows_contents_and_not_places(coco: Path, tmp_path: Path) -> None:
    base = suite_of(coco).protocol
    (coco.parent.parent).rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "annotations" / coco.name
    again = suite_of(moved, batch=3).protocol
    assert again["stamp"] == base["stamp"] == stamp(base) and again["prompts"] != base["prompts"]
    others = [
        suite_of(moved, seed=1),
        suite_of(moved, size=12),
        suite_of(moved, crops=Crops(8, 16)),
        suite_of(moved, prompts=PromptSource(str(moved), n=5)),
        suite_of(moved, prompts=PromptSource(str(moved), captions="first")),
        suite_of(moved, references=ReferenceSource(None)),
    ]
    picture(tmp_path / "elsewhere" / "val2017" / "003.png", 77)
    others.append(suite_of(moved))
    stamps = {suite.protocol["stamp"] for suite in others}
    assert len(stamps) == 7 and base["stamp"] not in stamps
    rows = [{"name": "a", "protocol": base}, {"name": "b", "protocol": again}, {"name": "c", "protocol": others[0].protocol}]
    assert comparable(*rows[:2]) and note(rows[:2]) == "" and not comparable(*rows)
    assert note(rows) == (
        "The rows were measured by 2 protocols: compare only rows of the same. "
        f"They are mine {base['stamp']}, mine {others[0].protocol['stamp']}."
    )


def test_what_the_command_line_changes_is_in_the_stamp() -> None:
    made, changed = read("protocols/shapes").differing(n=16, seed=0)
    suite = Suite.of(made, changed=changed)
    assert changed == {"n": 16} == suite.protocol["changed"] and suite.protocol["name"] == "shapes"
    assert suite.protocol["stamp"] == Suite.builtin("shapes", 16).protocol["stamp"]
    assert "changed" not in Suite.builtin("shapes", 16).protocol
    assert read("protocols/shapes").differing(1000, 0)[1] == {}


def test_all_images_of_the_set_and_a_folder_as_references(coco: Path) -> None:
    few = PromptSource(str(coco), n=2)
    folder = str(coco.parent.parent / "val2017")
    assert [suite_of(coco, prompts=few, references=ReferenceSource(s)).given.reference.images for s in ("prompts", "all", folder)] == [
        2,
        6,
        6,
    ]
    every = [suite_of(coco, prompts=few, references=ReferenceSource(s)).protocol["digests"]["reference"] for s in ("all", folder)]
    assert every[0] == every[1]


def test_data_sets_of_every_kind_as_references(coco: Path, tmp_path: Path) -> None:
    """With captions or without, by a column and a split of their own: all hold the same six pictures."""
    import tarfile

    import datasets

    folder, away = coco.parent.parent / "val2017", tmp_path / "sets"
    (away / "shards").mkdir(parents=True)
    files = sorted(str(file) for file in folder.iterdir())
    rows = datasets.Dataset.from_dict({"image": files, "jpg": files}).cast_column("image", datasets.Image())
    bare = rows.remove_columns("jpg")
    bare.save_to_disk(str(away / "saved"))
    datasets.DatasetDict(test=bare, train=bare.select([0, 1])).save_to_disk(str(away / "splits"))
    bare.to_parquet(str(away / "a.parquet"))
    bare.to_parquet(str(away / "shards" / "train-00000-of-00001.parquet"))
    rows.remove_columns("image").rename_column("jpg", "picture").to_json(str(away / "b.jsonl"))
    (away / "c.csv").write_text("file_name,text\n" + "".join(f"{name},one\n{name},two\n" for name in files))
    (away / "d.json").write_text(json.dumps([{"image": name} for name in files]))
    with tarfile.open(away / "e.tar", "w") as archive:
        for name in files:
            archive.add(name, Path(name).name)
    sets = [ReferenceSource(str(away / name)) for name in ("saved", "a.parquet", "shards", "c.csv", "d.json", "e.tar")]
    sets += [ReferenceSource(str(away / "splits"), split="test"), ReferenceSource(str(away / "b.jsonl"), image="picture")]
    sets += [ReferenceSource(str(coco)), ReferenceSource(str(folder))]
    found = [suite_of(coco, references=one).given.reference for one in sets]
    assert {one.images for one in found} == {6} and len({one.digest for one in found}) == 1
    assert suite_of(coco, references=ReferenceSource(str(away / "splits"))).given.reference.images == 2
    for one, told in (
        (
            ReferenceSource(str(away / "saved"), image="jpg"),
            "saved has no column jpg: it has image; name the column of images by references.im",
        ),
        (ReferenceSource(str(away / "splits"), split="dev"), "references.source: the data set .* it has no split 'dev', only test, train"),
        (ReferenceSource(image="jpg"), "references.image and references.split are of a data set, and source is prompts"),
        (ReferenceSource(str(away / "gone")), "references.source: the data set .*gone could not be read: there is no such folder or file"),
    ):
        with pytest.raises(ValueError, match=told):
            suite_of(coco, references=one)
    shutil.copy(coco, away / "alone.json")
    with pytest.raises(
        FileNotFoundError, match=r"references.source: .*alone.json: 6 of 6 images are missing, first [^;]*$"
    ):  # no option says where
        suite_of(coco, references=ReferenceSource(str(away / "alone.json")))


def test_only_what_is_asked_for_is_measured(coco: Path) -> None:
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    out = suite_of(coco, metrics=["frechet"]).score(lambda prompts, seed: images[: len(prompts)])
    assert out["frechet"] is not None and out["kid"] is out["saturation"] is None
    some, every = suite_of(coco, metrics=["frechet"]).protocol, suite_of(coco).protocol
    assert some["metrics"] == ["frechet"] and every["metrics"] is None and some["stamp"] == every["stamp"]
    its, whole, other = ({"protocol": said, "metrics": out} for said in (some, every, {**every, "stamp": "x"}))
    assert covers(its, some) and covers(whole, some) and not covers(its, every) and not covers(other, some)


def test_too_few_images_are_refused_before_anything_is_drawn(coco: Path) -> None:
    def never(prompts: list[str], seed: int) -> Tensor:
        pytest.fail("it has begun")

    few = suite_of(coco, prompts=PromptSource(str(coco), n=4))
    with pytest.raises(ValueError, match="density, coverage, precision, recall: needs at least 6 real images, and mine has 4: give more"):
        few.score(never)
    one = replace(suite_of(coco), prompts=["alone"], asked=["frechet"])
    with pytest.raises(ValueError, match="frechet: needs at least 2 images, and mine asks for 1: ask for more"):
        one.score(never)


def test_generated_images_are_cut_and_enlarged_as_real_ones_are(tmp_path: Path) -> None:
    """What is no square is cut to the one at its centre, and what is smaller than a crop is enlarged to it."""
    for crops in (Crops(14, 18), Crops(14, None), Crops(22, None)):
        given = Given(Networks(features=lambda images: images.flatten(1)), view=View(16, crops))
        for seed, size in enumerate([(20, 24), (26, 18), (24, 24)]):
            file = picture(tmp_path / "a.png", seed, size)
            gallery, drawn = Gallery.of_files([file]), read_picture(file)
            images = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None].float() / 127.5 - 1
            assert torch.equal(given.rows("features", images), torch.cat(list(gallery.squares(16))).flatten(1))
            real = given.rows_of(gallery.crops(crops), ["patches"])["patches"]
            assert torch.equal(given.rows("patches", images), real) and real.shape == (1, 3 * crops.side**2)
