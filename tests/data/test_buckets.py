"""Sizes of several shapes: which one a picture gets, what SDXL is told of it, and batches of one shape."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.source import Source
from ddil_lightning.data.base import Captions
from ddil_lightning.data.buckets import PART, UNREAD, Buckets, Sorting, nearest, sizes_of
from ddil_lightning.data.cachefile import cached
from ddil_lightning.data.captions import Images
from ddil_lightning.data.encoded import Encoded, Table, encode
from ddil_lightning.data.notices import Notices
from ddil_lightning.data.pictures import cut, fitted, picture_size, read_picture
from ddil_lightning.data.preparation import check_latents, check_sizes, latent_box
from ddil_lightning.data.sampler import CounterSampler
from ddil_lightning.data.sorting import sort_by_size
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.processes import Processes
from ddil_lightning.records import FORWARD, Context, take
from toys import HALF, Toy, equal, first, module

WIDE, SQUARE, HIGH = (16, 24), (16, 16), (24, 16)
SIZES = [SQUARE, WIDE, HIGH]


# Sizes ----------------------------------------------------------------------------------------------------------------------------


def test_buckets_keep_to_area_step_and_aspect() -> None:
    assert Buckets(16, 4, 1).sizes() == (SQUARE,) and Buckets(16, 4).sizes() == ((12, 20), (16, 16), (20, 12))
    sizes = Buckets().sizes()
    known = {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344), (704, 1408)}  # of SDXL's table, from the paper's appendix I
    assert known <= set(sizes) and {(w, h) for h, w in sizes} == set(sizes) and len(sizes) == len(set(sizes))
    assert all(h % 64 == w % 64 == 0 and h * w <= 2**20 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert all((h + 64) * w > 2**20 or (w + 64) * h > 2**20 for h, w in sizes)  # none could be longer on both sides


@pytest.mark.parametrize(
    ("size", "expected"),
    [(16, ((16, 16),)), ((16, 24), (WIDE,)), ([16, 24], (WIDE,)), ([[16, 24], [16, 16]], (WIDE, SQUARE)), (Buckets(16, 4, 1), (SQUARE,))],
)
def test_a_size_is_said_in_four_ways(size: Any, expected: Any) -> None:
    assert sizes_of(size) == expected


@pytest.mark.parametrize("size", [0, [16], [16, 16, 16], [[16]], [], [16, -1], [[8, 20000]]])
def test_what_no_picture_can_be_given_is_one_line(size: Any) -> None:
    with pytest.raises(ValueError, match=r"^size( is)? .*: give .*$"):
        sizes_of(size)


@pytest.mark.parametrize("settings", [{"side": 0}, {"step": 0}, {"aspect": 0.5}, {"side": 32, "step": 64}])
def test_buckets_outside_their_range_are_one_line(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"^size\.(side|step|aspect) .*: give .*$"):
        Buckets(**settings)


def test_a_picture_gets_the_nearest_logarithm_of_its_aspect() -> None:
    """Between 2:3 and 1:1 the middle is at sqrt(2 / 3) = 0.816: a difference of aspects would put it at 0.833."""
    assert [nearest(picture, SIZES) for picture in ((324, 400), (330, 400), (400, 400), (400, 330), (400, 324), (1, 9))] == [
        1,
        0,
        0,
        0,
        2,
        1,
    ]
    assert nearest((100, 100), [(8, 8), (16, 16), (12, 12)]) == 1  # of one aspect the largest
    assert nearest((100, 100), [(8, 16), (16, 8)]) == 0


# Pictures -------------------------------------------------------------------------------------------------------------------------


def saved(folder: Path, pictures: list[tuple[int, int]], rotated: tuple[int, ...] = ()) -> Path:
    """Noise of [height, width]; those of `rotated` are stored on their side, with a word of it in EXIF."""
    folder.mkdir()
    for i, (height, width) in enumerate(pictures):
        pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        image, exif = Image.fromarray(pixels.numpy()), Image.Exif()
        if i in rotated:
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / f"{i:02d}.png", exif=exif)
        (folder / f"{i:02d}.txt").write_text("a red circle")
    return folder


def test_a_picture_covers_its_size_and_is_cut_at_the_centre() -> None:
    """Of 30 x 20 pixels 20 x 20 are the largest square, from line 5 on; resized to 16 x 16 that line is the fourth."""
    assert cut((30, 20), (16, 16)) == (5, 0, 20, 20) and cut((24, 36), WIDE) == (0, 0, 24, 36) and cut((20, 40), WIDE) == (0, 5, 20, 30)
    image = Image.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))
    assert fitted(image, (10, 10)).eq(1).all() and fitted(image, (10, 20))[:, :, 5:15].mean() > 0.95
    assert fitted(image, (10, 20)).shape == (3, 10, 20) and fitted(image, (20, 60)).shape == (3, 20, 60)


def test_sdxl_is_told_the_size_the_crop_and_the_target(tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "set", [(30, 20), (20, 30), (24, 40), (8, 8)], rotated=(0, 2)))
    batch = Images(folder, size=16)[range(4)]
    assert batch.sizes is not None and batch.enlarged == 1
    assert batch.sizes.tolist() == [[30, 20, 4, 0, 16, 16], [20, 30, 0, 4, 16, 16], [24, 40, 0, 5, 16, 16], [8, 8, 0, 0, 16, 16]]
    several = Images(folder, size=SIZES)
    assert [(g.rows.tolist(), g.name) for g in several.groups()] == [([3], "16 x 16"), ([1, 2], "16 x 24"), ([0], "24 x 16")]
    assert several[[2, 1]].sizes.tolist() == [[24, 40, 0, 1, 16, 24], [20, 30, 0, 0, 16, 24]]  # type: ignore[union-attr]
    assert several[[0]].pixels.shape == (1, 3, 24, 16)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^rows 0 to 1 are of 2 sizes, and a batch is of one: take rows of one of `groups`$"):
        several[[0, 1]]
    assert Images(folder, size=SIZES).stamp() != Images(folder, size=16).stamp() != Images(folder, size=WIDE).stamp()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_read_from_the_head_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    image = Image.new("RGB", (400, 30), "red")
    image.save(tmp_path / "turned", kind, exif=exif)
    image.save(tmp_path / "plain", kind)
    data = (tmp_path / "plain").read_bytes()
    monkeypatch.setattr(Image.core, "new", lambda *args: pytest.fail("decoded"))  # what a file is decoded into
    assert picture_size(tmp_path / "turned") == (400, 30) and picture_size(tmp_path / "plain") == picture_size(data) == (30, 400)
    for broken in (b"", b"no picture"):
        with pytest.raises(ValueError, match=r"^row 7: not a readable image \(.*\)$"):
            picture_size(broken, "row 7")


def test_an_orientation_in_xmp_turns_a_picture_and_its_size(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>')
    Image.new("RGB", (40, 20)).save(tmp_path / "x.png", pnginfo=info)
    image = read_picture(tmp_path / "x.png")
    assert picture_size(tmp_path / "x.png") == (image.height, image.width) == (40, 20)


def test_a_row_that_cannot_be_read_is_replaced_within_its_size(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", [(24, 40), (16, 16), (24, 40), (16, 16), (24, 40)])
    (folder / "00.png").write_bytes(b"no picture")  # not even a size: it goes with the next row
    torn = (folder / "02.png").read_bytes()
    (folder / "02.png").write_bytes(torn[: len(torn) // 2])
    with pytest.raises(ValueError, match="00.png: not a readable image"):
        Images(str(folder), size=SIZES).groups()
    images = Images(str(folder), size=SIZES)
    images.on_error = "skip"
    assert [g.rows.tolist() for g in images.groups()] == [[0, 1, 3], [2, 4]]
    batch = images[[2, 4]]
    assert batch.rows.tolist() == [4, 4] and batch.pixels is not None and batch.pixels.shape[2:] == WIDE and len(batch.skipped) == 1
    assert batch.sizes.tolist() == [[24, 40, 0, 1, 16, 24]] * 2 and images[[3, 0]].rows.tolist() == [3, 1]  # type: ignore[union-attr]


def test_what_cannot_be_read_after_the_last_that_can_goes_with_the_first() -> None:
    """It got the first of the sizes: where no picture was of that, a group of rows that nobody can read ended every start."""
    known = Sorting([(8, 24), (8, 8), (24, 8)])
    known.know(torch.tensor([UNREAD, 2, UNREAD, 1, UNREAD, UNREAD], dtype=torch.int16))
    assert [known.size([row]) for row in range(6)] == [(24, 8), (24, 8), (8, 8), (8, 8), (24, 8), (24, 8)]
    assert next(known.others(5, 6)) == 0
    known.know(torch.full((2,), UNREAD, dtype=torch.int16))
    assert known.size([0, 1]) == (8, 24)


def test_in_place_of_a_row_no_more_rows_are_looked_at_than_it_takes() -> None:
    """A batch with one broken row listed all rows of the data set for each of its own: a minute a batch of 10 million rows."""
    tried = []

    class Million(Captions):
        def __len__(self) -> int:
            return 10**12  # a list of these would end the test

        def prompts(self, index: Any) -> list[str]:
            tried.append(list(index))
            if set(index) & {7, 8, len(self) - 1}:
                raise ValueError("broken")
            return ["a"] * len(index)

    rows = Million()
    rows.on_error = "skip"
    assert rows[[6, 7, len(rows) - 1]].rows.tolist() == [6, 9, 0] and len(tried) == 1 + 1 + 3 + 2
    sorting = Sorting(SIZES)
    sorting.know((torch.arange(10**6) % 2).to(torch.int16))
    assert list(islice(sorting.others(10**6 - 3, 10**6), 3)) == [10**6 - 1, 1, 3] and list(sorting.others(10, 10**6))[-1] == 8
    assert len(list(sorting.others(10, 10**6))) == 10**6 // 2 - 1


# Batches of one shape --------------------------------------------------------------------------------------------------------------

GROUPS = [torch.arange(0, 20, 2), torch.tensor([1, 3, 5, 7, 9, 11, 13]), torch.tensor([15, 17, 19])]


def drawn(n: int, batch: int = 2, world: int = 1, rank: int = 0, done: int = 0, seed: int = 3) -> list[list[int]]:
    found: list[list[int]] = []
    sampler = CounterSampler(20, batch, seed, world, rank, lambda: done + len(found), GROUPS)
    while len(found) < n:
        found.extend(list(sampler))
    return found[:n]


def group_of(rows: list[int]) -> int:
    (number,) = {i for i, group in enumerate(GROUPS) for row in rows if row in group}
    return number


def test_a_batch_is_of_one_group_and_an_epoch_has_every_row_once() -> None:
    sampler = CounterSampler(20, 2, 3, 1, 0, lambda: 0, GROUPS)
    assert len(sampler) == 5 + 3 + 1 and sampler.left_out == []
    epochs = [drawn(9, done=9 * k) for k in range(3)]
    for epoch in epochs:
        rows = [row for batch in epoch for row in batch]
        assert len(rows) == len(set(rows)) == 18 and sorted(map(group_of, epoch)) == [0] * 5 + [1] * 3 + [2]
    assert len({tuple(map(group_of, epoch)) for epoch in epochs}) == 3  # the order of the groups is drawn too
    assert {tuple(sorted(row for batch in epoch for row in batch)) for epoch in epochs} != 1  # the remainder is not always the same
    assert all(drawn(27 - done, done=done) == drawn(27)[done:] for done in range(27))


def test_ranks_share_out_batches_of_the_same_group() -> None:
    a, b = (drawn(8, world=2, rank=rank) for rank in range(2))
    assert [x + y for x, y in zip(a, b, strict=True)] == drawn(8, batch=4)
    assert list(map(group_of, a)) == list(map(group_of, b)) and not any(set(x) & set(y) for x, y in zip(a, b, strict=True))


def test_groups_without_a_whole_batch_are_left_out() -> None:
    assert CounterSampler(20, 2, 0, 2, 0, lambda: 0, GROUPS).left_out == [2]
    with pytest.raises(ValueError, match=r"20 captions, fewer than one batch of 11 .*, in 3 shapes of pictures none of which has a whole"):
        CounterSampler(20, 11, 0, 1, 0, lambda: 0, GROUPS)


def test_one_group_is_drawn_as_ever() -> None:
    one, none = (list(CounterSampler(20, 3, 5, 2, 1, lambda: 4, groups)) for groups in ([torch.arange(20)], ()))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5 * 1_000_003 + 1)).tolist()
    assert one == none == [order[6 * i + 3 : 6 * i + 6] for i in range(1, 3)]


# Encoded --------------------------------------------------------------------------------------------------------------------------


def of_two_shapes(n: int = 20) -> Encoded:
    """Every third row is of 2 x 6 latents, the others of 4 x 4; a row's number is in its first text state."""
    g = torch.Generator().manual_seed(7)
    text = torch.randn(n, 3, 2, generator=g)
    text[:, 0, 0] = torch.arange(n)
    wide = torch.arange(n) % 3 == 1
    rows = [(~wide).nonzero()[:, 0], wide.nonzero()[:, 0]]
    shapes = [(2, 4, 4), (2, 2, 6)]
    return Encoded.of([Table(torch.randn(len(r), *s, generator=g), Context(text[r]), r) for r, s in zip(rows, shapes, strict=True)])


