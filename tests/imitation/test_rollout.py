"""Algorithms 1 and 2 with exact denoisers: who acts, what is recorded, what is drawn, and that all of it is a function of the seed."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.feed import Wants
from ddil_lightning.imitation.buffer import ReplayBuffer
from ddil_lightning.imitation.options import Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import collect, draw, drawn, forward, fresh, guided, roll
from ddil_lightning.records import FORWARD, MIXED, STUDENT, TEACHER, CaptionBatch, Context, LatentBatch, Origin, Rollout
from ddil_lightning.streams import Streams

SD = NoiseSchedule.scaled_linear()
GRID, FINE = Grid.named("linspace", 4), Grid.named("linspace", 8)
SHAPE = (2, 3, 3)
STUDENTS = SamplingPrior(0.0, 1.0, 0.0)
HALF = SamplingPrior(0.5, 0.15, 0.35)


class Recorded(nn.Module):
    """A network that remembers the time and the guidance of every call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, []

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        self.calls.append((int(t[0]), c.w))
        return self.network(x_t, t, c)


class Method(NamedTuple):
    """What the draw asks of a method."""

    policies: Policies
    grid: Grid = GRID
    guidance: tuple[float, float] = (1.0, 1.0)
    wants: Wants = Wants()
    stage_updates: int = 0
    progress: float = 0.0

    def times(self, who: str) -> list[int]:
        return [t for t, _ in getattr(self.policies, who).denoiser.network.calls]


def method(student: nn.Module | None = None, teacher: nn.Module | None = None, how: Any = ddim, **kwargs: Any) -> Method:
    a, b = Recorded(student or Gaussian(0.5, 0.7, SD)), Recorded(teacher or Gaussian(-0.5, 0.9, SD))
    return Method(Policies(Policy(Denoiser(a, SD, "x0"), how), Policy(Denoiser(b, SD, "x0"), fine=FINE)), **kwargs)


def batch(n: int = 8, images: bool = True) -> CaptionBatch:
    latent = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(n)) if images else None
    return CaptionBatch(latent, Context(torch.arange(float(n)).view(n, 1, 1)), torch.arange(n))


