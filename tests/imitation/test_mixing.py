"""Teacher and student in turns: the pure samplers bit by bit, every pattern, the closed-form mean; and what a step costs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import noise, renoising
from ddil_lightning.diffusion.analytic import Corrupted, Gaussian
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.imitation.gaps import loss, nodes, recovery, see, states
from ddil_lightning.imitation.mixing import Actor, Actors, Bernoulli, Mixing, Pattern, Switch, mix_all, mix_eval
from ddil_lightning.records import END, Context

SD = NoiseSchedule.scaled_linear()
GRID = Grid.named("linspace", 4)
TIMES = GRID.times.tolist()
MU, STD, BIAS, SHAPE = 0.7, 0.5, 0.3, (3,)


class Noted(Policy):
    """A policy that remembers the intervals it is asked for, a sample each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noted: list[tuple[int, int]] = []

    def forward(self, x_t: Tensor, t: int, s: int, *args: Any, **kwargs: Any) -> Tensor:
        self.noted += [(t, s)] * len(x_t)
        return super().forward(x_t, t, s, *args, **kwargs)


def pair(n: int = 6, transition: Any = ddim, bias: float = BIAS, substeps: int = 8) -> Actors:
    """A teacher that knows the law of its data, and a student whose x0 is off by `bias`."""
    exact, c = Gaussian(MU, STD, SD), Context(torch.zeros(n, 1, 1))
    teacher = Noted(Denoiser(exact, SD, "x0"), ddim, substeps)
    return Actors(Actor(Noted(Denoiser(Corrupted(exact, bias=bias), SD, "x0"), transition), c), Actor(teacher, c))


def pure(actor: Actor, n: int, seed: int) -> Tensor:
    return actor.policy.sample(noise(n, SHAPE, seed), GRID, actor.c, renoising(n, seed))


@pytest.mark.parametrize("transition", [ddim, renoise], ids=str)
def test_the_ends_of_every_sweep_are_the_pure_samplers_bit_by_bit(transition: Any) -> None:
    actors = pair(transition=transition)
    teacher, student = pure(actors.teacher, 6, 3), pure(actors.student, 6, 3)
    assert not torch.equal(teacher, student)
    first, last = TIMES[0], TIMES[-1]
    for mixing in (Bernoulli(1.0), Switch("teacher", last), Switch("student", first), Pattern(0)):
        assert torch.equal(mix_eval(actors, mixing, GRID, SHAPE, 3), teacher)
    for mixing in (Bernoulli(0.0), Switch("student", last), Switch("teacher", first), Pattern(15)):
        assert torch.equal(mix_eval(actors, mixing, GRID, SHAPE, 3), student)


def test_every_pattern_visits_every_node_once() -> None:
    for bits in range(16):
        actors = pair(n=1)
        mix_eval(actors, Pattern(bits), GRID, SHAPE)
        asked = actors.student.policy.noted + actors.teacher.policy.noted  # type: ignore[attr-defined]
        assert sorted(asked, reverse=True) == list(pairwise(TIMES))
        assert [bits >> j & 1 for j, interval in enumerate(pairwise(TIMES)) if interval in actors.student.policy.noted] == [  # type: ignore[operator]
            1
        ] * bits.bit_count()


def test_a_sweep_is_its_mixtures_one_by_one_and_shares_what_begins_alike() -> None:
    mixings: list[Mixing] = [*map(Bernoulli, (0.0, 0.3, 0.8, 1.0)), *(Switch(who, t) for who in ("teacher", "student") for t in TIMES[1:4])]
    actors = pair(transition=renoise)
    alone = torch.stack([mix_eval(actors, mixing, GRID, SHAPE, 5) for mixing in mixings])
    asked = len(actors.teacher.policy.noted)  # type: ignore[attr-defined,arg-type]
    torch.testing.assert_close(mix_all(actors, mixings, GRID, SHAPE, 5), alone, rtol=1e-5, atol=1e-6)
    shared = len(actors.teacher.policy.noted) - asked  # type: ignore[attr-defined,arg-type]
    walk = states(actors.teacher.policy, GRID, noise(6, SHAPE, 5), actors.teacher.c)
    before = len(actors.teacher.policy.noted)  # type: ignore[attr-defined,arg-type]
    torch.testing.assert_close(mix_all(actors, mixings, GRID, SHAPE, 5, walk), alone, rtol=1e-5, atol=1e-6)
    assert len(actors.teacher.policy.noted) - before == shared - 4 * 6 < 0.7 * asked - 4 * 6  # type: ignore[attr-defined,arg-type]


