"""The words that a pipeline's text encoders know, and prompts that are given as embeddings in place of words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ddil_lightning.backbones.sizes import whole
from ddil_lightning.records import Context

if TYPE_CHECKING:
    from ddil_lightning.backbones.pipeline import Pipeline

LEAST = 2
"""A prompt is chosen from so many words at least."""


class Vocabulary:
    """The words of a pipeline, in which a prompt is searched: tokens whose text, standing alone, is read as that token again.

    Special tokens and pieces of words are none, so that words joined by spaces are read as they were written. A pipeline of two text
    encoders (SDXL) reads the same tokens by both: a word's embedding is the two, one behind the other.
    `ids` [V]: of the tokens; `table` [V, D]: their embeddings, float32. Raises ValueError for a pipeline without text encoders, for one
    whose encoders have different vocabularies, and for one that writes more around every prompt.
    """

    def __init__(self, backbone: Pipeline) -> None:
        if backbone.network().instruction(backbone.pipe):
            raise ValueError(
                f"{backbone.path} reads a prompt within other words, so that none stands alone: prompts are inverted for pipelines of "
                "other families (Stable Diffusion 1.x, 2.x, XL, PixArt)"
            )
        self.backbone, self.pairs = backbone, _pairs(backbone)
        tokenizers = [tokenizer for tokenizer, _ in self.pairs]
        self.tokenizer = tokenizers[0]
        special = {i for tokenizer in tokenizers for i in tokenizer.all_special_ids}
        ids = [i for i in sorted(self.tokenizer.get_vocab().values()) if i not in special]
        texts = [self.tokenizer.decode([i], clean_up_tokenization_spaces=False).strip() for i in ids]
        as_read = backbone.network().written(backbone.pipe, texts)
        read = self.tokenizer(as_read, add_special_tokens=False).input_ids
        kept = [k for k, (i, text) in enumerate(zip(ids, texts, strict=True)) if text and read[k] == [i]]
        if len(kept) < LEAST:
            raise ValueError(f"the tokenizer of {backbone.path} has no words of one token each, in which a prompt could be searched")
        self.ids, self.words = torch.tensor([ids[k] for k in kept]), [texts[k] for k in kept]
        layers = [encoder.get_input_embeddings().weight.detach() for _, encoder in self.pairs]
        self.widths = [layer.shape[1] for layer in layers]
        self.table = torch.cat([layer[self.ids.to(layer.device)].float().to(backbone.device) for layer in layers], 1)
        self._units = normalize(self.table, dim=1)

    def __len__(self) -> int:
        return len(self.words)

    @property
    def longest(self) -> int:
        """How many words a prompt can have: what the encoders read less the special tokens."""
        bare, limit = self.backbone.network().tokens(self.backbone.pipe, [""])
        return int(min(limit, *(tokenizer.model_max_length for tokenizer, _ in self.pairs))) - bare[0]

    def check_tokens(self, tokens: int) -> None:
        """Raises ValueError for prompts of so many words, which the encoders cannot read."""
        if not 1 <= tokens <= self.longest:
            raise ValueError(f"prompts of {tokens} tokens: the text encoder of {self.backbone.path} reads 1 to {self.longest}")

    def nearest(self, embeddings: Tensor) -> Tensor:
        """The projection: rows [...] of the table that have the largest cosine with `embeddings` [..., D]."""
        return (normalize(embeddings, dim=-1) @ self._units.T).argmax(-1)

    def text(self, rows: Tensor) -> str:
        """The prompt of rows [K] of the table."""
        return " ".join(self.words[i] for i in rows.tolist())

    def rows(self, prompt: str) -> Tensor:
        """The rows [K] of the table that the tokens of a prompt are. Raises ValueError for a token that is no word."""
        known = {i: row for row, i in enumerate(self.ids.tolist())}
        read = self.tokenizer(prompt, add_special_tokens=False).input_ids
        odd = next((i for i in read if i not in known), None)
        if odd is not None:
            raise ValueError(
                f"the prompt {prompt!r} has the token {self.tokenizer.decode([odd])!r}, which is no word of {self.backbone.path}"
            )
        return torch.tensor([known[i] for i in read])

    def encode(self, embeddings: Tensor) -> Context:
        """What the network is told of prompts whose words are embeddings [B, K, D], with gradients to these.

        The tokenizer puts start, end and padding around K words as it does around any; only the words' embeddings are replaced.
        """
        n, tokens, _ = embeddings.shape
        self.check_tokens(tokens)
        prompts, sizes = [self.text(torch.zeros(tokens, dtype=torch.long))] * n, whole(self.backbone.size, n)
        with ExitStack() as replaced:
            for (tokenizer, encoder), part in zip(self.pairs, embeddings.split(self.widths, -1), strict=True):
                start = tokenizer(prompts[0]).input_ids.index(int(self.ids[0]))
                replaced.enter_context(_replacing(encoder, part, start))
            return self.backbone.network().context(self.backbone.pipe, prompts, self.backbone.device, sizes)


@contextmanager
def _replacing(encoder: Any, embeddings: Tensor, start: int) -> Iterator[None]:
    """Inside, the input embeddings of a text encoder answer with `embeddings` [B, K, D] from the place `start` on."""

    def replace(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        stop = start + embeddings.shape[1]
        return torch.cat([out[:, :start], embeddings.to(out), out[:, stop:]], 1)

    weight = encoder.get_input_embeddings().weight  # T5 holds them in two modules, and calls the one that it does not name
    handles = [m.register_forward_hook(replace) for m in encoder.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pairs(backbone: Pipeline) -> list[tuple[Any, Any]]:
    """Tokenizers and text encoders, those that belong together side by side."""
    parts = backbone.pipe.components
    names = [name for name in sorted(parts) if name.startswith("tokenizer") and parts[name] is not None]
    pairs = [(parts[name], parts.get(name.replace("tokenizer", "text_encoder"))) for name in names]
    pairs = [pair for pair in pairs if pair[1] is not None]
    if not pairs:
        raise ValueError(f"{backbone.path} has no text encoder with a tokenizer, so there is no prompt to search")
    if any(pair[0].get_vocab() != pairs[0][0].get_vocab() for pair in pairs):
        raise ValueError(
            f"the text encoders of {backbone.path} read different tokens, so that no embedding belongs to one word: prompts are inverted "
            "for pipelines of one vocabulary (Stable Diffusion 1.x, 2.x, XL)"
        )
    return pairs
