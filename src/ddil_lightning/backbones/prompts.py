"""Prompts of a pipeline: what its text encoders make of them, and which they would cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ddil_lightning.backbones.sizes import Sized, whole
from ddil_lightning.backbones.weights import hushed
from ddil_lightning.records import Context
from ddil_lightning.texts import check_prompts, shortened


class Prompted(Sized):
    """A backbone of diffusers' pipelines, whose family says how its text encoders are asked."""

    _told_of_cuts = False

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], truncate: bool = False, sizes: Tensor | None = None) -> Context:
        """The text states of `prompts`, unguided. Raises ValueError for one that no tokenizer takes, or is too long without `truncate`."""
        check_prompts(prompts)
        if not truncate:
            self.check_length(prompts)
        self._tell_cut(prompts)
        if sizes is None:
            sizes = whole(self.size, len(prompts))
        with hushed():  # which would print what it cuts of every batch
            return self._network.context(self.pipe, prompts, self.device, sizes)

    def check_length(self, prompts: Sequence[str]) -> None:
        """Raises ValueError, naming the first prompt that the tokenizer would cut or does not take."""
        check_prompts(prompts)
        counts, limit = self._network.tokens(self.pipe, prompts)
        for prompt, count in zip(prompts, counts, strict=True):
            if count > limit:
                raise ValueError(
                    f"the prompt {shortened(prompt)!r} has {count} tokens and the text encoder reads {limit}: shorten it, or allow "
                    "truncation"
                )

    def _tell_cut(self, prompts: Sequence[str]) -> None:
        """A notice, once, of a prompt that one of several text encoders cuts."""
        if self._told_of_cuts:
            return
        counts, limit = self._network.cut_tokens(self.pipe, prompts)
        for prompt, count in zip(prompts, counts, strict=False):
            if count > limit:
                self._told_of_cuts = True
                logging.getLogger(__name__).warning(
                    f"the prompt {shortened(prompt)!r} has {count} tokens and CLIP reads {limit} of a text: the rest is told by T5 alone, "
                    "here and in longer prompts to come"
                )
                return

    @torch.no_grad()
    def null(self) -> Context:
        """The unconditional branch of guidance, one sample, as its family has it: mostly the context of the empty prompt."""
        return self._network.unconditional(self.pipe, self.device, whole(self.size, 1))
