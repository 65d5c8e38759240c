"""Where captioned images come from: archives, folders of parquet, streams, prompts in tables; and several captions of an image."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pickle
import re
import shutil
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ddil_lightning.counting import READERS
from ddil_lightning.data import captions, indexes, streaming, tables
from ddil_lightning.data.captions import Captions, Images, Prompts
from ddil_lightning.data.folders import Cells, Listing
from ddil_lightning.data.sampler import CounterSampler
from ddil_lightning.data.sorting import sort_by_size
from ddil_lightning.data.visits import Visit
from ddil_lightning.errors import Refusal
from ddil_lightning.files import PART, UNUSED
from ddil_lightning.processes import Elsewhere, Processes
from pair import Pair, together
from pictured import parquet, png


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("DDIL_CACHE", str(tmp_path_factory.mktemp("known")))  # many archives here are copies of others


def levels(captions: Captions, rows: Any) -> list[int]:
    """The red of pictures that were made by `png`, and of nothing else."""
    pixels = captions[rows].images()
    assert pixels is not None
    return ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def tar(file: Path, members: Mapping[str, bytes | str], mode: Any = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as archive:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


# Archives -------------------------------------------------------------------------------------------------------------------------


def sample(i: int, text: str = "txt") -> dict[str, bytes | str]:
    """A picture of red 10 i and its caption, as a member of its own or in a table."""
    told = f"row {i}" if text == "txt" else json.dumps({"text": f"row {i}", "width": 8})
    return {f"s/{i:04d}.png": png(10 * i), f"s/{i:04d}.{text}": told}


def archives(folder: Path) -> Path:
    """Six samples in two archives, the second with tables, beside what img2dataset also writes."""
    tar(folder / "00000.tar", {k: v for i in range(3) for k, v in sample(i).items()})
    tar(folder / "00001.tar", {k: v for i in range(3, 6) for k, v in sample(i, "json").items()})
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"a table of addresses")
    return folder


@pytest.mark.parametrize("path", ["", "0000*.tar", "{00000..00001}.tar", "{00000,00001}.tar", "0000[01].tar"])
def test_archives_are_read_in_any_order(path: str, tmp_path: Path) -> None:
    images = Images(str(archives(tmp_path / "a") / path), size=8)
    assert len(images) == 6 and images[[4, 0, 3]].prompts == ["row 4", "row 0", "row 3"] and levels(images, [4, 0, 3]) == [40, 0, 30]
    loader = DataLoader(images, batch_size=None, sampler=[[5, 1], [2]], num_workers=1)  # type: ignore[arg-type]
    assert [batch.prompts for batch in loader] == [["row 5", "row 1"], ["row 2"]]


def test_one_archive_and_the_first_rows_of_several(tmp_path: Path) -> None:
    folder = archives(tmp_path)
    assert Images(str(folder / "00001.tar"), size=8).prompts([0, 2]) == ["row 3", "row 5"]
    few = Images(str(folder), size=8, limit=4)
    assert len(few) == 4 and few.prompts([3]) == ["row 3"]


def test_members_of_a_sample_need_not_stand_together(tmp_path: Path) -> None:
    """A caption of the table goes before one of the text file, a picture that is named before the first; what is hidden is no member."""
    members: dict[str, bytes | str] = {"./a.b/1.JPG": png(10), "2.png": png(20), "._1.png": b"", "readme": "", "2.mask.png": png(1)}
    members |= {"2.txt": "by text\n\n another \n", "2.json": json.dumps({"caption": ["by table", "two"]}), "./a.b/1.txt": "\ufeffone"}
    file = tar(tmp_path / "x.tar", members)
    assert Images(str(file), size=8).texts([0, 1]) == [["one"], ["by text", "another"]]
    named = Images(str(file), size=8, caption="caption", image="mask.png")
    assert named.texts([0, 1]) == [["one"], ["by table", "two"]] and levels(named, [0, 1]) == [10, 1]


def test_pictures_that_are_no_sample_for_a_dot_in_their_name_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"img_1.5.png": png(1), "img_1.5.txt": "one and a half", **sample(2), "s/0002.mask.png": png(3)}
    assert len(Images(str(tar(tmp_path / "x.tar", members)), size=8)) == 1
    said = f"{tmp_path / 'x.tar'}: 1 pictures are left out, the first img_1.5.png: a sample is called after its name up to the first dot"
    assert [record.getMessage().partition(", as in")[0] for record in caplog.records] == [said]


def test_what_is_wrong_in_an_archive_is_named_and_skipped(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {"0.png": png(0), "1.txt": "no picture", "2.png": b"<html>", "2.txt": "broken", "3.png": png(30)}
    members |= {"3.json": "{", "4.png": png(40), "4.txt": b"\xff", **sample(5)}
    file = tar(tmp_path / "x.tar", members)
    images = Images(str(file), size=8)
    faults = {
        0: f"the data set {file}, row 0 (from 0): text is None and no caption",
        1: f"the data set {file}, row 1 (from 0): image is None and no file name",
        2: f"the data set {file}, row 2 (from 0), x.tar:2.png: not a readable image (it begins with",
        3: f"the data set {file}, row 3 (from 0): text is {file}:3.png, its .json: no JSON",
        4: f"the data set {file}, row 4 (from 0): text is {file}:4.png, its .txt: byte 0xff is not UTF-8",
    }
    for row, said in faults.items():
        with pytest.raises(ValueError, match="^" + re.escape(said)):
            images[[5, row]]
    images.on_error = "skip"
    batch = images[range(6)]
    assert batch.rows.tolist() == [5] * 6 and len(batch.skipped) == 5


def test_what_is_no_archive_is_one_line(tmp_path: Path) -> None:
    cut = tar(tmp_path / "cut.tar", {"0.png": png(0), "0.txt": "a" * 5000})
    cut.write_bytes(cut.read_bytes()[:2000])
    (tmp_path / "no.tar").write_text("no archive" * 100)
    tar(tmp_path / "packed.tar", sample(0), "w:gz")
    tar(tmp_path / "twice.tar", {"0.png": png(0), "0.PNG": png(1)})
    for name, why in (
        ("cut.tar", "cannot be read as a tar file: unexpected end of data; archives are read uncompressed and whole"),
        ("no.tar", "cannot be read as a tar file: "),
        ("packed.tar", "cannot be read as a tar file: "),
        ("twice.tar", "cannot be read as a tar file: it holds 0.PNG twice"),
        ("{1..2}.tar", f"could not be read: no file is called {tmp_path}/1.tar, which {tmp_path}/{{1..2}}.tar asks for"),
        ("x*.tar", f"could not be read: no file is called {tmp_path}/x*.tar"),
    ):
        with pytest.raises(ValueError, match=re.escape(why)) as error:
            Images(str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no row"):
        Images(str(tar(tmp_path / "empty.tar", {"0.npy": b"1"})))
    with pytest.raises(ValueError, match="it has no split 'test'"):
        Images(str(tmp_path / "empty.tar"), split="test")


def test_archives_that_are_cut_short_are_told_together_or_used_as_far_as_they_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first of them ended the start whatever was asked for, and each correction was followed by a whole index for the next."""
    for k in range(4):
        tar(tmp_path / f"{k}.tar", {name: data for i in range(3) for name, data in sample(3 * k + i).items()})
    for k in (1, 2):
        whole = (tmp_path / f"{k}.tar").read_bytes()
        (tmp_path / f"{k}.tar").write_bytes(whole[: 4 * 1024 + 512 + 10])  # in the picture of the third sample
    images = Images(str(tmp_path), size=8)
    damaged = [f"{k}.tar cannot be read as a tar file: unexpected end of data" for k in (1, 2)]
    said = f"the data set {tmp_path} could not be read: {'; '.join(damaged)}; archives are read uncompressed and whole, or in part by "
    for ask in (lambda: images.check_files(Processes()), lambda: images[[0]]):
        with pytest.raises(ValueError, match="^" + re.escape(said + "data.on_error=skip") + "$"):
            ask()
    with pytest.raises(ValueError, match=re.escape("; ".join(damaged))):
        tables.load(str(tmp_path), "image", None, "train", None)
    images.on_error = "skip"
    with caplog.at_level(logging.WARNING):
        images.check_files(Processes())
    assert "; ".join(damaged) + ": what is whole of such archives is used" in caplog.text
    assert [texts[0] for texts in images.texts(range(len(images)))] == [f"row {i}" for i in (0, 1, 2, 3, 4, 6, 7, 9, 10, 11)]
    assert levels(images, range(10)) == [10 * i for i in (0, 1, 2, 3, 4, 6, 7, 9, 10, 11)]


