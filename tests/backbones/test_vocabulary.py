"""Prompts as embeddings: what a text encoder answers to words and to their embeddings is the same, and only these have gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.vocabulary import Vocabulary

PROMPT = "a small red circle left of nine"


@pytest.mark.parametrize("layout", ["tiny", "xl"])
def test_embeddings_of_words_are_read_as_the_words(layout: str, request: pytest.FixtureRequest) -> None:
    """Start, end and padding are where the tokenizer puts them, also for fewer words than there is room for, and for both encoders."""
    backbone = Pipeline(str(request.getfixturevalue(layout)))
    vocabulary = Vocabulary(backbone)
    for prompt in (PROMPT, "blue", " ".join(["square"] * vocabulary.longest)):
        rows = vocabulary.rows(prompt)
        embeddings = vocabulary.table[rows].repeat(2, 1, 1).requires_grad_()
        made, plain = vocabulary.encode(embeddings), backbone.encode_text([prompt] * 2)
        assert torch.equal(made.text, plain.text)
        if layout == "xl":
            assert torch.equal(made.pooled, plain.pooled) and torch.equal(made.ids, plain.ids)
        (slope,) = torch.autograd.grad(made.text.sum(), embeddings)
        assert bool((slope != 0).flatten(2).any(2).all())  # every word counts
        assert not any(p.grad is not None or p.requires_grad for part in backbone.parts() for p in part.parameters())
    embedding = backbone.pipe.text_encoder.get_input_embeddings()
    assert not embedding._forward_hooks  # as it was


def test_the_projection_is_the_nearest_word_by_cosine(tiny: Path) -> None:
    vocabulary = Vocabulary(Pipeline(str(tiny)))
    given = torch.randn(3, 5, vocabulary.table.shape[1], generator=torch.Generator().manual_seed(0))
    rows = vocabulary.nearest(given)
    cosines = torch.stack([torch.cosine_similarity(given, word, dim=-1) for word in vocabulary.table], -1)
    assert torch.equal(rows, cosines.argmax(-1))
    assert torch.equal(vocabulary.nearest(vocabulary.table[rows] * 7), rows)  # idempotent, whatever the length


def test_words_are_tokens_that_stand_alone(tiny: Path) -> None:
    vocabulary = Vocabulary(Pipeline(str(tiny)))
    tokenizer = vocabulary.tokenizer
    assert {"red", "circle", "seven"} <= set(vocabulary.words)
    assert not set(vocabulary.ids.tolist()) & set(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # any of them, in any order, are read as they were written
        rows = torch.randint(len(vocabulary), (vocabulary.longest,), generator=generator)
        text = vocabulary.text(rows)
        assert tokenizer(text, add_special_tokens=False).input_ids == vocabulary.ids[rows].tolist()
        assert torch.equal(vocabulary.rows(text), rows)


def test_what_cannot_be_searched_is_refused(xl: Path) -> None:
    backbone = Pipeline(str(xl))
    vocabulary = Vocabulary(backbone)
    with pytest.raises(ValueError, match="prompts of 15 tokens: the text encoder of .* reads 1 to 14$"):
        vocabulary.encode(vocabulary.table[:1].repeat(1, 15, 1))
    with pytest.raises(ValueError, match="has the token .*, which is no word"):
        vocabulary.rows("a <|endoftext|>")
    other: Any = backbone.pipe.tokenizer_2
    other.add_tokens(["gigantic"])
    with pytest.raises(ValueError, match="read different tokens, so that no embedding belongs to one word"):
        Vocabulary(backbone)
