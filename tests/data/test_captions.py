"""Data sets in: Hugging Face folders and files, prompts alone; rows that cannot be read, and digests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddil_lightning.data.captions import Captions, Digits, Images, Prompts, RawBatch, Shapes, builtin
from ddil_lightning.miniature import shapes

COLOURS = ["red", "lime", "blue", "white", "black"]
CAPTIONS = [f"a {name} square" for name in ("red", "green", "blue", "white", "black")]
RGB = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1]])


def pictures() -> list[Image.Image]:
    """Five flat pictures, wider than high."""
    return [Image.new("RGB", (24, 16), colour) for colour in COLOURS]


def table(**columns: Any) -> Any:
    from datasets import Dataset
    from datasets import Image as ImageFeature

    made = Dataset.from_dict({"image": pictures(), "text": CAPTIONS} | columns)
    return made.cast_column("image", ImageFeature())


def test_a_shape_is_the_same_whatever_it_is_drawn_with() -> None:
    """Scenes are drawn when they are asked for: a set in memory is no larger than what it says of them."""
    rows = [70, 3, 70, 99]
    assert torch.equal(Shapes(n=100, seed=5).pixels(rows), shapes.render(shapes.draw_scenes(100, 5))[rows])


def saved(kind: str, folder: Path) -> str:
    """The five pictures in one of the ways that people keep them."""
    from datasets import DatasetDict

    if kind == "save_to_disk":
        table().save_to_disk(str(folder / "set"))
    elif kind == "save_to_disk, splits":
        DatasetDict({"train": table()}).save_to_disk(str(folder / "set"))
    elif kind == "parquet":
        table().to_parquet(str(folder / "set.parquet"))
        return str(folder / "set.parquet")
    else:
        (folder / "set").mkdir()
        for i, picture in enumerate(pictures()):
            picture.save(folder / "set" / f"{i}.png")
        lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(CAPTIONS)]
        (folder / "set" / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder / "set")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# Files ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["save_to_disk", "save_to_disk, splits", "parquet", "imagefolder"])
def test_a_data_set_is_read_from_where_it_lies(kind: str, tmp_path: Path) -> None:
    images = Images(saved(kind, tmp_path), size=8)
    assert len(images) == 5
    batch = images[[4, 0, 2]]
    assert isinstance(batch, RawBatch) and batch.pixels is not None
    assert batch.prompts == [CAPTIONS[i] for i in (4, 0, 2)] and batch.rows.tolist() == [4, 0, 2]
    assert batch.pixels.dtype == torch.uint8  # as a worker hands them over
    assert torch.equal(batch.images(), RGB[[4, 0, 2], :, None, None].expand(-1, -1, 8, 8))


def test_columns_limits_and_several_captions(tmp_path: Path) -> None:
    table(many=[[text, "another"] for text in CAPTIONS], number=[1, 2, 3, 4, 5]).save_to_disk(str(tmp_path / "set"))
    images = Images(str(tmp_path / "set"), size=8, caption="many", limit=3)
    assert len(images) == 3 and images.prompts([2, 1]) == [CAPTIONS[2], CAPTIONS[1]]
    assert len(Images(str(tmp_path / "set"), limit=99)) == 5


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    path = saved("save_to_disk", tmp_path)
    with pytest.raises(ValueError, match=r"has no column caption or picture: it has image, text; name them with image= and caption="):
        Images(path, image="picture", caption="caption")


def written(kind: str, folder: Path) -> str:
    """The five pictures in a file whose image column is no column of pictures."""
    from datasets import Dataset

    for i, picture in enumerate(pictures()):
        picture.save(folder / f"{i}.png")
    files = [folder / f"{i}.png" for i in range(5)]
    column: list[Any] = {
        "relative": [f.name for f in files],
        "absolute": [str(f) for f in files],
        "bytes": [f.read_bytes() for f in files],
        "bytes and path": [{"bytes": f.read_bytes(), "path": None} for f in files],
    }[kind.split(", ")[1]]
    rows = [{"image": x, "text": text} for x, text in zip(column, CAPTIONS, strict=True)]
    file = folder / f"set.{kind.split(', ')[0]}"
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.mark.parametrize(
    "kind", ["json, relative", "jsonl, absolute", "parquet, relative", "parquet, absolute", "parquet, bytes", "parquet, bytes and path"]
)
def test_the_image_column_holds_paths_or_bytes(kind: str, tmp_path: Path) -> None:
    batch = Images(written(kind, tmp_path), size=8)[[4, 0, 2]]
    assert batch.prompts == [CAPTIONS[i] for i in (4, 0, 2)] and batch.pixels is not None
    assert torch.equal(batch.images(), RGB[[4, 0, 2], :, None, None].expand(-1, -1, 8, 8))


def test_a_row_without_caption_or_picture_is_named(tmp_path: Path) -> None:
    pictures()[0].save(tmp_path / "0.png")
    (tmp_path / "bad.png").write_text("no picture")
    rows = [("0.png", "a"), ("0.png", None), ("gone.png", "c"), (None, "d"), ("bad.png", "e"), ("a\0.png", "\ud800"), ("0.png", 5)]
    file = tmp_path / "set.json"
    file.write_text(json.dumps([{"image": image, "text": text} for image, text in rows]))
    images = Images(str(file), size=8)
    assert images.pixels([0]).shape == (1, 3, 8, 8)
    captions = {1: "None and no caption", 5: r"a text with \ud800, half a character", 6: "5 and no caption"}
    for row, why in captions.items():
        with pytest.raises(ValueError, match=re.escape(f"the data set {file}, row {row} (from 0): text is {why}")):
            images.prompts([0, row])
    missing = f", {tmp_path / 'gone.png'}: not a readable image (No such file or directory)"
    faults = {
        2: missing,
        3: ": image is None and no file name",
        4: f", {tmp_path / 'bad.png'}: not a readable image (it begins with b'no p",
    }
    for row, why in (faults | {5: f": image is {str(tmp_path)!r}"[:20]}).items():
        with pytest.raises(ValueError, match=re.escape(f"the data set {file}, row {row} (from 0){why}")) as error:
            images.pixels([0, row])
        assert "\n" not in str(error.value) and "\0" not in str(error.value)


def test_a_missing_picture_is_said_at_the_first_batch(tmp_path: Path) -> None:
    path = saved("imagefolder", tmp_path)
    for i in (2, 3):
        (Path(path) / f"{i}.png").unlink()
    said = f"the data set {path}, row 2 (from 0), {path}/2.png: no such file; 2 of 5 pictures are missing"
    with pytest.raises(ValueError, match=re.escape(said)):
        Images(path, size=8)[[0]]


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "set.json"
    for text, said in (
        ('[{"image": "0.png", "text": "a"}, {"image"', f"{file}: no JSON: Expecting ':' delimiter"),
        ('{"image": "0.png", "text": "a"}\n{"image"', f"{file}, line 2: no JSON: Expecting ':' delimiter"),
        ('{"image": "0.png", "text": "a"}\n["image"]', f"{file}, line 2: no row such as"),
        ('[{"text": "a"}]', f"{file} has no column image: it has text; name them with image= and caption="),
        ("", f"{file} has no column image or text: it has none"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            Images(str(file))
        assert "\n" not in str(error.value)
    bad = tmp_path / "set.parquet"
    bad.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=f"the data set {bad} could not be read: ") as error:
        Images(str(bad))
    assert "\n" not in str(error.value) and "generating the dataset" not in str(error.value)
    table(number=[1, 2, 3, 4, 5]).to_parquet(str(bad))
    with pytest.raises(ValueError, match=r"column number holds Value\('int64'\) and no images; name another with image="):
        Images(str(bad), image="number")


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "set.pdf").write_text("no data")
    splits = saved("save_to_disk, splits", tmp_path)
    for path, why in (
        (str(tmp_path / "set.pdf"), "it is no .parquet, .arrow, .json, .jsonl, .csv, .tar file, no folder"),
        ("owner/there-is-no-such-set", "no such folder or file, and as a data set of the Hub: "),
        ("no/such/folder", "no such folder or file, and as a data set of the Hub: "),
        ("/no/such/folder", "there is no such folder or file"),
        ("~/no-such-folder", "there is no such folder or file"),
        ("~nosuchuser/x", "there is no such folder or file"),
        ("./no-such-folder", "there is no such folder or file"),
        (splits, "it has no split 'test', only train"),
    ):
        with pytest.raises(ValueError, match=f"the data set {path} could not be read: {why}") as error:
            Images(path, split="test")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["limit=0", "limit=-1", "size=0", "size=-8", "size=16385"])
def test_numbers_that_mean_nothing_are_refused(option: str) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(ValueError, match=f"^{name} {value}: "):
        Images("nowhere", **{name: int(value)})


def test_a_data_set_is_read_whatever_its_path_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets and stars are no patterns, `test` and `validation` no splits, and ~ is the home."""
    home = tmp_path / "test" / "sub [1] {a,b}*?"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for kind in ("save_to_disk", "parquet"):
        path = Path(saved(kind, home))
        assert Images(f"~/{path.name}", size=8).prompts([0, 4]) == [CAPTIONS[0], CAPTIONS[4]]
    named = (home / "set.parquet").rename(home / "validation [2].parquet")
    assert len(Images(str(named), size=8)) == 5