def test_rows_are_numbered_over_all_tables() -> None:
    data = of_two_shapes()
    assert len(data) == 20 and [g.rows.tolist()[:2] for g in data.groups()] == [[0, 2], [1, 4]]
    batch = data[[7, 1, 4]]
    assert (
        batch.latent is not None
        and batch.latent.shape == (3, 2, 2, 6)
        and batch.c.text[:, 0, 0].tolist() == batch.rows.tolist() == [7, 1, 4]
    )
    assert torch.equal(data[[5]].latent, data.tables[0].latents[[3]])  # type: ignore[arg-type, index]
    with pytest.raises(ValueError, match="rows of 2 shapes in one batch"):
        data[[0, 1]]
    assert [len(x) for x in data.some_latents(10)] == [7, 4]


def test_a_cache_file_has_a_table_a_shape(tiny: Path, tmp_path: Path) -> None:
    backbone, folder = Pipeline(str(tiny)), str(saved(tmp_path / "set", [(16, 16), (24, 40), (40, 24), (20, 20), (12, 20)]))
    whole, path = encode(Images(folder, size=SIZES), backbone), tmp_path / "cache"
    for made in (cached(path, Images(folder, size=SIZES), backbone, False, 0, Notices(), Processes()) for _ in range(2)):  # written, read
        assert [g.rows.tolist() for g in made.groups()] == [g.rows.tolist() for g in whole.groups()] == [[0, 3], [1, 4], [2]]
        for rows in ([0], [4, 1], [2]):
            a, b = made[rows], whole[rows]
            assert torch.equal(a.latent, b.latent.half().float()) and a.rows.tolist() == rows  # type: ignore[union-attr, arg-type]
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {f"{i}/{name}" for i in range(3) for name in ("latents", "text", "rows")}
    assert latent_box(made, backbone, Processes()) is not None
    exact = latent_box(whole, backbone, Processes())
    assert exact is not None
    flat = torch.cat([table.latents.transpose(0, 1).flatten(1) for table in whole.tables], 1)  # type: ignore[union-attr]
    assert all(lo <= x.median() <= hi for lo, x, hi in zip(exact[0], flat, exact[1], strict=True))
    torch.testing.assert_close(exact, latent_box(Images(folder, size=SIZES), backbone, Processes()), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="other captions or other pictures"):
        cached(path, Images(folder, size=[SQUARE, WIDE]), backbone, False, 0, Notices(), Processes())


