"""Captions and images after the frozen encoders, and the cache file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.data import cachefile, encoded
from ddil_lightning.data.cachefile import cached
from ddil_lightning.data.captions import Captions, RawBatch
from ddil_lightning.data.encoded import Encoded, encode, encode_batch
from ddil_lightning.data.notices import Notices
from ddil_lightning.data.preparation import latent_box, prepared, second_moment
from ddil_lightning.data.visits import spread
from ddil_lightning.errors import one_line
from ddil_lightning.files import replacing
from ddil_lightning.processes import Elsewhere, Processes
from ddil_lightning.records import CaptionBatch, Context
from pair import Pair, together


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Pipeline:
    return Pipeline(str(tiny))


class Few(Captions):
    """Six pictures in memory; `images=False`: their captions alone."""

    def __init__(self, images: bool = True) -> None:
        noise = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self._pixels = noise if images else None

    def __len__(self) -> int:
        return 6

    def prompts(self, index: Any) -> list[str]:
        return [f"a {('red', 'blue')[i % 2]} {('circle', 'square', 'digit')[i % 3]}" for i in index]

    def pixels(self, index: Any) -> torch.Tensor | None:
        return None if self._pixels is None else self._pixels[list(index)]


def test_encoding_at_once_is_encoding_batch_by_batch(backbone: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Few()
    monkeypatch.setattr(encoded, "CHUNK", 4)  # an uneven last chunk
    whole = encode(few, backbone)
    assert len(whole) == 6 and whole.latents is not None
    rows = [5, 0, 3]
    batch, direct = whole[rows], encode_batch(few[rows], backbone)
    assert batch.latent is not None and direct.latent is not None
    torch.testing.assert_close(batch.latent, direct.latent, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.c.text, direct.c.text, rtol=0, atol=1e-5)
    assert batch.rows.tolist() == direct.rows.tolist() == rows


class Equal(Few):
    """Three captions, each of two pictures, whose own sizes may differ."""

    def __init__(self, sizes: list[list[int]] | None = None) -> None:
        super().__init__()
        self._sizes = None if sizes is None else torch.tensor(sizes)

    def prompts(self, index: Any) -> list[str]:
        return [f"a {('red', 'blue', 'small')[i % 3]} circle" for i in index]

    def _raw_batch(self, rows: Any) -> RawBatch:
        raw = super()._raw_batch(rows)
        return raw if self._sizes is None else raw._replace(sizes=self._sizes[list(rows)])


@pytest.mark.parametrize("own", [False, True])
def test_equal_captions_are_encoded_once_unless_a_network_may_be_told_them_with_another_size(
    own: bool, backbone: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = [16, 16, 0, 0, 16, 16], [32, 16, 0, 0, 16, 16]
    few = Equal([here, here, here, here, here, other] if own else None)
    direct = [encode_batch(few[[i]], backbone).c.text[0] for i in range(6)]
    asked: list[list[str]] = []
    text = backbone.encode_text
    monkeypatch.setattr(backbone, "encode_text", lambda p, *args, **kwargs: asked.append(list(p)) or text(p, *args, **kwargs))
    monkeypatch.setattr(encoded, "CHUNK", 4)
    whole = encode(few, backbone)
    once = few.prompts([0, 1, 2])
    assert asked == [once, [once[2]]] if own else asked == [once]
    batch = whole[[5, 0, 3, 1]]
    for got, row in zip(batch.c.text, (5, 0, 3, 1), strict=True):
        torch.testing.assert_close(got, direct[row], rtol=0, atol=1e-5)
    asked.clear()
    torch.testing.assert_close(encode_batch(few[[3, 0, 4]], backbone).c.text, whole[[3, 0, 4]].c.text, rtol=0, atol=1e-5)
    assert asked == [once[:2]]


def test_captions_alone_have_no_latents(backbone: Pipeline) -> None:
    whole = encode(Few(images=False), backbone)
    assert whole.latents is None and whole[[1, 2]].latent is None
    assert encode_batch(Few(images=False)[[0]], backbone).latent is None


def written(path: Path, captions: Captions, backbone: Pipeline, truncate: bool = False, notices: Notices | None = None) -> Encoded:
    return cached(path, captions, backbone, truncate, 0, notices or Notices(), Processes())


def test_several_machines_do_not_write_one_file(backbone: Pipeline, tmp_path: Path) -> None:
    """Each writes back whole pages of what it has mapped. What is there already is read by all."""
    path = tmp_path / "cache.safetensors"
    with pytest.raises(ValueError, match="is not there, and several machines cannot write one file: encode by ddil-cache first"):
        cached(path, Few(True), backbone, False, 0, Notices(), Processes(nodes=2))
    assert not path.exists() and len(written(path, Few(True), backbone)) == 6
    assert len(cached(path, Few(True), backbone, False, 0, Notices(), Processes(nodes=2))) == 6


def refused_by_two(rank: int, tiny: str, path: str, late: bool) -> str:
    """What ends both processes where the first cannot begin, or not end, the file of both."""

    @contextmanager
    def refusing(path: Path, durable: bool = False) -> Iterator[Path]:
        if late:
            with replacing(path) as temporary:
                yield temporary
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cachefile, "replacing", refusing)
        try:
            cached(Path(path), Few(True), Pipeline(tiny), False, 0, Notices(), together(rank))
        except (Elsewhere, OSError) as error:
            return one_line(error)
    return ""


@pytest.mark.parametrize("late", [False, True])
def test_a_file_that_the_first_cannot_write_ends_all(late: bool, pair: Pair, tiny: Path, tmp_path: Path) -> None:
    """The others waited for days."""
    assert pair.run(refused_by_two, str(tiny), str(tmp_path / "cache"), late, timeout=60) == ["Read-only file system"] * 2


@pytest.mark.parametrize("images", [True, False])
def test_a_cache_file_holds_half_precision_and_is_mapped(images: bool, backbone: Pipeline, tmp_path: Path) -> None:
    path, few = tmp_path / "deep" / "cache.safetensors", Few(images)
    first, again, whole = written(path, few, backbone), written(path, few, backbone), encode(few, backbone)
    assert [p.name for p in path.parent.iterdir()] == [path.name] and len(first) == len(again) == 6
    for rows in ([4, 1], [0, 5, 5]):
        batch, other, exact = first[rows], again[rows], whole[rows]
        assert other.c.mask is other.c.w is None and batch.rows.tolist() == rows
        assert torch.equal(batch.c.text, other.c.text) and torch.equal(batch.c.text, exact.c.text.half().float())
        assert (batch.latent is None) == (not images)
        if batch.latent is not None and other.latent is not None and exact.latent is not None:
            assert torch.equal(batch.latent, other.latent) and torch.equal(batch.latent, exact.latent.half().float())
    assert again.c.text.dtype == torch.float16 and again[[0]].c.text.dtype == torch.float32
    if Path("/proc/self/maps").is_file():
        assert path.name in Path("/proc/self/maps").read_text()


def test_a_file_of_ours_is_a_safetensors_file(backbone: Pipeline, tmp_path: Path) -> None:
    """Whoever reads it with the library finds the same numbers, aligned; sizes of SDXL and masks keep their type."""
    c = Context(torch.randn(6, 5, 3), torch.ones(6, 5, dtype=torch.int64), torch.randn(6, 7), torch.full((6, 6), 4096.0 + 1))
    batch = CaptionBatch(torch.randn(6, 4, 3, 3), c, torch.arange(6))
    values = cachefile.columns_of(batch)
    cachefile._empty(tmp_path / "x", {name: (value, 6) for name, value in values.items()}, {"rows": "6"})
    for name, column in cachefile._mapped(tmp_path / "x").items():
        column[:] = values[name].numpy()
        column.flush()
    found = load_file(tmp_path / "x")
    assert found.keys() == values.keys() == {"latents", "text", "mask", "pooled", "ids"}
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in values.items())
    assert found["ids"].dtype == torch.float32 and found["mask"].dtype == torch.int64


@pytest.mark.parametrize("change", ["first caption", "middle caption", "last picture", "order", "fewer", "none"])
def test_a_cache_of_other_rows_is_refused_whichever_row_it_is(change: str, backbone: Pipeline, tmp_path: Path) -> None:
    path, few = tmp_path / "cache", Few()
    written(path, few, backbone)

    class Other(Few):
        def __len__(self) -> int:
            return 5 if change == "fewer" else 6

        def prompts(self, index: Any) -> list[str]:
            order = [5 - i for i in index] if change == "order" else index
            row = {"first caption": 0, "middle caption": 3}.get(change)
            return ["a digit" if i == row else text for i, text in zip(index, super().prompts(order), strict=True)]

        def pixels(self, index: Any) -> torch.Tensor | None:
            found = super().pixels(index)
            assert found is not None
            if change == "last picture" and 5 in index:
                found[list(index).index(5), 0, 3, 3] += 1e-3
            return found

    if change == "none":
        written(path, Other(), backbone)
        return
    with pytest.raises(ValueError, match=f"the cache {path} was made from other captions or other pictures: delete it"):
        written(path, Other(), backbone)


def test_a_cache_of_other_encoders_is_refused(backbone: Pipeline, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    written(path, Few(), backbone)
    other = Pipeline(str(tiny))
    assert other.encoders() == backbone.encoders()
    with torch.no_grad():
        other.pipe.vae.encoder.conv_in.bias[0] += 1e-6
    half = Pipeline(str(tiny), torch.bfloat16)
    for made in (other, half):
        with pytest.raises(
            ValueError, match=f"the cache {path} was made by another pipeline's encoders, or in another precision of theirs"
        ):
            written(path, Few(), made)


def test_pictures_that_were_copied_are_the_same_pictures(backbone: Pipeline, tmp_path: Path) -> None:
    """Their times are other ones, and their contents decide; as long as nothing is touched, no picture is read for it."""
    from PIL import Image

    from ddil_lightning.data.captions import Images

    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red circle")
    path = tmp_path / "cache"
    written(path, Images(str(folder), size=16), backbone)
    untouched = Images(str(folder), size=16)
    untouched.content = lambda: pytest.fail("read")  # type: ignore[method-assign,assignment,return-value]
    written(path, untouched, backbone)
    os.utime(folder / "1.png", (1, 1))
    written(path, Images(str(folder), size=16), backbone)
    Image.new("RGB", (16, 16), (9, 9, 9)).save(folder / "1.png")
    with pytest.raises(ValueError, match="other captions or other pictures"):
        written(path, Images(str(folder), size=16), backbone)


def test_a_full_disk_is_known_before_anything_is_encoded(backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole file takes its room first; here files may not grow, as on a full disk."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(cachefile, "raw_batches", lambda *args: pytest.fail("encoded"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError) as error:
            written(tmp_path / "cache", Few(), backbone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "cache")) and list(tmp_path.iterdir()) == []


def test_a_damaged_cache_says_so(backbone: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    written(path, Few(), backbone)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"the cache {path} is damaged or none of ours .*: delete it, or give another data.cache"):
        written(path, Few(), backbone)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="does not say what it was made from"):
        written(path, Few(), backbone)
    with pytest.raises(ValueError, match="damaged or none of ours"):
        Encoded.load(path)


def test_values_that_half_precision_cannot_hold_are_refused(backbone: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "encode_text", lambda prompts, truncate, sizes: Context(torch.full((len(prompts), 2, 3), 1e5)))
    with pytest.raises(ValueError, match="the text of rows 0 to 5 are too large for half precision: set data.cache to true"):
        written(tmp_path / "cache", Few(), backbone)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_loaded_so_many_pixels_at_a_time(backbone: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watched(Few):
        def pixels(self, index: Any) -> torch.Tensor | None:
            sizes.append(len(index))
            return super().pixels(index)

    whole = encode(Few(), backbone)
    monkeypatch.setattr(encoded, "LOADED", 2 * 16 * 16)
    few = encode(Watched(), backbone)
    assert sizes == [1, 2, 2, 2]  # the first to see how large they are
    torch.testing.assert_close(few.latents, whole.latents, rtol=0, atol=1e-5)
    again = encode(Few(), backbone, workers=2)
    assert torch.equal(again.latents, few.latents) and torch.equal(again.c.text, few.c.text)  # type: ignore[arg-type]


def test_rows_that_are_skipped_or_enlarged_are_told_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    notices = Notices()
    raw = RawBatch(None, ["a"] * 4, torch.arange(4), enlarged=1, skipped=("row 2 cannot be read",), gone=(2,))
    for _ in range(3):  # three epochs of one batch
        notices.hear(raw, 4)
    notices.close()
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(";")[0] for line in said] == [
        "row 2 cannot be read", "some pictures are smaller than data.captions.size and are enlarged, which blurs them",
        "1 rows of the data could not be read and were skipped", "1 of 4 pictures were smaller than data.captions.size and were enlarged",
    ]  # fmt: skip


def test_long_captions_are_refused_or_cut(backbone: Pipeline) -> None:
    class Long(Few):
        def prompts(self, index: Any) -> list[str]:
            return ["blue " * 30 for _ in index]

    with pytest.raises(ValueError, match="has 32 tokens and the text encoder reads 16"):
        encode(Long(), backbone)
    assert len(encode(Long(), backbone, truncate=True)) == 6


def test_data_that_are_encoded_are_not_replaced_by_a_cache(backbone: Pipeline, tmp_path: Path) -> None:
    """A file that lay there took the place of data that had nothing to do with it; the rows of that very file are at home there."""
    path, own = tmp_path / "cache", encode(Few(), backbone)
    assert written(path, own, backbone) is own and not path.exists()
    mapped = written(path, Few(), backbone)
    assert written(path, mapped, backbone) is mapped  # a second fit
    with pytest.raises(ValueError, match=f"^the data are encoded already, and the cache {path} would take their place: .*$"):
        written(path, own, backbone)


def test_a_cache_of_prompts_that_may_be_cut_is_refused_where_they_are_not_cut(backbone: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    written(path, Few(), backbone, truncate=True)
    written(path, Few(), backbone, truncate=True)
    with pytest.raises(ValueError, match=f"^the cache {path} was made with data.truncate, .*: set data.truncate, or delete it.*$"):
        written(path, Few(), backbone)
    written(tmp_path / "whole", Few(), backbone)
    written(tmp_path / "whole", Few(), backbone, truncate=True)  # no prompt in it was too long


def test_rows_that_were_skipped_stay_known(backbone: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Holes(Few):
        def pixels(self, index: Any) -> torch.Tensor | None:
            gone = [i for i in index if i in (2, 5)]
            if gone:
                raise ValueError(f"row {gone[0]} is gone")
            return super().pixels(index)

    path, holes = tmp_path / "cache", Holes()
    holes.on_error = "skip"
    for _ in range(2):  # made, then mapped
        notices = Notices()
        written(path, holes, backbone, notices=notices)
        notices.close()
        assert notices.count == 2
    told = [record.getMessage() for record in caplog.records]
    assert told.count("2 rows of the data could not be read and were skipped") == 2
    mended = Few()
    mended.content = holes.content  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"^the cache {path} was made with 2 rows skipped: set data.on_error to skip, or delete it.*$"):
        written(path, mended, backbone)


@pytest.mark.parametrize("key", ["content", "truncate", "skipped"])
def test_a_cache_that_does_not_say_what_it_is_is_refused(key: str, backbone: Pipeline, tmp_path: Path) -> None:
    """As those of older versions do not; one whose rows were never counted is not whole."""
    from safetensors import safe_open

    path = tmp_path / "cache"
    written(path, Few(), backbone)
    with safe_open(path, "pt") as file:
        known = file.metadata()
    assert known["skipped"] == "0000000000"
    rest = {name: value for name, value in known.items() if name != key}
    for metadata in (rest, {**known, "skipped": cachefile.UNKNOWN}):
        save_file(load_file(path), path, metadata)
        with pytest.raises(ValueError, match=f"the cache {path} does not say what it was made from"):
            written(path, Few(), backbone)


class Many(Captions):
    """Two million captions, of which none is there: what reads one has begun to encode."""

    def __len__(self) -> int:
        return 2 * 10**6

    def prompts(self, index: Any) -> list[str]:
        raise ValueError("enough")


@pytest.mark.parametrize(
    ("world", "rank", "shape", "told"), [(8, 0, (4, 32, 32), 1), (1, 0, (4, 32, 32), 0), (8, 1, (4, 32, 32), 0), (8, 0, (4, 2, 2), 0)]
)
def test_copies_of_large_data_in_every_process_are_told(
    world: int, rank: int, shape: Any, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    """2,000,000 rows of 4 (4096 + 100) bytes are 31.3 GiB in each of them; of small data and by one process nothing is said."""
    null = Context(torch.zeros(1, 10, 8), pooled=torch.zeros(1, 20))
    backbone: Any = SimpleNamespace(latent_shape=shape, null=lambda: null, path="p", size=None)
    us = Processes(SimpleNamespace(global_rank=rank, world_size=world, strategy=None))
    with pytest.raises(ValueError, match="enough"):
        prepared(Many(), backbone, True, False, 0, "stop", Notices(), us)
    lines = [record.getMessage() for record in caplog.records if "data.cache is true" in record.getMessage()]
    assert len(lines) == told and all("each of the 8 processes encodes all 2000000 rows and holds up to 31.3 GiB" in line for line in lines)


# What is found from a part of the rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(10, 3), (1000, 999), (7, 7), (5, 9), (10**7, 4)])
def test_some_rows_are_one_of_each_part(n: int, k: int) -> None:
    rows = spread(n, k)
    assert len(rows) == min(n, k) and rows.equal(rows.unique()) and rows.equal(spread(n, k))
    assert (rows * len(rows) // n - torch.arange(len(rows))).abs().max() <= 1


class Sources(Captions):
    """3000 latents in an order of their own: of the first fifth the contrast is low, as that of line drawings is."""

    def __init__(self, order: torch.Tensor) -> None:
        contrast = torch.where(torch.arange(3000) < 600, 0.1, 1.0)[order]
        noise = torch.randn(3000, 2, 2, 2, generator=torch.Generator().manual_seed(0))[order]
        self.latents = noise * contrast.view(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.latents)

    def prompts(self, index: Any) -> list[str]:
        return [""] * len(index)

    def pixels(self, index: Any) -> torch.Tensor:
        return self.latents[list(index)]


@pytest.mark.parametrize("encodes", [False, True])
def test_box_and_moment_are_those_of_all_sources(encodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of N(0, 1) in four fifths of the rows and a tenth of it in the first: the box is +-3.2, the mean square 0.8, in any order.

    They were taken from the first rows: a box of +-0.3 and a mean square of 0.01, to which every estimate of the teacher was clamped.
    """
    monkeypatch.setattr("ddil_lightning.data.preparation.ENCODED", 512), monkeypatch.setattr("ddil_lightning.data.preparation.MOMENT", 512)
    backbone: Any = SimpleNamespace(encode_images=lambda images: images, device=torch.device("cpu"))
    mixed = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    alternating = torch.arange(3000).view(5, 600).T.flatten()  # every fifth row is of the first source
    for order in (torch.arange(3000), mixed, alternating):
        rows = Sources(order)
        data = rows if encodes else Encoded(rows.latents, Context(torch.zeros(3000, 1, 1)))
        (lo, hi), moment = latent_box(data, backbone, Processes()) or ([], []), second_moment(data)
        assert all(2.7 < side < 4 for side in (*hi, *(-x for x in lo)))
        assert moment is None if encodes else moment == pytest.approx(0.8, abs=0.06)