def start(n: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """The noise that `roll` begins with, and the generator after it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, *SHAPE), generator=generator), generator


def rolled(m: Method, actors: Any, n: int = 3, seed: int = 0, **kwargs: Any) -> Rollout:
    return roll(m.policies, GRID, actors, batch(n).c, SHAPE, torch.Generator().manual_seed(seed), **kwargs)


def same(a: LatentBatch, b: LatentBatch) -> bool:
    flat = [(*x._replace(c=None, real_c=None), *x.c, *(x.real_c or ())) for x in (a, b)]
    pairs = zip(*flat, strict=True)
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


# Algorithm 2 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [ddim, renoise], ids=["ddim", "renoise"])
def test_student_roll_outs_are_the_states_of_its_sampler(how: Any):
    m = method(how=how)
    made = rolled(m, [True] * 4)
    x, generator = start(3, 0)
    states = list(m.policies.student.walk(x, GRID, batch(3).c, generator))
    assert torch.equal(made.x_t, torch.cat([x, *states[:-1]]))
    assert m.times("teacher") == [] and made.source.unique().tolist() == [STUDENT]


def test_teacher_roll_outs_are_its_own_states_at_shared_nodes():
    m = method()
    made = rolled(m, [False] * 4)
    x, _ = start(3, 0)
    fine = list(Policy(m.policies.teacher.denoiser).walk(x, FINE, batch(3).c))  # the teacher alone on its eight nodes
    assert torch.equal(made.x_t, torch.cat([x, *fine[1:-1:2]]))
    assert made.source.unique().tolist() == [TEACHER] and made.actors.unique().tolist() == [0]
    assert m.times("student") == [] and m.times("teacher")[:6] == FINE.nodes.tolist()[:6]


@pytest.mark.parametrize("actors", list(itertools.product([True, False], repeat=4)), ids=lambda a: "".join("TS"[x] for x in a))
def test_every_pattern_of_actors(actors: tuple[bool, ...]):
    """Data at one point, student and teacher exact: every state is alpha mu + sigma e with the same e, whoever acts."""
    mu = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    m = method(PointMass(mu, SD), PointMass(mu, SD))
    made = rolled(m, actors)
    x, _ = start(3, 0)
    e = (x - SD.alphas[999] * mu) / SD.sigmas[999]
    want = torch.cat([SD.alphas[t] * mu + SD.sigmas[t] * e for t in GRID.nodes.tolist()])
    assert torch.allclose(made.x_t, want, atol=1e-5) and torch.equal(made.x_t[:3], x)
    assert made.t.tolist() == GRID.nodes.repeat_interleave(3).tolist() and made.row.tolist() == [0, 1, 2] * 4
    bits = [sum(1 << j for j in range(i) if actors[j]) for i in range(4)]
    assert made.actors.view(4, 3)[:, 0].tolist() == bits
    past = [actors[: max(i, 1)] for i in range(4)]  # at node 0, who will act first
    assert made.source.view(4, 3)[:, 0].tolist() == [STUDENT if all(a) else MIXED if any(a) else TEACHER for a in past]
    inside = [t for t, a in zip(GRID.nodes.tolist()[:3], actors, strict=False) if a]
    assert m.times("student") == inside and len(m.times("teacher")) == 2 * (3 - len(inside))


def test_unit_gaussian_data_are_turned_by_any_mix():
    m = method(Gaussian(0.0, 1.0, SD), Gaussian(0.0, 1.0, SD))
    m = m._replace(policies=m.policies._replace(teacher=Policy(m.policies.teacher.denoiser)))
    made = rolled(m, [True, False, True, False])
    angle = torch.atan2(SD.sigmas, SD.alphas)[GRID.nodes]
    shrink = torch.cat([torch.ones(1), (angle[:-1] - angle[1:]).cos().cumprod(0)])
    assert torch.allclose(made.x_t.double().view(4, 3, *SHAPE), shrink.view(4, 1, 1, 1, 1) * made.x_t[:3].double(), atol=1e-6)


def test_the_first_node_is_pure_noise():
    """The rung that the deployed student starts from; forward latents there still hold alpha = 0.068 of the data."""
    made = rolled(method(PointMass(50.0, SD)), [True] * 4, n=500)
    first = made.x_t[made.t == 999]
    assert torch.equal(first, start(500, 0)[0])
    assert abs(float(first.mean())) < 4 / math.sqrt(first.numel()) and float(first.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("upto", [0, 1, 2, 3, None])
def test_states_are_recorded_before_their_transition(upto: int | None):
    """No rung costs more than the transitions before it, and the last node's own transition is never made."""
    m = method()
    made = rolled(m, [True] * 4, upto=upto)
    last = 3 if upto is None else upto
    assert m.times("student") == GRID.nodes.tolist()[:last] and m.policies.student.denoiser.evaluations == 3 * last
    assert made.t.unique().tolist() == sorted(GRID.nodes.tolist()[: last + 1])
    assert torch.equal(made.x_t, rolled(method(), [True] * 4).x_t[: 3 * (last + 1)])


@pytest.mark.parametrize("training", [True, False])
def test_roll_outs_leave_no_trace(training: bool):
    class Trainable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(())), nn.Dropout(0.0)

        def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
            return self.scale * x_t

    network = Trainable().train(training)
    state, python = torch.get_rng_state(), random.getstate()
    made = rolled(method(network), [True, False, True, True])
    assert made.x_t.grad_fn is None and not made.x_t.requires_grad and network.scale.grad is None
    assert [x.training for x in network.modules()] == [training, training]
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python and torch.is_grad_enabled()


