"""The DataModule: its position in the data, the cadence of roll-outs and the sources of a batch, against an exact toy method."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from ddil_lightning.data.captions import Captions
from ddil_lightning.data.datamodule import evaluating
from ddil_lightning.data.sampler import CounterSampler
from ddil_lightning.feed import Wants
from ddil_lightning.imitation.options import Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import forward
from ddil_lightning.records import FORWARD, STUDENT, TEACHER, Context, LatentBatch, Origin
from ddil_lightning.streams import Streams
from toys import FORWARD_ONLY, STUDENT_ONLY, Toy, batches, data, equal, first, module

# Position -------------------------------------------------------------------------------------------------------------------------


def rows(n: int, size: int = 20, batch: int = 3, seed: int = 5, world: int = 1, rank: int = 0, done: int = 0) -> list[list[int]]:
    """The next `n` lists of rows, epoch after epoch."""
    found: list[list[int]] = []
    sampler = CounterSampler(size, batch, seed, world, rank, lambda: done + len(found))
    while len(found) < n:
        found.extend(list(sampler))
    return found[:n]


def test_a_counter_resumes_exactly_anywhere() -> None:
    whole = rows(30)
    assert all(rows(30 - done, done=done) == whole[done:] for done in range(30))


def test_an_epoch_has_every_row_once_and_epochs_differ() -> None:
    epochs = [rows(6, done=6 * k) for k in range(3)]
    for epoch in epochs:
        flat = [i for batch in epoch for i in batch]
        assert len(flat) == 18 == len(set(flat)) and set(flat) <= set(range(20))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert rows(6) != rows(6, seed=6) and len(CounterSampler(20, 3, 0, 1, 0, lambda: 4)) == 6


def test_ranks_share_out_the_batches_of_one_process() -> None:
    ranks = [rows(10, batch=2, world=3, rank=r) for r in range(3)]
    together = [a + b + c for a, b, c in zip(*ranks, strict=True)]
    assert together == rows(10, batch=6)
    assert all(len(set(batch)) == 6 for batch in together)


def test_too_little_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"20 captions, fewer than one batch of 7 on 3 process\(es\): lower data\.batch_size"):
        CounterSampler(20, 7, 0, 3, 0, lambda: 0)
    with pytest.raises(ValueError, match="fewer than one batch of 32"):
        module(batch_size=32).train_dataloader()


def test_an_epoch_that_is_cut_short_goes_on_where_it_stopped() -> None:
    """A loader that outlives its epoch, as under Trainer(limit_train_batches=...), follows the counter of done batches."""
    made, whole = module(FORWARD_ONLY), [b.real for b in first(7, module(FORWARD_ONLY))]
    loader, seen = made.train_dataloader(), []
    for _ in range(3):
        for raw, _ in zip(loader, range(2), strict=False):
            seen.append(made.on_after_batch_transfer(raw, 0).real)
            made.commit()
    assert equal(seen[:4], whole[:4]) and equal(seen[4:], whole[4:5] + seen[5:]) and len(seen) == 5


# Sources --------------------------------------------------------------------------------------------------------------------------


def test_evaluating_gives_every_flag_back() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    net[1][0].eval()
    flags = [m.training for m in net.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluating(net):
        assert not any(m.training for m in net.modules())
        raise RuntimeError("inside")
    assert [m.training for m in net.modules()] == flags


def test_rollouts_come_at_their_cadence() -> None:
    toy = Toy()
    made, calls, sizes = module(toy=toy, rollouts={"every": 3}), [], []
    for _ in islice(batches(made), 8):
        calls.append(toy.calls)
        sizes.append(made.statistics()["buffer/size"])
    assert calls == [3, 3, 3, 6, 6, 6, 9, 9]  # three transitions between the four states of a roll-out
    assert sizes == [16, 16, 16, 32, 32, 32, 48, 48]


def test_the_clock_counts_updates_not_batches() -> None:
    toy = Toy()
    made = module(toy=toy, rollouts={"every": 1})
    for i, raw in zip(range(4), made.train_dataloader(), strict=False):
        made.on_after_batch_transfer(raw, 0)  # critic turns or micro-batches: the clock stands
        made.commit()
        assert toy.calls == 3 and made.done == i + 1


def test_fewer_trajectories_than_samples() -> None:
    made = module(rollouts={"trajectories": 2}, buffer={"capacity": 64})
    first(1, made)
    assert made.buffer is not None and len(made.buffer) == 8
    assert module(rollouts={"trajectories": 99}).trajectories == 4


def test_without_a_buffer_every_batch_is_rolled_out_afresh() -> None:
    toy = Toy()
    made = module(SamplingPrior(0.5, 0.25, 0.25, "trajectory"), toy=toy, buffer={"capacity": 0})
    found = first(12, made)
    assert made.buffer is None and "buffer/size" not in made.statistics()
    for b in found:
        assert b.source[:2].eq(FORWARD).all() and b.source[2:].ne(FORWARD).all()
        assert len(b.t[2:].unique()) == 1 and b.slot.eq(-1).all() and b.weight.eq(1).all()
        assert not b.x_t.requires_grad and b.real is not None
    assert {int(b.source[-1]) for b in found} == {STUDENT, TEACHER} and len({int(b.t[-1]) for b in found}) > 2


@pytest.mark.parametrize("reuse", [0.5, 2.0, 3.0])
def test_reuse_sets_the_cadence(reuse: float) -> None:
    """u N R / (q B) batches between two roll-outs: 4 nodes, 4 trajectories, half of 4 latents. Then the overhead is q c / (u C)."""
    toy = Toy()
    made, n = module(toy=toy, rollouts={"every": 10, "reuse": reuse}), 96
    drawn = sum(int(b.slot.ge(0).sum()) for b in first(n, made))
    assert drawn == n * 4 * 0.5 and made.buffer is not None
    assert drawn / made.buffer._next == pytest.approx(reuse)  # draws of each state that was ever stored
    assert toy.calls * 4 / (n * 4) == pytest.approx(0.5 * (3 / 4) / reuse)  # evaluations a sample: c = 3 / 4 for 4 nodes, the last is free
    made.prior = SamplingPrior(0.75, 0.25)  # the prior in force: half the draws, half the roll-outs
    before = toy.calls
    first(n, made)
    assert toy.calls - before == before / 2


def test_reuse_counts_batches_and_not_updates() -> None:
    """Micro-batches and the critic's turns draw states too."""
    made = module(toy=(toy := Toy()), rollouts={"every": 10, "reuse": 1.0})
    for raw in islice(made.train_dataloader(), 5):
        made.on_after_batch_transfer(raw, 0)
        made.commit()  # and no student update
    assert toy.calls == 3
    for _ in range(2):
        made.on_after_batch_transfer(raw, 0)
        made.commit()
    assert toy.calls == 3
    made.done = 8
    made.on_after_batch_transfer(raw, 0)
    assert toy.calls == 6


