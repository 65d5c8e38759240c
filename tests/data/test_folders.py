"""Folders of pictures, whatever they are called: training and evaluation read the same rows."""

from __future__ import annotations

import csv
import json
import logging
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddil_lightning.data.captions import Images, Prompts
from ddil_lightning.data.folders import Listing, Row
from ddil_lightning.evaluation.captioned import Captioned, read_set
from ddil_lightning.evaluation.metrics.pairs import load_images
from ddil_lightning.evaluation.protocols import PromptSource

# Names that `datasets` and globs take for splits, patterns and addresses.
NAMES = ["test.png", "validation.png", "a [1].png", "sub [1]/größe.png", "test/train.png", "x*y?/{a,b}.PNG", "we::ird/~.png"]


def picture(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, 0, 0)).save(path)


def pictures(folder: Path, names: Sequence[str] = NAMES) -> None:
    for i, name in enumerate(names):
        picture(folder / name, i)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """A metadata file of its kind, as editors and spreadsheets write it: with a byte order mark."""
    if file.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(file))
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8-sig")


def evaluated(source: Path | str, images: Path | str | None = None) -> Captioned:
    """What evaluation reads of a set."""
    return read_set(PromptSource(str(source), None if images is None else str(images)))


def by_file(found: Captioned) -> dict[str, list[str]]:
    """Its captions by picture."""
    assert found.pictures is not None
    files = [str(file) for file, _ in found.pictures.sources(found.pictures.rows)]
    return dict(zip(files, found.captions, strict=True))