def test_the_noise_of_re_noising_is_fresh():
    """Read off the states of a point mass: uncorrelated over nodes, ranks and steps, and with the forward source's noise."""
    n = 400
    m = method(PointMass(0.7, SD), how=renoise)

    def noises(streams: Streams) -> list[Tensor]:
        made = collect(batch(n), m, STUDENTS, streams, SHAPE)
        states = zip(made.x_t.split(n)[1:], GRID.nodes.tolist()[1:], strict=True)
        return [((x - SD.alphas[t] * 0.7) / SD.sigmas[t]).flatten() for x, t in states]

    first = collect(batch(n), m, STUDENTS, Streams(0, 7), SHAPE).x_t[:n].flatten()
    noised = forward(batch(n), m, Streams(0, 7), Wants(pure_noise=True))
    forwards = ((noised.x_t - SD.at(noised.t, noised.x_t)[0] * noised.real) / SD.at(noised.t, noised.x_t)[1])[noised.node > 0]
    table = torch.stack([first, *noises(Streams(0, 7)), *noises(Streams(0, 8)), *noises(Streams(0, 7, rank=1))]).double()
    assert float((table.corrcoef() - torch.eye(len(table))).abs().max()) < 5 / math.sqrt(table.shape[1])
    other = torch.stack([first.view(n, -1)[noised.node > 0].flatten(), forwards.flatten()]).double()
    assert abs(float(other.corrcoef()[0, 1])) < 5 / math.sqrt(other.shape[1])


def test_the_control_stands_at_the_same_times():
    """Forward latents at the very nodes of a roll-out, or timestep emphasis is mistaken for the correction of the shift."""
    m, b = method(how=renoise, grid=Grid.consistency(), guidance=(2.0, 8.0)), batch(200)
    made = collect(b, m, STUDENTS, Streams(0, 3), SHAPE)
    m.policies.student.denoiser.network.calls.clear()
    control = collect(b, m, STUDENTS, Streams(0, 3), SHAPE, Rollouts(control=True))
    assert m.times("student") == m.times("teacher") == []
    assert torch.equal(control.t, made.t) and torch.equal(control.row, made.row) and torch.equal(control.c.w, made.c.w)
    assert control.source.unique().tolist() == [FORWARD] and control.x_t.shape == made.x_t.shape
    alpha, sigma = SD.at(control.t, control.x_t)
    eps = ((control.x_t - alpha * b.latent[control.row]) / sigma).view(-1, b.latent.numel()).double()
    assert float((eps.corrcoef() - torch.eye(len(eps))).abs().max()) < 5 / math.sqrt(b.latent.numel())
    drawn = draw(batch(8), m, HALF, Streams(0, 1), shape=SHAPE, rollouts=Rollouts(control=True))
    assert torch.equal(drawn.t, draw(batch(8), m, HALF, Streams(0, 1), shape=SHAPE).t) and drawn.source.unique().tolist() == [FORWARD]
    with pytest.raises(ValueError, match=r"no images: set data\.rollouts\.control to false"):
        collect(batch(images=False), m, STUDENTS, Streams(0, 3), SHAPE, Rollouts(control=True))


@pytest.mark.parametrize(("wants", "said"), [(Wants(pure_noise=True), None), (Wants(), True)])
def test_the_control_begins_in_noise_as_forward_latents_of_the_method_do(wants: Wants, said: bool | None) -> None:
    m, b = method(how=renoise)._replace(wants=wants), batch(200)
    how = Rollouts(control=True, pure_noise=said)
    one, other = (collect(x, m, STUDENTS, Streams(0, 3), SHAPE, how) for x in (b, b._replace(latent=b.latent + 9)))
    moved = (one.x_t - other.x_t).flatten(1).any(1)
    assert torch.equal(moved, one.t < one.t.max()), "at node 0 nothing of the data is seen, at every other all of it"
    assert abs(float(one.x_t[:200].var()) - 1) < 0.05


def test_a_method_without_a_teacher_policy_says_so():
    m = method()
    alone = m._replace(policies=Policies(m.policies.student))
    with pytest.raises(ValueError, match="no teacher policy: give that share to the student"):
        rolled(alone, [True, False, True, True])
    assert len(rolled(alone, [True] * 4).t) == 12