def test_an_archive_that_the_system_does_not_read_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With data.on_error=skip a network that was away for a moment left a process with fewer rows than the others. What a head says of
    itself is damage, also where the system refuses to go there."""
    folder = archives(tmp_path)

    def away(self: tarfile.TarFile) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "next", away)
        with pytest.raises(ValueError, match=r"^the data set .* could not be read: .*/0000\d\.tar cannot be read: Input/output error$"):
            Images(str(folder), size=8)
    head = bytearray((folder / "00001.tar").read_bytes())
    head[124:136] = b"\xff" * 8 + b"\x80\0\0\0"  # of so many bytes less than nothing
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:512])
    (folder / "00001.tar").write_bytes(head)
    assert Images(str(folder), size=8)._damaged == ["00001.tar cannot be read as a tar file: Invalid argument"]


def found_by_two(rank: int, folder: str, cut: bool) -> str:
    """What is said of archives of which the second process finds one cut short, or not at all."""
    images = Images(folder if rank == 0 else f"{folder}/0000{'1' if cut else '0'}.tar", size=8)
    images._path, images.on_error = "x", "skip"
    if rank == 1 and cut:
        images._damaged = ["00001.tar is cut"]
    try:
        images.check_files(together(rank))
    except (Elsewhere, ValueError) as error:
        return str(error)
    return ""


def test_processes_that_find_other_rows_are_told(pair: Pair, tmp_path: Path) -> None:
    """Each trained on its own: batches of other pictures, and in the end of another number of them."""
    folder = str(archives(tmp_path))
    for cut, why in ((False, ""), (True, " (00001.tar is cut)")):
        said = f"the data set x has 6 rows for process 0 and 3 rows{why} for process 1: see that all of them find the same files, and start"
        assert [text[: len(said)] for text in pair.run(found_by_two, folder, cut)] == [said] * 2


def test_the_heads_of_an_archive_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process read them all at every start. A file of another time or size is read again, and no other."""
    read: list[str] = []
    heads = indexes.read_heads
    monkeypatch.setattr(indexes, "read_heads", lambda file, image: (read.append(file.name), heads(file, image))[1])
    folder = archives(tmp_path)
    before = [images.texts(range(6)) for images in (Images(str(folder), size=8), Images(str(folder / "*.tar"), size=8))]
    assert sorted(read) == ["00000.tar", "00001.tar"] and before[0] == before[1]
    read.clear()
    tar(folder / "00001.tar", {k: v for i in range(3, 8) for k, v in sample(i, "json").items()})
    os.utime(folder / "00001.tar", (9, 9))
    assert len(Images(str(folder), size=8)) == 8 and read == ["00001.tar"]
    read.clear()
    os.utime(folder / "00000.tar", (9, 9))
    assert len(Images(str(folder), size=8, limit=2)) == 2 and read[0] == "00000.tar"
    monkeypatch.setenv("DDIL_CACHE", str(folder / "00000_stats.json"))  # a place that cannot be written
    assert Images(str(folder), size=8).texts([5]) == [["row 5"]]