def test_pictures_of_a_table_are_read_as_files_are(tmp_path: Path) -> None:
    """An EXIF orientation, 16 bits and transparency, embedded in parquet; how many were enlarged is counted."""
    from datasets import Dataset

    photo, exif = Image.new("RGB", (12, 8), "red"), Image.Exif()
    photo.paste("blue", (6, 0, 12, 8))
    exif[0x0112] = 6  # turned by a quarter when shown: left comes to the top
    photo.save(tmp_path / "turned.png", exif=exif)
    Image.new("I;16", (8, 8), 257 * 128).save(tmp_path / "sixteen.png")
    Image.new("RGBA", (9, 8), (255, 0, 255, 0)).save(tmp_path / "clear.png")
    rows = [{"image": (tmp_path / f"{name}.png").read_bytes(), "text": name} for name in ("turned", "sixteen", "clear")]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "set.parquet"))
    batch = Images(str(tmp_path / "set.parquet"), size=8)[[0, 1, 2]]
    assert batch.pixels is not None and batch.enlarged == 0
    assert torch.equal(batch.images()[0, :, 0, 7], RGB[0]) and torch.equal(batch.images()[0, :, 7, 0], RGB[2])
    assert batch.images()[1].eq(torch.tensor(128.0) / 127.5 - 1).all() and batch.images()[2].eq(1).all()
    assert Images(str(tmp_path / "set.parquet"), size=9)[[0, 1, 2]].enlarged == 3