def test_every_rung_is_drawn_and_walked_no_further():
    """FastVideo 743: the wrong rung trained, the pure-noise rung lost, every rung simulated whatever rung is drawn."""
    seen, n = [], 240
    for step in range(n):
        m = method()
        b = fresh(batch(2), m, STUDENTS, Streams(0, step), SHAPE)
        node = int(b.node[0])
        assert m.times("student") == GRID.nodes.tolist()[:node] and b.t.tolist() == [GRID.nodes.tolist()[node]] * 2
        assert torch.equal(b.s, GRID.after(b.t)) and b.real is None
        seen.append(node)
    share = torch.tensor(seen).bincount(minlength=4) / n
    assert bool(((share - 0.25).abs() < 4 * (0.25 * 0.75 / n) ** 0.5).all())


# Algorithm 1 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pure_noise", [False, True])
def test_without_roll_outs_the_draw_is_the_forward_source(pure_noise: bool):
    """beta = (1, 0, 0): the step of the underlying method, bit by bit, with or without a filled buffer and without a network call."""
    m, streams = method(guidance=(2.0, 8.0)), Streams(0, 5)
    plain = forward(batch(), m, streams, Wants(pure_noise))
    full = ReplayBuffer(100)
    made = collect(batch(), method(), STUDENTS, streams, SHAPE)
    full.add(made, clock=0, stage=0)
    for buffer, granularity in ((None, "sample"), (full, "sample"), (None, "step")):
        how = Rollouts(granularity=granularity, pure_noise=pure_noise)
        drawn = draw(batch(), m, SamplingPrior(), streams, shape=SHAPE, buffer=buffer, rollouts=how)
        assert same(drawn, plain)
    assert m.times("student") == m.times("teacher") == [] and torch.equal(plain.real, batch().latent)
    assert plain.source.unique().tolist() == [FORWARD] and plain.weight.unique().tolist() == [1] and plain.slot.unique().tolist() == [-1]


def test_forward_latents_are_noised_data():
    n = 4000
    b = forward(batch(n), method(), Streams(0, 0))
    alpha, sigma = SD.at(b.t, b.x_t)
    eps = (b.x_t - alpha * b.real) / sigma
    assert float(eps.std()) == pytest.approx(1, abs=0.02) and abs(float((eps * b.real).mean())) < 0.02
    assert torch.equal(b.s, GRID.after(b.t)) and torch.equal(b.node, GRID.rows(b.t)) and len(b.node.unique()) == 4
    pure = forward(batch(n), method(), Streams(0, 0), Wants(pure_noise=True))
    first = b.node == 0
    assert torch.allclose(pure.x_t[first], eps[first], atol=1e-4) and torch.equal(pure.x_t[~first], b.x_t[~first])


def test_a_mixed_batch_keeps_its_captions_and_its_data():
    b, m = batch(8), method(guidance=(2.0, 8.0))
    drawn = draw(b, m, HALF, Streams(0, 1), shape=SHAPE)
    assert drawn.source.tolist()[:4] == [FORWARD] * 4 and FORWARD not in drawn.source.tolist()[4:]
    assert torch.equal(drawn.c.text, b.c.text) and torch.equal(drawn.real, b.latent)
    assert bool(((drawn.c.w >= 1) & (drawn.c.w <= 7)).all())  # w = g - 1
    for calls in (p.denoiser.network.calls for p in m.policies):  # one w for both actors of a trajectory, and for the loss
        assert all(torch.equal(w, drawn.c.w[4:]) for _, w in calls)
    assert same(drawn, draw(b, method(guidance=(2.0, 8.0)), HALF, Streams(0, 1), shape=SHAPE))
    assert not torch.equal(drawn.x_t, draw(b, m, HALF, Streams(0, 2), shape=SHAPE).x_t)
    free = draw(batch(images=False), m, STUDENTS, Streams(0, 1), shape=SHAPE)
    assert free.real is None and len(free.t) == 8


def test_guidance_is_uniform_in_w():
    w = guided(batch(20_000).c, (2.0, 14.0), torch.Generator().manual_seed(0)).w
    assert 1 <= float(w.min()) < 1.01 and 12.99 < float(w.max()) < 13 and float(w.mean()) == pytest.approx(7, abs=0.1)
    assert guided(batch(3).c, (7.5, 7.5), torch.Generator()).w.tolist() == [6.5] * 3