def test_an_index_serves_copies_and_nothing_else_and_goes_when_nobody_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy on a node's own disk had one for good, and an archive of the same place, size and time was read at another's places."""
    read: list[str] = []
    heads = indexes.read_heads
    monkeypatch.setattr(indexes, "read_heads", lambda file, image: (read.append(file.name), heads(file, image))[1])
    folder, kept = archives(tmp_path / "set"), Path(os.environ["DDIL_CACHE"]) / "archives"
    told = Images(str(folder), size=8).texts(range(6))
    for copy in "ab":
        shutil.copytree(folder, tmp_path / copy)  # which keeps the time
        assert Images(str(tmp_path / copy), size=8).texts(range(6)) == told
        shutil.rmtree(tmp_path / copy)
    assert len(read) == len(list(kept.iterdir())) == 2
    stat = (folder / "00000.tar").stat()
    tar(folder / "00000.tar", {k: v for i in (2, 1, 0) for k, v in sample(i).items()})
    os.utime(folder / "00000.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (folder / "00000.tar").stat().st_size == stat.st_size
    old = time.time() - UNUSED - 60
    for file in kept.iterdir():
        os.utime(file, (old, old))
    (kept / f".x.999999999.{PART}").touch()
    assert Images(str(folder), size=8).texts(range(3)) == told[2::-1] and len(read) == 3
    assert len(list(kept.iterdir())) == 2  # the used one and the new one


def test_an_index_is_none_of_an_archive_whose_captions_were_corrected(tmp_path: Path) -> None:
    """Neither its size nor its last 64 KiB had changed: texts were cut, or ended in zeros, where a copy had been indexed."""
    large = noisy(300)

    def written(*captions: str) -> Path:
        tar(tmp_path / "set" / "0.tar", {k: v for i, text in enumerate(captions) for k, v in ((f"{i}.txt", text), (f"{i}.png", large))})
        return tmp_path / "set" / "0.tar"

    file = written("a small cat that sits on a red chair", "two")
    shutil.copytree(file.parent, tmp_path / "copy", copy_function=shutil.copyfile)
    assert Images(str(tmp_path / "copy"), size=8).texts(range(2)) == Images(str(file.parent), size=8).texts(range(2))
    before = file.stat().st_size
    written("a cat", "two birds on a wire")
    assert file.stat().st_size == before
    os.utime(file, (9, 9))
    assert Images(str(file.parent), size=8).texts(range(2)) == [["a cat"], ["two birds on a wire"]]


def test_an_archive_that_is_away_ends_the_run_whatever_is_asked_for(tmp_path: Path) -> None:
    """Rows of it had been passed over, and others trained in their place, or cached."""
    images = Images(str(archives(tmp_path / "set")), size=8)
    images.on_error = "skip"
    (tmp_path / "set" / "00000.tar").unlink()
    with pytest.raises(Refusal, match=r"00000.tar cannot be read: No such file or directory$"):
        images[[0, 1]]


def noisy(side: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_of_a_picture_in_a_file_with_others_no_more_than_its_head_is_read_for_its_size(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pictures were, at every start. What is known of data of a stamp is kept, but for pictures that could not be read."""
    folder, pictures = tmp_path / "set", []
    for i in range(6):
        file = io.BytesIO()
        Image.effect_noise((300, 200) if i % 2 else (200, 200), 90).convert("RGB").save(file, "PNG")
        pictures.append(b"no picture" * 20000 if i == 2 else file.getvalue())
    if kind == "tar":
        tar(folder / "0.tar", {name: data for i, one in enumerate(pictures) for name, data in ((f"{i}.png", one), (f"{i}.txt", "a"))})
    else:
        from datasets import Dataset

        folder.mkdir()
        Dataset.from_list([{"image": one, "text": "a"} for one in pictures]).to_parquet(str(folder / "train.parquet"))
    monkeypatch.setattr("ddil_lightning.data.archives._read", lambda *args: pytest.fail("a picture was read whole"))
    monkeypatch.setattr(tables.Table, "pictures", lambda *args: pytest.fail("a picture was read whole"))
    seen, far, size_of = [], [], captions.picture_size

    def looked_at(source: Any, name: str) -> tuple[int, int]:
        seen.append(source)
        try:
            return size_of(source, name)
        finally:
            far.append(source.tell())

    monkeypatch.setattr(captions, "picture_size", looked_at)

    def images() -> Images:
        made = Images(str(folder), size=[(16, 16), (16, 24)])
        made.on_error = "skip"
        sort_by_size(made, Processes())
        return made

    other = Path(os.environ["DDIL_CACHE"]) / "sizes" / "of-data-that-are-gone.safetensors"
    other.parent.mkdir()
    other.touch()
    os.utime(other, (0, 0))
    assert [group.rows.tolist() for group in images().groups()] == [[0, 4], [1, 2, 3, 5]] and not other.exists()
    assert all(not isinstance(source, bytes) for source in seen) and len(seen) > 6
    if kind == "tar":
        assert all(read <= 2**15 < len(one) for read, one in zip(far[-6:], pictures, strict=True))
        assert all(source.closed for source in seen)
    seen.clear()
    assert [group.rows.tolist() for group in images().groups()] == [[0, 4], [1, 2, 3, 5]] and len(seen) == 1
    assert pickle.loads(pickle.dumps(images())).sorting.size([4]) == (16, 16)


