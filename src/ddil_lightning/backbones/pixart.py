"""PixArt-alpha (Chen et al. 2023) and PixArt-Sigma (Chen et al. 2024): T5's text under a mask, and a learned variance beside eps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.transformers import Transformer
from ddil_lightning.records import Context

T5_TOKENS = 300
"""What PixArt-Sigma's pipeline reads of T5 and pads every text to; alpha's reads 120."""

TOLD = 128
"""The sample_size whose transformers alpha's pipeline tells the size of the image; all others must do without."""


class PixArt(Transformer):
    """A PixArtTransformer2DModel as a network `(x_t, t, c) -> eps`: of what it writes, the first half of the channels.

    The other half, the learned variance, is read by no pipeline and gets no gradient: a student keeps it as it was. Alpha's for 1024 pixels
    are told height, width and their ratio of every image. None has a place for an embedding of the guidance, which its pipelines could not
    tell it: what is not guided twice has one guidance in its weights.
    """

    blocks_of = ("BasicTransformerBlock",)
    adapts = (  # as train_scripts/train_pixart_lora_hf.py of PixArt-alpha has them
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("proj", "linear", "linear_1", "linear_2"),
    )
    # Captions as they are, not as a library that need not be there cleans them; images of the size that was asked for, not of a near one.
    called_with: ClassVar[Mapping[str, Any]] = MappingProxyType({"clean_caption": False, "use_resolution_binning": False})
    sized = ("sample_size", "interpolation_scale")
    resizable = False  # its positions are counted in shares of sample_size

    def check(self, path: str, channels: int | None) -> None:
        """Raises ValueError for another task than text-to-image in latents of so many `channels`."""
        config = self.model.config
        written = config.out_channels or config.in_channels
        if config.in_channels != channels or written not in (channels, 2 * config.in_channels):
            raise ValueError(
                f"the transformer of {path} reads {config.in_channels} channels and writes {written}, and its autoencoder has {channels}: "
                "only text-to-image is distilled, whose networks write as many or, with a learned variance, twice as many"
            )

    @property
    def _told_size(self) -> bool:
        """Whether it is told the image's size; where its configuration does not say it, the size of its samples does."""
        return bool(self.model.use_additional_conditions)

    def spaces(self) -> dict[str, Any]:
        """Latents, the width of the text states, and whether it is told the size."""
        config = self.model.config
        width = config.caption_channels or config.cross_attention_dim
        return {**super().spaces(), "text width": width, "image's size (use_additional_conditions)": self._told_size}

    @staticmethod
    def written(pipe: Any, prompts: Sequence[str]) -> list[str]:
        """In small letters, without space around them."""
        return list(pipe._text_preprocessing(list(prompts), clean_caption=False))

    @classmethod
    def tokens(cls, pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """T5 could read more than its pipelines hand it."""
        limit = inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
        return [len(ids) for ids in pipe.tokenizer(cls.written(pipe, prompts)).input_ids], limit

    @staticmethod
    def context(pipe: Any, prompts: Sequence[str], device: torch.device, sizes: Tensor) -> Context:
        """T5's states under their mask. Raises ValueError for a pipeline that does not say a size to a network that is told it."""
        text, mask, _, _ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, num_images_per_prompt=1, device=device, clean_caption=False
        )
        if not pipe.transformer.use_additional_conditions:
            return Context(text.float(), mask=mask)
        if "Sigma" in type(pipe).__name__ or pipe.transformer.config.sample_size != TOLD:
            raise ValueError(
                "this PixArt's transformer is told the image's size (use_additional_conditions in its config.json), which pipelines never "
                f"say but a PixArtAlphaPipeline where sample_size is {TOLD}: set it to false, or mend model_index.json"
            )
        return Context(text.float(), mask=mask, ids=sizes.to(device, torch.float32))

    def blank(self, n: int, tokens: int) -> Context:
        """Texts of T5_TOKENS under their mask, whatever the tokenizer could read, and sizes where they are told."""
        config = self.model.config
        text = torch.zeros(n, T5_TOKENS, config.caption_channels or config.cross_attention_dim)
        return Context(text, mask=torch.ones(n, T5_TOKENS).long(), ids=torch.ones(n, 6) if self._told_size else None)

    def tail(self) -> Sequence[nn.Module]:
        """Its blocks and the projection onto patches, which its embeddings of time and text come after by name alone."""
        return self.model.transformer_blocks, self.model.proj_out

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, C, H, W] eps. Raises ValueError for a context without mask, or without a size that is told."""
        if c.mask is None:
            raise ValueError("PixArt reads its text under a mask, which this context lacks: encode prompts by its own pipeline")
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        dtype = self.dtype
        if self._told_size:
            if c.ids is None:
                raise ValueError("this PixArt is told the image's size, which this context lacks: encode prompts by its own pipeline")
            size = c.ids[:, 4:]
            told = {"resolution": size.to(dtype), "aspect_ratio": (size[:, :1] / size[:, 1:]).to(dtype)}
        out = self.model(x_t.to(dtype), c.text.to(dtype), t, told, encoder_attention_mask=c.mask, return_dict=False)[0]
        return out[:, : x_t.shape[1]]  # type: ignore[no-any-return]