def means(actor_has_bias: list[float], substeps: list[int]) -> float:
    """The mean of the end from a mean of 0 at the start: DDIM is affine, x_s = a x_t + b x0, and x0 = mu + gain (x_t - alpha mu) + bias.

    `actor_has_bias`: of each interval the chance that it is the student's, which takes it in one step; the teacher takes `substeps`.
    """
    mean = 0.0
    for (t, s), p, k in zip(pairwise(TIMES), actor_has_bias, substeps, strict=True):
        inside = [round(t + (s - t) * i / k) for i in range(k + 1)]
        mean = p * _walk(mean, [t, s], BIAS) + (1 - p) * _walk(mean, inside, 0.0)
    return mean


def _walk(mean: float, stops: list[int], bias: float) -> float:
    for t, s in pairwise(stops):
        (a_t, s_t), (a_s, s_s) = ((float(SD.alphas[u]), float(SD.sigmas[u])) for u in (t, s))
        x0 = MU + a_t * STD**2 / (a_t**2 * STD**2 + s_t**2) * (mean - a_t * MU) + bias
        mean = s_s / s_t * mean + (a_s - s_s * a_t / s_t) * x0
    return mean


def test_a_known_bias_gives_the_closed_form_mean() -> None:
    """From zero noise a fixed pattern is its own mean, exactly; a random one has its mean over many samples."""
    n, eight = 4000, [8] * 4
    actors = pair(n)
    for share in (0.25, 0.75):
        made = mix_eval(actors, Bernoulli(1 - share), GRID, SHAPE, 11).double()
        free = mix_eval(pair(n, bias=0.0), Bernoulli(1 - share), GRID, SHAPE, 11).double()  # the same noise and turns, without the bias
        want = means([share] * 4, eight)
        # Both laws are affine with the same slopes, so the difference of means holds none of the start's noise.
        shift = made - free
        unbiased = means([share] * 4, eight) - _bias_part(share)
        assert float(shift.mean()) == pytest.approx(want - unbiased, abs=4 * float(shift.mean(1).std()) / n**0.5)
        assert float(made.mean()) == pytest.approx(want, abs=4 * float(made.mean(1).std()) / n**0.5)


def _bias_part(share: float) -> float:
    """What the bias adds to the mean of a mixture: the mean with it minus the mean without."""
    global BIAS
    kept, BIAS = BIAS, 0.0
    try:
        without = means([share] * 4, [8] * 4)
    finally:
        BIAS = kept
    return means([share] * 4, [8] * 4) - without


def test_shares_are_those_asked_for_and_nested() -> None:
    few, more = (Bernoulli(p).by_student(GRID, 3000, 2) for p in (0.3, 0.6))
    assert float((~few).float().mean()) == pytest.approx(0.3, abs=0.02) and float((~more).float().mean()) == pytest.approx(0.6, abs=0.02)
    assert not bool((more & ~few).any())  # the teacher keeps what it had
    assert torch.equal(Bernoulli(0.3).by_student(GRID, 5, 7), Bernoulli(0.3).by_student(GRID, 9, 3)[4:])  # by a sample's own seed


