"""Stored pairs: the teacher's own trajectories by their ends, kept in a folder that knows whose they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones import LatentsAlone
from ddil_lightning.data import pairs as stored_pairs
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.pairs import NAME, Maker, Stored
from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.reflection import Reflection
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.feed import Pairs, Wants
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import forward
from ddil_lightning.processes import Processes
from ddil_lightning.records import CaptionBatch, Context, LatentBatch, Pair
from ddil_lightning.streams import Streams
from toys import SCHEDULE, Toy, data, first, module

MU, S, STEPS, ROWS = 0.5, 0.7, 8, 10


class Exact(LatentsAlone):
    """A teacher whose flow is known: N(mu, S^2) in every coordinate."""

    def __init__(self, mu: float = MU) -> None:
        super().__init__("gaussian", SCHEDULE, "x0", (1, 2, 2), {"guidance": 1.0})
        self.exact = Gaussian(mu, S, SCHEDULE)

    def network(self) -> Any:
        return self.exact

    def fingerprint(self) -> str:
        return f"{float(self.exact.mu)}"

    def null(self) -> Context:
        return Context(torch.zeros(1, 1, 1))


class Words(Captions):
    def __init__(self, words: str = "w") -> None:
        self.words = words

    def __len__(self) -> int:
        return ROWS

    def prompts(self, index: Any) -> list[str]:
        return [f"{self.words} {i}" for i in index]


def taken(rows: Tensor) -> CaptionBatch:
    return CaptionBatch(None, Context(torch.zeros(len(rows), 1, 1)), rows)


def make(pairs: Pairs, mu: float = MU, g: tuple[float, float] = (1.0, 1.0), words: str = "w", batch: int = 4) -> Stored:
    groups = [torch.arange(0, ROWS, 2), torch.arange(1, ROWS, 2)]
    return Maker(pairs, Exact(mu), g, taken, batch, Processes()).made(groups, Words(words))


@pytest.mark.parametrize(("g", "each"), [((1.0, 1.0), 1), ((1.0, 3.0), 2)])
def test_a_teacher_without_guidance_is_asked_once_a_step(g: tuple[float, float], each: int) -> None:
    maker = Maker(Pairs(steps=STEPS), Exact(), g, taken, 4, Processes())
    maker.made([torch.arange(ROWS)], Words("w"))
    assert maker.policy.denoiser.evaluations == each * STEPS * ROWS


def ddim_map(z: Tensor, schedule: NoiseSchedule = SCHEDULE, steps: int = STEPS) -> Tensor:
    """DDIM on trailing nodes with the closed-form posterior mean of N(mu, S^2)."""
    times = [*(1000 - 1000 * k // steps - 1 for k in range(steps)), -1]
    x = z.double()
    for t, s in zip(times, times[1:], strict=False):
        a, sg, a_s, s_s = (float(table[i]) for i in (t, s) for table in (schedule.alphas, schedule.sigmas))
        x0 = MU + a * S**2 / (a * a * S**2 + sg * sg) * (x - a * MU)
        x = a_s * x0 + s_s * (x - a * x0) / sg
    return x


def test_an_end_is_what_the_teachers_ddim_makes_of_its_noise() -> None:
    made = make(Pairs(steps=STEPS, each=2), g=(2.0, 4.0))
    rows = torch.arange(ROWS)
    for number in range(2):
        pair = made.of(rows, torch.full_like(rows, number))
        torch.testing.assert_close(pair.end.double(), ddim_map(pair.noise), atol=2e-3, rtol=2e-3)  # stored in half precision
        assert bool((pair.w >= 1).all()) and bool((pair.w <= 3).all()) and pair.w.unique().numel() == ROWS
    assert abs(float(pair.noise.std()) - 1) < 0.4


def test_a_pair_follows_from_seed_row_and_number_alone() -> None:
    rows, one = torch.tensor([7, 2]), torch.tensor([0, 1])
    pairs = [make(Pairs(steps=2, each=2), batch=b).of(rows, one) for b in (1, 5)]
    assert torch.equal(pairs[0].noise, pairs[1].noise) and torch.allclose(pairs[0].end, pairs[1].end)
    other = make(Pairs(steps=2, each=2, seed=1)).of(rows, one)
    again = make(Pairs(steps=2, each=2)).of(rows, 1 - one)
    assert not torch.equal(other.noise, pairs[0].noise) and not torch.equal(again.noise, pairs[0].noise)


def test_a_folder_is_read_and_one_that_was_cut_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_pairs, "PART", 3)
    solved: list[int] = []
    solve = Maker._solved
    monkeypatch.setattr(Maker, "_solved", lambda self, part: solved.append(len(part.rows)) or solve(self, part))
    pairs, rows = Pairs(str(tmp_path / "p"), STEPS), torch.arange(ROWS)
    before = make(pairs).of(rows, rows * 0)
    assert solved == [3, 2, 3, 2]
    files = sorted((tmp_path / "p").glob("pairs-*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-9])  # of a disk that was full
    files[2].unlink()  # of a run that was killed
    (tmp_path / "p" / f".{files[2].name}.999999999.ddil-part").touch()
    after = make(pairs).of(rows, rows * 0)
    assert solved == [3, 2, 3, 2, 2, 3] and torch.equal(before.noise, after.noise) and torch.equal(before.end, after.end)
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == sorted([NAME, *(f.name for f in files)])
    memory = make(Pairs(None, STEPS)).of(rows, rows * 0)
    assert torch.equal(memory.end, after.end) and len(solved) == 10


def test_a_folder_that_another_has_just_begun_is_one_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told to hold something else, where the other began between two looks at it."""
    pairs, holds = Pairs(str(tmp_path / "p"), STEPS), stored_pairs.holds_anything
    looks = iter([lambda folder: make(pairs), holds])
    monkeypatch.setattr(stored_pairs, "holds_anything", lambda folder: (next(looks)(folder), holds(folder))[1])
    assert make(pairs).each == 1 and next(looks, None) is None


