"""Data sets in: Hugging Face folders and files, prompts alone, the square crop."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddil_lightning.captions import Captions, Digits, Images, Prompts, RawBatch, builtin, square

COLOURS = ["red", "lime", "blue", "white", "black"]
CAPTIONS = [f"a {name} square" for name in ("red", "green", "blue", "white", "black")]
RGB = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1]])


def pictures() -> list[Image.Image]:
    """Five flat pictures, wider than high."""
    return [Image.new("RGB", (24, 16), colour) for colour in COLOURS]


def table(**columns: Any) -> Any:
    from datasets import Dataset
    from datasets import Image as ImageFeature

    made = Dataset.from_dict({"image": pictures(), "text": CAPTIONS, **columns})
    return made.cast_column("image", ImageFeature())


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
    assert torch.equal(batch.pixels, RGB[[4, 0, 2], :, None, None].expand(-1, -1, 8, 8))


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
    assert torch.equal(batch.pixels, RGB[[4, 0, 2], :, None, None].expand(-1, -1, 8, 8))


def test_a_row_without_caption_or_picture_is_named(tmp_path: Path) -> None:
    pictures()[0].save(tmp_path / "0.png")
    (tmp_path / "bad.png").write_text("no picture")
    rows = [("0.png", "a"), ("0.png", None), ("gone.png", "c"), (None, "d"), ("bad.png", "e")]
    file = tmp_path / "set.json"
    file.write_text(json.dumps([{"image": image, "text": text, "number": 5} for image, text in rows]))
    images = Images(str(file), size=8)
    assert len(images[[0]].prompts) == 1
    with pytest.raises(ValueError, match=rf"{file}, row 1 \(from 0\): text is None and no caption"):
        images.prompts([0, 1])
    for row, why in ((2, f"no file {tmp_path / 'gone.png'}"), (3, "An image should have"), (4, "cannot identify image file")):
        with pytest.raises(ValueError, match=rf"{file}, row {row} \(from 0\): image cannot be read: {re.escape(why)}"):
            images.pixels([0, row])
    with pytest.raises(ValueError, match=r"column number holds Value\('int64'\) and no images; name another with image="):
        Images(str(file), image="number")
    file.write_text('[{"image": "0.png", "text": "a"}, {"image"')
    with pytest.raises(ValueError, match=f"the data set {file} could not be read: ") as error:
        Images(str(file))
    assert "\n" not in str(error.value) and "generating the dataset" not in str(error.value)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    splits = saved("save_to_disk, splits", tmp_path)
    for path, why in ((str(tmp_path / "empty"), ""), ("owner/there-is-no-such-set", ""), (splits, "it has no split 'test', only train")):
        with pytest.raises(ValueError, match=f"the data set {path} could not be read: {why}") as error:
            Images(path, split="test")
        assert "\n" not in str(error.value)


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blue square \n")
    prompts = Prompts(str(file))
    assert len(prompts) == 2 and prompts[[1, 0]].prompts == ["a blue square", "a red circle"] and prompts[[0]].pixels is None
    file.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts\.txt has no line"):
        Prompts(str(file))


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


# The square crop ------------------------------------------------------------------------------------------------------------------


def test_square_cuts_the_centre() -> None:
    """Left third red, middle third lime, right third blue: a wide picture keeps its middle, a high one too."""
    wide = Image.new("RGB", (30, 10), "lime")
    wide.paste("red", (0, 0, 10, 10)), wide.paste("blue", (20, 0, 30, 10))
    for picture in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        got = square(picture, 10)
        assert got.shape == (3, 10, 10) and got.dtype == torch.float32
        assert torch.equal(got, RGB[1][:, None, None].expand(-1, 10, 10))


@pytest.mark.parametrize("size", [(7, 9), (16, 16), (33, 50), (100, 8)])
def test_square_is_square_whatever_comes(size: tuple[int, int]) -> None:
    for mode in ("RGB", "L", "RGBA", "P", "1"):
        got = square(Image.new(mode, size), 16)
        assert got.shape == (3, 16, 16) and got.min() >= -1 and got.max() <= 1


def test_square_keeps_grey_values() -> None:
    assert square(Image.new("L", (8, 8), 0), 4).eq(-1).all() and square(Image.new("L", (8, 8), 255), 4).eq(1).all()
    torch.testing.assert_close(square(Image.new("L", (8, 8), 128), 4), torch.full((3, 4, 4), 128 / 127.5 - 1))