def test_the_box_of_several_shapes_is_read_from_every_image() -> None:
    """Two shapes of N(0, 1) have the box of one shape: the quantiles of 0.05 %, -+3.2905, and 5 % of their distance in all around them.

    It was that of 4096 numbers, as of one image: its sides were off by up to 0.5.
    """
    latents, c = torch.randn(120, 4, 32, 64, generator=torch.Generator().manual_seed(0)), Context(torch.zeros(120, 1, 1))
    rows, high = torch.arange(120), latents[60:].reshape(60, 4, 64, 32)
    one = Encoded(latents, c)
    two = Encoded.of([Table(latents[:60], take(c, rows[:60]), rows[:60]), Table(high, take(c, rows[60:]), rows[60:])])
    backbone: Any = None  # which encoded data do not need
    box, boxes = latent_box(one, backbone, Processes()), latent_box(two, backbone, Processes())
    assert boxes == box and boxes is not None
    # 245,760 numbers a channel: the deviation of such a quantile is 0.025.
    torch.testing.assert_close(torch.tensor(boxes).abs(), torch.full((2, 4), 1.05 * 3.2905), rtol=0, atol=0.1)


# The DataModule -------------------------------------------------------------------------------------------------------------------


def test_batches_and_buffer_are_of_one_shape() -> None:
    """Roll-outs have the shape and the captions of their batch; the first batch of a shape is rolled out at once."""
    toy = Toy()
    made, calls, shapes = module(HALF, of_two_shapes(), toy, rollouts={"every": 50}, buffer={"capacity": 99}), [], []
    for b in islice((b for k in range(20) for b in first(1, made)), 20):
        real = b.real
        assert real is not None and b.x_t.shape == real.shape and b.source[:2].eq(FORWARD).all() and b.source[2:].ne(FORWARD).all()
        assert all((row % 3 == 1) == (real.shape[-1] == 6) for row in b.c.text[:, 0, 0].tolist())
        calls.append(toy.calls)
        shapes.append(tuple(real.shape[1:]))
    new = [i for i, shape in enumerate(shapes) if shape not in shapes[:i]]
    assert len(new) == 2 and [i for i in range(20) if calls[i] != (calls[i - 1] if i else 0)] == new
    assert made.buffer is not None and made.buffer.shapes() == set(shapes)


