"""Flux.1 (Black Forest Labs 2024): a flow in packed latents; dev is told its guidance by an embedding, schnell is told none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.transformers import Packed
from ddil_lightning.records import Context

T5_TOKENS = 512
"""What its pipeline reads of T5 and pads every text to."""


def _in_blocks(row: str, *layers: str) -> tuple[str, ...]:
    return tuple(f"{row}.{{}}.{layer}" for layer in layers)


_DOUBLE, _SINGLE = partial(_in_blocks, "transformer_blocks"), partial(_in_blocks, "single_transformer_blocks")


class Flux(Packed):
    """A FluxTransformer2DModel as a network `(x_t, t, c) -> eps - x0` of latents [B, C, H, W], which it packs in patches of 2 x 2.

    Its time is sigma, (sigma 1000) / 1000 in its own type, as FluxPipeline rounds it in that of the latents: every role is told what the
    pipeline that it is loaded into in its precision would tell it.

    Dev (`guidance_embeds`) is told g = 1 + w of its context by its own embedding, as its pipeline tells it guidance_scale. So it is told
    the guidance as a teacher already: it is asked once, not twice, nothing is guided by the empty prompt, and whatever is made of it (a
    student, a critic, adapters) is told g by the same embedding, whose weights they have. Schnell and networks that were freed of their
    distillation have no embedding: guidance above 1 takes two evaluations, what FluxPipeline calls true_cfg_scale.
    """

    blocks_of = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    adapts = (  # train_dreambooth_lora_flux.py of diffusers: of the blocks of one stream the attention alone
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    authors = MappingProxyType(
        {
            "double_blocks.{}.img_attn.qkv": _DOUBLE("attn.to_q", "attn.to_k", "attn.to_v"),
            "double_blocks.{}.img_attn.proj": _DOUBLE("attn.to_out.0"),
            "double_blocks.{}.img_mlp.0": _DOUBLE("ff.net.0.proj"),
            "double_blocks.{}.img_mlp.2": _DOUBLE("ff.net.2"),
            "double_blocks.{}.img_mod.lin": _DOUBLE("norm1.linear"),
            "double_blocks.{}.txt_attn.qkv": _DOUBLE("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "double_blocks.{}.txt_attn.proj": _DOUBLE("attn.to_add_out"),
            "double_blocks.{}.txt_mlp.0": _DOUBLE("ff_context.net.0.proj"),
            "double_blocks.{}.txt_mlp.2": _DOUBLE("ff_context.net.2"),
            "double_blocks.{}.txt_mod.lin": _DOUBLE("norm1_context.linear"),
            "single_blocks.{}.linear1": _SINGLE("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "single_blocks.{}.linear2": _SINGLE("proj_out"),
            "single_blocks.{}.modulation.lin": _SINGLE("norm.linear"),
        }
    )

    @property
    def w_conditioned(self) -> bool:  # type: ignore[override]
        """Whether it has an embedding of the guidance."""
        return bool(self.model.config.guidance_embeds)

    def row(self) -> Sequence[nn.Module]:
        """The blocks of two streams, then those of one, which answer with text and image apart as well."""
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def check(self, path: str, channels: int | None) -> None:
        """Raises ValueError for another task than text-to-image in latents of so many `channels`."""
        config = self.model.config
        read, written = config.in_channels, config.out_channels or config.in_channels
        if channels is None or not read == written == 4 * channels:
            raise ValueError(
                f"the transformer of {path} reads {read} channels and writes {written}, and its autoencoder {channels}, packed by four: "
                "only text-to-image is distilled, no filling, control or editing"
            )

    def spaces(self) -> dict[str, Any]:
        """Latents, the widths of the texts, and whether it is told its guidance."""
        return {**super().spaces(), "embedding of the guidance (guidance_embeds)": self.w_conditioned}

    def told(self) -> dict[str, Any]:
        """Raises ValueError: an embedding of two layers that starts at zero would learn nothing of w."""
        raise ValueError(
            "this Flux has no embedding of the guidance (guidance_embeds is false, as schnell's): set model.w_conditioned to false"
        )

    @staticmethod
    def tokens(pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """By T5, of which its pipeline reads 512."""
        return [len(ids) for ids in pipe.tokenizer_2(list(prompts)).input_ids], T5_TOKENS

    @staticmethod
    def cut_tokens(pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """By CLIP, whose pooled text is of as many tokens as it has, whatever the prompt."""
        return [len(ids) for ids in pipe.tokenizer(list(prompts)).input_ids], pipe.tokenizer_max_length

    @staticmethod
    def context(pipe: Any, prompts: Sequence[str], device: torch.device, sizes: Tensor) -> Context:
        """T5's states, padded to 512 tokens without a mask, and CLIP's pooled text."""
        text, pooled, _ = pipe.encode_prompt(list(prompts), device=device, num_images_per_prompt=1, max_sequence_length=T5_TOKENS)
        return Context(text.float(), pooled=pooled.float())

    def blank(self, n: int, tokens: int) -> Context:
        """Texts of T5's 512 tokens, whatever CLIP reads, and pooled ones."""
        c = super().blank(n, T5_TOKENS)
        return c._replace(pooled=torch.zeros(n, self.model.config.pooled_projection_dim))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, C, H, W] the velocity. Raises ValueError for a context without pooled text, or without the guidance that it is told."""
        if c.pooled is None:
            raise ValueError("Flux is told the pooled text, which this context lacks: encode prompts by its own pipeline")
        if self.w_conditioned and c.w is None:
            raise ValueError("this Flux is told its guidance, but the context carries no w: give it guidance g (w = g - 1)")
        dtype, shape = self.dtype, x_t.shape[1:]
        out = self.model(
            hidden_states=self.packed(x_t.to(dtype)),
            timestep=t.to(dtype) / 1000,
            guidance=c.w.float() + 1 if self.w_conditioned and c.w is not None else None,
            pooled_projections=c.pooled.to(dtype),
            encoder_hidden_states=c.text.to(dtype),
            txt_ids=torch.zeros(c.text.shape[1], 3, device=x_t.device, dtype=dtype),
            img_ids=places(shape[1] // 2, shape[2] // 2, x_t.device).to(dtype),
            return_dict=False,
        )[0]
        return self.unpacked(out, shape)


def places(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """[height width, 3] the places of patches, as its pipeline counts them: 0, row, column. Made on `device`, without a copy."""
    rows, columns = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