# Rows that cannot be read ---------------------------------------------------------------------------------------------------------


class Counted(Captions):
    """Six pictures in memory, of which `bad` cannot be read."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 6

    def prompts(self, index: Any) -> list[str]:
        return [f"row {i}" for i in index]

    def pixels(self, index: Any) -> torch.Tensor:
        for i in set(index) & set(self.bad):
            raise OSError(f"row {i} is gone")
        return torch.tensor([float(i) for i in index])[:, None, None, None].expand(-1, 3, 2, 2)


def test_the_next_row_takes_the_place_of_one_that_cannot_be_read() -> None:
    rows = Counted(1, 2, 5)
    with pytest.raises(OSError, match="row 5 is gone"):
        rows[[0, 5]]
    rows.on_error = "skip"
    batch = rows[[5, 1, 3, 2]]
    assert batch.rows.tolist() == [0, 3, 3, 3] and batch.prompts == ["row 0", "row 3", "row 3", "row 3"]
    assert batch.pixels is not None and batch.images()[:, 0, 0, 0].tolist() == [0, 3, 3, 3]
    assert batch.skipped == ("row 5 is gone", "row 1 is gone", "row 2 is gone") and batch.gone == (5, 1, 2)
    assert rows[[0, 3]].skipped == () and rows[[4, 3]].rows.tolist() == [4, 3]
    nothing = Counted(*range(6))
    nothing.on_error = "skip"
    with pytest.raises(OSError, match="row 3 is gone"):
        nothing[[3]]


def test_files_and_captions_that_cannot_be_read_are_skipped(tmp_path: Path) -> None:
    path = saved("imagefolder", tmp_path)
    (Path(path) / "0.png").write_text("<html>")
    (Path(path) / "1.png").unlink()
    metadata = Path(path) / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"a white square"', "null"))
    images = Images(path, size=32)
    images.on_error = "skip"
    batch = images[[0, 3, 4]]
    assert batch.rows.tolist() == [2, 4, 4] and batch.enlarged == 3 and len(batch.skipped) == 3
    for why, place in zip(batch.skipped, ("row 0 (from 0), ", "row 1 (from 0), ", "row 3 (from 0): text is None"), strict=True):
        assert why.startswith(f"the data set {path}, {place}")
    assert batch.pixels is not None and torch.equal(batch.images()[:, :, 0, 0], RGB[[2, 4, 4]])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_and_lightning_hand_on_what_was_skipped(workers: int) -> None:
    from lightning.fabric.utilities import move_data_to_device
    from torch.utils.data import DataLoader

    rows = Counted(1)
    rows.on_error = "skip"
    loader = DataLoader(rows, batch_size=None, sampler=[[0, 1]], num_workers=workers)  # type: ignore[arg-type]
    batch = move_data_to_device(next(iter(loader)), torch.device("cpu"))
    assert isinstance(batch, RawBatch) and batch.enlarged == 0 and batch.rows.tolist() == [0, 2]
    assert list(batch.skipped) == ["row 1 is gone"]


# Digests --------------------------------------------------------------------------------------------------------------------------


def digests(path: str, **options: Any) -> list[str | None]:
    images = Images(path, **{"size": 8} | options)
    return [images.content(), images.stamp()]


def change(kind: str, path: Path) -> None:
    """One pixel, one caption or the order."""
    rows = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
    if kind == "pixel":
        with Image.open(path / "2.png") as picture:
            picture.putpixel((3, 3), (1, 2, 3))
            picture.save(path / "2.png")
    elif kind == "caption":
        rows[4]["text"] += "."
    elif kind == "order":
        rows[1], rows[2] = rows[2], rows[1]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("kind", ["pixel", "caption", "order"])
def test_digests_of_files_follow_every_picture_caption_and_the_order(kind: str, tmp_path: Path) -> None:
    path = saved("imagefolder", tmp_path)
    before = digests(path)
    assert digests(path) == before and all(a != b for a, b in zip(before, digests(path, size=9), strict=True))
    change(kind, Path(path))
    assert all(a != b for a, b in zip(before, digests(path), strict=True))


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_digests_of_a_data_set_follow_every_picture_caption_and_the_order(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path)
    before = digests(path)
    assert digests(path) == before
    assert all(a != b for a, b in zip(before, digests(path, limit=4), strict=True))
    other = [*pictures()[:4], Image.new("RGB", (24, 16), (0, 0, 1))]
    for changed in (table(image=other), table(text=[*CAPTIONS[:4], "."]), table().select([0, 2, 1, 3, 4])):
        if kind == "parquet":
            changed.to_parquet(path)
        else:
            shutil.rmtree(path)
            changed.save_to_disk(path)
        after = digests(path)
        assert all(a != b for a, b in zip(before, after, strict=True))
        before = after


def test_two_halves_of_one_file_have_digests_of_their_own(tmp_path: Path) -> None:
    path = saved("parquet", tmp_path)
    first, second = (digests(path, split=f"train[{half}]") for half in (":2", "2:4"))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_no_two_sets_have_a_digest_by_how_their_parts_join(tmp_path: Path) -> None:
    """One picture that holds what two pictures and the caption between them would be written as."""
    for name, text in (("one.png", "1'b'2"), ("1.png", "1"), ("2.png", "2")):
        (tmp_path / name).write_text(text)
    (tmp_path / "whole.jsonl").write_text('{"image": "one.png", "text": "a"}')
    (tmp_path / "parts.jsonl").write_text('{"image": "1.png", "text": "a"}\n{"image": "2.png", "text": "b"}')
    assert Images(str(tmp_path / "whole.jsonl")).content() != Images(str(tmp_path / "parts.jsonl")).content()


def test_a_stamp_follows_the_files_that_a_table_names(tmp_path: Path) -> None:
    path = written("parquet, relative", tmp_path)
    before = digests(path)
    Image.new("RGB", (5, 5)).save(tmp_path / "4.png")
    assert all(a != b for a, b in zip(before, digests(path), strict=True))


@pytest.mark.slow
def test_a_stamp_is_the_same_in_another_process(tmp_path: Path) -> None:
    paths = [saved(kind, tmp_path / kind) for kind in ("parquet", "save_to_disk", "imagefolder") if not (tmp_path / kind).mkdir()]
    here = [digests(path) for path in paths]
    code = (
        "import datasets.config, json, pathlib, sys\ndatasets.config.HF_DATASETS_CACHE = pathlib.Path(sys.argv[1])\n"
        "from ddil_lightning.data.captions import Images\n"
        "print(json.dumps([[(i := Images(p, size=8)).content(), i.stamp()] for p in sys.argv[2:]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cache"), *paths], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == here


def test_digests_of_sets_in_memory_follow_every_row() -> None:
    assert builtin("digits").content() == builtin("digits").content() and builtin("digits").stamp() is None
    whole, other = Counted().content(), Counted()
    other.prompts = lambda index: [f"row {i}." if i == 5 else f"row {i}" for i in index]  # type: ignore[method-assign]
    assert Counted().content() == whole != other.content()
    brighter = Counted()
    brighter.pixels = lambda index: Counted().pixels(index) + (torch.tensor(list(index)) == 5)[:, None, None, None]  # type: ignore[method-assign]
    assert brighter.content() not in (whole, other.content())


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red circle\r\n\n  a blue\x0c square \n")
    prompts = Prompts(str(file))
    assert len(prompts) == 2 and prompts[[1, 0]].prompts == ["a blue\x0c square", "a red circle"] and prompts[[0]].pixels is None
    before = prompts.stamp()
    file.write_text("a red circle\na blue square\n")
    assert Prompts(str(file)).stamp() != before
    file.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts\.txt has no line"):
        Prompts(str(file))
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read: No such file or directory"):
        Prompts(str(tmp_path / "gone.txt"))


def test_builtin_sets_by_name() -> None:
    digits = builtin("digits")
    assert isinstance(digits, Digits) and len(digits) == 1400
    batch = digits[[0, 7]]
    assert batch.pixels is not None and batch.pixels.shape == (2, 3, 16, 16) and batch.prompts[0].startswith("a handwritten ")
    with pytest.raises(ValueError, match="no built-in data set is called 'coco': known are shapes, digits"):
        builtin("coco")


def test_a_set_that_says_nothing_of_itself_is_refused() -> None:
    with pytest.raises(TypeError, match="Captions does not say its length"):
        len(Captions())
    with pytest.raises(TypeError, match="Captions has no captions"):
        Captions()[[0]]