@pytest.mark.parametrize(
    ("mixing", "why"), [(Switch("teacher", 600), "switch at 600, which is none"), (Pattern(16), "pattern 16 is none"), (Pattern(-1), "-1")]
)
def test_what_no_grid_has_is_refused(mixing: Mixing, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mix_eval(pair(), mixing, GRID, SHAPE)
    with pytest.raises(ValueError, match=r"p_teacher is 1\.5"):
        Bernoulli(1.5)


# What a step costs -----------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_bias_and_nothing_without_one() -> None:
    """A student that steps as its teacher loses nothing; one whose x0 is off by b is off by b at the end, or by its step's share of it."""
    same = pair(bias=0.0, substeps=1)
    x = noise(6, SHAPE, 0)
    assert float(loss(same, GRID, 1, x).max()) < 1e-12
    off = pair(substeps=1)
    a_t, s_t, a_s, s_s = (float(f[t]) for t in TIMES[1:3] for f in (SD.alphas, SD.sigmas))
    torch.testing.assert_close(loss(off, GRID, 1, x), torch.full((6,), (BIAS * (a_s - s_s * a_t / s_t)) ** 2).double(), rtol=1e-4, atol=0)
    noisy = pair(transition=renoise, substeps=1)
    torch.testing.assert_close(loss(noisy, GRID, 3, x), torch.full((6,), BIAS**2).double(), rtol=1e-4, atol=0)
    walk = states(off.teacher.policy, GRID, x, off.teacher.c)
    torch.testing.assert_close(loss(off, GRID, 1, walk[TIMES[1]], walk), loss(off, GRID, 1, walk[TIMES[1]]))


@pytest.mark.parametrize("transition", [ddim, renoise], ids=str)
def test_large_latents_are_looked_at_a_few_at_a_time(transition: Any) -> None:
    """128 x 128 of them, of which two are sampled at once elsewhere, too: the same numbers as of each alone."""
    actors, x = pair(n=3, transition=transition, substeps=1), noise(3, (1, 128, 128), 0)
    found = states(actors.student.policy, GRID, x, actors.student.c, renoising(3, 7))
    walk = states(actors.teacher.policy, GRID, x, actors.teacher.c)
    lost = loss(actors, GRID, 1, walk[TIMES[1]], walk)
    for i in range(3):
        alone = pair(n=1, transition=transition, substeps=1)
        one = states(alone.student.policy, GRID, x[i : i + 1], alone.student.c, renoising(3, 7)[i : i + 1])
        assert all(torch.equal(found[t][i : i + 1], one[t]) for t in TIMES)
        its = {t: z[i : i + 1] for t, z in walk.items()}
        torch.testing.assert_close(lost[i : i + 1], loss(alone, GRID, 1, its[TIMES[1]], its))
    most: list[int] = []
    actors.student.policy.denoiser.register_forward_pre_hook(lambda module, given: most.append(len(given[0])))
    states(actors.student.policy, GRID, x, actors.student.c, renoising(3, 7))
    loss(actors, GRID, 1, walk[TIMES[1]], walk)
    assert max(most) == 2


def test_recovery_is_what_the_continuations_differ_by() -> None:
    """Students without an error have nothing to recover from; with a constant one both continuations differ by the same closed form."""
    same, x = pair(bias=0.0, substeps=1), noise(6, SHAPE, 1)
    walk = states(same.teacher.policy, GRID, x, same.teacher.c)
    assert max(float(part.max()) for part in recovery(same, GRID, 0, walk, 0)) < 1e-12
    off = pair(substeps=1)
    injected, plain = recovery(off, GRID, 1, walk, 0)
    start = float(walk[TIMES[2]][0, 0])
    gap = _walk(start, TIMES[2:], BIAS) - _walk(start, TIMES[2:], 0.0)
    torch.testing.assert_close(injected, torch.full((6,), gap**2).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(plain, injected, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_a_report_of_the_nodes_has_all_of_it() -> None:
    n = 400
    data = MU + STD * noise(n, SHAPE, 900)
    parts = [see(pair(n, transition=renoise), GRID, SHAPE, (0, 1000, 2000), data, asked) for asked in (16, 0)]
    rows = nodes(parts, GRID)
    assert [row["t"] for row in rows] == TIMES[:-1]
    late: Any = rows[2]
    assert late["shift"]["forward"]["frechet"] > 0.02 < late["shift"]["teacher"]["frechet"] and late["loss"]["on"] > 0.8 * BIAS**2
    first: Any = rows[0]
    assert abs(first["shift"]["teacher"]["energy_distance"]) < 0.05 and first["ratio"]["teacher"] == pytest.approx(1, abs=0.5)
    assert set(rows[-1]["recovery"]) == set() and set(rows[0]["recovery"]) == {"injected", "plain"}  # type: ignore[call-overload]
    without: Any = nodes([part._replace(forward={}, values={t: {"on": v["on"], "teacher": v["teacher"]} for t, v in part.values.items()})
                          for part in parts], GRID)  # fmt: skip
    assert set(without[1]["shift"]) == {"teacher"} == set(without[1]["ratio"]) and TIMES[-1] == END