@contextmanager
def few_files(more: int) -> Iterator[None]:
    """Inside, this process may open so many files more."""
    resource = pytest.importorskip("resource")
    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + more + 1, before[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(more):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for number in taken:
            os.close(number)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux lists them")
def test_archives_are_open_as_long_as_a_picture_is_looked_at(tmp_path: Path) -> None:
    """Each of a thread's 64 pictures had a file of its own open, 1024 of all threads: as many as a process may mostly have. Those for which
    there was none were taken for broken ones, and trained at their neighbour's aspect."""
    pictures = []
    for size in (8, 8), (24, 8):
        file = io.BytesIO()
        Image.new("RGB", size).save(file, "PNG")
        pictures.append(file.getvalue())
    members = {name: data for i in range(256) for name, data in ((f"{i}.png", pictures[i % 3 == 0]), (f"{i}.txt", "a"))}
    images = Images(str(tar(tmp_path / "0.tar", members)), size=[(8, 8), (8, 24)])
    images.on_error = "skip"
    with few_files(READERS + 2):
        assert images.groups()[1].rows.tolist() == [*range(0, 256, 3)]
    with few_files(0), pytest.raises(Refusal, match=r"0\.tar cannot be opened: Too many open files; .* \(ulimit -n\)"):
        images.frames([0])
    with few_files(0), pytest.raises(Refusal, match=r"0\.tar cannot be opened: Too many open files"):
        images[[0]]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "0.png").write_bytes(pictures[0])
    (alone / "0.txt").write_text("a")
    images = Images(str(alone), size=[(8, 8), (8, 24)])
    images.on_error = "skip"
    for ask in (images.frames, images.__getitem__):
        with few_files(0), pytest.raises(Refusal, match=r"0\.png cannot be opened: Too many open files"):
            ask([0])


