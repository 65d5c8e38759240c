"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a flow in latents, text and image in one attention (SD3Transformer2DModel)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones.transformers import Transformer
from ddil_lightning.diffusion.alike import Alike
from ddil_lightning.records import Context

T5_TOKENS = 256
"""What its pipeline reads of T5 at most, its max_sequence_length, and pads every text to: zeros where there is no T5."""


def silent(pipe: Any) -> bool:
    """Whether T5 says nothing in a pipeline: there is none, or one of no layers whose states are zeros."""
    encoder = getattr(pipe, "text_encoder_3", None)
    if encoder is None or pipe.tokenizer_3 is None:
        return True
    return encoder.config.num_layers == 0 and not bool(encoder.shared.weight.any())


def _in_blocks(*layers: str) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.{{}}.{layer}" for layer in layers)


class SD3(Transformer):
    """An SD3Transformer2DModel as a network `(x_t, t, c) -> eps - x0`, of sigma 1000 in float32, which its pipeline does not round further.

    It has no place for an embedding of the guidance: what is not guided twice has one guidance in its weights.
    """

    flow = True
    image = 1
    blocks_of = ("JointTransformerBlock",)
    adapts = (  # of both streams, as train_dreambooth_lora_sd3.py of diffusers has them
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    authors = MappingProxyType(
        {
            "joint_blocks.{}.x_block.attn.qkv": _in_blocks("attn.to_q", "attn.to_k", "attn.to_v"),
            "joint_blocks.{}.x_block.attn.proj": _in_blocks("attn.to_out.0"),
            "joint_blocks.{}.x_block.attn2.qkv": _in_blocks("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "joint_blocks.{}.x_block.attn2.proj": _in_blocks("attn2.to_out.0"),
            "joint_blocks.{}.x_block.mlp.fc1": _in_blocks("ff.net.0.proj"),
            "joint_blocks.{}.x_block.mlp.fc2": _in_blocks("ff.net.2"),
            "joint_blocks.{}.context_block.attn.qkv": _in_blocks("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "joint_blocks.{}.context_block.attn.proj": _in_blocks("attn.to_add_out"),
            "joint_blocks.{}.context_block.mlp.fc1": _in_blocks("ff_context.net.0.proj"),
            "joint_blocks.{}.context_block.mlp.fc2": _in_blocks("ff_context.net.2"),
        }
    )

    @property
    def largest(self) -> int:
        """Its positions are a table, from the middle of which smaller sizes are cut."""
        return int(self.model.config.pos_embed_max_size) * self.patch

    @staticmethod
    def tokens(pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """By T5, which reads more than CLIP does and what its pipeline cuts of it; without one by CLIP."""
        if silent(pipe):
            return [len(ids) for ids in pipe.tokenizer(list(prompts)).input_ids], pipe.tokenizer_max_length
        return [len(ids) for ids in pipe.tokenizer_3(list(prompts)).input_ids], T5_TOKENS

    @staticmethod
    def cut_tokens(pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """By both CLIPs, beside T5."""
        if silent(pipe):
            return [], 0
        return [len(ids) for ids in pipe.tokenizer(list(prompts)).input_ids], pipe.tokenizer_max_length

    @staticmethod
    def context(pipe: Any, prompts: Sequence[str], device: torch.device, sizes: Tensor) -> Context:
        """The states of both CLIPs side by side, padded to T5's width and followed by T5's; the pooled ones of the CLIPs. No mask.

        Where there is no T5 the zeros that its pipeline reads in its place are left out, for `forward` to put there.
        """
        text, _, pooled, _ = pipe.encode_prompt(
            list(prompts), None, None, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        text = text[:, :-T5_TOKENS] if silent(pipe) else text
        return Context(text.float(), pooled=pooled.float())

    def blank(self, n: int, tokens: int) -> Context:
        """Texts of CLIP's `tokens` and T5's, and pooled ones."""
        c = super().blank(n, tokens + T5_TOKENS)
        return c._replace(pooled=torch.zeros(n, self.model.config.pooled_projection_dim))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, C, H, W] the velocity. Raises ValueError for a context without pooled text."""
        if c.pooled is None:
            raise ValueError("Stable Diffusion 3 is told the pooled text, which this context lacks: encode prompts by its own pipeline")
        dtype, told = self.dtype, {}
        text, pooled = c.text.to(dtype), c.pooled.to(dtype)
        if text.shape[1] < T5_TOKENS:  # without T5: its 256 zeros stay equal to each other, and are asked once
            text, told = torch.cat([text, torch.zeros_like(text[:, :1])], 1), {"joint_attention_kwargs": {"alike": T5_TOKENS}}
            if not isinstance(next(iter(self.model.attn_processors.values())), Alike):
                self.model.set_attn_processor(Alike())
        return self.model(x_t.to(dtype), encoder_hidden_states=text, pooled_projections=pooled, timestep=t, **told, return_dict=False)[0]

    def in_full(self, told: dict[str, Any]) -> dict[str, Any]:
        """With all the zeros in T5's place, of which `forward` says one."""
        many = (told.get("joint_attention_kwargs") or {}).get("alike", 1)
        text = told["encoder_hidden_states"]
        return {**told, "encoder_hidden_states": torch.cat([text, text[:, -1:].expand(-1, many - 1, -1)], 1)}
