"""Plans follow the shares and are a pure function of the seed, so every rank issues the same network calls (METHODS 1.8)."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.feed import Wants
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import counts, draw, plan
from ddil_lightning.records import CaptionBatch, Context
from ddil_lightning.streams import Streams
from pair import Pair

SD = NoiseSchedule.scaled_linear()
PRIOR = SamplingPrior(0.45, 0.25, 0.3)
STEPS = 1000
GRID = Grid.named("linspace", 4)


class Calls(nn.Module):
    """An exact network that writes its calls, with their batch sizes, to a shared list."""

    def __init__(self, name: str, log: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.name, self.log, self.law = name, log, Gaussian(0.5, 0.7, SD)

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        self.log.append((self.name, int(t[0]), len(t)))
        return self.law(x_t, t, c)


class Method(NamedTuple):
    policies: Policies
    grid: Grid
    guidance: tuple[float, float] = (2.0, 8.0)
    wants: Wants = Wants()


def fingerprint(x: object) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.blake2b(repr(x).encode(), digest_size=16).digest()), dtype=torch.uint8)


def plans(rank: int) -> Tensor:
    """[STEPS, 16] one hash a step: how many roll-outs, which grid, who acts, where it stops."""
    grid = Grid.consistency()
    rows = []
    for step in range(STEPS):
        streams = Streams(0, step, rank=rank)
        rng = streams.shared("rollout")
        walk, actors = plan(PRIOR, grid, rng)
        shares = [counts(PRIOR, 7, how, streams.shared("source")) for how in ("sample", "step")]
        rows.append(fingerprint((shares, walk.times.tolist(), actors, rng.randrange(len(walk)))))
    return torch.stack(rows)


def calls(rank: int) -> tuple[Tensor, Tensor]:
    """A hash of all network calls of 40 draws, and of the latents that they made."""
    log: list[tuple[str, int, int]] = []
    policies = Policies(*(Policy(Denoiser(Calls(name, log), SD, "x0")) for name in ("student", "teacher")))
    method = Method(policies, Grid.named("linspace", 4))
    data = CaptionBatch(torch.zeros(7, 1, 2, 2), Context(torch.zeros(7, 1, 1)), torch.arange(7))
    made = [draw(data, method, PRIOR, Streams(0, step, rank=rank), shape=(1, 2, 2)) for step in range(40)]
    assert {name for name, _, _ in log} == {"student", "teacher"}
    return fingerprint(log), fingerprint([(b.x_t.tolist(), b.c.w.tolist()) for b in made])


def everything(rank: int) -> Tensor:
    log, latents = calls(rank)
    return torch.cat([plans(rank), log[None], latents[None]])


def test_two_ranks_and_one_draw_the_same_plan(pair: Pair):
    first, second = pair.run(everything)
    alone = everything(0)
    assert torch.equal(first[: STEPS + 1], second[: STEPS + 1])  # plans, and the calls that follow from them
    assert not torch.equal(first[-1], second[-1])  # noise and guidance are each rank's own
    assert torch.equal(first, alone)  # world size 1 is rank 0 of world size 2
    assert len(alone[:STEPS].unique(dim=0)) > STEPS // 20  # and the plans do change from step to step


def test_actors_follow_the_shares():
    """Interval mixing is a product of coins: a state at node i is the student's alone with probability p_S^i (METHODS 1.5)."""
    half = SamplingPrior(0.5, 0.15, 0.35)
    rng, n, p = random.Random(0), 20_000, half.p_student
    drawn = torch.tensor([plan(half, GRID, rng)[1] for _ in range(n)]).double()
    four_sd = 4 * (p * (1 - p) / n) ** 0.5
    assert bool(((drawn.mean(0) - p).abs() < four_sd).all())
    assert float((drawn.T.corrcoef() - torch.eye(4)).abs().max()) < 4 / math.sqrt(n)
    for i in range(1, 5):
        alone, q = float(drawn[:, :i].prod(1).mean()), p**i
        assert abs(alone - q) < 4 * (q * (1 - q) / n) ** 0.5
    whole = torch.tensor([plan(SamplingPrior(0.5, 0.15, 0.35, mix="trajectory"), GRID, rng)[1] for _ in range(n)]).double()
    assert bool((whole == whole[:, :1]).all()) and abs(float(whole[:, 0].mean()) - p) < four_sd
    students, teachers = SamplingPrior(0.0, 1.0, 0.0), SamplingPrior(0.0, 0.0, 1.0)
    assert all(all(plan(students, GRID, rng)[1]) and not any(plan(teachers, GRID, rng)[1]) for _ in range(50))


@pytest.mark.parametrize("granularity", ["sample", "step"])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_sources_follow_the_shares(granularity: Any, size: int):
    rng, n = random.Random(0), 8000
    share = SamplingPrior(0.45, 0.2, 0.35)
    drawn = torch.tensor([counts(share, size, granularity, rng) for _ in range(n)]).double() / size
    spread = float(drawn.std()) or 1e-9
    assert abs(float(drawn.mean()) - share.rollouts) < 4 * spread / math.sqrt(n)
    kinds = set((drawn * size).tolist())
    assert kinds <= ({0, size} if granularity == "step" else {math.floor(0.55 * size), math.ceil(0.55 * size)})
    assert {counts(SamplingPrior(), size, granularity, rng) for _ in range(9)} == {0}
    assert {counts(SamplingPrior(0.0, 1.0, 9e-7), 10**5 * size, granularity, rng) for _ in range(99)} == {10**5 * size}


def test_streams_are_a_pure_function():
    base = Streams(3, 17, stage=1, rank=0)
    assert base.shared("plan").random() == Streams(3, 17, 1, rank=5).shared("plan").random()  # every rank plans alike
    assert torch.equal(torch.rand(9, generator=base.local("noise")), torch.rand(9, generator=Streams(3, 17, 1, 0).local("noise")))
    base.shared("other").random(), base.local("other")  # asking for one stream moves no other
    others = [Streams(4, 17, 1), Streams(3, 18, 1), Streams(3, 17, 2), Streams(31, 7, 1), Streams(3, 1, 71)]
    values = [s.shared("plan").random() for s in (base, *others)] + [base.shared("plans").random()]
    numbers = [float(torch.rand(1, generator=s.local("noise"))) for s in (base, *others, base._replace(rank=1))]
    assert len(set(values)) == len(values) and len(set(numbers)) == len(numbers)
    assert base.shared("a").random() != random.Random(base.local("a").initial_seed()).random()
