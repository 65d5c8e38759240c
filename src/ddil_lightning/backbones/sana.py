"""SANA and SANA-1.5 (Xie et al. 2024, 2025): a flow in latents 32 times smaller, linear attention, Gemma's text after an instruction."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddil_lightning.backbones.transformers import Transformer
from ddil_lightning.records import Context

GEMMA_TOKENS = 300
"""What its pipeline keeps of Gemma's states, its max_sequence_length, and pads every text to: the first, and then the last ones."""


class Sana(Transformer):
    """A SanaTransformer2DModel as a network `(x_t, t, c) -> eps - x0`, told sigma 1000 times its timestep_scale, not rounded.

    Its pipeline writes an instruction before every prompt (`complex_human_instruction`), which Gemma reads and of whose states nearly
    nothing is kept; the empty prompt of guidance is without one. There are no positions, but where its configuration has an
    interpolation_scale. SANA-Sprint's networks, which are told the guidance, are students already and follow another path.
    """

    flow = True
    blocks_of = ("SanaTransformerBlock",)
    # Images of the size that was asked for, not of a near one.
    called_with: ClassVar[Mapping[str, Any]] = MappingProxyType({"use_resolution_binning": False})
    called_size = (1024, 1024)
    in_comfy = False
    sized = ("sample_size", "interpolation_scale")
    resizable = False  # a plain call does not ask for it, and where there are positions they are counted in shares of it

    def positions(self, shape: Sequence[int]) -> int | None:
        """None: its pipeline tells no scheduler the size."""
        return None

    def check(self, path: str, channels: int | None) -> None:
        """Raises ValueError for SANA-Sprint, and for another task than text-to-image in latents of so many `channels`."""
        if self.model.config.guidance_embeds:
            raise ValueError(
                f"the transformer of {path} is told the guidance (guidance_embeds), as SANA-Sprint's is: a student already, on an arc and "
                "not on a line, which its pipeline alone can call; distil a SANA or SANA-1.5, with model.w_conditioned set to false"
            )
        super().check(path, channels)

    @staticmethod
    def written(pipe: Any, prompts: Sequence[str]) -> list[str]:
        """In small letters, without space around them."""
        return list(pipe._text_preprocessing(list(prompts), clean_caption=False))

    @staticmethod
    def instruction(pipe: Any) -> str:
        """What stands before every prompt in a plain call."""
        return "\n".join(_lines(pipe))

    @classmethod
    def tokens(cls, pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Of what is kept, where a prompt reads on from the last of the instruction: nothing is cut of one that has GEMMA_TOKENS."""
        before = cls.instruction(pipe)
        spent = len(pipe.tokenizer.encode(before)) - 2
        return [len(ids) - spent for ids in pipe.tokenizer([before + p for p in cls.written(pipe, prompts)]).input_ids], GEMMA_TOKENS

    @staticmethod
    def context(pipe: Any, prompts: Sequence[str], device: torch.device, sizes: Tensor) -> Context:
        """Gemma's states of the prompts, as they are after the instruction, under their mask."""
        return _encoded(pipe, prompts, device, _lines(pipe))

    @staticmethod
    def unconditional(pipe: Any, device: torch.device, sizes: Tensor) -> Context:
        """The empty prompt without the instruction."""
        return _encoded(pipe, [""], device, None)

    def blank(self, n: int, tokens: int) -> Context:
        """Texts of GEMMA_TOKENS under their mask, whatever the tokenizer could read."""
        return Context(torch.zeros(n, GEMMA_TOKENS, self.model.config.caption_channels), mask=torch.ones(n, GEMMA_TOKENS).long())

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, C, H, W] the velocity. Raises ValueError for a context without mask."""
        if c.mask is None:
            raise ValueError("SANA reads its text under a mask, which this context lacks: encode prompts by its own pipeline")
        dtype, told = self.dtype, t * self.model.config.timestep_scale
        text = c.text.to(dtype)
        return self.model(x_t.to(dtype), text, told, encoder_attention_mask=c.mask, return_dict=False)[0]  # type: ignore[no-any-return]


def _lines(pipe: Any) -> list[str]:
    """The instruction of a plain call, line by line."""
    return list(inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default or ())


def _encoded(pipe: Any, prompts: Sequence[str], device: torch.device, instruction: list[str] | None) -> Context:
    text, mask, _, _ = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, device=device, complex_human_instruction=instruction
    )
    return Context(text.float(), mask=mask)