# Ends ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [ddim, renoise], ids=["ddim", "renoise"])
@pytest.mark.parametrize("upto", [None, 1])
def test_a_roll_out_that_goes_on_to_its_end_has_the_same_states(how: Any, upto: int | None):
    m, actors = method(how=how), [False, True, True, False]
    plain, whole = rolled(m, actors, upto=upto), rolled(m, actors, upto=upto, ends=True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:5], whole[:5], strict=True)) and plain.noise is plain.end is None
    x, generator = start(3, 0)
    assert torch.equal(whole.noise, x)
    times = GRID.times.tolist()
    for i, acts in enumerate(actors):
        x = (m.policies.student if acts else m.policies.teacher)(x, times[i], times[i + 1], batch(3).c, generator)
    assert torch.equal(whole.end, x)


def test_pairs_are_coupled_by_the_flow_and_stay_with_their_states():
    """Data of a Gaussian: the end of the flow is a known affine map of the noise, exact for the deterministic teacher."""
    law = Gaussian(-0.5, 0.9, SD)
    m, buffer = method(teacher=law, wants=Wants(ends=True)), ReplayBuffer(1000)
    prior = SamplingPrior(0.25, 0.0, 0.75)
    for step in range(4):
        buffer.add(collect(batch(8), m, prior, Streams(0, step), SHAPE), clock=step, stage=0)
    restored = ReplayBuffer(1000)
    restored.load_state_dict(buffer.state_dict())
    for held in (buffer, restored, None):
        drawn = draw(batch(16), m, prior, Streams(1, 0), shape=SHAPE, buffer=held)
        assert drawn.source.tolist() == [FORWARD] * 4 + [TEACHER] * 12
        # Of forward latents the pair is independent noise and data, on whose line x_t lies.
        alpha, sigma = SD.at(drawn.t[:4], drawn.x_t)
        assert torch.equal(drawn.end[:4], batch(16).latent[:4])
        assert torch.allclose(drawn.x_t[:4], alpha * drawn.end[:4] + sigma * drawn.noise[:4], atol=1e-6)
        # Of the teacher's, the end is what its sampler makes of the noise, and x_t a state between the two.
        policy = m.policies.teacher
        for i in range(4, 16):
            c = Context(drawn.c.text[i : i + 1], w=drawn.c.w[i : i + 1])
            states = [drawn.noise[i : i + 1], *policy.walk(drawn.noise[i : i + 1], GRID, c)]
            assert torch.allclose(states[-1], drawn.end[i : i + 1], atol=1e-5)
            assert torch.allclose(states[GRID.nodes.tolist().index(int(drawn.t[i]))], drawn.x_t[i : i + 1], atol=4e-3)
    assert draw(batch(16), method(teacher=law), prior, Streams(1, 0), shape=SHAPE).noise is None


def test_the_control_has_no_ends():
    with pytest.raises(ValueError, match="no trajectories, whose ends this method needs: set data.rollouts.control to false"):
        draw(batch(), method(wants=Wants(ends=True)), STUDENTS, Streams(0, 0), shape=SHAPE, rollouts=Rollouts(control=True))


def test_a_method_asks_for_pure_noise_and_of_one_node_needs_no_data():
    m = method(grid=Grid.named("linspace", 1), wants=Wants(pure_noise=True))
    drawn = draw(batch(64, images=False), m, SamplingPrior(), Streams(0, 0), shape=SHAPE)
    assert drawn.x_t.shape == (64, *SHAPE) and drawn.real is None and drawn.t.unique().tolist() == [999]
    assert float(drawn.x_t.std()) == pytest.approx(1, abs=0.05) and drawn.source.unique().tolist() == [FORWARD]
    assert torch.equal(drawn.x_t, draw(batch(64, images=True), m, SamplingPrior(), Streams(0, 0), shape=SHAPE).x_t)
    both = method(grid=Grid.named("linspace", 1), wants=Wants(pure_noise=True, ends=True))
    for prior in (SamplingPrior(), HALF):  # of forward latents the end is an image
        with pytest.raises(ValueError, match="no images: give that share to the teacher"):
            draw(batch(images=False), both, prior, Streams(0, 0), shape=SHAPE)
    many = method(wants=Wants(pure_noise=True))
    with pytest.raises(ValueError, match="no images: give that share to the teacher"):
        draw(batch(images=False), many, SamplingPrior(), Streams(0, 0), shape=SHAPE)
    rollouts = (Rollouts(pure_noise=x) for x in (None, False))
    asked, told = (draw(batch(64), many, SamplingPrior(), Streams(0, 0), shape=SHAPE, rollouts=x) for x in rollouts)
    first = asked.node == 0
    assert bool(first.any()) and not torch.equal(asked.x_t[first], told.x_t[first]) and torch.equal(asked.x_t[~first], told.x_t[~first])


