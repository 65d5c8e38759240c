"""Records: rows, concatenation, movement, and what guidance does to a context."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddil_lightning.records import (
    END,
    FORWARD,
    MIXED,
    SOURCES,
    STUDENT,
    TEACHER,
    CaptionBatch,
    Context,
    LatentBatch,
    Prediction,
    cat,
    take,
    to,
    wide,
    widest,
)


def context(n: int, first: float = 0.0) -> Context:
    return Context(first + torch.arange(n * 6.0).view(n, 2, 3), mask=torch.ones(n, 2, dtype=torch.bool), w=torch.arange(float(n)))


def latents(n: int) -> LatentBatch:
    t = torch.tensor([999, 749, 499, 249])[:n]
    tags = torch.full_like(t, FORWARD)
    return LatentBatch(torch.randn(n, 4, 2, 2), t, t - 250, torch.arange(n), context(n), None, tags, torch.ones(n), tags - 1)


def test_names_stand_where_their_tags_point():
    assert [SOURCES[tag] for tag in (FORWARD, STUDENT, TEACHER, MIXED)] == ["forward", "student", "teacher", "mixed"]
    assert torch.arange(3)[END] == 2  # END as an index reads the last row


@pytest.mark.parametrize("index", [slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([False, True, True, False])], ids=str)
def test_take_reaches_nested_records_and_leaves_none(index):
    b = latents(4)
    part = take(b, index)
    assert type(part) is LatentBatch and type(part.c) is Context
    assert torch.equal(part.x_t, b.x_t[1:3]) and torch.equal(part.c.text, b.c.text[1:3]) and torch.equal(part.c.w, torch.tensor([1.0, 2.0]))
    assert part.real is None and part.c.pooled is None


def test_cat_undoes_take():
    b = latents(4)
    whole = cat([take(b, slice(1)), take(b, slice(1, 4))])
    assert type(whole) is LatentBatch and type(whole.c) is Context and whole.real is None
    for a, e in zip((*whole._replace(c=None), *whole.c), (*b._replace(c=None), *b.c), strict=True):
        assert a is e is None or torch.equal(a, e)
    assert cat([b]) is b
    assert len(take(b, slice(0)).t) == 0


def test_to_converts_floats_only():
    """bf16(999) is 1000 and bf16(749) is 748: a time that passes through the float type arrives at another node."""
    b = latents(4)
    for moved in (to(b, torch.bfloat16), to(b, dtype=torch.bfloat16), to(b, "cpu", torch.bfloat16)):
        assert moved.x_t.dtype == moved.c.text.dtype == moved.c.w.dtype == torch.bfloat16
        assert torch.equal(moved.t, b.t) and moved.t.dtype == torch.long
        assert moved.c.mask.dtype == torch.bool and moved.real is None
    batch = CaptionBatch(None, context(2), torch.tensor([1_000_003, 257]))
    assert torch.equal(to(batch, torch.float16).rows, batch.rows)  # float16 ends at 65504


def test_to_moves_integers_to_the_device():
    moved = to(latents(2), "meta")
    assert {x.device.type for x in (moved.x_t, moved.t, moved.c.text, moved.c.mask)} == {"meta"}
    assert moved.x_t.dtype == torch.float32 and moved.t.dtype == torch.long


def test_records_survive_lightnings_collections():
    """Lightning moves batches with this function; it raises on frozen dataclasses."""
    from lightning_utilities.core.apply_func import apply_to_collection

    b = latents(3)
    moved = apply_to_collection(b, torch.Tensor, lambda x: x + 0)
    assert type(moved) is LatentBatch and type(moved.c) is Context
    assert torch.equal(moved.x_t, b.x_t) and torch.equal(moved.c.w, b.c.w) and moved.real is None


def test_guided_replaces_w_alone():
    c = context(3)
    assert torch.equal(c.guided(6.5).w, torch.full((3,), 6.5)) and torch.equal(c.guided(2).w, torch.full((3,), 2.0))
    w = torch.tensor([1.0, 2.0, 3.0])
    assert c.guided(w).w is w and c.guided(None).w is None and c.guided(w).text is c.text
    assert torch.equal(c.w, torch.arange(3.0))


def test_one_context_expands_to_a_batch():
    one = take(context(2, first=5.0), slice(1, 2))
    many = one.expand(4)
    assert many.text.shape == (4, 2, 3) and many.mask.shape == (4, 2) and many.w.shape == (4,) and many.pooled is None
    assert torch.equal(many.text, one.text.repeat(4, 1, 1))


def test_predictions_are_records_too():
    p = Prediction(*torch.randn(3, 5, 2))
    assert torch.equal(take(p, [4, 0]).v, p.v[[4, 0]]) and torch.equal(cat([p, p]).eps, torch.cat([p.eps, p.eps]))


@pytest.mark.parametrize(("device", "where"), [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_float64_is_not_asked_of_a_device_that_has_none(device: str, where: str) -> None:
    with FakeTensorMode():
        made = wide(torch.zeros(3, device=device))
    assert made.dtype == torch.float64 and made.device.type == where
    assert (widest(torch.device(device)) == torch.float64) is (device == where)
