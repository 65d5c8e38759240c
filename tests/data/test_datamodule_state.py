"""The DataModule over ranks, files and resumed runs, and how it encodes."""

from __future__ import annotations

import io
import logging
import logging.handlers
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.data.sampler import Parting, carried
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.processes import Processes
from ddil_lightning.records import FORWARD
from pair import Pair
from toys import FORWARD_ONLY, HALF, Toy, attach, data, equal, first, module

# Ranks and states -----------------------------------------------------------------------------------------------------------------


def test_ranks_agree_on_the_plan_and_differ_in_noise() -> None:
    runs = [first(8, module(SamplingPrior(0.4, 0.3, 0.3), rank=r, world=2, batch_size=5, buffer={"capacity": 0})) for r in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.source, b.source) and torch.equal(a.t[a.source != FORWARD], b.t[b.source != FORWARD])
        assert not torch.isclose(a.x_t, b.x_t).any() and not torch.equal(a.c.w, b.c.w)


@pytest.mark.parametrize(
    "kwargs", [{}, {"buffer": {"capacity": 0}}, {"buffer": {"priority": 0.6, "capacity": 40}}], ids=["buffer", "fresh", "priority"]
)
@pytest.mark.parametrize("at", [3, 5, 7])
def test_resuming_repeats_every_bit(at: int, kwargs: dict[str, Any]) -> None:
    """Batches 3 (inside an epoch), 5 (its end) and 7 on, from a state that went through a file."""
    prior = SamplingPrior(0.4, 0.4, 0.2)
    straight = first(10, module(prior, **kwargs))
    before = module(prior, **kwargs)
    first(at, before)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = module(prior, **kwargs)
    after.load_state_dict(torch.load(file, weights_only=True))
    after.learner.stage_updates = at  # type: ignore[misc]
    torch.manual_seed(at)  # the global generator plays no part
    assert equal(first(10 - at, after), straight[at:])


def test_workers_stay_from_epoch_to_epoch() -> None:
    """They are handed the rows of the next one, also where an epoch was cut short; nothing is read by processes of their own."""
    seen: list[list[list[int]]] = []
    for workers in (0, 2):
        made = module(FORWARD_ONLY, workers=workers)
        loader, pids, rows = made.train_dataloader(), [], []
        for batches in (5, 2, 5):  # of an epoch of five
            for batch in islice(loader, batches):
                rows.append(batch.rows.tolist())
                made.commit()
            pids.append([worker.pid for worker in getattr(loader._iterator, "_workers", [])])
        assert pids[0] == pids[1] == pids[2] and len(pids[0]) == workers
        seen.append(rows)
    assert seen[0] == seen[1] and len(seen[0]) == 5 + 2 + 3


