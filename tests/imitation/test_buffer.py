"""The replay buffer: what it keeps, in which order it forgets, and the probabilities of prioritised replay."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from ddil_lightning.imitation.buffer import ReplayBuffer, weights
from ddil_lightning.records import FORWARD, MIXED, STUDENT, TEACHER, Context, Rollout

NODES = (999, 749, 500, 250)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rollout(seed: int, rows: int = 3, nodes: tuple[int, ...] = NODES, shape: tuple[int, ...] = (2, 4, 4)) -> dict:
    """All states of `rows` trajectories over `nodes`; the text of a row starts with 100 seed + row."""
    m = rows * len(nodes)
    text = torch.randn(rows, 5, 2, generator=generator(seed))
    text[:, 0, 0] = 100 * seed + torch.arange(rows)
    return Rollout(
        torch.randn(m, *shape, generator=generator(seed)),
        torch.tensor(nodes).repeat_interleave(rows),
        torch.arange(rows).repeat(len(nodes)),
        torch.tensor([STUDENT, TEACHER, MIXED, STUDENT])[: len(nodes)].repeat_interleave(rows),
        torch.arange(m) + (1 << 40),
        Context(text, mask=torch.ones(rows, 5, dtype=torch.bool), w=torch.arange(rows) / 4),
    )


def filled(chunks: int = 3, **settings) -> ReplayBuffer:
    buffer = ReplayBuffer(**{"capacity": 100} | settings)
    for k in range(chunks):
        buffer.add(rollout(k), clock=10 * k, stage=0)
    return buffer


def test_a_rare_shape_keeps_what_it_has() -> None:
    """Its only roll-out was evicted for being the oldest, and batches of it were forward latents from then on."""
    buffer, rare, often = ReplayBuffer(36), (2, 2, 6), (2, 4, 4)
    for k, shape in enumerate((rare, often, often, often, often)):
        buffer.add(rollout(k, shape=shape), clock=k, stage=0)
    assert buffer.held(rare) == 12 and buffer.held(often) == 24
    assert set((buffer.sample(200, 9, generator(), shape=often).c.text[:, 0, 0] // 100).tolist()) == {3, 4}
    buffer.add(rollout(5, shape=rare), clock=5, stage=0)
    buffer.add(rollout(6, shape=(2, 8, 2)), clock=6, stage=0)
    assert buffer.held(rare) == buffer.held(often) == buffer.held((2, 8, 2)) == 12
    buffer.update(torch.arange(84), torch.ones(84), torch.tensor(NODES).repeat_interleave(3).repeat(7))  # slots between are gone
    buffer.add(rollout(7, nodes=NODES[:1], shape=(2, 1, 1)), clock=7, stage=0)
    assert buffer.held(often) == 0 and len(buffer) == 27  # of as many the oldest


def test_shapes_have_their_share_of_the_batches(caplog: pytest.LogCaptureFixture) -> None:
    """Of ten roll-outs a shape of seven in ten batches holds seven; all held as many, whatever their batches. A rare one keeps one."""
    shares = {(2, 4, 4): 0.7, (2, 2, 6): 0.28, (2, 8, 2): 0.02}
    buffer = ReplayBuffer(120)
    buffer.shares = shares
    buffer.say_room(40)
    for k in range(36):
        buffer.add(rollout(k, shape=list(shares)[k % 3]), clock=k, stage=0)
    assert [buffer.held(shape) // 12 for shape in shares] == [7, 2, 1]
    assert set((buffer.sample(200, 36, generator(), shape=(2, 4, 4)).c.text[:, 0, 0] // 300).long().tolist()) == set(range(5, 12))
    assert caplog.records == []
    small = ReplayBuffer(24)  # of two: the rarest has none
    small.shares = shares
    small.say_room(12)
    for k in range(12):
        small.add(rollout(k, shape=list(shares)[2 - k % 3]), clock=k, stage=0)
    assert [small.held(shape) // 12 for shape in shares] == [1, 1, 0]
    assert [record.getMessage() for record in caplog.records] == [
        "data.buffer.capacity 24 holds 2 roll-outs of 12 states, and the data have 3 sizes: one that has none is rolled out with its next "
        "batch, which is more often than data.rollouts says; raise the capacity to 36, or lower data.rollouts.trajectories"
    ]


def same(a: tuple, b: tuple) -> bool:
    """Two samples, bit for bit."""
    return all(same(x, y) if isinstance(x, tuple) else (x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def losses(buffer: ReplayBuffer, seed: int = 0, clock: int = 20) -> None:
    """One round of losses for every slot of `filled()`, with a scale that depends on the node."""
    slot, t = torch.arange(36), torch.cat([rollout(k).t for k in range(3)])
    buffer.update(slot, torch.rand(36, generator=generator(seed)) * t, t)


def test_a_sample_holds_what_was_added():
    buffer, data = filled(storage="float32"), [rollout(k) for k in range(3)]
    got = buffer.sample(64, clock=25, generator=generator())
    chunk, local = got.slot // 12, got.slot % 12
    assert got.x_t.dtype == torch.float32 and chunk.unique().tolist() == [0, 1, 2]
    for i in range(64):
        d, j = data[int(chunk[i])], int(local[i])
        for name in ("x_t", "t", "source", "actors"):
            assert torch.equal(getattr(got, name)[i], getattr(d, name)[j])
        r = int(d.row[j])
        assert torch.equal(got.c.text[i], d.c.text[r]) and torch.equal(got.c.w[i], d.c.w[r])
        assert int(got.age[i]) == 25 - 10 * int(chunk[i])
    assert got.c.mask.dtype == torch.bool and got.c.pooled is None and torch.equal(got.weight, torch.ones(64))


def test_the_buffer_owns_its_states():
    data = rollout(0)
    buffer = ReplayBuffer(100, storage="float32")
    buffer.add(data, clock=0, stage=0)
    before = buffer.sample(20, 0, generator())
    for x in (data.x_t, data.t, data.row, data.c.text, data.actors):
        x.zero_()
    assert same(before, buffer.sample(20, 0, generator()))


@pytest.mark.parametrize(("nodes", "exact"), [((999, 500), False), ((999, 49), True), ((999, -1), True)])
def test_half_precision_but_not_near_the_clean_end(nodes: tuple[int, ...], exact: bool):
    data = rollout(0, nodes=nodes)
    buffer = ReplayBuffer(100)
    buffer.add(data, clock=0, stage=0)
    got = buffer.sample(40, 0, generator())
    assert torch.equal(got.x_t, data.x_t[got.slot]) == exact
    assert torch.allclose(got.x_t, data.x_t[got.slot], rtol=1e-3, atol=1e-6)
    assert buffer.state_dict()["chunks"][0]["states"]["x_t"].dtype == (torch.float32 if exact else torch.float16)


def test_chunks_of_both_precisions_mix():
    buffer = ReplayBuffer(100)
    buffer.add(rollout(0), clock=0, stage=0)
    buffer.add(rollout(1, nodes=(999, 19)), clock=0, stage=0)
    fine = rollout(1, nodes=(999, 19)).x_t
    got = buffer.sample(60, 0, generator())
    late = got.slot >= 12
    assert late.any() and not late.all() and torch.equal(got.x_t[late], fine[got.slot[late] - 12])


def test_the_oldest_rollouts_go_first():
    buffer = ReplayBuffer(30)
    slots = [buffer.add(rollout(k), clock=k, stage=0) for k in range(4)]
    assert torch.equal(torch.cat(slots), torch.arange(48))  # never reused
    assert len(buffer) == 24 and buffer.sample(200, 4, generator()).slot.unique().tolist() == list(range(24, 48))
    buffer.add(rollout(4, rows=1), clock=5, stage=0)
    assert len(buffer) == 28 and buffer.sample(300, 5, generator()).slot.unique().tolist() == list(range(24, 52))


def test_age_and_stage_drop_rollouts():
    buffer = filled(max_age=15)
    buffer.expire(clock=15, stage=0)
    assert len(buffer) == 36  # an age of max_age is still allowed
    buffer.expire(clock=16, stage=0)
    assert buffer.sample(200, 16, generator()).slot.unique().tolist() == list(range(12, 36))
    buffer.add(rollout(3), clock=16, stage=1)
    buffer.expire(clock=16, stage=1)
    assert buffer.sample(200, 16, generator()).slot.unique().tolist() == list(range(36, 48))


def test_flush_forgets_states_and_losses_but_no_slot():
    buffer = filled(priority=0.6)
    losses(buffer)
    buffer.flush()
    assert len(buffer) == 0 and buffer.state_dict()["means"] == []
    assert buffer.add(rollout(5), clock=30, stage=1).tolist() == list(range(36, 48))
    with pytest.raises(ValueError, match="empty"):
        ReplayBuffer(5).sample(1, 0, generator())


def test_capacity_zero_keeps_nothing():
    buffer = ReplayBuffer(0)
    assert buffer.add(rollout(0), clock=0, stage=0).tolist() == [-1] * 12 and len(buffer) == 0


def test_priority_zero_is_plain_uniform_replay_bit_for_bit():
    plain, other = filled(), filled(half_life=1e-3, uniform=0.7, beta0=0.0)
    losses(other)
    a, b = generator(7), generator(7)
    index = (torch.rand(50, generator=generator(7), dtype=torch.float64) * 36).long()
    got = plain.sample(50, 20, a)
    assert torch.equal(got.slot, index) and torch.equal(got.weight, torch.ones(50))
    assert same(got, other.sample(50, 20, b, progress=0.5))
    # Priorities take the same numbers from the generator, so that whatever is drawn afterwards does not change.
    c = generator(7)
    filled(priority=0.6).sample(50, 20, c)
    assert torch.equal(a.get_state(), b.get_state()) and torch.equal(a.get_state(), c.get_state())


def expected_probabilities(u: Tensor, age: Tensor, a: float, half_life: float, eta: float) -> Tensor:
    p = u.clamp(0.1, 10) ** a * 2 ** (-age / half_life)
    return (1 - eta) * p / p.sum() + eta / len(p)


def test_probabilities_follow_the_formula():
    buffer = filled(priority=0.6, half_life=30, uniform=0.2)
    t = torch.cat([rollout(k).t for k in range(3)])
    loss = torch.rand(36, generator=generator(1), dtype=torch.float64) ** 4 * t + 1e-3
    loss[5] = 1e7  # clipped
    buffer.update(torch.arange(36), loss, t)
    mean = torch.stack([loss[t == x].mean() for x in t])
    age = 40.0 - torch.tensor([0.0, 10.0, 20.0], dtype=torch.float64).repeat_interleave(12)
    p = buffer.probabilities(clock=40)
    assert torch.allclose(p, expected_probabilities(loss / mean, age, 0.6, 30, 0.2), rtol=1e-12)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float(p.min()) >= 0.2 / 36


def test_nodes_with_large_losses_get_no_larger_share():
    buffer = filled(priority=1.0, half_life=1e9, uniform=0.0)
    t = torch.cat([rollout(k).t for k in range(3)])
    buffer.update(torch.arange(36), torch.where(t == 999, 1000.0, 1.0), t)
    assert torch.allclose(buffer.probabilities(20), torch.full((36,), 1 / 36, dtype=torch.float64))


def test_new_states_get_the_largest_priority_present():
    buffer = filled(priority=1.0, half_life=1e9, uniform=0.0)
    assert torch.allclose(buffer.probabilities(20), torch.full((36,), 1 / 36, dtype=torch.float64))
    slot, t = torch.arange(4), torch.full((4,), 999)
    buffer.update(slot, torch.tensor([1.0, 1.0, 1.0, 5.0]), t)  # u = 0.5, 0.5, 0.5, 2.5
    p = buffer.probabilities(20)
    assert torch.allclose(p[:3], p[3] / 5) and torch.allclose(p[3:], p[3].expand(33))


def test_running_mean_is_plain_first_and_forgets_later():
    buffer = filled(priority=1.0)
    slot, t = torch.zeros(1, dtype=torch.long), torch.tensor([999])
    for value in (1.0, 2.0, 6.0):
        buffer.update(slot, torch.tensor([value]), t)
    assert buffer.state_dict()["means"] == [[999, pytest.approx(3.0), 3]]
    for _ in range(200):
        buffer.update(slot.expand(20), torch.full((20,), 10.0), t.expand(20))
    assert buffer.state_dict()["means"][0][1] == pytest.approx(10.0, abs=1e-6)


def test_draws_follow_the_probabilities():
    buffer = filled(priority=0.8, half_life=20)
    losses(buffer)
    n, p = 40000, buffer.probabilities(20)
    seen = torch.bincount(buffer.sample(n, 20, generator()).slot, minlength=36).double()
    chi_square = float(((seen - n * p).square() / (n * p)).sum())
    assert chi_square < 35 + 4 * (2 * 35) ** 0.5
    assert float(((seen - n / 36).square() / (n / 36)).sum()) > 1000  # and are far from uniform


def test_importance_weights_are_unbiased_at_the_end_and_annealed_before():
    buffer = filled(priority=0.8, half_life=20)
    losses(buffer)
    p = buffer.probabilities(20)
    value = torch.arange(36).double().square()
    got = buffer.sample(60000, 20, generator(), progress=1.0)
    estimate = got.weight.double() * value[got.slot]
    error = float(estimate.std()) / 60000**0.5
    assert float(estimate.mean()) == pytest.approx(float(value.mean()), abs=4 * error)
    assert abs(float(value[got.slot].mean()) - float(value.mean())) > 10 * error  # unweighted it is biased
    for progress, b in ((0.0, 0.4), (0.5, 0.7), (1.0, 1.0)):
        got = buffer.sample(30, 20, generator(), progress=progress)
        raw = (36 * p) ** -b
        assert torch.allclose(got.weight, (raw / (p * raw).sum())[got.slot].float())


@pytest.mark.parametrize("b", [0.0, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("uniform", [0.1, 0.0])
def test_weights_are_1_on_average_so_that_roll_outs_keep_their_share(b, uniform):
    """Rows of the data beside them weigh 1."""
    buffer = filled(priority=2.0, half_life=20, uniform=uniform, beta0=b)
    losses(buffer)
    p = buffer.probabilities(20)
    got = weights(p, b)
    assert float((p * got).sum()) == pytest.approx(1, abs=1e-12)
    drawn = buffer.sample(500, 20, generator())
    assert torch.allclose(drawn.weight, got[drawn.slot].float())
    if b == 1:
        assert torch.allclose(got, 1 / (36 * p))  # exactly those of uniform replay


def test_a_state_that_is_never_drawn_leaves_the_weights_finite():
    p = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    for b in (0.4, 1.0):
        got = weights(p, b)
        assert got.isfinite().all() and got[1:].tolist() == pytest.approx([1, 1])


def test_a_long_pause_does_not_underflow():
    p = filled(priority=0.6, half_life=1.0, uniform=0.0).probabilities(clock=10**6)
    assert p.isfinite().all() and float(p.sum()) == pytest.approx(1)


def test_dead_slots_and_broken_losses_are_ignored():
    buffer = ReplayBuffer(24, priority=0.6)
    for k in range(3):
        buffer.add(rollout(k), clock=0, stage=0)
    before = buffer.probabilities(0)
    slot = torch.tensor([0, 11, -1, 36, 999, 20])
    buffer.update(slot, torch.tensor([9.0, 9.0, 9.0, 9.0, 9.0, float("nan")]), torch.full((6,), 999))
    assert torch.equal(buffer.probabilities(0), before) and buffer.state_dict()["means"] == []
    buffer.update(torch.tensor([12, 35]), torch.tensor([1.0, 3.0]), torch.tensor([999, 999]))  # first and last live slot
    u = torch.cat([k["states"]["u"] for k in buffer.state_dict()["chunks"]])
    assert u.nonzero().flatten().tolist() == [0, 23] and u[[0, 23]].tolist() == [0.5, 1.5]
    ReplayBuffer(5, priority=1.0).update(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([9]))  # empty: nothing to do


def test_broken_states_are_rejected_and_counted():
    data = rollout(0, rows=2, nodes=(999, 749))
    data = data._replace(x_t=torch.ones(4, 2, 4, 4))
    x = data.x_t
    x[0, 0, 0, 0], x[1], x[2] = float("nan"), 2.1, 0.49
    buffer = ReplayBuffer(100)
    assert buffer.add(data, clock=0, stage=0, expected=torch.ones(4)).tolist() == [-1, -1, -1, 0]
    assert buffer.add(data, clock=0, stage=0, expected=torch.tensor([1.0, 4.4, 0.24, 5.0])).tolist() == [-1, 1, 2, -1]
    assert buffer.add(data, clock=0, stage=0).tolist() == [-1, 3, 4, 5]
    x[1] = 7e4  # infinite in half precision
    assert buffer.add(data, clock=0, stage=0).tolist() == [-1, -1, 6, 7]
    assert buffer.stats(0)["rejected"] == 3 + 2 + 1 + 2 and len(buffer) == 8
    assert buffer.sample(40, 0, generator()).x_t.isfinite().all()
    x[:] = float("inf")
    assert buffer.add(data, clock=0, stage=0).tolist() == [-1] * 4 and len(buffer) == 8


def test_points_of_few_dimensions_have_no_energy_to_judge():
    """A Gaussian in the plane is beyond the band one time in four; that says nothing of a roll-out."""
    data, expected = rollout(0, rows=2, nodes=(999, 749)), torch.ones(4)
    for shape, kept in (((2, 1, 1), [0, 1, 2]), ((2, 4, 4), [0])):
        data = data._replace(x_t=torch.tensor([1.0, 0.1, 9.0, float("inf")]).view(4, 1, 1, 1).expand(4, *shape))
        slots = ReplayBuffer(100).add(data, clock=0, stage=0, expected=expected)
        assert slots[slots >= 0].tolist() == kept


def test_stats_count():
    buffer = filled()
    got = buffer.stats(clock=30)
    assert got["size"] == 36 and got["age"] == pytest.approx(20) and got["ess"] == pytest.approx(36) and got["rejected"] == 0
    assert [got[f"share_{name}"] for name in ("forward", "student", "teacher", "mixed")] == [0, 0.5, 0.25, 0.25]
    prioritised = filled(priority=1.0, uniform=0.0)
    losses(prioritised)
    ess = prioritised.stats(30)["ess"]
    assert ess == pytest.approx(1 / float(prioritised.probabilities(30).square().sum())) and 1 < ess < 35
    assert set(ReplayBuffer(3).stats(0)) == set(got) and not any(ReplayBuffer(3).stats(0).values())


def test_saving_and_restoring_is_exact():
    buffer = filled(priority=0.6, half_life=20)
    losses(buffer)
    bad = rollout(3)
    bad.x_t[0] = float("nan")
    buffer.add(bad, clock=25, stage=0)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    snapshot = buffer.state_dict()
    other = ReplayBuffer(100, priority=0.6, half_life=20)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))

    def go_on(b: ReplayBuffer) -> list:
        out, g = [], generator(3)
        for step in range(4):
            s = b.sample(16, 30 + step, g, progress=step / 4)
            b.update(s.slot, s.x_t.flatten(1).square().mean(1), s.t)
            out.append(s)
            b.add(rollout(10 + step), clock=30 + step, stage=0)
            b.expire(30 + step, 0)
        return [*out, tuple(torch.tensor([v]) for v in b.stats(40).values()), (b.probabilities(40),)]

    first = go_on(buffer)
    assert all(same(x, y) for x, y in zip(first, go_on(other), strict=True))
    for _ in range(2):  # a snapshot moves neither with the buffer it was taken from nor with the one it was loaded into
        again = ReplayBuffer(100, priority=0.6, half_life=20)
        again.load_state_dict(snapshot)
        assert all(same(x, y) for x, y in zip(first, go_on(again), strict=True))


def test_ends_that_a_method_asks_for_no_more_are_left_out() -> None:
    """A run goes on whose method once asked for them, with new roll-outs beside the old ones."""
    old, made = ReplayBuffer(100), rollout(0)
    old.add(made._replace(noise=made.x_t[:3], end=made.x_t[:3], whole=made.source[:3]), clock=0, stage=0)
    now = ReplayBuffer(100)
    now.load_state_dict(old.state_dict(), ends=False)
    now.add(rollout(1), clock=1, stage=0)
    got = now.sample(50, clock=2, generator=generator())
    assert got.noise is None and got.end is None and len(got.slot.unique()) > 12


def test_restoring_into_a_smaller_buffer_drops_the_oldest():
    small = ReplayBuffer(15)
    small.load_state_dict(filled().state_dict())
    assert small.sample(100, 20, generator()).slot.unique().tolist() == list(range(24, 36))


def test_points_and_a_context_without_extras():
    buffer = ReplayBuffer(10)
    index, c = torch.zeros(4, dtype=torch.long), Context(torch.zeros(1, 1, 3))
    buffer.add(Rollout(torch.randn(4, 2), torch.tensor(NODES), index, index + FORWARD, index, c), clock=0, stage=0)
    got = buffer.sample(6, 0, generator())
    assert got.x_t.shape == (6, 2) and got.c.text.shape == (6, 1, 3) and got.c.w is None
    assert len(buffer.sample(0, 0, generator()).t) == 0


def test_readable_errors():
    data = rollout(0)
    with pytest.raises(ValueError, match="capacity, max_age"):
        ReplayBuffer(-1)
    with pytest.raises(ValueError, match="storage"):
        ReplayBuffer(1, storage="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exceeds the replay buffer's capacity 5"):
        ReplayBuffer(5).add(data, clock=0, stage=0)
    with pytest.raises(ValueError, match="as many t"):
        ReplayBuffer(50).add(data._replace(t=data.t[:3]), clock=0, stage=0)
    with pytest.raises(ValueError, match="row must name"):
        ReplayBuffer(50).add(data._replace(row=data.row + 1), clock=0, stage=0)
    with pytest.raises(ValueError, match="flush it first"):
        filled().add(data._replace(c=data.c.guided(None)), clock=0, stage=0)
    with pytest.raises(ValueError, match="update needs"):
        filled().update(torch.zeros(2), torch.zeros(3), torch.zeros(3))


# Latents of several shapes ----------------------------------------------------------------------------------------------------------

WIDE = (2, 2, 6)


def mixed(**settings) -> ReplayBuffer:
    buffer = ReplayBuffer(**{"capacity": 100} | settings)
    for k, shape in enumerate([(2, 4, 4), WIDE, (2, 4, 4), WIDE]):
        buffer.add(rollout(k, shape=shape), clock=10 * k, stage=0)
    return buffer


@pytest.mark.parametrize("priority", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_a_batch_is_drawn_from_its_own_shape(priority: float) -> None:
    """As from a buffer that holds nothing else: the same states, weights and ages."""
    buffer, alone = mixed(priority=priority), ReplayBuffer(100, priority=priority)
    for k in (1, 3):
        alone.add(rollout(k, shape=WIDE), clock=10 * k, stage=0)
    assert buffer.held(WIDE) == len(alone) == 24 and buffer.held((2, 4, 4)) == 24 and buffer.held((1, 2, 2)) == 0 and len(buffer) == 48
    assert buffer.shapes() == {WIDE, (2, 4, 4)}
    for made, slots in ((buffer, torch.cat([torch.arange(12, 24), torch.arange(36, 48)])), (alone, torch.arange(24))):
        loss = torch.rand(24, generator=generator(4))
        made.update(slots, loss, torch.cat([rollout(k).t for k in (1, 3)]))
    got, plain = (made.sample(50, clock=40, generator=generator(), shape=WIDE) for made in (buffer, alone))
    assert got.x_t.shape == (50, *WIDE) and same(got._replace(slot=plain.slot), plain)
    assert {(slot - 12) // 12 for slot in got.slot.tolist()} == {0, 2}
    with pytest.raises(ValueError, match="the replay buffer is empty"):
        buffer.sample(1, clock=40, generator=generator(), shape=(1, 2, 2))


def test_shapes_share_the_capacity_and_the_oldest_goes_first() -> None:
    buffer = mixed(capacity=40)
    assert buffer.held((2, 4, 4)) == 12 and buffer.held(WIDE) == 24
    buffer.add(rollout(4, shape=(2, 4, 4)), clock=40, stage=0)
    assert buffer.held((2, 4, 4)) == 24 and buffer.held(WIDE) == 12
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    again = ReplayBuffer(40)
    again.load_state_dict(torch.load(file, weights_only=True))
    for shape in (WIDE, (2, 4, 4)):
        assert same(*(made.sample(9, clock=50, generator=generator(), shape=shape) for made in (buffer, again)))
    with pytest.raises(ValueError, match=r"contexts .* do not fit those in the replay buffer .*: flush it first"):
        buffer.add(rollout(5, shape=(2, 1, 1))._replace(c=Context(torch.zeros(3, 4, 2))), clock=50, stage=0)