def test_pictures_are_looked_for_by_one_process_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(10 * i))
        (tmp_path / f"{i}.txt").write_text("a")
    images = [Images(str(tmp_path), size=8) for _ in range(2)]
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png: no such file; 1 of 3 pictures are missing$"):
        images[0].check_files(Processes())
    monkeypatch.setattr(Listing, "missing", lambda *args: pytest.fail("looked for again"))
    first = iter([((3, []), None), (None, None)])  # of the second of two, whose first has found as many rows, and nothing missing
    strategy = SimpleNamespace(broadcast=lambda told: next(first), reduce_boolean_decision=bool)
    images[1].check_files(Processes(SimpleNamespace(global_rank=1, world_size=2, strategy=strategy)))
    assert images[1][[0]].rows.tolist() == [0]


def test_the_stamp_of_archives_follows_them_and_what_is_read(tmp_path: Path) -> None:
    folder = archives(tmp_path)
    before = Images(str(folder)).stamp()
    assert Images(str(folder / "*.tar")).stamp() == before != Images(str(folder), caption="other").stamp()
    whole = Images(str(folder)).content()
    tar(folder / "00000.tar", {k: v for i in (0, 1, 7) for k, v in sample(i).items()})
    os.utime(folder / "00000.tar", (9, 9))
    assert Images(str(folder)).stamp() != before and Images(str(folder)).content() != whole


# Parquet and streams ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["", "train-*.parquet", "train-0000{0,1}-of-00002.parquet"])
def test_parquet_files_are_one_data_set(path: str, stream: bool, tmp_path: Path) -> None:
    parquet(tmp_path / "set" / "data")
    (tmp_path / "set" / "README.md").write_text("as it is cloned")
    images = Images(str(tmp_path / "set" / ("data/" + path if path else "")), size=8, stream=stream)
    assert len(images) == 10 and levels(images, [3, 4, 5]) == [30, 40, 50] and images.texts([9]) == [["row 9", "again 9"]]
    assert len(Images(str(tmp_path / "set"), size=8, limit=7, stream=stream)) == 7


def test_parquet_files_of_a_split_are_those_that_are_called_so(tmp_path: Path) -> None:
    parquet(tmp_path)
    (tmp_path / "train-00001-of-00002.parquet").rename(tmp_path / "test-00000-of-00001.parquet")
    assert Images(str(tmp_path), size=8).prompts([0]) == ["row 0"] and len(Images(str(tmp_path), size=8)) == 5
    assert Images(str(tmp_path), size=8, split="test").prompts([0]) == ["row 5"]
    with pytest.raises(ValueError, match="it has no split 'other': no file is called after it"):
        Images(str(tmp_path), split="other")


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train-00000-of-00001-6f24123afdb9a66c", "test-00000-of-00001-0a0b0c0d0e0f1234"], 1),  # as the Hub once called them
        (["digits_train", "digits-test"], 1),
        (["part-0", "part-1"], 2),
        (["test-00000-of-00002", "test-00001-of-00002"], 2),  # nothing else: they were meant
        (["part-0", "test-00000-of-00001"], "test"),
        (["valid", "my test"], "test, valid"),
    ],
)
def test_what_is_held_out_is_not_trained_on(names: list[str], read: Any, tmp_path: Path) -> None:
    parquet(tmp_path, rows=2)
    for i, name in enumerate(names):
        (tmp_path / f"train-0000{i}-of-00002.parquet").rename(tmp_path / f"{name}.parquet")
    if isinstance(read, int):
        assert Images(str(tmp_path), size=8).prompts(range(read)) == ["row 0", "row 1"][:read] and len(Images(str(tmp_path))) == read
        return
    said = f"could not be read: no file is called train, and some are called {read}: give split=, or a pattern of the files that are meant"
    with pytest.raises(ValueError, match=said):
        Images(str(tmp_path), size=8)
    assert Images(str(tmp_path), size=8, split="test").prompts([0]) == ["row 1"]


