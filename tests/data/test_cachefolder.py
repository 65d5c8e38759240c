"""A cache folder: made by one process or two, in one go or several, and trained on as if its rows had just been encoded."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import suite
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.data import encoded, manifest, numbering, shards, sorting, writer
from ddil_lightning.data.cachefolder import CacheFolder, open_folder
from ddil_lightning.data.captions import Captions, Images, RawBatch
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.data.encoded import encode, encode_batch
from ddil_lightning.data.notices import Notices
from ddil_lightning.data.preparation import prepared
from ddil_lightning.data.shards import Column, packed, unpacked, write_shard
from ddil_lightning.data.sharing import Missing
from ddil_lightning.data.visits import Visit
from ddil_lightning.data.writer import Keeping, Writer
from ddil_lightning.errors import one_line
from ddil_lightning.files import holds_anything
from ddil_lightning.processes import Elsewhere, Processes
from ddil_lightning.records import CaptionBatch, to
from options import options
from pair import together
from pictured import parquet
from suite import BY_NAME, MIXED, Run, StopAt, build, fit, state
from toys import FORWARD_ONLY, Toy, attach, equal, first

if TYPE_CHECKING:
    from pair import Pair

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Pipeline:
    return Pipeline(str(tiny))


class Ten(Captions):
    """Ten pictures in memory with a caption each; `several`: with one, two or three; `images=False`: captions alone."""

    def __init__(self, several: bool = False, images: bool = True, bad: tuple[int, ...] = ()) -> None:
        noise = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.several, self._pixels, self.bad = several, noise if images else None, bad

    def __len__(self) -> int:
        return 10

    def prompts(self, index: Any) -> list[str]:
        return [texts[0] for texts in self.texts(index)]

    def texts(self, index: Any) -> list[list[str]]:
        if not self.several:
            return [[f"a digit {WORDS[i]}"] for i in index]
        return [[f"a digit {WORDS[i]}", "a red circle", f"a small {WORDS[i % 3]}"][: 1 + i % 3] for i in index]

    def pixels(self, index: Any) -> torch.Tensor | None:
        for i in set(index) & set(self.bad):
            raise ValueError(f"row {i} is broken")
        return None if self._pixels is None else self._pixels[list(index)]


def made(folder: Path, captions: Captions, backbone: Pipeline, truncate: bool = False, **keeping: Any) -> dict[str, Any]:
    return Writer(folder, captions, backbone, Keeping(**{"shard_rows": 4} | keeping), truncate, 0, Processes()).write()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# What is kept ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_folder_gives_what_encoding_gives_in_its_precision(
    dtype: Any, backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with as many rows in a batch of the encoders: another number of them may round otherwise."""
    monkeypatch.setattr(encoded, "CHUNK", 4), monkeypatch.setattr(writer, "CHUNK", 4)
    told = made(tmp_path / "c", Ten(), backbone, dtype=dtype)
    direct, found = encode(Ten(), backbone), CacheFolder(tmp_path / "c")
    kind = getattr(torch, dtype)
    for rows in ([9, 0, 5], [3], list(range(10))):
        a, b = direct[rows], found[rows]
        assert isinstance(b, CaptionBatch) and equal(b, to(to(a, kind), torch.float32)) and b.rows.tolist() == rows
    assert (
        told["captions"] == 10
        and told["rows"] == 10
        and [g["files"] for g in told["groups"]] == [[f"rows-0000{i}.safetensors" for i in range(3)]]
    )
    assert found.prompts([7, 1]) == ["a digit seven", "a digit one"] and len(found) == 10
    box = found.some_latents(4)
    assert len(box) == 1 and box[0].shape == (4, 4, 8, 8)
    if Path("/proc/self/maps").is_file():
        assert "rows-00001.safetensors" in Path("/proc/self/maps").read_text()


def test_equal_captions_are_kept_once_and_all_of_a_picture_are_drawn(backbone: Pipeline, tmp_path: Path) -> None:
    rows = Ten(several=True)
    told = made(tmp_path / "c", rows, backbone, dtype="float32")
    assert told["captions"] == 10 + 2  # each row's own, and two that several have
    found, memory = CacheFolder(tmp_path / "c"), encode(rows, backbone)
    assert found.texts([8, 1]) == rows.texts([8, 1])
    drawn = set()
    for epoch in range(12):
        visit = Visit([2, 9, 4], 5, epoch)
        asked = rows[visit]
        drawn.add(asked.prompts[0])
        torch.testing.assert_close(found[visit].c.text, encode_batch(asked, backbone).c.text, rtol=0, atol=1e-5)
        torch.testing.assert_close(memory[visit].c.text, found[visit].c.text, rtol=0, atol=1e-5)
    assert drawn == set(rows.texts([2])[0])
    assert sum(len(load_file(tmp_path / "c" / name)["text"]) for name in told["files"] if name.startswith("text")) == told["captions"]


