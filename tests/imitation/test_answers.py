"""Kept answers: who is asked, what comes back, and when they are forgotten (METHODS 1.6)."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.imitation.answers import missing
from ddil_lightning.imitation.buffer import ReplayBuffer
from ddil_lightning.records import STUDENT, Context, LatentBatch, Rollout

NODES, ROWS = (999, 500), 3
STATES = len(NODES) * ROWS


class Network:
    """x_t t + w, or without guidance x_t t: a function of every row by itself. Remembers for how many rows it was asked."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, b: LatentBatch) -> Tensor:
        self.rows.append(len(b.t))
        shape = (-1, 1, 1, 1)
        return b.x_t * b.t.view(shape) / 1000 + (0 if b.c.w is None else b.c.w.view(shape))


def rollout(seed: int) -> Rollout:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(STATES, 2, 4, 4, generator=g)
    t, row = torch.tensor(NODES).repeat_interleave(ROWS), torch.arange(ROWS).repeat(len(NODES))
    c = Context(torch.zeros(ROWS, 1, 1), w=torch.rand(ROWS, generator=g))
    return Rollout(x, t, row, torch.full_like(t, STUDENT), torch.zeros_like(t), c)


def filled(chunks: int = 2, **settings: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(**{"capacity": 100} | settings)
    for k in range(chunks):
        buffer.add(rollout(k), clock=10 * k, stage=0)
    return buffer


def batch(buffer: ReplayBuffer, slots: list[int], guided: bool = True) -> LatentBatch:
    """Latents of the buffer by their slots; of a slot -1 one that is noise."""
    found = {}
    for chunk, rows, local in buffer._found(torch.tensor(slots)):
        for row, i in zip(rows.tolist(), local.tolist(), strict=True):
            s = chunk.states
            found[row] = s.x_t[i].float(), s.t[i], chunk.c.w[s.row[i]]  # type: ignore[index]
    g = torch.Generator().manual_seed(9)
    drawn = [found.get(i, (torch.randn(2, 4, 4, generator=g), torch.tensor(250), torch.tensor(0.5))) for i in range(len(slots))]
    x, t, w = (torch.stack(column) for column in zip(*drawn, strict=True))
    c = Context(torch.zeros(len(t), 1, 1), w=w if guided else None)
    return LatentBatch(x, t, t - 1, torch.zeros_like(t), c, None, torch.full_like(t, STUDENT), torch.ones(len(t)), torch.tensor(slots))


def test_what_is_known_is_not_asked_for_again() -> None:
    buffer, network = filled(), Network()
    for slots, rows in (([-1, 3, 7], 3), ([7, -1, 0, 3, -1], 3), ([3, 7, 0], 0), ([11, 3], 1)):
        b, before = batch(buffer, slots), sum(network.rows)
        assert torch.equal(buffer.answers.of(b, b.slot, network), Network()(b))
        assert sum(network.rows) - before == rows
    assert 0 not in network.rows  # and never for nothing


def test_a_state_that_is_drawn_twice_is_asked_for_once() -> None:
    buffer, network = filled(), Network()
    b = batch(buffer, [5, -1, 5, -1, 2, 5])
    assert torch.equal(buffer.answers.of(b, b.slot, network), Network()(b)) and network.rows == [4]


def test_where_every_answer_is() -> None:
    asked, place = missing(torch.tensor([-1, 4, 9, 4, -1, 9, 8]), torch.tensor([False, False, True, False, False, True, False]))
    assert asked.tolist() == [0, 1, 4, 6] and place.tolist() == [0, 1, 4, 1, 2, 5, 3]


def test_a_guided_answer_is_another_one() -> None:
    buffer, network = filled(), Network()
    for guided, rows in ((True, 2), (False, 2), (True, 0), (False, 0)):
        b, before = batch(buffer, [1, 8], guided), sum(network.rows)
        assert torch.equal(buffer.answers.of(b, b.slot, network), Network()(b)) and sum(network.rows) - before == rows


def test_an_answer_of_several_parts() -> None:
    buffer, network = filled(), Network()

    def both(b: LatentBatch) -> tuple[Tensor, Tensor]:
        return network(b), b.t * 2

    for slots in ([2, -1, 4], [4, 2], [4, 2, 9]):
        b = batch(buffer, slots)
        x, twice = buffer.answers.of(b, b.slot, both)
        assert torch.equal(x, Network()(b)) and torch.equal(twice, b.t * 2) and twice.dtype == torch.long
    assert network.rows == [3, 1]


@pytest.mark.parametrize("end", ["flush", "stage", "age", "eviction"])
def test_an_answer_goes_with_its_state(end: str) -> None:
    buffer, network = filled(capacity=2 * STATES), Network()
    old = batch(buffer, [0, 1])
    buffer.answers.of(old, old.slot, network)
    if end == "flush":
        buffer.flush()
    elif end == "eviction":
        buffer.add(rollout(2), clock=20, stage=0)
    else:
        buffer.expire(*((10, 1) if end == "stage" else (10 + buffer.max_age, 0)))
    buffer.answers.of(old, old.slot, network)
    assert network.rows == [2, 2]
    buffer.answers.of(old, old.slot, network)  # nor is anything kept for a slot that is gone
    assert network.rows == [2, 2, 2]


def test_half_precision_and_none() -> None:
    for storage, rows in (("float16", [3]), ("none", [3, 3])):
        buffer, network = filled(answers=storage), Network()
        b = batch(buffer, [0, 5, 9])
        first, again = (buffer.answers.of(b, b.slot, network) for _ in range(2))
        assert torch.equal(first, Network()(b)) and network.rows == rows and again.dtype == torch.float32
        torch.testing.assert_close(again, first, rtol=2**-11, atol=2**-25)
        assert torch.equal(again, first.half().float()) == (storage == "float16")
    with pytest.raises(ValueError, match=r"buffer.answers is 'int8': give one of float32, float16, none"):
        filled(answers="int8")


def test_they_are_saved_with_the_buffer() -> None:
    buffer, network = filled(), Network()
    b = batch(buffer, [0, 5, 9])
    buffer.answers.of(b, b.slot, network)
    file = io.BytesIO()
    torch.save(state := buffer.state_dict(), file)
    file.seek(0)
    again = filled(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.answers.of(b, b.slot, network), Network()(b)) and network.rows == [3]
    buffer.answers.of(more := batch(buffer, [0, 1, 9, 10]), more.slot, network)  # what was saved does not change any more
    late = filled(0)
    late.load_state_dict(state)
    late.answers.of(more, more.slot, network)
    assert network.rows == [3, 2, 2]


@pytest.mark.parametrize("change", ["storage", "older"])
def test_answers_kept_otherwise_are_asked_for_again(change: str) -> None:
    buffer, network = filled(), Network()
    b = batch(buffer, [0, 5])
    buffer.answers.of(b, b.slot, network)
    state = buffer.state_dict()
    if change == "older":  # a checkpoint of before
        del state["answers"]
        for chunk in state["chunks"]:
            chunk.pop("answers", None)
    other = filled(0, answers="float16" if change == "storage" else "float32")
    other.load_state_dict(state)
    other.answers.of(b, b.slot, network)
    assert network.rows == [2, 2] and len(other) == 2 * STATES


def test_another_question_forgets_what_was_answered_to_the_first() -> None:
    """A run that goes on with another pipeline, box or grid: its states are as good as before, and what was said of them is not."""
    buffer, network = filled(), Network()
    b = batch(buffer, [0, 5, 9])
    buffer.answers.of(b, b.slot, network, question=lambda: "box 1")
    rows = []
    for question in ("box 1", "box 2"):
        again = filled(0)
        again.load_state_dict(buffer.state_dict())
        for _ in range(2):
            assert torch.equal(again.answers.of(b, b.slot, network, question=lambda asked=question: asked), Network()(b))  # type: ignore[misc]
        rows.append(len(network.rows))
    assert rows == [1, 2] and again.state_dict()["question"] == "box 2"


def test_the_question_is_not_read_where_nothing_can_be_known_or_kept() -> None:
    """Reading it takes every weight of the teacher; a batch of data alone has no state of the buffer."""
    buffer = filled()
    b, asked, network = batch(buffer, [-1, -1]), [], Network()
    buffer.answers.of(b, b.slot, network, question=lambda: asked.append("data") or "")  # type: ignore[func-returns-value]
    b = batch(buffer, [-1, 0])
    buffer.answers.of(b, b.slot, network, question=lambda: asked.append("state") or "")  # type: ignore[func-returns-value]
    assert asked == ["state"]


def test_several_processes_ask_together() -> None:
    """A sharded network waits for all of them: a process that knows every answer asks for one row."""
    buffer, network = filled(), Network()
    b = batch(buffer, [0, 5, 9])
    for _ in range(2):
        assert torch.equal(buffer.answers.of(b, b.slot, network, alone=False), Network()(b))
    assert network.rows == [3, 1]