@pytest.mark.parametrize("capacity", [99, 20])
def test_the_buffer_is_told_how_often_a_shape_comes(capacity: int, caplog: pytest.LogCaptureFixture) -> None:
    """Of 31 rows 21 are of one shape and 10 of the other: five batches of four and two; a roll-out has 16 states."""
    toy = Toy()
    toy.backbone = SimpleNamespace(**vars(toy.backbone), device=torch.device("cpu"), to=lambda device: None, path="p", size=None)
    toy.backbone.check_latents = lambda shape: None
    made = module(HALF, of_two_shapes(31), toy, buffer={"capacity": capacity})
    made.setup("fit")
    assert made.buffer is not None and made.buffer.shares == {(2, 4, 4): 5 / 7, (2, 2, 6): 2 / 7}
    first(9, made)
    said = [record.getMessage() for record in caplog.records if "data.buffer.capacity" in record.getMessage()]
    assert [line[:64] for line in said] == ["data.buffer.capacity 20 holds 1 roll-outs of 16 states, and the "] * (capacity == 20)


@pytest.mark.parametrize("buffer", [{"capacity": 20}, {"capacity": 99, "max_age": 2}])
def test_a_shape_that_the_buffer_has_lost_is_rolled_out_again(buffer: Any) -> None:
    """Evicted or too old: its batches were forward latents alone until by chance one of them met the cadence."""
    made = module(HALF, of_two_shapes(), Toy(), rollouts={"every": 5}, buffer=buffer)
    assert all(bool(b.source[2:].ne(FORWARD).all()) for b in first(60, made))