def test_captions_alone(backbone: Pipeline, tmp_path: Path) -> None:
    made(tmp_path / "c", Ten(images=False), backbone)
    found = CacheFolder(tmp_path / "c")
    assert found.latents is None and found[[3, 1]].latent is None and found.some_latents(3) == []
    torch.testing.assert_close(found[[3, 1]].c.text, encode(Ten(images=False), backbone)[[3, 1]].c.text, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="^captions without images, and no text states of them: there is nothing to keep"):
        made(tmp_path / "d", Ten(images=False), backbone, text=False)


def test_without_text_states_captions_are_encoded_on_the_fly(backbone: Pipeline, tmp_path: Path) -> None:
    told = made(tmp_path / "c", Ten(several=True), backbone, dtype="float32", text=False)
    assert not any(name.startswith("text") for name in told["files"])
    found = CacheFolder(tmp_path / "c")
    visit = Visit([8, 0], 1, 3)
    batch = found[visit]
    assert not found.whole and isinstance(batch, RawBatch) and batch.pixels is None and batch.prompts == Ten(several=True)[visit].prompts
    on_the_fly, whole = encode_batch(batch, backbone), encode_batch(Ten(several=True)[visit], backbone)
    assert torch.equal(on_the_fly.c.text, whole.c.text)
    torch.testing.assert_close(on_the_fly.latent, whole.latent, rtol=0, atol=1e-5)
    # Asked for later, they are added to what is there.
    before = contents(tmp_path / "c")
    made(tmp_path / "c", Ten(several=True), backbone, dtype="float32")
    after = contents(tmp_path / "c")
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    assert isinstance(CacheFolder(tmp_path / "c")[visit], CaptionBatch)