def test_pairs_of_something_else_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    make(Pairs(str(folder), 4))
    end = ": remove the folder, or give another model.pairs.path"
    for said, kwargs in {
        "by another teacher, or in another precision of its weights": {"mu": 0.4},
        "at guidance [1.0, 1.0], not [2.0, 2.0]": {"g": (2.0, 2.0)},
        "of other captions": {"words": "v"},
    }.items():
        with pytest.raises(ValueError) as error:
            make(Pairs(str(folder), 4), **kwargs)
        assert str(error.value) == f"the pairs in {folder} were made {said}{end}"
    for said, kwargs in {"in 4 steps, not 5": {"steps": 5}, "from the seed 0, not 1": {"seed": 1}, "with 1 of each": {"each": 2}}.items():
        with pytest.raises(ValueError, match=said):
            make(Pairs(str(folder), **{"steps": 4, **kwargs}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(ValueError, match="holds something else than pairs"):
        make(Pairs(str(tmp_path / "other")))
    with pytest.raises(ValueError, match="is a file: give a folder"):
        make(Pairs(str(tmp_path / "other" / "x")))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "pairs.steps is 0"),
        ({"each": -1}, "pairs.each is -1"),
        ({"seed": -1}, "pairs.seed is -1"),
        ({"path": ""}, "is empty"),
    ],
)
def test_options_out_of_range(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pairs(**wrong)


def test_a_teacher_is_known_by_its_weights_and_its_schedule(tiny: Path, tiny_eps: Path) -> None:
    from suite import backbone

    same, other = backbone(tiny), backbone(tiny_eps)  # the same weights, read as another prediction
    assert same.fingerprint() == backbone(tiny).fingerprint() != other.fingerprint()
    before = same.fingerprint()
    weight = next(same.network().parameters())
    with torch.no_grad():
        weight += 1
    assert same.fingerprint() != before
    with torch.no_grad():
        weight -= 1


def test_forward_latents_are_mixed_from_the_ends_of_a_pair() -> None:
    toy, stored, rows = Toy(), make(Pairs(steps=STEPS), g=(3.0, 5.0)), torch.tensor([4, 1, 9, 0, 2, 7])
    batch = stored.joined(taken(rows)._replace(latent=torch.ones(len(rows), 1, 2, 2)))
    got = forward(batch, toy, Streams(0, 0), Wants(pairs=Pairs()))  # type: ignore[arg-type]
    assert batch.pair is not None and got.noise is batch.pair.noise and got.end is batch.pair.end
    first = (got.node == 0).view(-1, 1, 1, 1)
    mixed = SCHEDULE.add_noise(batch.pair.end, batch.pair.noise, got.t)
    assert 0 < first.sum() < len(rows) and torch.equal(torch.where(first, got.x_t, mixed), mixed)
    assert torch.equal(got.c.w, batch.pair.w) and got.real is batch.latent
    plain = forward(batch, toy, Streams(0, 0), Wants())  # type: ignore[arg-type]
    bare = forward(batch._replace(pair=None), toy, Streams(0, 0), Wants())  # type: ignore[arg-type]
    assert plain.noise is None and torch.equal(plain.x_t, bare.x_t)  # who does not ask for pairs sees nothing of them
    with pytest.raises(ValueError, match="the data bring none: set model.pairs.each to 1 or more"):
        forward(batch._replace(pair=None), toy, Streams(0, 0), Wants(pairs=Pairs()))  # type: ignore[arg-type]


def test_forward_latents_of_pairs_have_the_law_of_their_noise_level() -> None:
    """A pair's end under its own noise has not: of the flow to N(mu, S^2), y = mu + S z, its variance were (alpha S + sigma)^2."""
    n, toy = 20_000, Toy()
    z = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    pair = Pair(z, MU + S * z, torch.ones(n))
    batch = CaptionBatch(None, Context(torch.zeros(n, 1, 1)), torch.arange(n), pair)
    got = forward(batch, toy, Streams(0, 0), Wants(pairs=Pairs(), pure_noise=True))  # type: ignore[arg-type]
    for node, t in enumerate(toy.grid.nodes.tolist()):
        alpha, sigma = (float(v) for v in SCHEDULE.at(torch.tensor([t]), torch.zeros(1, 1)))
        x = got.x_t[got.node == node]
        mean, variance = (alpha * MU, alpha**2 * S**2 + sigma**2) if node else (0.0, 1.0)
        assert float(x.mean()) == pytest.approx(mean, abs=0.06) and float(x.var()) == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize("mode", ["static", "dynamic", "off"])
def test_an_end_is_held_in_the_box_when_it_is_joined_and_not_where_it_is_stored(mode: Any) -> None:
    stored, rows = make(Pairs(steps=STEPS)), torch.tensor([4, 1, 9])
    free = stored.of(rows, rows * 0)
    stored.reflection = Reflection([0.2], [0.8], mode)
    held = stored.joined(taken(rows)).pair
    assert held is not None and torch.equal(held.end, stored.reflection(free.end)) and torch.equal(held.noise, free.noise)
    assert torch.equal(held.end, free.end) is (mode == "off") and torch.equal(stored.of(rows, rows * 0).end, free.end)


@pytest.mark.parametrize("reflects", [False, True])
def test_the_datamodule_makes_them_for_a_method_that_asks(tmp_path: Path, reflects: bool) -> None:
    """Without images; the pairs' own steps reach the teacher, every row keeps its pair over the epochs, and ends lie in its box."""
    toy = Toy()
    box = toy.policies.teacher.denoiser.reflection = Reflection([0.4] * 2, [0.6] * 2, "static") if reflects else None  # type: ignore[union-attr]
    toy.wants = Wants(pairs=Pairs(str(tmp_path / "p"), 3))
    teacher = toy.policies.teacher.denoiser  # type: ignore[union-attr]
    toy.backbone = SimpleNamespace(**vars(toy.backbone), fingerprint=lambda: "t", encoders=lambda: "e", schedule=SCHEDULE)
    toy.backbone.role, toy.backbone.device, toy.backbone.to = lambda name: teacher, torch.device("cpu"), lambda device: None
    toy.backbone.check_latents = lambda shape: None
    made = module(SamplingPrior(), data(8, images=False), toy)
    made.setup("fit")
    seen: dict[tuple[float, ...], set[float]] = {}
    for b in first(5, made):
        assert isinstance(b, LatentBatch) and b.noise is not None and b.end is not None and b.real is None
        assert bool(((b.end >= 0.4) & (b.end <= 0.6)).all()) is reflects
        for text, noise in zip(b.c.text, b.noise, strict=True):
            seen.setdefault(tuple(text.flatten().tolist()), set()).add(float(noise.sum()))
    assert len(seen) == 8 and all(len(sums) == 1 for sums in seen.values())
    assert made.reference(2).pair is not None and made._stored is not None and made._stored.reflection is box
