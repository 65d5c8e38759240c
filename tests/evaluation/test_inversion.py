"""Prompt inversion: the search against objectives with known answers, and its measures against closed forms."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.vocabulary import Vocabulary
from ddil_lightning.evaluation.inversion import Denoising, Noise, Search, held_noise, invert
from ddil_lightning.evaluation.likeness import judged, likeness, worded
from ddil_lightning.evaluation.table import cell
from ddil_lightning.miniature import judge, shapes
from ddil_lightning.miniature.wording import words_right
from ddil_lightning.runs import inverted


class Distance:
    """The squared distance of the words from given ones, which needs no noise: its minimum is known."""

    chunk = 8

    def __init__(self, goal: Tensor) -> None:
        self.goal = goal

    def draw(self, search: Search, generator: torch.Generator) -> Noise:
        return Noise(torch.zeros(1), torch.zeros(1))

    def __call__(self, embeddings: Tensor, noise: Noise) -> Tensor:
        return (embeddings - self.goal).square().sum((1, 2))


@pytest.fixture(scope="module")
def vocabulary(tiny: Path) -> Vocabulary:
    return Vocabulary(Pipeline(str(tiny)))


@pytest.mark.parametrize("search", [Search(4, updates=60, period=20, lr=0.02, passes=0), Search(4, updates=0, passes=1, candidates=99)])
def test_the_known_answer_is_found(vocabulary: Vocabulary, search: Search) -> None:
    """By delayed projection alone and by exchanges alone; the trace never rises, and the loss is that of the prompt."""
    goal = vocabulary.rows("small red circle left")
    found = invert(Distance(vocabulary.table[goal]), vocabulary, search, seed=3)
    assert (found.prompt, found.loss) == ("small red circle left", 0.0)
    assert torch.equal(found.rows, goal) and found.trace[0] > 0 and found.trace == sorted(found.trace, reverse=True)


@pytest.mark.parametrize(("updates", "periods"), [(0, []), (9, [9]), (20, [10, 10]), (25, [10, 10, 5])])
def test_no_update_is_left_out(vocabulary: Vocabulary, updates: int, periods: list[int]) -> None:
    """What the period leaves of them is projected, too; a draw of noise an update, and one that prompts are compared on."""
    drawn = []

    class Counted(Distance):
        def draw(self, search: Search, generator: torch.Generator) -> Noise:
            drawn.append(1)
            return super().draw(search, generator)

    search = Search(2, updates=updates, passes=1, candidates=2)
    found = invert(Counted(vocabulary.table[vocabulary.rows("red circle")]), vocabulary, search)
    assert (search.periods, len(drawn), len(found.trace)) == (periods, updates + 1, 2 + len(periods))
    said = inverted._losses([{"trace": found.trace, "loss": found.loss, "caption_loss": None}], asdict(search))
    assert ("after our PH2P" in said) == (updates > 0) and (f"after our PH2P {cell(found.trace[-2])}" in said) == (updates > 0)


@pytest.mark.parametrize("passes", [0, 2])
def test_a_latent_of_nan_is_refused(vocabulary: Vocabulary, passes: int) -> None:
    z = torch.full(vocabulary.backbone.latent_shape, math.nan)
    with pytest.raises(ValueError, match="^no prompt has a finite denoising loss"):
        invert(Denoising(vocabulary, z), vocabulary, Search(2, updates=1, samples=1, passes=passes))


def test_an_exchange_takes_the_candidate_that_is_best(vocabulary: Vocabulary) -> None:
    """One candidate at each place is what the gradient recommends: the word with the least inner product with it."""
    goal = vocabulary.table[vocabulary.rows("seven")]
    start = invert(Distance(goal), vocabulary, Search(1, updates=0, passes=0), seed=0)
    slope = 2 * (vocabulary.table[start.rows] - goal)
    advised = (vocabulary.table @ slope[0]).argmin()
    found = invert(Distance(goal), vocabulary, Search(1, updates=0, passes=1, candidates=1), seed=0)
    better = (vocabulary.table[advised] - goal).square().sum() < start.loss
    assert int(found.rows) == int(advised if better else start.rows)


def test_the_loss_is_the_teachers_own(vocabulary: Vocabulary) -> None:
    """Of a prompt in words: mean squared error of v at the noised latent, whatever the chunk; `draw` stays in its range, evenly."""
    backbone = vocabulary.backbone
    z = torch.randn(backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    objective = Denoising(vocabulary, z)
    noise = objective.draw(Search(timesteps=(600, 699), samples=10), torch.Generator().manual_seed(1))
    assert [int(t) // 10 for t in noise.t] == list(range(60, 70))
    prompts = ["a red circle", "nine blue square"]
    rows = torch.stack([vocabulary.rows(prompt) for prompt in prompts])
    with torch.no_grad():
        got = objective(vocabulary.table[rows], noise)
        for i, prompt in enumerate(prompts):
            alpha, sigma = backbone.schedule.at(noise.t, noise.eps)
            out = backbone.network()(alpha * z + sigma * noise.eps, noise.t, backbone.encode_text([prompt] * 10))
            assert torch.allclose(got[i], (out - (alpha * noise.eps - sigma * z)).square().mean(), atol=1e-5)
        objective.chunk = 3
        assert torch.allclose(objective(vocabulary.table[rows], noise), got, atol=1e-5)


def test_a_prompt_follows_from_image_and_seed(vocabulary: Vocabulary) -> None:
    """Searched between others or alone; the network stays as it was."""
    latents = torch.randn(2, *vocabulary.backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    search = Search(3, updates=2, period=1, samples=2, passes=1, candidates=3)
    before = [p.clone() for p in vocabulary.backbone.network().parameters()]
    first = [invert(Denoising(vocabulary, z), vocabulary, search, seed=i) for i, z in enumerate(latents)]
    again = invert(Denoising(vocabulary, latents[1]), vocabulary, search, seed=1)
    objective = Denoising(vocabulary, latents[1])
    with torch.no_grad():  # of the text itself, as the pipeline reads it
        read = objective.told(vocabulary.backbone.encode_text([again.prompt]), held_noise(objective, search, 1))
    assert again.loss == pytest.approx(float(read), rel=1e-5)
    assert (again.prompt, again.loss, again.trace) == (first[1].prompt, first[1].loss, first[1].trace)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, vocabulary.backbone.network().parameters(), strict=True))
    start = Search(6, updates=0, passes=0, samples=1)
    starts = {invert(Denoising(vocabulary, latents[0]), vocabulary, start, seed=s).prompt for s in range(4)}
    assert len(starts) == 4  # other seeds begin with other words
    with pytest.raises(ValueError, match="no prompt has a finite denoising loss"):
        invert(Denoising(vocabulary, latents[0] * torch.nan), vocabulary, start)


def test_bad_settings_are_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="timesteps 9 3: give the smaller one first"):
        Search(timesteps=(9, 3))
    with pytest.raises(ValueError, match="period"):
        Search(period=0)
    with pytest.raises(ValueError, match="prompts of 99 tokens"):
        invert(Denoising(vocabulary, torch.zeros(vocabulary.backbone.latent_shape)), vocabulary, Search(tokens=99))


# Measures ---------------------------------------------------------------------------------------------------------------------------


def test_likeness_of_the_references_themselves_is_perfect() -> None:
    references = shapes.render(shapes.draw_scenes(3, 0))

    def features(x: Tensor) -> Tensor:
        return x.flatten(1)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))

    found = likeness(references[:, None].expand(-1, 2, -1, -1, -1), references, features, distance)
    assert found["similarity"] == pytest.approx(1) and found["lpips"] == found["lpips_diversity"] == 0
    saved = torch.nn.functional.normalize((references.add(1).mul(127.5).round() / 127.5 - 1).flatten(1), dim=1)
    others = (saved @ saved.T)[~torch.eye(3, dtype=torch.bool)].mean()
    assert found["similarity_others"] == pytest.approx(float(others), abs=1e-5)
    alone = likeness(references[:1, None], references[:1], features, distance)
    assert alone["similarity_others"] is None and alone["lpips_diversity"] is None


def test_what_is_recovered_stands_beside_chance() -> None:
    """Two scenes that share their background alone: right prompts have all, and by chance that one."""
    captions = ["a small red circle at the top on a grey background", "a large blue cross at the left on a grey background"]
    found = worded(["red circle small top grey a", "on left a large blue cross grey"], captions, words_right)
    assert (found["attributes"], found["all"]) == (1, 1) and found["chance"] == {"attributes": pytest.approx(0.2), "all": 0}
    wrong = words_right(["red green circle small top right grey", "large cross"], captions)
    assert {kind: right.tolist() for kind, right in wrong.items()} == {
        "shape": [1, 1],
        "colour": [0, 0],
        "size": [1, 1],
        "place": [0, 0],
        "background": [1, 0],
    }
    assert words_right(["seven"], ["a handwritten seven"])["digit"].tolist() == [1]
    scenes = shapes.draw_scenes(4, 1)
    images, said = shapes.render(scenes), shapes.captions(scenes, 0, full=True)
    exact = judged(images[:, None], said, judge.judge)
    assert (exact["attributes"], exact["all"]) == (1, 1) and exact["chance"]["attributes"] < 0.7