def test_reuse_and_cadence_are_one_setting() -> None:
    with pytest.raises(ValueError, match=r"rollouts.reuse = 2 and rollouts.every = 3 both set the cadence: give one of them"):
        Rollouts(every=3, reuse=2.0)
    with pytest.raises(ValueError, match=r"rollouts.reuse is 0.0: give a number above 0"):
        Rollouts(reuse=0.0)


@pytest.mark.parametrize("images", [True, False])
def test_a_small_buffer_gives_the_whole_share(images: bool) -> None:
    """Four states for a batch of five, and none of them older than an update: with replacement that is enough, from the first batch on."""
    made = module(STUDENT_ONLY, data(images=images), rollouts={"every": 2, "trajectories": 1}, buffer={"max_age": 1}, batch_size=5)
    for b in first(6, made):
        assert b.source.eq(STUDENT).all() and b.slot.ge(0).all()
        assert made.buffer is not None and len(made.buffer) == 4


@pytest.mark.parametrize("rollouts", [{"every": 50}, {"reuse": 40.0, "every": Rollouts.every}, {"every": 3}])
def test_no_state_is_drawn_that_is_older_than_allowed(rollouts: Any) -> None:
    """It was forgotten at the next roll-out alone, and until then drawn at any age."""
    made, ages = module(SamplingPrior(0.5, 0.5), rollouts=rollouts, buffer={"max_age": 4}), []
    for b in islice(batches(made), 20):
        assert made.buffer is not None and bool((b.source != FORWARD).any())
        ages.append(max(made.learner.stage_updates - 1 - chunk.clock for chunk in made.buffer._chunks))  # when they were drawn
    assert max(ages) == 4


