"""Digits: captions, the fixed split, the judge and mode coverage."""

from __future__ import annotations

import pytest
import torch

from ddil_lightning.miniature import digits as D


def test_images_and_split() -> None:
    images, labels = D.split("train")
    held, held_labels = D.split("held_out")
    assert images.shape == (1400, 3, 16, 16) and held.shape == (397, 3, 16, 16)
    assert images.min() == -1 and images.max() <= 1
    assert set(labels.tolist()) == set(held_labels.tolist()) == set(range(10))
    assert torch.equal(images[:, 0], images[:, 2])
    with pytest.raises(ValueError, match="unknown split 'test'"):
        D.split("test")


def test_draw_is_reproducible_and_does_not_depend_on_n() -> None:
    images, captions = D.draw(300, 3)
    few, few_captions = D.draw(20, 3)
    assert torch.equal(images[:20], few) and captions[:20] == few_captions
    bare = sum(c == "a handwritten digit" for c in captions)
    assert 10 <= bare <= 45
    assert {w for c in captions for w in c.split()} == set(D.WORDS)


def test_captions_and_parse() -> None:
    assert D.caption(7) == "a handwritten seven" and D.caption(7, bare=True) == "a handwritten digit"
    assert D.parse("A handwritten seven.") == {"digit": 7} and D.parse("a handwritten digit") == {}
    assert D.prompts(12, 0)[10:] == ["a handwritten zero", "a handwritten one"]
    with pytest.raises(ValueError, match="not a caption of the digits data: 'a dog'"):
        D.parse("a dog")


def test_judge_on_held_out_people() -> None:
    images, labels = D.split("held_out")
    found = D.judge(images, [D.caption(int(k)) for k in labels])
    assert 0.94 < float(found.attribute_accuracy.mean()) < 1.0
    assert torch.equal(found.correct["digit"], found.all_right)
    wrong = D.judge(images, [D.caption((int(k) + 1) % 10) for k in labels])
    assert float(wrong.all_right.mean()) < 0.03


def test_judge_on_training_images_and_noise() -> None:
    images, labels = D.split("train")
    captions = [D.caption(int(k)) for k in labels]
    found = D.judge(images, captions)
    assert float(found.all_right.mean()) > 0.995
    assert float(found.residual.median()) < 1e-3
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(D.judge(noise, captions).all_right.mean()) < 0.2
    assert D.judge(noise, captions).residual.min() > 0.1


def test_judge_leaves_open_captions_open_and_checks_its_input() -> None:
    images, _ = D.split("held_out")
    found = D.judge(images[:2], ["a handwritten digit"] * 2)
    assert found.correct["digit"].isnan().all() and found.all_right.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        D.judge(images[:2], ["a handwritten one"])
    with pytest.raises(ValueError, match="needs images"):
        D.judge(torch.zeros(1, 3, 32, 32), ["a handwritten one"])


def test_mode_coverage() -> None:
    images, labels = D.split("held_out")
    texts = D.partial_prompts() * len(images)
    assert D.mode_coverage(images, texts) > 0.93
    ones = images[labels == 1]
    assert D.mode_coverage(ones, texts[: len(ones)]) < 0.12
    half = images[labels < 5]
    assert 0.4 < D.mode_coverage(half, texts[: len(half)]) < 0.65
    with pytest.raises(ValueError, match="leave the digit open"):
        D.mode_coverage(images[:2], ["a handwritten one"] * 2)