@pytest.mark.parametrize("kwargs", [{}, {"buffer": {"capacity": 0}}, {"buffer": {"priority": 0.6, "capacity": 40}}])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_resuming_with_several_shapes_repeats_every_bit(at: int, kwargs: Any) -> None:
    prior = SamplingPrior(0.4, 0.4, 0.2)
    straight, before, after = first(9, module(prior, of_two_shapes(), **kwargs)), module(prior, of_two_shapes(), **kwargs), None
    first(at, before)
    after = module(prior, of_two_shapes(), **kwargs)
    after.load_state_dict(before.state_dict())
    after.learner.stage_updates = at  # type: ignore[misc]
    assert equal(first(9 - at, after), straight[at:]) and len({b.x_t.shape for b in straight}) == 2


def test_ranks_are_at_the_same_shape() -> None:
    a, b = (first(8, module(HALF, of_two_shapes(), rank=r, world=2, batch_size=2)) for r in range(2))
    assert [x.x_t.shape for x in a] == [y.x_t.shape for y in b] and not any(
        torch.isclose(x.x_t, y.x_t).any() for x, y in zip(a, b, strict=True)
    )


def test_pictures_that_are_left_out_are_named_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    made = module(HALF, of_two_shapes(10), batch_size=4)  # three of one shape
    assert len(made.train_dataloader().sampler) == 1  # type: ignore[arg-type]
    assert "pictures are left out, too few of a size for a batch of 4: 3 of latents of 2 x 6" in caplog.text


