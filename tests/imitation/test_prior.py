"""Priors stay on the simplex whatever the schedule and the clock; wrong ones are refused by name and number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from ddil_lightning.imitation.prior import Constant, Cosine, Exponential, Gated, GatedBy, Linear, Piecewise, SamplingPrior, Schedule

FIRST = SamplingPrior(0.5, 0.15, 0.35)  # part 1 and part 2 of a stage (METHODS 1.5)
LAST = SamplingPrior(0.4, 0.42, 0.18)
FREE = SamplingPrior(0.0, 1.0, 0.0)
CLOCKS = [0, 1, 2, 99, 100, 101, 333, 999, 1000, 1001, 10**6, 10**12, 2**63]
MADE: dict[str, Callable[[SamplingPrior, SamplingPrior], Schedule]] = {
    "constant": lambda a, b: Constant(a),
    "piecewise": lambda a, b: Piecewise([a, b], [0, 100]),
    "linear": lambda a, b: Linear(a, b, end=1000, start=100),
    "cosine": lambda a, b: Cosine(a, b, end=1000),
    "exponential": lambda a, b: Exponential(a, b, rate=0.7, every=13),
    "gated": lambda a, b: Gated(a, b, steps=7),
}


def shares(prior: SamplingPrior) -> tuple[float, float, float]:
    return prior.forward, prior.student, prior.teacher


@pytest.mark.parametrize("name", MADE)
def test_every_schedule_stays_on_the_simplex(name: str):
    rng = random.Random(0)
    pairs = [(FIRST, LAST), (FIRST, FREE), (FREE, SamplingPrior(0.0, 0.0, 1.0))]
    for _ in range(30):
        cuts = [sorted((rng.random(), rng.random())) for _ in range(2)]
        a, b = (SamplingPrior(1 - v, u, v - u) for u, v in cuts)
        pairs.append((a, b))
    for first, last in pairs:
        if name == "gated" and not (first.forward and first.student):
            continue  # it has nothing to compare
        schedule = MADE[name](first, last)
        for clock in CLOCKS:
            prior = schedule(clock)
            assert all(0 <= share <= 1 for share in shares(prior)) and sum(shares(prior)) == pytest.approx(1, abs=1e-12)
            low, high = (min(first.p_student, last.p_student), max(first.p_student, last.p_student))
            assert low - 1e-9 <= prior.p_student <= high + 1e-9
            for share, a, b in zip(shares(prior), shares(first), shares(last), strict=True):
                assert min(a, b) - 1e-12 <= share <= max(a, b) + 1e-12


@pytest.mark.parametrize("name", ["piecewise", "linear", "cosine", "exponential"])
def test_schedules_start_at_the_first_prior_and_end_at_the_last(name: str):
    schedule = MADE[name](FIRST, LAST)
    assert shares(schedule(0)) == pytest.approx(shares(FIRST), abs=1e-15)
    assert shares(schedule(10**9)) == pytest.approx(shares(LAST), abs=1e-15)
    assert schedule(77) == schedule(77)  # a function of the clock: a resumed run repeats it
    rising = [schedule(clock).student for clock in range(0, 1200, 10)]
    assert all(a <= b + 1e-15 for a, b in zip(rising, rising[1:], strict=False))


@pytest.mark.parametrize(
    ("schedule", "clock", "share"),
    [
        (Linear(FIRST, LAST, end=300, start=100), 150, 0.25),
        (Linear(FIRST, LAST, end=300, start=100), 99, 0.0),
        (Cosine(FIRST, LAST, end=400), 100, (1 - math.cos(math.pi / 4)) / 2),
        (Cosine(FIRST, LAST, end=400), 200, 0.5),
        (Exponential(FIRST, LAST, rate=0.5, every=100), 100, 0.5),
        (Exponential(FIRST, LAST, rate=0.5, every=100), 350, 1 - 0.5**3.5),
        (Piecewise([FIRST, LAST], [0, 10]), 9, 0.0),
        (Piecewise([FIRST, LAST], [0, 10]), 10, 1.0),
    ],
)
def test_values_between(schedule: Schedule, clock: int, share: float):
    want = [(1 - share) * a + share * b for a, b in zip(shares(FIRST), shares(LAST), strict=True)]
    assert shares(schedule(clock)) == pytest.approx(want, abs=1e-12)


def test_piecewise_walks_its_parts():
    parts = [SamplingPrior(), FIRST, LAST]
    schedule = Piecewise(parts, [0, 5, 50])
    assert [schedule(clock) for clock in (0, 4, 5, 49, 50, 10**9)] == [parts[0], parts[0], parts[1], parts[1], parts[2], parts[2]]


def test_the_share_of_the_student_in_roll_outs():
    """beta_student = (1 - b_f) p_S and beta_teacher = (1 - b_f) (1 - p_S): METHODS 1.5."""
    assert (FIRST.rollouts, FIRST.p_student) == (pytest.approx(0.5), pytest.approx(0.3))
    assert (LAST.rollouts, LAST.p_student) == (pytest.approx(0.6), pytest.approx(0.7))
    assert SamplingPrior().p_student == SamplingPrior().rollouts == 0 and FREE.p_student == 1
    assert FIRST.towards(LAST, 0.5).mix == FIRST.mix == "interval"
    whole = SamplingPrior(0.4, 0.42, 0.18, mix="trajectory")
    # The last one's mix had been dropped in silence; one of whose roll-outs nobody or one alone takes part has none to lose.
    for lone in (SamplingPrior(), FREE):
        assert lone.towards(whole, 0.3).mix == whole.towards(lone, 0.3).mix == "trajectory"
    for kind in ("linear", "cosine", "exponential", "gated"):
        with pytest.raises(ValueError, match="a prior of mix interval moves to one of mix trajectory, .* or take Piecewise"):
            MADE[kind](FIRST, whole)
    assert MADE["piecewise"](FIRST, whole)(100).mix == "trajectory"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SamplingPrior(0.5, 0.2, 0.2), r"sum to 0\.9, not 1: forward 0\.5 \+ student 0\.2 \+ teacher 0\.2"),
        (lambda: SamplingPrior(0.5, 0.5, 2e-6), r"sum to 1\.000002, not 1"),
        (lambda: SamplingPrior(1.2, -0.2, 0.0), r"share forward = 1\.2 is not between 0 and 1"),
        (lambda: SamplingPrior(0.5, -0.1, 0.6), r"share student = -0\.1 is not between 0 and 1"),
        (lambda: SamplingPrior(float("nan"), 0.5, 0.5), "share forward = nan is not between 0 and 1"),
        (lambda: SamplingPrior(mix="coin"), "'trajectory' or 'interval', not 'coin'"),  # type: ignore[arg-type]
        (lambda: Linear(FIRST, LAST, end=5, start=5), "from start 5 to a later end, got 5"),
        (lambda: Cosine(FIRST, LAST, end=5, start=-1), "from start -1"),
        (lambda: Exponential(FIRST, LAST, rate=1.0), r"0 < rate < 1 and every >= 1, got 1\.0 and 100"),
        (lambda: Exponential(FIRST, LAST, every=0), r"got 0\.5 and 0"),
        (lambda: Piecewise([FIRST, LAST], [0]), r"got 2 priors and starts \[0\]"),
        (lambda: Piecewise([FIRST, LAST], [0, 0]), r"rising from 0; got 2 priors and starts \[0, 0\]"),
        (lambda: Piecewise([FIRST], [3]), r"rising from 0; got 1 priors and starts \[3\]"),
        (lambda: Piecewise([], []), "got 0 priors"),
        (lambda: Gated(FIRST, LAST, steps=0), r"steps is 0: give a number of at least 1"),
        (lambda: Gated(FIRST, LAST, ratio=-1.0), r"ratio is -1\.0: give a number above 0"),
        (lambda: Gated(SamplingPrior(), LAST), "give its first prior a student share"),
        (lambda: Gated(SamplingPrior(0.5, 0.0, 0.5), LAST), "give its first prior a student share"),
        (lambda: Gated(SamplingPrior(0.0, 1.0), LAST), "give its first prior a forward share, or take GatedBy"),
    ],
)
def test_errors_name_the_number_and_the_remedy(make: Callable[[], object], match: str):
    with pytest.raises(ValueError, match=match):
        make()


def test_rounded_shares_are_accepted():
    """Thirds written with seven digits are a prior; its roll-outs never exceed a batch by rounding (see test_rollout)."""
    assert SamplingPrior(0.3333333, 0.3333333, 0.3333334).rollouts == pytest.approx(2 / 3, abs=1e-6)
    with pytest.raises(TypeError, match="give it a __call__"):
        Schedule()(0)


@pytest.mark.parametrize(
    ("state", "steps", "level"),
    [
        ({"level": 8, "steps": 10, "passed": 1}, 4, 3),
        ({"level": 8, "steps": 10, "passed": 1}, 20, 16),
        ({"level": 10, "steps": 10, "passed": 0}, 4, 4),
        ({"level": 8, "passed": 1}, 4, 4),  # of before states said it
    ],
)
@pytest.mark.parametrize("kind", ["gated", "by"])
def test_a_gated_schedule_goes_on_with_other_steps(kind: str, state: dict[str, int], steps: int, level: int) -> None:
    """It was beyond its last prior: a share above 1, or one that nobody had asked for."""
    schedule = Gated(FIRST, LAST, steps=steps) if kind == "gated" else GatedBy(FIRST, LAST, "x", 1.0, steps=steps)
    schedule.state = state
    assert (schedule.level, schedule.passed) == (level, state["passed"]) and schedule(0) == FIRST.towards(LAST, level / steps)
    assert schedule.state["steps"] == steps


def test_gated_rises_by_patience_in_a_row():
    schedule = Gated(FIRST, LAST, ratio=1.25, steps=4, patience=3)
    for on_policy in (1.2, 1.2, 1.3, 1.2, 1.2):  # 1.3 is over 1.25 and breaks the row
        schedule.observe(on_policy, 1.0)
    assert (schedule.level, schedule(10**9)) == (0, FIRST)  # the clock alone moves nothing
    schedule.observe(1.2, 1.0)
    assert schedule.level == 1 and shares(schedule(0)) == pytest.approx(shares(FIRST.towards(LAST, 0.25)))
    for _ in range(100):
        schedule.observe(0.5, 1.0)
    assert schedule.level == 4 and shares(schedule(0)) == pytest.approx(shares(LAST))


def test_gated_hears_the_students_own_latents_by_their_numbers():
    """The teacher's roll-outs are not on-policy: they had lowered the mean, and the prior moved on before the student was good."""
    heard: list[tuple[float, float]] = []
    schedule = Gated(FIRST, LAST)
    schedule.observe = lambda own, forward: heard.append((own, forward))  # type: ignore[method-assign]
    shared = {"drawn/share_forward": 0.25, "drawn/share_student": 0.1, "drawn/share_mixed": 0.3, "drawn/share_teacher": 0.35}
    schedule.hear(1, {"forward": 1.0, "student": 2.0, "mixed": 4.0, "teacher": 0.1, **shared})
    schedule.hear(2, {"forward": 1.0, "mixed": 3.0, "teacher": 0.1})
    schedule.hear(3, {"forward": 1.0, "teacher": 0.1})
    schedule.hear(4, {"student": 2.0})
    assert heard == [(pytest.approx(3.5), 1.0), (3.0, 1.0)]


@pytest.mark.parametrize(("on_policy", "forward"), [(float("nan"), 1.0), (1.0, float("nan")), (1.0, 0.0), (float("inf"), 1.0), (1.25, 1.0)])
def test_gated_does_not_rise_on_what_it_cannot_judge(on_policy: float, forward: float):
    schedule = Gated(FIRST, LAST, patience=1)
    schedule.observe(on_policy, forward)
    assert schedule.level == 0