def test_sizes_and_shapes_of_pictures(xl: Path, tmp_path: Path) -> None:
    """SDXL's pooled text once a caption, its ids once a picture; two shapes are two tables."""
    for i in range(6):
        Image.new("RGB", (40, 30) if i % 2 else (30, 40), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a {('red', 'blue')[i // 3]} circle")
    backbone = Pipeline(str(xl))
    sizes: Any = [(16, 32), (32, 16)]
    images = Images(str(tmp_path), size=sizes)
    told = made(tmp_path / "c", images, backbone, dtype="float32", shard_rows=2)
    assert told["captions"] == 2 and [len(group["files"]) for group in told["groups"]] == [2, 2]
    found, memory = CacheFolder(tmp_path / "c"), encode(Images(str(tmp_path), size=sizes), backbone)
    assert [group.rows.tolist() for group in found.groups()] == [group.rows.tolist() for group in memory.groups()]
    for rows in ([1, 5], [4, 0, 2]):
        a, b = memory[rows], found[rows]
        assert torch.equal(a.c.ids, b.c.ids) and a.latent is not None  # type: ignore[arg-type]
        for x, y in ((a.latent, b.latent), (a.c.text, b.c.text), (a.c.pooled, b.c.pooled)):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    made(tmp_path / "d", Images(str(tmp_path), size=sizes), backbone, text=False)
    fly = encode_batch(CacheFolder(tmp_path / "d")[[1, 5]], backbone)
    assert torch.equal(fly.c.ids, memory[[1, 5]].c.ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_pictures_that_are_named_beside_their_cache_are_not_opened(
    kind: str, backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process opened all of them at every start, for the names of their sizes in a warning."""
    (tmp_path / "set").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 16) if i % 2 else (16, 16), (30 * i, 0, 0)).save(tmp_path / "set" / f"{i}.png")
        (tmp_path / "set" / f"{i}.txt").write_text(f"a digit {WORDS[i]}")
    images = [Images(str(tmp_path / "set"), size=[(16, 16), (16, 32)]) for _ in range(2)]
    cache = tmp_path / "c"
    if kind == "folder":
        made(cache, images[0], backbone)
    else:
        prepared(images[0], backbone, str(cache), False, 0, "stop", Notices(), Processes())
    monkeypatch.setattr(sorting, "_numbers", lambda *args: pytest.fail("sorted by size again"))
    monkeypatch.setattr("ddil_lightning.data.captions.picture_size", lambda *args: pytest.fail("opened"))
    toy = Toy()
    toy.backbone = backbone
    data = attach(DDILDataModule(images[1], FORWARD_ONLY, batch_size=4, cache=str(cache)), toy)
    data.setup("fit")
    names = ["16 x 16", "16 x 32"] if kind == "folder" else ["latents of 8 x 8", "latents of 8 x 16"]
    assert list(data._names.values()) == names and len(first(2, data)) == 2


def test_rows_that_are_skipped_are_counted_once_and_worded(backbone: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holes = Ten(bad=(2, 3))
    holes.on_error = "skip"
    told = made(tmp_path / "c", holes, backbone)
    assert told["skipped"] == {"count": 2, "first": ["row 2 is broken", "row 3 is broken"]}
    found = CacheFolder(tmp_path / "c")
    assert found.prompts([2, 3, 4]) == ["a digit four"] * 3 and len(found) == 10
    with pytest.raises(ValueError, match=r"was made with 2 rows skipped: set data\.on_error to skip"):
        open_folder(tmp_path / "c", None, backbone, False, False, Processes())
    assert len(open_folder(tmp_path / "c", None, backbone, False, True, Processes())) == 10


def test_the_caption_of_a_skipped_row_is_the_same_with_a_cache_and_without(backbone: Pipeline, tmp_path: Path) -> None:
    """It was drawn by the row that was read without one, and with one by the row that was asked for."""
    holes = Ten(several=True, bad=(3, 4, 7))
    holes.on_error = "skip"
    made(tmp_path / "c", holes, backbone, text=False)
    found, drawn = CacheFolder(tmp_path / "c"), set()
    for epoch in range(12):
        visit = Visit(range(10), 5, epoch)
        assert found[visit].prompts == holes[visit].prompts
        drawn.add(tuple(found[visit].prompts[3:6]))
    assert any(len(set(texts)) > 1 for texts in drawn)  # each by its own row


def test_what_half_precision_cannot_hold_is_refused(backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "encode_images", lambda pixels: torch.full((len(pixels), 4, 8, 8), 1e5))
    with pytest.raises(ValueError, match=r"the latents of rows 0 to 3 are too large for float16, or not finite: give --dtype bfloat16"):
        made(tmp_path / "c", Ten(), backbone)
    made(tmp_path / "d", Ten(), backbone, dtype="bfloat16")


def test_a_caption_that_is_too_long_is_named_before_any_image_is_encoded(
    backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stopped ddil-cache at its own file, and what was encoded up to there could not be gone on with by the remedy, truncation."""
    long = Ten(bad=(3,))
    long.on_error, long.stamp = "skip", lambda: "ten"  # type: ignore[method-assign]
    long.texts = lambda index: [["blue", "red " * 30] if i == 9 else ["blue"] for i in index]  # type: ignore[method-assign]
    said = r"^row 9 \(from 0\) of the data: the prompt 'red .* has 32 tokens and the text encoder reads 16: .* \(data\.truncate=true\)$"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=said):
        patch.setattr(Pipeline, "encode_images", lambda *args: pytest.fail("encoded"))
        made(tmp_path / "c", long, backbone)
    short = Ten()
    made(tmp_path / "c2", short, backbone)
    whole = contents(tmp_path / "c2")
    monkeypatch.setattr(Pipeline, "encode_images", lambda *args: pytest.fail("encoded"))
    assert made(tmp_path / "c2", short, backbone, truncate=True)["truncate"]  # rows do not depend on it
    different = {name for name, data in contents(tmp_path / "c2").items() if data != whole[name]}
    assert different == {"manifest.json", *(f"text-0000{i}.safetensors" for i in range(3))}
    monkeypatch.undo()
    long = Ten()
    long.texts = lambda index: [["blue " * 30 if i == 1 else "blue"] for i in index]  # type: ignore[method-assign]
    made(tmp_path / "d", long, backbone, truncate=True)
    with pytest.raises(
        ValueError, match=r"was made with data\.truncate, and prompts in it may be cut: set data\.truncate, or make it anew"
    ):
        open_folder(tmp_path / "d", None, backbone, False, False, Processes())


def test_a_stream_is_kept_in_one_pass(backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gives is what the same files give that are read in any order."""
    from ddil_lightning.data.streaming import Stream

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, begun, begin = str(parquet(tmp_path / "set", rows=30)), [], Stream._begin
    monkeypatch.setattr(Stream, "_begin", lambda self, row: (begun.append(row), begin(self, row))[1])
    made(tmp_path / "stream", Images(folder, 16, stream=True), backbone)
    assert begun == [0]
    made(tmp_path / "table", Images(folder, 16), backbone)
    one, other = contents(tmp_path / "stream"), contents(tmp_path / "table")
    assert one == other
    for cache, stream in (("stream", False), ("table", True)):
        open_folder(tmp_path / cache, Images(folder, 16, stream=stream), backbone, False, False, Processes())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_reads_its_part_of_a_stream_by_one_worker(
    rank: int, backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 60 rows in four files each of two processes has 30. Both read them all, by each worker: files were dealt in turn."""
    from ddil_lightning.data.captions import Images
    from ddil_lightning.data.streaming import Stream

    images, seen, read = Images(str(parquet(tmp_path, parts=4, rows=60)), 16, stream=True), tmp_path / "read", Stream._from

    def told(self: Stream, row: int) -> Any:
        for batch in read(self, row):
            with seen.open("a") as file:  # a worker reads
                file.write("row\n")
            yield batch

    monkeypatch.setattr(Stream, "_from", told)
    us = Processes(SimpleNamespace(global_rank=rank, world_size=2, strategy=None))
    made_, parts = Writer(tmp_path / "c", images, backbone, Keeping(shard_rows=5), False, 3, us), torch.arange(60).split(5)
    monkeypatch.setattr(made_, "_encoded", lambda raw, rows: {}), monkeypatch.setattr(made_, "_write_rows", lambda *_: None)
    mine = made_._mine(12, lambda i: False)
    assert mine == list(range(6 * rank, 6 * rank + 6))
    made_._rows([writer.Shard(f"{i}", 0, part) for i, part in enumerate(parts)], mine, [torch.arange(60)])
    assert len(seen.read_text().split()) == 30
    said = [record.getMessage() for record in caplog.records if "data.workers" in record.getMessage()]
    assert said == ["data.workers=3: a stream has one in each process, for every one would read all of it"] * (rank == 0)


# Several goes and several processes -------------------------------------------------------------------------------------------------


def test_a_cache_goes_on_where_it_was_killed(backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every file that it writes: what is whole stays as it is, the rest is made, and all is as if nothing had happened."""
    rows = Ten(several=True)
    made(tmp_path / "whole", rows, backbone)
    whole = contents(tmp_path / "whole")
    count = [0]

    def killed(*args: Any) -> None:
        if count[0] == 0:
            raise KeyboardInterrupt
        count[0] -= 1
        write_shard(*args)

    for after in range(sum(name.endswith(".safetensors") for name in whole)):
        folder = tmp_path / f"killed after {after}"
        count[0] = after
        for module in (writer, numbering):
            monkeypatch.setattr(module, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            made(folder, rows, backbone)
        monkeypatch.undo()
        kept = {file: file.stat().st_mtime_ns for file in folder.glob("rows-*")}
        with pytest.raises(ValueError, match="is not complete: give the same ddil-cache command again, and it goes on"):
            CacheFolder(folder)
        (folder / ".rows-00009.safetensors.999999999.ddil-part").write_bytes(b"half")
        made(folder, rows, backbone)
        assert contents(folder) == whole and all(file.stat().st_mtime_ns == time for file, time in kept.items())


def test_a_complete_cache_is_left_alone_and_a_damaged_one_mended(
    backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    told = made(folder, Ten(), backbone)
    whole = contents(folder)
    monkeypatch.setattr(Pipeline, "encode_images", lambda *args: pytest.fail("encoded"))
    assert made(folder, Ten(), backbone) == json.loads(json.dumps(told))
    monkeypatch.undo()
    for name in ("rows-00001.safetensors", "text-00002.safetensors", "index.safetensors"):
        (folder / name).write_bytes(whole[name][:-1])
        with pytest.raises(ValueError, match=f"the cache {folder} is damaged: {name} is not as it was written; remove it, and make it"):
            CacheFolder(folder)
        made(folder, Ten(), backbone)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"the cache {folder} is damaged: {name} is missing"):
            CacheFolder(folder)
        made(folder, Ten(), backbone)
        assert contents(folder) == whole
    flipped = bytearray(whole["rows-00001.safetensors"])
    flipped[-1] ^= 1
    (folder / "rows-00001.safetensors").write_bytes(flipped)
    CacheFolder(folder)  # as long as it was: that is what a start looks at
    with pytest.raises(ValueError, match=r"rows-00001\.safetensors is not as it was written"):
        manifest.check_files(folder, manifest.read(folder), whole=True)


def test_text_states_are_those_of_the_captions_that_a_repair_has_numbered_anew(backbone: Pipeline, tmp_path: Path) -> None:
    """A row that could not be read at first can be read later: every caption behind it moves up by one, and its text states with it."""
    rows, folder = Ten(bad=(1,)), tmp_path / "c"
    rows.on_error, rows.stamp = "skip", lambda: "ten"  # type: ignore[method-assign]
    made(folder, rows, backbone, dtype="float32")
    rows.bad = (9,)
    for name in ("rows-00000.safetensors", "rows-00002.safetensors"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    made(folder, rows, backbone, dtype="float32")
    found = CacheFolder(folder)
    assert found.prompts([1, 8]) == ["a digit one", "a digit eight"]
    states = backbone.encode_text(found.prompts(range(10))).text
    torch.testing.assert_close(found[range(10)].c.text, states, rtol=0, atol=1e-5)
    manifest.check_files(folder, manifest.read(folder), whole=True)
    assert {file.name for file in folder.glob("*.safetensors")} == set(manifest.read(folder)["files"])


def test_rows_that_have_changed_their_size_are_made_again(backbone: Pipeline, tmp_path: Path) -> None:
    """What could not be read was sorted with the row after it; a file of the other rows is not kept."""
    (tmp_path / "set").mkdir()
    for i in range(4):
        Image.new("RGB", (24, 16) if i in (0, 3) else (16, 16), (60 * i, 0, 0)).save(tmp_path / "set" / f"{i}.png")
        (tmp_path / "set" / f"{i}.txt").write_text(WORDS[i])
    picture = (tmp_path / "set" / "0.png").read_bytes()
    (tmp_path / "set" / "0.png").write_bytes(b"the server does not answer")

    def images() -> Images:
        found = Images(str(tmp_path / "set"), size=[(16, 16), (16, 24)])
        found.on_error, found.stamp = "skip", lambda: "addresses"  # type: ignore[method-assign]
        return found

    made(tmp_path / "c", images(), backbone)
    (tmp_path / "set" / "0.png").write_bytes(picture)
    (tmp_path / "c" / "text-00000.safetensors").unlink()
    made(tmp_path / "c", images(), backbone)
    assert [group.rows.tolist() for group in CacheFolder(tmp_path / "c").groups()] == [[1, 2], [0, 3]]


def test_more_files_than_can_be_mapped_are_told_before_they_are_made(
    backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A start on such a cache called a file of it damaged."""
    monkeypatch.setattr(shards, "MAPS", tmp_path / "max_map_count")
    (tmp_path / "max_map_count").write_text("4110\n")
    told = made(tmp_path / "c", Ten(several=True), backbone)
    assert len(told["files"]) == 10 and CacheFolder(tmp_path / "c") and not caplog.records
    (tmp_path / "max_map_count").write_text("4105\n")
    made(tmp_path / "d", Ten(several=True), backbone)
    assert re.search(r"some 14 files, which training maps, and a process of this machine maps 4105 pieces of memory", caplog.text)
    with pytest.raises(ValueError, match=r"^the cache .* has 10 files, and .* maps 4105 .* \(vm\.max_map_count\): .* give ddil-cache more"):
        CacheFolder(tmp_path / "c")


def test_captions_of_files_that_are_there_are_not_checked_again(
    backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each go read and tokenised all captions before its first picture. Those of files that were made with truncation are still to be."""
    checked: list[int] = []
    check = writer.check_lengths
    monkeypatch.setattr(writer, "check_lengths", lambda rows, *rest: (checked.extend(rows), check(rows, *rest))[1])
    made(tmp_path / "c", Ten(), backbone)
    assert checked == list(range(10))
    checked.clear()
    (tmp_path / "c" / "rows-00001.safetensors").unlink()
    made(tmp_path / "c", Ten(), backbone)
    assert checked == [4, 5, 6, 7]
    checked.clear()
    made(tmp_path / "d", Ten(), backbone, truncate=True)
    made(tmp_path / "d", Ten(), backbone)
    assert checked == list(range(10))


# Others that know nothing of these ---------------------------------------------------------------------------------------------------


def test_files_that_another_has_made_meanwhile_are_left_to_it(
    backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A task of an array job encoded every file that was missing when it began, whatever the others had made since."""
    made(tmp_path / "whole", Ten(), backbone)
    encode_images, rows = Pipeline.encode_images, []

    def met(self: Pipeline, pixels: torch.Tensor) -> torch.Tensor:
        rows.append(len(pixels))
        if len(rows) == 1:  # another begins and ends while the first file is encoded
            with monkeypatch.context() as patch:
                patch.setattr(Pipeline, "encode_images", encode_images)
                made(tmp_path / "c", Ten(), backbone)
        return encode_images(self, pixels)

    monkeypatch.setattr(Pipeline, "encode_images", met)
    assert made(tmp_path / "c", Ten(), backbone)["complete"] and rows == [4]
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    assert caplog.text.count(f"another process writes into {tmp_path / 'c'} as well: what is missing is shared") == 1


def test_who_is_late_leaves_a_folder_as_it_is_complete(backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that had looked before another completed the folder took its manifest away, minutes later, and wrote its captions anew."""

    def state() -> dict[str, tuple[int, int]]:
        return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in (tmp_path / "c").iterdir()}

    class Late(Ten):
        def check_files(self, processes: Processes) -> None:
            made(tmp_path / "c", Ten(), backbone)
            before.append(state())

    before: list[dict[str, tuple[int, int]]] = []
    assert made(tmp_path / "c", Late(), backbone)["complete"] and before == [state()]
    with monkeypatch.context() as patch:  # one that has looked a second time as well
        patch.setattr(Writer, "_known", lambda self, about: about)
        patch.setattr(Writer, "_begin", lambda self, about: about)
        assert made(tmp_path / "c", Ten(), backbone)["complete"] and before == [state()]


def test_who_begins_while_another_completes_the_folder_leaves_its_manifest(
    backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that had looked, and had not written yet, put the manifest of a cache that is begun in the place of the complete one."""
    states = []

    def meanwhile(folder: Path, **given: Any) -> None:
        monkeypatch.undo()
        made(folder, Ten(), backbone)
        states.append((folder / "manifest.json").read_bytes())
        assert json.loads(states[0])["complete"]

    monkeypatch.setattr(writer, "sweep", meanwhile)
    ten = Writer(tmp_path / "c", Ten(), backbone, Keeping(shard_rows=4), False, 0, Processes())
    assert ten._begin(ten._about())["complete"] and states == [(tmp_path / "c" / "manifest.json").read_bytes()]
    begun = json.dumps({**json.loads(states[0]), "complete": False})
    (tmp_path / "c" / "manifest.json").write_text(begun)
    monkeypatch.setattr(writer, "holding", lambda path: nullcontext(False))  # by one that is just completing it
    assert not ten._begin(ten._about())["complete"] and (tmp_path / "c" / "manifest.json").read_text() == begun


def late_by_two(rank: int, tiny: str, folder: str, fault: str) -> str:
    """What ends both processes where something fails that one of them does."""

    def fails(*given: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), fault)

    told = Writer(Path(folder), Ten(), Pipeline(tiny), Keeping(shard_rows=4), False, 0, together(rank))
    with pytest.MonkeyPatch.context() as patch:
        if rank == (fault == "sums"):
            patch.setattr(writer, {"lock": "holding", "sums": "checksum", "maps": "too_many"}[fault], fails)
        try:
            told.write()
        except (Elsewhere, OSError) as error:
            return one_line(error)
    return ""


@pytest.mark.parametrize("fault", ["maps", "lock", "sums"])
def test_what_one_of_several_does_ends_all_where_it_fails(fault: str, pair: Pair, tiny: Path, tmp_path: Path) -> None:
    """The others waited for days."""
    assert pair.run(late_by_two, str(tiny), str(tmp_path / "c"), fault, timeout=60) == [f"No space left on device: {fault}"] * 2


def test_a_folder_that_another_has_just_begun_is_a_cache(backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told to hold something else, while the other's manifest was half written, or where it came between two looks at the folder."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".manifest.json.4242-elsewhere-0a1b2c3d.ddil-part").write_text("{")
    assert made(tmp_path / "c", Ten(), backbone)["complete"]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something else than a cache"):
        made(tmp_path / "d", Ten(), backbone)
    looks = iter([lambda folder: made(tmp_path / "e", Ten(), backbone), *[holds_anything] * 9])
    monkeypatch.setattr(manifest, "holds_anything", lambda folder: (next(looks)(folder), holds_anything(folder))[1])
    assert made(tmp_path / "e", Ten(), backbone)["complete"]


def test_data_that_cannot_be_encoded_yet_begin_no_cache(backbone: Pipeline, tmp_path: Path) -> None:
    """When they are mended they are other data, by their stamp, and the folder would be refused with nothing in it."""
    (tmp_path / "set").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(tmp_path / "set" / f"{i}.png")
        (tmp_path / "set" / f"{i}.txt").write_text(f"a digit {WORDS[i]}")
    images, picture = Images(str(tmp_path / "set"), size=16), (tmp_path / "set" / "2.png").read_bytes()
    (tmp_path / "set" / "2.png").unlink()
    with pytest.raises(ValueError, match="no such file; 1 of 3 pictures are missing"):
        made(tmp_path / "c", images, backbone)
    (tmp_path / "set" / "2.png").write_bytes(picture)
    assert made(tmp_path / "c", images, backbone)["complete"]


def test_who_meets_another_goes_its_own_way(tmp_path: Path) -> None:
    """Two that begin at once would make the same files side by side up to the last."""
    there: set[int] = set()
    made_by: list[list[int]] = [[], []]
    workers = [Missing(range(200), there.__contains__, tmp_path) for _ in range(2)]
    turns = [iter(worker) for worker in workers]
    while any(turns):
        for number, turn in enumerate(turns):
            made_by[number] += [] if turn is None else [next(turn, -1)]
        for number, worker in enumerate(workers):
            if turns[number] is not None and made_by[number][-1] == -1:
                turns[number] = None  # type: ignore[call-overload]
            elif turns[number] is not None and not worker.is_made(made_by[number][-1]):
                there.add(made_by[number][-1])
    assert there == set(range(200)) and sum(map(len, made_by)) < 230
    streamed = Missing(range(5), {0, 3}.__contains__, tmp_path, in_order=True)
    assert list(streamed) == [1, 2, 4]


def one_of_an_array(rank: int, tiny: str, folder: str) -> tuple[bool, int]:
    backbone, count, encode_images = Pipeline(tiny), [0], Pipeline.encode_images

    def slowly(pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1 + 0.3 * rank)  # in step with each other both would begin every row at the same time
        count[0] += len(pixels)
        return encode_images(backbone, pixels)

    backbone.encode_images = slowly  # type: ignore[method-assign, assignment]
    told = Writer(Path(folder), Ten(several=True), backbone, Keeping(shard_rows=1), False, 0, Processes()).write()
    return told["complete"], count[0]


def test_tasks_of_an_array_share_a_folder(pair: Pair, tiny: Path, backbone: Pipeline, tmp_path: Path) -> None:
    """Two processes without a launcher: one of them completes the folder, and neither encodes all of it."""
    made(tmp_path / "one", Ten(several=True), backbone, shard_rows=1)
    found = pair.run(one_of_an_array, str(tiny), str(tmp_path / "two"))
    assert any(complete for complete, _ in found) and sum(count for _, count in found) < 20
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def sorted_by_two(rank: int, folder: str) -> tuple[int, list[list[int]]]:
    images, asked = Images(folder, size=[(16, 16), (16, 32)]), [0]
    frames = images.frames
    images.frames = lambda rows: (asked.__setitem__(0, asked[0] + len(rows)), frames(rows))[1]  # type: ignore[method-assign]
    sorting.sort_by_size(images, together(rank))
    return asked[0], [group.rows.tolist() for group in images.groups()]


def test_processes_share_the_heads_of_the_pictures(pair: Pair, tmp_path: Path) -> None:
    """The first read them all, while the others waited."""
    for i in range(8):
        Image.new("RGB", (32, 16) if i % 3 else (16, 16)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a digit")
    assert pair.run(sorted_by_two, str(tmp_path)) == [(4, [[0, 3, 6], [1, 2, 4, 5, 7]])] * 2


def written_by_two(rank: int, tiny: str, folder: str) -> None:
    Writer(Path(folder), Ten(several=True), Pipeline(tiny), Keeping(shard_rows=4), False, 0, together(rank)).write()


def test_two_processes_write_what_one_does(pair: Pair, tiny: Path, backbone: Pipeline, tmp_path: Path) -> None:
    made(tmp_path / "one", Ten(several=True), backbone)
    pair.run(written_by_two, str(tiny), str(tmp_path / "two"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# What is refused --------------------------------------------------------------------------------------------------------------------


def test_a_cache_of_other_encoders_or_data_is_refused(backbone: Pipeline, tiny: Path, tmp_path: Path) -> None:
    made(tmp_path / "c", Ten(), backbone)
    made(tmp_path / "bare", Ten(), backbone, text=False)
    vae, text = Pipeline(str(tiny)), Pipeline(str(tiny))
    with torch.no_grad():
        vae.pipe.vae.encoder.conv_in.bias[0] += 1e-6
        next(text.pipe.text_encoder.parameters())[0] += 1e-6
    for name, other in (("vae", vae), ("text_encoder", text)):
        said = f"^the cache {tmp_path / 'c'} was made by another {name} than that of {tiny}, or in another precision: make it anew by"
        with pytest.raises(ValueError, match=said):
            open_folder(tmp_path / "c", None, other, False, False, Processes())
    open_folder(tmp_path / "bare", None, text, False, False, Processes())
    with pytest.raises(ValueError, match="another vae"):
        open_folder(tmp_path / "bare", None, vae, False, False, Processes())
    fewer = Ten()
    fewer.stamp = lambda: "other"  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"was made from other captions or pictures: .*, or leave data\.captions out"):
        open_folder(tmp_path / "c", fewer, backbone, False, False, Processes())
    with pytest.raises(ValueError, match=f"^{tmp_path / 'c'} holds a cache with dtype float16, not float32: remove it, or give another"):
        made(tmp_path / "c", Ten(), backbone, dtype="float32")
    with pytest.raises(ValueError, match="holds a cache with other encoders"):
        made(tmp_path / "c", Ten(), vae)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a cache: give another --out"):
        made(tmp_path / "other", Ten(), backbone)
    with pytest.raises(ValueError, match=r"is no cache: it has no manifest\.json; make one by ddil-cache"):
        CacheFolder(tmp_path / "other")
    with pytest.raises(ValueError, match="another vae"):  # named as the data themselves
        prepared(CacheFolder(tmp_path / "c"), vae, True, False, 0, "stop", Notices(), Processes())
    own = encode(Ten(), backbone)
    with pytest.raises(ValueError, match="^the data are encoded already, and the cache .* would take their place"):
        open_folder(tmp_path / "c", own, backbone, False, False, Processes())


def test_data_without_a_stamp_are_compared_by_their_content(backbone: Pipeline, tmp_path: Path) -> None:
    """The built-in sets and most classes of one's own have none: any other data were taken for those of the cache, and gone on with."""
    made(tmp_path / "c", Ten(), backbone)
    open_folder(tmp_path / "c", Ten(), backbone, False, False, Processes())
    brighter = Ten()
    brighter._pixels = Ten().pixels(range(10)) + 0.01  # type: ignore[operator]
    for other in (Ten(several=True), brighter):
        with pytest.raises(ValueError, match=r"was made from other captions or pictures: .*, or leave data\.captions out"):
            open_folder(tmp_path / "c", other, backbone, False, False, Processes())
    (tmp_path / "c" / "rows-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="holds a cache of other captions or pictures: remove it, or give another --out"):
        made(tmp_path / "c", brighter, backbone)
    assert made(tmp_path / "c", Ten(), backbone)["complete"]


def test_a_cache_of_another_size_is_refused(backbone: Pipeline, tmp_path: Path) -> None:
    rows = Ten()
    rows.sizes = ((16, 16),)
    made(tmp_path / "c", rows, backbone)
    other = Ten()
    other.sizes = ((32, 32), (16, 64))
    with pytest.raises(ValueError, match=r"was made of pictures of 16 x 16, and data\.captions\.size is 32 x 32, 16 x 64: make it anew"):
        open_folder(tmp_path / "c", other, backbone, False, False, Processes())


# Training ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [True, False])
def test_training_on_a_folder_is_training_on_what_was_encoded(text: bool, tiny: Path, backbone: Pipeline, tmp_path: Path) -> None:
    made(tmp_path / "c", Ten(several=True), backbone, dtype="float32", text=text)
    shutil.move(tmp_path / "c", tmp_path / "moved")
    runs = []
    moved = tmp_path / "moved"
    for captions, cache in ((Ten(several=True), True), (None, str(moved)), (CacheFolder(moved), True)):
        toy = Toy()
        toy.backbone = backbone
        made_ = attach(DDILDataModule(captions, FORWARD_ONLY, batch_size=4, cache=cache), toy)
        made_.setup("fit")
        runs.append((first(6, made_), made_.box(), made_.examples(2), made_.reference(2)))
    assert equal(runs[1], runs[2])
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(a.t, b.t)
        torch.testing.assert_close(a.x_t, b.x_t, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.c.text, b.c.text, rtol=0, atol=1e-5)
    assert runs[0][2] == runs[1][2] == ["a digit zero", "a digit one"]


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_resumes_exactly_and_is_that_on_what_a_file_keeps(several: bool, light: Path, tmp_path: Path) -> None:
    """To the bit, and without the data. The position in them, here in the midst of an epoch, is part of the checkpoint; so are captions."""
    made(tmp_path / "folder", Ten(several), suite.backbone(light), shard_rows=16)

    def run(name: str, *callbacks: Any, ckpt: Path | None = None) -> Run:
        rows = None if name == "folder" else Ten(several)
        given = {"batch_size": 3, "rollouts": {"every": 2}, "buffer": {"capacity": 64}, "cache": str(tmp_path / name)}
        data = DDILDataModule(rows, MIXED, **options(DDILDataModule, {}, given))
        return fit(build(BY_NAME["lcm"], light, updates=5), data, *callbacks, ckpt=ckpt)

    straight = run("folder" if several else "file")
    cut = run("folder", StopAt(4, tmp_path / "cut.ckpt"))
    resumed = run("folder", ckpt=tmp_path / "cut.ckpt")
    assert suite.equal(state(straight), state(resumed)) and straight.rows == cut.rows + resumed.rows
    assert isinstance(resumed.data.captions, CacheFolder) and isinstance(straight.data.captions, CacheFolder) == several


# Columns ----------------------------------------------------------------------------------------------------------------------------


def test_a_column_goes_over_several_files() -> None:
    whole = torch.arange(24).view(8, 3)
    column = Column([whole[:3], whole[3:3], whole[3:]])
    assert column.shape == (8, 3) and len(column) == 8
    for index in ([7, 0, 3, 3, 2], slice(None, 5), torch.tensor([4]), slice(6, None), []):
        assert torch.equal(
            column[index], whole[torch.as_tensor(index) if isinstance(index, list) and index else index if index != [] else slice(0)]
        )
    for wrong in (8, -1):
        with pytest.raises(IndexError):
            column[[wrong]]


def test_texts_are_kept_as_they_are() -> None:
    texts = ["", "ein Kreis, größer", "两个", "a\nb", ""]
    assert unpacked(packed(texts)) == texts and unpacked(packed(texts), [2, 0]) == ["两个", ""] and unpacked(packed([])) == []
    assert unpacked(packed(["", ""])) == ["", ""]
