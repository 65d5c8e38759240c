"""What single words say of a scene of the built-in data, for prompts that need not be sentences of its grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddil_lightning.miniature import digits, shapes

KINDS: Mapping[str, frozenset[str]] = {
    "shape": frozenset(shapes.SHAPES),
    "colour": frozenset(shapes.COLOURS),
    "size": frozenset(shapes.SIZES),
    "place": frozenset(" ".join((*shapes.POSITIONS, "above")).split()),
    "background": frozenset(shapes.BACKGROUNDS),
    "digit": frozenset(digits.NUMBERS),
}
"""The words by what they speak of; those of position and relation are partly the same."""


def words_right(prompts: Sequence[str], captions: Sequence[str]) -> dict[str, Tensor]:
    """For each kind of words whether a prompt has exactly those of its caption, in any order: [N] 1.0 or 0.0, nan where that has none.

    A kind that no caption mentions is left out. Raises ValueError where the numbers of prompts and captions differ.
    """
    if len(prompts) != len(captions):
        raise ValueError(f"{len(prompts)} prompts but {len(captions)} captions")
    pairs = [(frozenset(prompt.split()), frozenset(caption.split())) for prompt, caption in zip(prompts, captions, strict=True)]
    found = {
        kind: torch.tensor([float(has & words == asked & words) if asked & words else torch.nan for has, asked in pairs])
        for kind, words in KINDS.items()
    }
    return {kind: right for kind, right in found.items() if not right.isnan().all()}