def test_sizes_are_checked_before_anything_is_encoded(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone, folder = Pipeline(str(tiny)), str(saved(tmp_path / "set", [(16, 16), (24, 40)]))
    with pytest.raises(ValueError, match=r"^data\.captions\.size: .* multiples of 8 pixels, not of 17 x 30: the nearest is 16 x 32$"):
        check_sizes(Images(folder, size=[SQUARE, (17, 30)]), backbone)
    with pytest.raises(ValueError, match=r"^data\.captions\.size is 16 x 24, 24 x 16, and .* samples at 16 x 16: give that size too"):
        check_sizes(Images(folder, size=[WIDE, HIGH]), backbone)
    check_sizes(Images(folder, size=[WIDE, HIGH]), Pipeline(Source(str(tiny), size=WIDE)))
    images = Images(folder, size=[*SIZES, (8, 32)])
    with caplog.at_level(logging.WARNING):
        sort_by_size(images, Processes())
    assert "no picture is nearest in aspect to 24 x 16, 8 x 32 of data.captions.size" in caplog.text
    whole = encode(images, backbone)
    assert check_latents(whole, Pipeline(Source(str(tiny), size=WIDE)), False, lambda rows: whole[rows].latent)[0].tolist() == [1]


def test_heads_are_read_side_by_side_and_stay_in_order() -> None:
    """A million of them on a network were read one after the other at every start. What cannot be read ends all."""
    both, sizes = threading.Barrier(2), [(1024, 1024), (832, 1216)]

    def pictures(rows: Sequence[int]) -> list[tuple[int, int] | None]:
        both.wait(10)
        return [sizes[row % 3 == 0] for row in rows]

    groups = Sorting(sizes).groups(pictures, 4 * PART)
    assert groups[1].rows.tolist() == [*range(0, 4 * PART, 3)]

    def broken(rows: Sequence[int]) -> list[tuple[int, int] | None]:
        if rows[0] == PART:
            raise ValueError("row 64: not a readable image")
        return [sizes[0]] * len(rows)

    with pytest.raises(ValueError, match="row 64: not a readable image"):
        Sorting(sizes).groups(broken, 10**4 * PART)