def test_a_stream_is_read_once_in_order_and_again_for_who_goes_back(tmp_path: Path) -> None:
    images = Images(str(parquet(tmp_path, rows=60)), size=8, stream=True)
    begun: list[int] = []
    begin = images._rows._begin
    images._rows._begin = lambda row: (begun.append(row), begin(row))
    for rows in (range(0, 25), range(25, 50)):
        assert images[rows].prompts == [f"row {i}" for i in rows]
    assert begun == [] and images[[50, 12]].prompts == ["row 50", "row 12"] and begun == []  # 12 is among those that are kept
    assert images[[3]].prompts == ["row 3"] and begun == [3] and images[[59, 4]].prompts == ["row 59", "row 4"] and begun == [3]
    del images._rows._begin
    assert pickle.loads(pickle.dumps(images))[[2]].prompts == ["row 2"]
    parts = [[2, 3], [0, 1], [58, 59]]
    for workers in (1, 2):
        loader = DataLoader(images, batch_size=None, sampler=parts, num_workers=workers)  # type: ignore[arg-type]
        assert [batch.rows.tolist() for batch in loader] == parts


def test_a_stream_passes_over_files_of_which_no_row_is_asked_for(tmp_path: Path) -> None:
    """Four files of 15 rows: who has the rows from 20 on reads neither the first file nor, on the way to row 50, the third.

    It read every row in between, and so did every process and every worker that had a part of them.
    """
    images = Images(str(parquet(tmp_path, parts=4, rows=60)), size=8, stream=True)
    for i in (0, 2):
        (tmp_path / f"train-0000{i}-of-00004.parquet").write_bytes(b"nothing")
    assert images[[20, 21]].prompts == ["row 20", "row 21"] and images[range(22, 30)].prompts[-1] == "row 29"
    assert images[[50, 59]].prompts == ["row 50", "row 59"]
    with pytest.raises(ValueError, match=r"breaks off at row 30"):
        images[[30]]
    assert len(images) == 60 and images[[16]].prompts == ["row 16"]


def test_a_stream_asks_a_file_again_for_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One answer of thousands that got lost had a process read all rows before its own, for as long as it lived, and nobody was told."""
    import pyarrow.parquet as pq

    monkeypatch.setattr(streaming, "PAUSES", (0.0, 0.0))
    lost, read_metadata = [0], pq.read_metadata

    def away(data: Any) -> Any:
        lost[0] -= 1
        if lost[0] >= 0:
            raise ConnectionError("no answer")
        return read_metadata(data)

    monkeypatch.setattr(pq, "read_metadata", away)
    for times, ends in ((2, [30, 60]), (99, None)):
        images = Images(str(parquet(tmp_path, parts=2, rows=60)), size=8, stream=True)
        images._rows.__dict__.pop("_ends", None)
        lost[0] = times
        assert images._rows._ends == ends and images[[40]].prompts == ["row 40"]
        said = f"the files of the data set {tmp_path} do not say how many rows each has (no answer): the rows before those that are asked"
        assert [said in record.getMessage() for record in caplog.records] == [True] * (ends is None)


def test_a_stream_skips_what_cannot_be_read_and_names_what_is_not_there(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (7, 0, 0)).save(tmp_path / "7.png")
    from datasets import Dataset

    cells = [{"image": name, "text": text} for name, text in (("7.png", "a"), ("gone.png", "b"), ("7.png", None), ("7.png", "d"))]
    Dataset.from_list(cells).to_parquet(str(tmp_path / "set.parquet"))
    images = Images(str(tmp_path / "set.parquet"), size=8, stream=True)
    with pytest.raises(ValueError, match=re.escape(f"row 1 (from 0), {tmp_path}/gone.png: not a readable image")):
        images[[0, 1]]
    images.on_error = "skip"
    assert images[range(4)].rows.tolist() == [0, 3, 3, 3] and levels(images, [0]) == [7]
    with pytest.raises(ValueError, match=r"has no column caption: it has image, text; name them with image= and caption="):
        Images(str(tmp_path / "set.parquet"), caption="caption", stream=True)
    with pytest.raises(ValueError, match="could not be read: stream is for parquet files and data sets of the Hub"):
        Images(str(tmp_path), stream=True)
    with pytest.raises(ValueError, match="could not be read: no such folder or file, and as a data set of the Hub: "):
        Images("owner/there-is-no-such-set", stream=True)


def test_a_stream_begins_with_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    """It was decoded for the sake of the columns' names, and ended the run in a library's words, on_error=skip or not."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Column

    cells = {"image": [{"bytes": data, "path": None} for data in (b"no picture", png(10))], "text": ["a", "b"]}
    Dataset.from_dict(cells, features=Features({"image": Column(), "text": Value("string")})).to_parquet(str(tmp_path / "set.parquet"))
    images = Images(str(tmp_path / "set.parquet"), size=8, stream=True)
    with pytest.raises(ValueError, match=r"row 0 \(from 0\): not a readable image \(it begins with b'no picture'"):
        images[[0]]
    images.on_error = "skip"
    assert levels(images, [0, 1]) == [10, 10]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "set.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"^the data set .*cut\.parquet could not be read: ") as error:
        Images(str(tmp_path / "cut.parquet"), size=8, stream=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "parquet", "archives", "saved"])