@pytest.mark.parametrize("prior", [SamplingPrior(), HALF, STUDENTS])
@pytest.mark.parametrize("ends", [False, True])
def test_the_host_knows_where_the_rows_of_a_batch_come_from(prior, ends):
    m, buffer = method(wants=Wants(ends=ends)), ReplayBuffer(1000)
    buffer.add(collect(batch(8), m, STUDENTS, Streams(0, 0), SHAPE), clock=0, stage=0)
    for held in (buffer, None):
        b, origin = drawn(batch(8), m, prior, Streams(0, 1), shape=SHAPE, buffer=held)
        assert origin == Origin.of(b) and (origin.whole is not None) is ends
        assert [b.source[row] != FORWARD for row in range(8)] == [row in origin.rolled for row in range(8)]


# The buffer ---------------------------------------------------------------------------------------------------------------------


def test_buffered_states_keep_their_caption_and_guidance():
    """LCM: collected on 3, 4 or 5 nodes, trained on the grid of 50, whose next node is 20 earlier and not the roll-out's."""
    m, buffer = method(how=renoise, grid=Grid.consistency(), guidance=(2.0, 8.0)), ReplayBuffer(1000)
    known: dict[tuple[float, float], Tensor] = {}
    for step in range(6):
        made = collect(batch(8), m, STUDENTS, Streams(0, step), SHAPE)
        buffer.add(made, clock=step, stage=0)
        known |= {(float(made.c.w[r]), float(t)): x for x, t, r in zip(made.x_t, made.t, made.row, strict=True)}
        assert len(made.t) // 8 in (3, 4, 5)
    calls = len(m.times("student"))
    b = batch(64)
    drawn = draw(b, m, SamplingPrior(0.25, 0.75, 0.0), Streams(1, 0), shape=SHAPE, buffer=buffer)
    for i in range(16, 64):
        assert torch.allclose(drawn.x_t[i], known[float(drawn.c.w[i]), float(drawn.t[i])], atol=4e-3)  # float16 storage
    assert drawn.source.tolist() == [FORWARD] * 16 + [STUDENT] * 48 and torch.equal(drawn.real, b.latent)
    assert torch.equal(drawn.node, m.grid.rows(drawn.t)) and torch.equal(drawn.s[16:], drawn.t[16:] - 20)
    assert bool((drawn.slot[16:] >= 0).all()) and len(m.times("student")) == calls  # reuse costs no network call


def test_a_buffer_that_holds_too_little():
    m, buffer = method(), ReplayBuffer(100)
    assert same(draw(batch(), m, HALF, Streams(0, 1), shape=SHAPE, buffer=buffer), forward(batch(), m, Streams(0, 1)))
    with pytest.raises(ValueError, match="collect a roll-out before the first draw"):
        draw(batch(images=False), m, STUDENTS, Streams(0, 1), shape=SHAPE, buffer=buffer)
    one = fresh(batch(1), method(), STUDENTS, Streams(0, 1), SHAPE)
    buffer.add(Rollout(one.x_t, one.t, torch.zeros(1), one.source, torch.zeros(1), one.c), clock=0, stage=0)
    for data in (batch(), batch(images=False)):  # one state is enough: it is drawn with replacement
        assert draw(data, m, STUDENTS, Streams(0, 1), shape=SHAPE, buffer=buffer).slot.tolist() == [0] * len(data.rows)
    with pytest.raises(ValueError, match="no images: give that share to the teacher"):
        draw(batch(images=False), m, HALF, Streams(0, 1), shape=SHAPE)
