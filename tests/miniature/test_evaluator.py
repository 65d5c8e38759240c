"""The evaluator: what its features and scores tell apart, and its file format."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddil_lightning.miniature import digits, shapes
from ddil_lightning.miniature.contrast import scores, spoil
from ddil_lightning.miniature.evaluator import CONTEXT, VOCABULARY, Evaluator, load_evaluator, tokenise
from ddil_lightning.miniature.judge import judge


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return load_evaluator()


@pytest.fixture(scope="module")
def pairs() -> tuple[Tensor, list[str]]:
    scenes = shapes.draw_scenes(200, 77)
    return shapes.render(scenes), shapes.captions(scenes, 77, full=True)


def test_tokenise() -> None:
    ids = tokenise(["a red circle", "A red dog.", "a " * 40])
    assert ids.shape == (3, CONTEXT)
    assert [VOCABULARY[i] for i in ids[0, :5]] == ["<start>", "a", "red", "circle", "<end>"]
    assert ids[0, 5:].sum() == 0 and VOCABULARY[ids[1, 3]] == "<unknown>"
    assert (ids.max(1).values == len(VOCABULARY) - 1).all()  # the end token, by which open_clip pools


def test_clip_score_prefers_the_true_caption(evaluator: Evaluator, pairs: tuple[Tensor, list[str]]) -> None:
    images, captions = pairs
    own = evaluator.clip_score(images, captions)
    other = evaluator.clip_score(images, captions[1:] + captions[:1])
    assert own.shape == (200,) and own.abs().max() <= 1.0
    assert (own > other).float().mean() > 0.97
    with pytest.raises(ValueError, match="200 images but 1 captions"):
        evaluator.clip_score(images, ["a circle"])


@pytest.mark.slow
def test_held_out_figures(evaluator: Evaluator) -> None:
    found = scores(evaluator, n=256)
    assert found["image to text"] > 0.6 and found["text to image"] > 0.6
    assert found["spoiled below true"] > 0.8
    assert found["digits"] > 0.8


def test_features_react_to_what_changes(evaluator: Evaluator, pairs: tuple[Tensor, list[str]]) -> None:
    images, _ = pairs
    features = evaluator.image_features(images)
    assert features.shape == (200, evaluator.num_features)
    assert torch.allclose(evaluator(images[:7]), features[:7], atol=1e-5)  # an image's features do not depend on its batch
    near = (evaluator.image_features(images + 0.02) - features).norm(dim=1)
    far = (features.roll(1, 0) - features).norm(dim=1)
    assert near.median() < 0.5 * far.median()


def test_feature_maps_are_unit_vectors_and_measure_distance(evaluator: Evaluator, pairs: tuple[Tensor, list[str]]) -> None:
    images, _ = pairs
    maps = evaluator.image_feature_maps(images[:8])
    assert [tuple(m.shape) for m in maps] == [(8, 96, 8, 8)] * 4
    assert all(torch.allclose(m.norm(dim=1), torch.ones(8, 8, 8), atol=1e-4) for m in maps)

    def distance(a: Tensor, b: Tensor) -> float:
        both = zip(evaluator.image_feature_maps(a), evaluator.image_feature_maps(b), strict=True)
        return float(sum((x - y).square().sum(1).mean() for x, y in both))

    assert distance(images[:8], images[:8]) == 0.0
    assert distance(images[:8], images[:8] + 0.05) < distance(images[:8], images[8:16])


def test_other_sizes_and_wrong_input(evaluator: Evaluator) -> None:
    images, labels = digits.split("held_out")
    assert evaluator.image_features(images[:3]).shape == (3, 64)
    texts = torch.nn.functional.normalize(evaluator.text_features([digits.caption(k) for k in range(10)]))
    best = (evaluator.image_features(images) @ texts.T).argmax(1)
    assert (best == labels).float().mean() > 0.8
    with pytest.raises(ValueError, match=r"needs images \[N, 3, H, W\]"):
        evaluator.image_features(torch.zeros(1, 1, 32, 32))


def test_it_is_frozen_and_survives_saving(evaluator: Evaluator, pairs: tuple[Tensor, list[str]], tmp_path: Path) -> None:
    assert not evaluator.training and not any(p.requires_grad for p in evaluator.parameters())
    copy = load_evaluator(evaluator.save(tmp_path / "e"))
    assert torch.equal(copy.image_features(pairs[0][:5]), evaluator.image_features(pairs[0][:5]))
    config = tmp_path / "e" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocabulary": ["other"]}))
    with pytest.raises(ValueError, match="another version"):
        load_evaluator(tmp_path / "e")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_evaluator(tmp_path)


def test_spoiled_captions_are_wrong_for_the_judge(pairs: tuple[Tensor, list[str]]) -> None:
    images, captions = pairs
    rng = random.Random(0)
    wrong = [spoil(c, rng) for c in captions]
    assert all(w != c for w, c in zip(wrong, captions, strict=True))
    assert float(judge(images, wrong).all_right.mean()) == 0.0
    assert spoil("a shape", rng) == "a handwritten digit"