def test_a_copy_is_alike_and_other_data_are_not(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache was refused for the time of a copy, and for that of the files that `datasets` makes for itself."""
    from datasets import load_dataset

    source, copy = tmp_path / "source", tmp_path / "elsewhere" / "copy"
    if kind == "folder":
        source.mkdir()
        for i in range(3):
            (source / f"{i}.png").write_bytes(png(10 * i))
            (source / f"{i}.txt").write_text(f"row {i}")
    elif kind == "archives":
        archives(source)
    else:
        parquet(tmp_path / "own" if kind == "saved" else source)
        if kind == "saved":
            load_dataset("parquet", data_files=str(tmp_path / "own" / "*.parquet"), split="train").save_to_disk(str(source))
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "another cache")
    a, b = Images(str(source), size=8), Images(str(copy), size=8)
    assert a.likeness() == b.likeness() and a.stamp() != b.stamp() and a.stamp() == Images(str(source), size=8).stamp()
    if kind == "parquet":
        os.utime(next((tmp_path / "another cache").rglob("*.arrow")), (9, 9))
        assert a.stamp() == Images(str(source), size=8, stream=True).stamp()
        assert a.likeness() == Images(str(copy), size=8, stream=True).likeness()
    suffix = {"folder": ".png", "parquet": ".parquet", "archives": ".tar", "saved": ".arrow"}[kind]
    file = next(file for file in sorted(copy.rglob("*")) if file.suffix == suffix)
    data = file.read_bytes()
    file.unlink()  # it may be mapped
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert a.likeness() != b.likeness()


# Prompts ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_prompts_stand_in_a_column(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"p.{kind}"
    if kind == "parquet":
        parquet(tmp_path, parts=1, rows=2, prompt=lambda i: f"a {i}").joinpath("train-00000-of-00001.parquet").rename(file)
    else:
        rows = [{"prompt": "a 0", "n": 1}, {"prompt": "a 1", "n": 2}]
        lines = [json.dumps(rows)] if kind == "json" else [json.dumps(row) for row in rows]
        file.write_text("prompt,n\na 0,1\na 1,2\n" if kind == "csv" else "\n".join(lines))
    prompts = Prompts(str(file), caption="prompt")
    assert len(prompts) == 2 and prompts[[1, 0]].prompts == ["a 1", "a 0"] and prompts[[0]].pixels is None
    assert prompts.stamp() == Prompts(str(file), caption="prompt").stamp()
    with pytest.raises(ValueError, match=rf"^{file} has no column words: it has .*prompt.*; name another with caption="):
        Prompts(str(file), caption="words")


@pytest.mark.parametrize("kind", ["folder", "pattern", "split", "archives", "pictures", "lines", "saved"])
def test_prompts_stand_in_many_files(kind: str, tmp_path: Path) -> None:
    """A folder or a pattern of parquet files, as captions of large data come, was "Is a directory". Pictures beside them are not read."""
    folder, path, read = tmp_path / "set", tmp_path / "set", ["row 0", "again 0", "row 1", "again 1", "row 2", "again 2"]
    if kind in ("folder", "pattern", "split"):
        parquet(folder, rows=3, parts=3, more=lambda i: i)
        path = folder / "train-*.parquet" if kind == "pattern" else folder
        if kind == "split":
            (folder / "train-00002-of-00003.parquet").rename(folder / "test-00000-of-00001.parquet")
            assert Prompts(str(path), split="test").prompts([0]) == ["row 2"]
            read = read[:4]
    elif kind == "archives":
        archives(folder)
        read = [f"row {i}" for i in range(6)]
    elif kind == "pictures":
        folder.mkdir()
        for i in range(3):
            (folder / f"{i}.jpg").write_bytes(b"no picture")
            (folder / f"{i}.txt").write_text(f"row {i}\nagain {i}")
    elif kind == "lines":
        folder.mkdir()
        (folder / "a.txt").write_text("row 0\nagain 0\n\nrow 1\n")
        (folder / "b.txt").write_text("again 1\nrow 2\nagain 2")
        path = folder / "*.txt"
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": read}).save_to_disk(str(folder))
    prompts = Prompts(str(path))
    assert [text for texts in prompts.texts(range(len(prompts))) for text in texts] == read and prompts[[0]].pixels is None
    with pytest.raises(ValueError, match=r"could not be read: no file is called .*/gone-\*\.parquet$"):
        Prompts(str(tmp_path / "gone-*.parquet"))


def test_a_prompt_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": ["b", "c"]}\n{"other": 1}')
    prompts = Prompts(str(tmp_path / "p.jsonl"))
    assert prompts.texts([0, 2]) == [["a"], ["b", "c"]]
    for row in (1, 3):
        with pytest.raises(ValueError, match=re.escape(f"p.jsonl, row {row} (from 0): text is None and no caption")):
            prompts[[row]]
    prompts.on_error = "skip"
    assert prompts[[1, 3]].rows.tolist() == [2, 0]


# Several captions -------------------------------------------------------------------------------------------------------------------


class Several(Captions):
    """Six rows of which row i has i + 1 captions."""

    def __len__(self) -> int:
        return 6

    def prompts(self, index: Any) -> list[str]:
        return [texts[0] for texts in self.texts(index)]

    def texts(self, index: Any) -> list[list[str]]:
        return [[f"{i}.{k}" for k in range(i + 1)] for i in index]


def test_every_caption_is_drawn_as_often_and_by_nothing_but_seed_epoch_and_row() -> None:
    rows, seen = Several(), []
    for epoch in range(600):
        torch.manual_seed(epoch)  # the global generator plays no part
        seen.append(rows[Visit([5, 2, 0], 3, epoch)].prompts)
        assert rows[Visit([2, 0], 3, epoch)].prompts == seen[-1][1:]  # whatever else is in the batch
    counts = [[sum(told[place] == f"{row}.{k}" for told in seen) for k in range(row + 1)] for place, row in enumerate((5, 2, 0))]
    assert min(counts[0]) > 70 and max(counts[0]) < 130 and min(counts[1]) > 160 and counts[2] == [600]
    assert [rows[Visit([5], 4, epoch)].prompts for epoch in range(600)] != [told[:1] for told in seen]
    assert rows[[5, 2]].prompts == ["5.0", "2.0"]  # without an epoch the first, for probes


def test_a_sampler_says_the_epoch_and_a_resumed_one_the_same() -> None:
    done = [0]
    sampler = CounterSampler(6, 2, 11, 1, 0, lambda: done[0])
    rows, straight = Several(), []
    for epoch in range(4):
        done[0] = 3 * epoch
        straight += [rows[batch].prompts for batch in sampler]
    done[0] = 7  # in the midst of the third epoch
    assert [rows[batch].prompts for batch in sampler] == straight[7:9]
    assert [batch.prompts for batch in DataLoader(rows, batch_size=None, sampler=sampler, num_workers=1)] == straight[7:9]
    assert len({text for batch in straight for text in batch if text[0] == "5"}) > 1


def test_lines_of_a_text_file_are_captions(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one\r\n\n two \nthree\n")
    images = Images(str(tmp_path), size=8)
    assert images.texts([0]) == [["one", "two", "three"]] and images[[0]].prompts == ["one"]
    assert {images[Visit([0], 0, epoch)].prompts[0] for epoch in range(40)} == {"one", "two", "three"}


def test_cells_come_back_as_they_were() -> None:
    values = ["a", ["b", "c\udc80"], None, [], "", ["d"], [1, "e"], 5, '["f"]']
    cells = pickle.loads(pickle.dumps(Cells(values)))
    assert list(cells) == values and [cells[i] for i in (1, 8)] == [["b", "c\udc80"], '["f"]']