def rows_of(ranks: list[DDILDataModule]) -> list[int]:
    """The rows that are left of the epoch, in the order of its batches on all ranks."""
    loaders = (made.train_dataloader() for made in ranks)
    return [row for batches in zip(*loaders, strict=True) for batch in batches for row in batch.rows.tolist()]


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (1, 2), (2, 2), (2, 4), (1, 6), (1, 3)])
def test_the_place_in_the_data_stays_with_other_batches(world: int, batch: int, caplog: pytest.LogCaptureFixture) -> None:
    """After three batches of 4 of 20 rows, 12 rows of the epoch's order are done, rounded down to a whole batch.

    The counter was taken for that of the new batches: with batches of 2 the run went back to row 6, in silence.
    """
    order = rows_of([module(FORWARD_ONLY)])
    before = module(FORWARD_ONLY)
    first(3, before)
    ranks = [module(FORWARD_ONLY, rank=rank, world=world, batch_size=batch) for rank in range(world)]
    for made in ranks:
        made.load_state_dict(before.state_dict())
    whole = world * batch
    assert rows_of(ranks) == order[12 // whole * whole : 20 // whole * whole] and all(made.streams.step == 3 for made in ranks)
    said = [record.getMessage() for record in caplog.records]
    among = "1 process" if world == 1 else "2 processes"
    line = (
        f"the run goes on with {among} with batches of {batch} in place of 1 process with batches of 4, {whole} rows a step in place of 4:"
    )
    assert [text[: len(line)] for text in said] == ([] if (world, batch) == (1, 4) else [line])
    # And on from there, by way of a second checkpoint.
    again = [module(FORWARD_ONLY, rank=rank, world=world, batch_size=batch) for rank in range(world)]
    done = [first(1, made) for made in ranks]
    for made in again:
        made.load_state_dict(ranks[0].state_dict() | {"buffers": [None] * world})
    assert rows_of(again) == rows_of(ranks) and len(done) == world


def test_where_batches_of_other_sizes_stand() -> None:
    """Epochs of 100 rows, of one shape or of 60 and 40; what is left over of an epoch belongs to it."""
    one, two = (100,), (60, 40)
    eight, ten, thirty, four = (lambda groups, shape=shape: Parting(*shape, groups) for shape in ((2, 4), (1, 10), (3, 10), (4, 2)))
    assert all(carried(66, eight(groups), four(groups)) == 66 for groups in (one, two))  # the same batches, in other processes
    assert carried(12 * 5 + 6, eight(one), ten(one)) == 10 * 5 + 4 and carried(10 * 5 + 4, ten(one), eight(one)) == 12 * 5 + 5
    assert carried(10 * 5 + 9, ten(one), thirty(one)) == 3 * 5 + 3  # 90 rows are all that an epoch of these has: the next begins
    assert carried(12 * 5 + 6, eight(two), ten(two)) == 10 * 5 + 4 and carried(10 * 5 + 9, ten(two), thirty(two)) == 3 * 5 + 3
    # Of twice as many rows as of half as many: in the same epoch, after the same share of it.
    assert carried(10 * 5 + 4, ten(one), ten((200,))) == 20 * 5 + 8 and carried(10 * 5 + 4, ten(one), ten((50,))) == 5 * 5 + 2
    assert carried(10 * 5 + 4, ten(one), ten(two)) == 10 * 5 + 4 and carried(10 * 5 + 4, ten(one), thirty((300, 300))) == 20 * 5 + 8


@pytest.mark.parametrize(("rows", "place"), [(20, 7), (40, 14), (12, 4)])
def test_data_of_another_length_are_told_and_the_epoch_is_kept(rows: int, place: int, caplog: pytest.LogCaptureFixture) -> None:
    """After seven batches of 4 of 20 rows two of five of the second epoch are done. The counter was taken for that of the present data: of
    40 rows the run went back to the first epoch, in silence."""
    before = module(FORWARD_ONLY)
    first(7, before)
    after = module(FORWARD_ONLY, data(rows))
    after.load_state_dict(before.state_dict())
    assert after._place() == place and after.streams.step == 7
    expected = module(FORWARD_ONLY, data(rows))
    expected.done = place
    assert rows_of([after]) == rows_of([expected])
    said = [record.getMessage() for record in caplog.records]
    line = (
        f"the data have {rows} rows, where the checkpoint had 20 rows: the run goes on in the same epoch, as far into it; in what is "
        "left of it some rows come a second time and others not at all, and every later epoch is whole"
    )
    assert said == ([] if rows == 20 else [line])
    old = before.state_dict()
    del old["rows"]  # a checkpoint of before
    expected.load_state_dict(old)
    assert expected._place() == 7


@pytest.mark.parametrize(("was", "now"), [(1, 2), (2, 1), (3, 2)])
def test_roll_outs_go_on_with_other_processes(was: int, now: int) -> None:
    """A process that has a buffer in the checkpoint has it again; a new one has none, and then all begin with an empty one: the network
    calls of the next batches are the same on all of them."""
    ranks = [module(rank=rank, world=was, rollouts={"every": 3}) for rank in range(was)]
    for made in ranks:
        first(1, made)
    state = ranks[0].state_dict() | {"buffers": [made.state_dict()["buffers"][0] for made in ranks]}
    calls = []
    for rank in range(now):
        other = module(rank=rank, world=now, rollouts={"every": 3})
        other.load_state_dict(state)
        other.learner.stage_updates = 1  # type: ignore[misc]
        assert other.buffer is not None and len(other.buffer) == (0 if now > was else 16)
        if now <= was:
            assert equal(other.buffer.state_dict()["chunks"][0]["states"]["x_t"], state["buffers"][rank]["chunks"][0]["states"]["x_t"])
        toy, seen = other.learner, []
        for _ in range(4):
            first(1, other)
            seen.append(toy.calls)  # type: ignore[attr-defined]
        calls.append(seen)
    assert all(seen == calls[0] for seen in calls) and (calls[0][0] > 0) == (now > was) and calls[0][-1] > calls[0][1]


def test_a_checkpoint_may_leave_the_roll_outs_out() -> None:
    """Then it holds no state, and a run that goes on rolls out with its next batch, of the same rows."""
    whole, before = (module(rollouts={"every": 9}, buffer={"saved": saved}) for saved in (True, False))
    straight = first(6, whole)
    assert equal(first(3, before), straight[:3])
    state = before.state_dict()
    assert state["buffers"] == [None] and whole.state_dict()["buffers"][0]["chunks"]
    toy = Toy()
    after = module(toy=toy, rollouts={"every": 9}, buffer={"saved": False})
    after.load_state_dict(state)
    toy.stage_updates = 3
    (batch,) = first(1, after)
    assert toy.calls > 0 and after.buffer is not None and len(after.buffer) == 16
    forward = batch.source == FORWARD
    assert 0 < int(forward.sum()) < 4 and torch.equal(batch.x_t[forward], straight[3].x_t[forward])


class Holes(Captions):
    """Eight rows of which the third and the sixth cannot be read."""

    on_error = "skip"

    def __len__(self) -> int:
        return 8

    def prompts(self, index: Any) -> list[str]:
        for row in set(index) & {2, 5}:
            raise ValueError(f"row {row} is broken")
        return [""] * len(index)


def skipped_by_two(rank: int) -> tuple[list[float], list[str]]:
    """What the curves say, of a run that goes on too, and what is told at its end, where each process comes by one of the rows."""
    counts, said = [], logging.handlers.BufferingHandler(99)
    logging.getLogger("ddil_lightning").addHandler(said)
    state: list[Any] = [None]
    for row in (2, 5), (2, 2), (0, 0):
        made = module(FORWARD_ONLY, Holes(), rank=rank, world=2, buffer={"capacity": 0})
        if state[0] is not None:
            made.load_state_dict(state[0])
        made.notices.hear(made.captions[[row[rank], 7]], 8)  # type: ignore[index]
        counts.append(made.statistics()["data/skipped"])
        state = [made.state_dict()]
        distributed.broadcast_object_list(state)  # a checkpoint has that of the first process
    made.teardown("fit")
    return counts, [record.getMessage() for record in said.buffer if "could not be read" in record.getMessage()]


def test_rows_that_any_process_skips_are_counted_once_and_for_good(pair: Pair) -> None:
    """Each process counted its own share, and from 0 whenever the run went on."""
    told = ["2 rows of the data could not be read and were skipped"]
    assert pair.run(skipped_by_two) == [([2, 2, 2], told), ([2, 2, 2], [])]


def test_processes_tell_each_other_of_a_skipped_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that went on sent all rows of before to all others, and sorted them at every row of its curves."""
    sent: list[set[int]] = []
    monkeypatch.setattr(Processes, "gathered", lambda self, mine: (sent.append(mine), [mine])[1])
    made = module(FORWARD_ONLY, Holes(), buffer={"capacity": 0})
    for rows in ([2, 7], [2, 5]):
        made.notices.hear(made.captions[rows], 8)  # type: ignore[index]
        made.statistics()
    kept = made.state_dict()
    assert sent == [{2}, {5}, set()] and kept["skipped"].tolist() == [2, 5]
    again = module(FORWARD_ONLY, Holes(), buffer={"capacity": 0})
    again.load_state_dict(kept)
    assert again.statistics()["data/skipped"] == 2 and sent[3:] == [set()] and again.notices.skipped == {2, 5}
    again.load_state_dict({**kept, "skipped": [2, 3]})
    assert again.statistics()["data/skipped"] == 3


def test_of_rows_of_other_data_no_more_than_their_number_is_kept() -> None:
    """Data that had gained a file numbered their rows anew: rows that can be read were taken for skipped ones, and those for none."""
    made = module(FORWARD_ONLY, Holes(), buffer={"capacity": 0})
    made.notices.hear(made.captions[[2, 5]], 8)  # type: ignore[index]
    kept = {**made.state_dict(), "rows": [11]}
    for _ in range(2):  # a run that goes on twice
        made = module(FORWARD_ONLY, Holes(), buffer={"capacity": 0})
        made.load_state_dict(kept)
        assert made.statistics()["data/skipped"] == 2 and made.notices.skipped == set()
        kept = made.state_dict()
    made.notices.hear(made.captions[[2, 7]], 8)  # type: ignore[index]
    assert made.statistics()["data/skipped"] == 3


def test_every_rank_gets_its_own_buffer_back() -> None:
    ranks = [module(rank=r, world=2) for r in range(2)]
    for made in ranks:
        first(1, made)
    state = ranks[0].state_dict() | {"buffers": [made.state_dict()["buffers"][0] for made in ranks]}
    other = module(rank=1, world=2)
    other.load_state_dict(state)
    assert other.buffer is not None and ranks[1].buffer is not None
    mine, theirs = (x.state_dict()["chunks"][0]["states"]["x_t"] for x in (other.buffer, ranks[1].buffer))
    assert torch.equal(mine, theirs)


def test_a_flush_forgets_the_rollouts_and_collects_at_once() -> None:
    toy = Toy()
    made = module(toy=toy, rollouts={"every": 100})
    first(2, made)
    made.flush()
    assert made.buffer is not None and len(made.buffer) == 0 and toy.calls == 3
    first(1, made)
    assert len(made.buffer) == 16 and toy.calls == 6


def test_only_training_batches_become_latents() -> None:
    made = attach(DDILDataModule(data(), HALF, batch_size=4), toy := Toy(), training=False)
    raw = next(iter(made.train_dataloader()))
    assert made.on_after_batch_transfer(raw, 0) is raw and toy.calls == 0


def test_without_a_trainer_the_way_out_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"Trainer\.fit\(method, datamodule\); outside it, call rollout\.draw"):
        _ = DDILDataModule(data()).learner


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rollouts": {"every": 0}}, "rollouts.every is 0"),
        ({"buffer": {"capacity": -1}}, "buffer.capacity is -1"),
    ],
)
def test_settings_outside_their_range_are_refused(kwargs: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: give a number of at least"):
        module(**kwargs)


# Encoding -------------------------------------------------------------------------------------------------------------------------


class Counted(Captions):
    """Twelve pictures in memory; counts how many were asked for."""

    asked = 0

    def __len__(self) -> int:
        return 12

    def prompts(self, index: Any) -> list[str]:
        return [f"a {('red', 'blue')[i % 2]} circle" for i in index]

    def pixels(self, index: Any) -> Tensor:
        self.asked += len(index)
        return torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))[list(index)] * 2 - 1


@pytest.fixture(scope="module")
def real(tiny: Path) -> Toy:
    """The toy with the encoders of the tiny pipeline."""
    toy = Toy()
    toy.backbone = Pipeline(str(tiny))
    return toy


def test_a_cache_file_is_written_once_and_then_read(real: Toy, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "set.safetensors"
    made, again = (attach(DDILDataModule(Counted(), cache=str(file), batch_size=4), real) for _ in range(2))
    made.setup("test")
    assert not file.exists() and isinstance(made.captions, Counted)
    counted = made.captions
    made.setup("fit")
    # A digest of all rows and all rows encoded, and the first row to see what the file must hold and how large pictures are.
    assert file.is_file() and counted.asked == 12 + 12 + 2 and made.examples(2) == ["a red circle", "a blue circle"]
    unread = again.captions
    again.setup("fit")
    assert isinstance(again.captions, Encoded) and isinstance(unread, Counted) and unread.asked == 12  # the digest: it has no stamp
    assert equal(again.captions[[3, 1]], made.captions[[3, 1]])
    assert made.box() == again.box() and made.box() is not None


def test_encoding_on_the_fly_gives_the_same_latents(real: Toy) -> None:
    runs = []
    for cache in (True, False):
        real.stage_updates = 0
        made = attach(DDILDataModule(Counted(), FORWARD_ONLY, batch_size=4, cache=cache), real)
        made.setup("fit")
        runs.append((first(2, made), made.box()))
    (cached, box), (fly, other) = runs
    for a, b in zip(cached, fly, strict=True):
        torch.testing.assert_close(a.x_t, b.x_t, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.c.text, b.c.text, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(box), torch.tensor(other), rtol=0, atol=1e-5)


def test_the_pipeline_names_the_data(monkeypatch: pytest.MonkeyPatch, real: Toy) -> None:
    asked: list[str] = []
    monkeypatch.setattr("ddil_lightning.data.preparation.builtin", lambda name: (asked.append(name), Counted())[1])
    made = attach(DDILDataModule(cache=False), real)
    made.setup("fit")
    assert asked == ["digits"] and isinstance(made.captions, Counted)


def test_encoding_happens_on_the_trainers_device(monkeypatch: pytest.MonkeyPatch, real: Toy) -> None:
    """Lightning moves the method after setup; the encoders go ahead, or a whole data set would be encoded on the CPU."""
    moved: list[torch.device] = []
    monkeypatch.setattr(Pipeline, "to", lambda self, device: (moved.append(device), self)[1])
    made = attach(DDILDataModule(Counted(), batch_size=4), real)
    made.trainer.strategy.root_device = torch.device("cuda", 1)  # type: ignore[union-attr,misc]
    made.setup("fit")
    assert moved == [torch.device("cuda", 1)]