def test_roll_outs_that_are_all_rejected_show(caplog: pytest.LogCaptureFixture) -> None:
    """A student whose states leave the band of the buffer: the run goes on with forward latents, and says that DDIL is off."""
    made = module(STUDENT_ONLY, toy=Toy(bias=1e4), rollouts={"every": 1})
    made._moment = 1e12
    assert all(b.source.eq(FORWARD).all() for b in first(2, made))
    stats = made.statistics()
    assert stats["buffer/rejected"] == 32 and stats["buffer/size"] == stats["buffer/share_student"] == 0
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("ddil_lightning")]
    assert said.startswith("all 16 states of a roll-out were rejected: ") and "\n" not in said
    assert module(FORWARD_ONLY).statistics() == {"prior/forward": 1.0, "prior/student": 0.0, "prior/teacher": 0.0}


class Pictures(Captions):
    """Twenty pictures, each of one colour, whose captions are their numbers."""

    def __len__(self) -> int:
        return 20

    def prompts(self, index: Any) -> list[str]:
        return [str(i) for i in index]

    def pixels(self, index: Any) -> Tensor:
        return torch.tensor(list(index)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 20


def encoding(real: bool, control: bool = False) -> tuple[list[LatentBatch], list[int]]:
    """Seven batches of data that are encoded on the fly, and how many images were encoded for each."""
    toy, asked = Toy(), []

    def images(pixels: Tensor) -> Tensor:
        asked.append(len(pixels))
        return pixels[:, :2, ::2, ::2] + 0.0

    def texts(prompts: Any, truncate: bool, sizes: Any) -> Context:
        return Context(torch.tensor([[[float(p)]] for p in prompts]))

    more = {"device": torch.device("cpu"), "encode_images": images, "encode_text": texts}
    toy.backbone, toy.wants = SimpleNamespace(**vars(toy.backbone), **more), Wants(real=real)
    made = module(captions=Pictures(), toy=toy, cache=False, rollouts={"every": 3, "trajectories": 3, "control": control})
    made.reference(1)  # `setup` asks for a row of every shape
    asked.clear()
    return first(7, made), asked


@pytest.mark.parametrize("control", [False, True])
def test_only_rows_that_are_noised_or_rolled_out_are_encoded(control: bool) -> None:
    """Half of each batch are roll-outs, made of three captions at every third; a method that reads the data's latents has them all."""
    (whole, all_of_them), (spared, few) = encoding(True, control), encoding(False, control)
    assert all_of_them == [4] * 7 and few == [4, 2, 2, 3, 2, 2, 3]
    for a, b in zip(whole, spared, strict=True):
        assert equal(a._replace(real=None, real_c=None), b._replace(real=None, real_c=None))
        assert a.real is not None and a.real.shape == a.x_t.shape and b.real is None


def test_a_probes_rows_are_of_all_the_data() -> None:
    """Sets that are joined are in the order of their sources: the first rows were a probe of the first of them."""
    made = module()  # of 20 rows
    made.learner.backbone.device = torch.device("cpu")
    rows = made.reference(4).rows
    assert (rows // 5).tolist() == [0, 1, 2, 3] and made.reference(4).rows.equal(rows)
    assert made.reference(50).rows.tolist() == list(range(20))


def test_captions_alone_train_on_rollouts() -> None:
    batch = first(1, module(SamplingPrior(0, 0.5, 0.5), data(images=False)))[0]
    assert batch.real is None and batch.source.ne(FORWARD).all()
    with pytest.raises(ValueError, match="the prior has a forward share but the data set has no images"):
        first(1, module(FORWARD_ONLY, data(images=False)))


def test_prior_1_0_0_is_plain_training_bit_by_bit() -> None:
    """Whatever the buffer is set to, and with no network called."""
    plain = []
    for done in range(8):
        toy, epoch = Toy(), data()
        raw = epoch[rows(9, batch=4, seed=0)[done]]
        plain.append(forward(raw, toy, Streams(0, done)))
    for kwargs in (
        {},
        {"buffer": {"capacity": 0}},
        {"rollouts": {"every": 1}, "buffer": {"priority": 0.6}},
        {"rollouts": {"granularity": "step", "trajectories": 1}},
    ):
        toy = Toy()
        assert equal(first(8, module(FORWARD_ONLY, toy=toy, **kwargs)), plain)
        assert toy.calls == 0


def test_a_rollout_batch_has_its_own_captions_and_guidance() -> None:
    """x_t, caption and w travel together: the latents of a buffer draw are those of the roll-out with that very context."""
    made = module(STUDENT_ONLY, buffer={"capacity": 64})
    b = first(1, made)[0]
    assert made.buffer is not None and b.c.w is not None
    (chunk,) = made.buffer.state_dict()["chunks"]
    row = chunk["states"]["row"][b.slot]
    assert torch.equal(b.c.w, chunk["c"]["w"][row]) and torch.equal(b.c.text, chunk["c"]["text"][row])
    assert torch.equal(b.x_t, chunk["states"]["x_t"][b.slot].float()) and torch.equal(b.t, chunk["states"]["t"][b.slot])
    assert b.c.w.ge(1).all() and b.c.w.le(7).all()  # g = 1 + w in [2, 8]
    assert torch.equal(made.learner.grid.after(b.t), b.s)


def test_where_the_rows_of_the_last_batch_come_from_is_known_and_of_any_other_read() -> None:
    made = module()
    (b,) = first(1, made)
    known = made.origin(b._replace(x_t=b.x_t * 0, t=b.t * 0))
    assert known is made.origin(b) and known == Origin.of(b) and set(known.source) == {FORWARD, STUDENT}
    assert made.origin(b._replace(source=b.source * 0 + TEACHER)).source == (TEACHER,) * len(b.t)


def test_step_granularity_gives_a_batch_one_source() -> None:
    tags = [b.source.unique().tolist() for b in first(16, module(rollouts={"granularity": "step"}))]
    assert all(len(tag) == 1 for tag in tags) and {tag[0] for tag in tags} == {FORWARD, STUDENT}


def test_pure_noise_has_no_signal_at_the_first_node() -> None:
    found = [first(6, module(FORWARD_ONLY, rollouts={"pure_noise": flag})) for flag in (False, True)]
    for a, b in zip(*found, strict=True):
        differs = (a.x_t != b.x_t).flatten(1).any(1)
        assert torch.equal(differs, a.node == 0)


def test_autocast_of_the_trainer_holds_in_rollouts() -> None:
    toy, seen = Toy(), []
    toy.act = lambda x0: (seen.append(torch.is_autocast_enabled("cpu")), x0)[1]  # type: ignore[method-assign,func-returns-value]
    made = module(toy=toy)
    made.trainer.precision_plugin = MixedPrecision("bf16-mixed", "cpu")  # type: ignore[union-attr,misc]
    first(1, made)
    assert seen == [True] * 3


def test_broken_rollouts_stop_the_run_and_say_where() -> None:
    with pytest.raises(FloatingPointError, match="a roll-out by the student policy is not finite at t = 749, student update 0"):
        first(1, module(toy=Toy(bias=float("nan"))))


def test_priorities_follow_the_losses() -> None:
    made = module(STUDENT_ONLY, buffer={"priority": 1.0, "capacity": 64})
    b = first(1, made)[0]._replace(t=torch.full((4,), 999))
    b = b._replace(slot=torch.tensor([0, 1, -1, 2]))
    made.observe(b, torch.tensor([1.0, 3.0, 1000.0, 2.0]))
    assert made.buffer is not None
    u = made.buffer.state_dict()["chunks"][0]["states"]["u"]
    torch.testing.assert_close(u[:4], torch.tensor([0.5, 1.5, 1.0, 0.0], dtype=torch.float64))
    module(STUDENT_ONLY, buffer={"capacity": 0}).observe(b, torch.ones(4))  # nothing to rank: nothing happens