def both(folder: Path, **options: Any) -> list[tuple[str, str]]:
    """File and caption of every row, which training and evaluation must agree on; of the latter a picture's captions are together."""
    images = Images(str(folder), size=8, **options)
    index = range(len(images))
    files = [file for _, file in images._rows.pictures(index)]
    trained = list(zip(files, images.prompts(index), strict=True))
    every: dict[str, list[str]] = {}
    for file, caption in trained:
        every.setdefault(file, []).append(caption)
    found = by_file(evaluated(folder))
    assert list(found.items()) == list(every.items())
    assert (images.pixels(index) == load_images([Path(f) for f in files], 8)).all()
    return [(os.path.relpath(file, folder), caption) for file, caption in trained]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_folder_with_metadata(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "test [0]"
    pictures(folder)
    picture(folder / "left out.png")
    rows = [(name, f"number {i}, größer\x0cas said") for i, name in enumerate(reversed(NAMES))]
    write(folder / f"metadata.{kind}", [{"file_name": name, "text": text} for name, text in rows])
    assert both(folder) == rows


def test_an_unquoted_comma_does_not_cut_a_caption(tmp_path: Path) -> None:
    """The rest of the caption was dropped without a word. Empty cells at the end are a spreadsheet's."""
    pictures(tmp_path, ["a.png", "b.png"])
    metadata = tmp_path / "metadata.csv"
    metadata.write_text('file_name,text\na.png,"a barn, snow",,\nb.png,a dog\n')
    assert both(tmp_path) == [("a.png", "a barn, snow"), ("b.png", "a dog")]
    metadata.write_text("file_name,text\na.png,a dog\nb.png,a barn, snow\n")
    said = f"^{re.escape(str(metadata))}, line 3: more cells than the head names, first ' snow': put captions with commas in quotes$"
    for read in (lambda: Images(str(tmp_path)), lambda: evaluated(tmp_path), lambda: Prompts(str(metadata))):
        with pytest.raises(ValueError, match=said):
            read()


def test_an_empty_cell_of_a_csv_is_a_missing_caption(tmp_path: Path) -> None:
    """As one is that the line lacks: it was trained on as a caption of no words."""
    pictures(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,\nb.png\nc.png,a dog\n")
    images = Images(str(tmp_path), size=8)
    for row in (0, 1):
        with pytest.raises(ValueError, match=rf"row {row} \(from 0\): text is None and no caption; correct or remove the row"):
            images.prompts([row])
    images.on_error = "skip"
    assert images[[0, 1, 2]].rows.tolist() == [2, 2, 2]


def test_metadata_in_folders_below(tmp_path: Path) -> None:
    """Paths count from the folder of their own metadata; the top comes first."""
    pictures(tmp_path, ["a/1.png", "b [2]/test/1.png", "z.png", "b [2]/no row.png"])
    write(tmp_path / "metadata.csv", [{"file_name": "z.png", "text": "z"}])
    write(tmp_path / "b [2]" / "metadata.jsonl", [{"file_name": "test/1.png", "text": "b"}])
    write(tmp_path / "a" / "metadata.jsonl", [{"file_name": "1.png", "text": "a"}, {"file_name": "../z.png", "text": "z again"}])
    assert both(tmp_path) == [("z.png", "z"), ("a/1.png", "a"), ("z.png", "z again"), ("b [2]/test/1.png", "b")]


def test_a_folder_with_a_text_beside_each_picture(tmp_path: Path) -> None:
    pictures(tmp_path)
    picture(tmp_path / "left out.png")
    picture(tmp_path / ".hidden.png"), picture(tmp_path / ".thumbnails" / "1.png")
    for name in [*NAMES, ".hidden.png", ".thumbnails/1.png"]:
        (tmp_path / name).with_suffix(".txt").write_text(f" caption of {name}\r\n", encoding="utf-8-sig")
    expected = sorted(NAMES, key=lambda name: Path(name).parts)
    assert both(tmp_path) == [(name, f"caption of {name}") for name in expected]


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    pictures(tmp_path / "elsewhere", ["1.png"]), pictures(folder, ["2.png"])
    (tmp_path / "elsewhere" / "1.txt").write_text("one"), (folder / "2.txt").write_text("two")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("round", "again"):  # two, for the ways through them double with every step
        (folder / name).symlink_to(folder)
    assert both(folder) == [("2.png", "two"), ("linked/1.png", "one")]


def test_a_stray_description_makes_no_saved_data_set(tmp_path: Path) -> None:
    """`save_to_disk` writes two files; one alone came with the pictures."""
    pictures(tmp_path, ["1.png"])
    (tmp_path / "1.txt").write_text("one"), (tmp_path / "dataset_info.json").write_text('{"name": "mine"}')
    assert both(tmp_path) == [("1.png", "one")]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A byte that is no UTF-8, as old archives leave it."""
    name = os.fsdecode(b"gr\xf6sse.png")
    picture(tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("an old one")
    assert both(tmp_path) == [(name, "an old one")]
    assert Images(str(tmp_path), size=8).stamp() and Images(str(tmp_path), size=8).content()


def test_columns_that_the_user_names(tmp_path: Path) -> None:
    pictures(tmp_path, ["1.png", "2.png"])
    write(tmp_path / "metadata.jsonl", [{"photo_file_name": f"{i}.png", "says": [f"{i}", "more"], "text": "other"} for i in (1, 2)])
    images = Images(str(tmp_path), size=8, image="photo", caption="says", limit=1)
    assert len(images) == 1 and images[[0]].prompts == ["1"]
    said = (
        f"{tmp_path / 'metadata.jsonl'} has no column caption or file_name: it has photo_file_name, says, text; name them with image= and"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        Images(str(tmp_path), caption="caption")


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_a_list_of_files(kind: str, tmp_path: Path) -> None:
    """With a byte order mark, from a folder with brackets, under the name of a split; no cell is taken for a missing one."""
    folder = tmp_path / "sub [1]"
    pictures(folder)
    rows = [{"image": name, "text": text} for name, text in zip(NAMES, ["NA", "null", "7", "nan", "a\u2028b", "x, y", '"'], strict=True)]
    file = folder / f"validation.{kind}"
    if kind == "json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    else:
        write(file, rows)
    batch = Images(str(file), size=8)[range(7)]
    assert batch.prompts == [row["text"] for row in rows] and batch.pixels is not None
    assert ((batch.images()[:, 0, 0, 0] + 1) * 127.5).round().tolist() == list(range(7))
    if kind != "json":  # of which evaluation reads COCO's
        assert by_file(evaluated(file)) == {str(folder / r["image"]): [r["text"]] for r in rows}


def test_a_message_is_one_line_whatever_the_file_is_called(tmp_path: Path) -> None:
    (tmp_path / "a\nb.png").write_text("no picture")
    (tmp_path / "a\nb.txt").write_text("two lines")
    for read in (lambda p: load_images([*map(Path, by_file(evaluated(p)))], 8), lambda p: Images(str(p), size=8)[[0]]):
        with pytest.raises(ValueError, match=r"a\\nb\.png': not a readable image") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


def refused(said: str, path: Path) -> None:
    """Both readers name what is wrong, training at the latest when it reads the rows."""
    for read in (evaluated, lambda p: Images(str(p), size=8)[[0, 1]]):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)) as error:
            read(path)
        assert "\n" not in str(error.value)


FAULTS = {
    "no JSON": ('{"file_name": "2.png"', "metadata.jsonl, line 2: no JSON"),
    "no row": ("[]", "metadata.jsonl, line 2: no row such as"),
    "half a character": (r'{"file_name": "2.png", "text": "\ud800"}', r"a text with \ud800, half a character"),
    "NUL in a name": (r'{"file_name": "2\u0000.png", "text": "x"}', r"2\x00.png', which no file can be called"),
    "half a character in a name": (r'{"file_name": "\ud800.png", "text": "x"}', "which no file can be called"),
    "no name": ('{"text": "x"}', "None and no file name"),
    "number for a name": ('{"file_name": 5, "text": "x"}', "5 and no file name"),
    "no caption": ('{"file_name": "2.png"}', "None and no caption"),
    "no file": ('{"file_name": "gone.png", "text": "x"}', "gone.png"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_named(fault: str, tmp_path: Path) -> None:
    line, said = FAULTS[fault]
    pictures(tmp_path, ["1.png", "2.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n' + line + "\n")
    refused(said, tmp_path)
    if said.startswith("metadata") or fault != "no file":
        with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: "):
            evaluated(tmp_path)


def test_folders_that_hold_nothing_or_too_much(tmp_path: Path) -> None:
    refused(f"{tmp_path}: no image with a caption was found among 0 picture files", tmp_path)
    pictures(tmp_path, ["1.png", "2.png"])
    refused(f"{tmp_path}: no image with a caption was found among 2 picture files: give a metadata.jsonl", tmp_path)
    (tmp_path / "1.txt").write_bytes(b"gr\xf6\xdfer"), (tmp_path / "2.txt").write_text("two")
    refused(f"{tmp_path / '1.txt'}, line 1: byte 0xf6 is not UTF-8: save the file as UTF-8", tmp_path)
    for kind in ("csv", "jsonl"):
        write(tmp_path / f"metadata.{kind}", [{"file_name": "1.png", "text": "x"}])
    refused(f"{tmp_path} holds metadata.jsonl and metadata.csv: keep one", tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\n1.png,"' + "x" * 200_000 + '"\n')
    refused(f"{tmp_path / 'metadata.csv'}, line 2: no CSV: field larger than field limit", tmp_path)
    (tmp_path / "metadata.csv").rename(tmp_path / "metadata.parquet")
    refused(f"{tmp_path / 'metadata.parquet'} cannot be read: ", tmp_path)
    with pytest.raises(ValueError, match="it has no split 'test', for a list of pictures is all train"):
        Images(str(tmp_path), split="test")


def test_the_evaluation_names_a_broken_picture_and_counts_small_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path, ["1.png", "2.png"])
    with caplog.at_level(logging.WARNING, "ddil_lightning.evaluation.metrics.pairs"):
        load_images([tmp_path / "1.png", tmp_path / "2.png"], 8)
        assert not caplog.messages
        load_images([tmp_path / "1.png", tmp_path / "2.png"], 9)
    assert caplog.messages == ["2 of 2 images are smaller than 9 pixels and were enlarged"]
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / '2.png'}: not a readable image (")):
        load_images([tmp_path / "1.png", tmp_path / "2.png"], 8)


def test_evaluation_finds_pictures_in_another_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", ["a/1.png"])
    (tmp_path / "texts" / "a").mkdir(parents=True)
    write(tmp_path / "texts" / "a" / "metadata.jsonl", [{"image": "1.png", "prompt": "one"}])
    assert by_file(evaluated(tmp_path / "texts", tmp_path / "pictures")) == {str(tmp_path / "pictures" / "a" / "1.png"): ["one"]}


def test_a_list_survives_the_way_into_a_worker() -> None:
    rows = [Row("a.png", "größer", ""), Row(None, 5, ""), Row("b\udcf6.png", None, ""), Row("", "", "")]
    listing = pickle.loads(pickle.dumps(Listing(rows, Path("."))))
    assert len(listing) == 4 and listing.captions([3, 1, 0, 2]) == ["", 5, "größer", None]
    assert listing.pictures(range(4)) == [(None, "a.png"), (None, None), (None, "b\udcf6.png"), (None, "")]
    assert len(Listing([], Path("."))) == 0


def test_a_folder_at_home_is_found_by_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and evaluation agree on `~`; the home of nobody is a folder that does not exist."""
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures(tmp_path / "set", ["a.png"])
    write(tmp_path / "set.jsonl", [{"file_name": "a.png", "text": "a"}])
    (tmp_path / "set" / "a.txt").write_text("a")
    found = [by_file(evaluated(*where)) for where in (("~/set",), ("~/set.jsonl", "~/set"), (tmp_path / "set",))]
    assert found == [{str(tmp_path / "set" / "a.png"): ["a"]}] * 3
    assert Images("~/set", size=8).prompts([0]) == ["a"]
    with pytest.raises(ValueError, match="^the data set ~nosuchuser/set could not be read: there is no such folder or file$"):
        evaluated("~nosuchuser/set")
