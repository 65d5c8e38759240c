"""Qwen-Image (Wu et al. 2025): a flow in packed latents, told Qwen2.5-VL's states of a prompt under a mask, guided at a constant norm."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.transformers import Packed
from ddil_lightning.records import Context

QWEN_TOKENS = 512
"""What a plain call reads of a prompt at most, its max_sequence_length, with the end of the template that stands after it."""
OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Settings of networks for other tasks: guidance_embeds, which diffusers has no embedding for, editing, and images in layers."""


class QwenImage(Packed):
    """A QwenImageTransformer2DModel as a network `(x_t, t, c) -> eps - x0` of latents [B, C, H, W], which it packs in patches of 2 x 2.

    Its time is sigma, (sigma 1000) / 1000 in its own type, as QwenImagePipeline rounds it in that of the latents. Guidance takes two
    evaluations, the second told " ", and what it makes of them has the norm of the conditional answer in every patch: true_cfg_scale of
    its pipeline.
    """

    negative = " "
    norm_patch = 2
    blocks_of = ("QwenImageTransformerBlock",)
    authors = MappingProxyType({})

    def check(self, path: str, channels: int | None) -> None:
        """Raises ValueError for a network of another task than text-to-image, or of latents of other than so many `channels`."""
        config = self.model.config
        other = next((name for name in OTHERS if config.get(name)), None)
        if other is not None:
            raise ValueError(
                f"the transformer of {path} has {other} set: only text-to-image is distilled, no editing, no layers, and no embedding of "
                "the guidance, for which diffusers has no weights"
            )
        read, written = config.in_channels, config.patch_size**2 * (config.out_channels or config.in_channels)
        if channels is None or config.patch_size != self.patch or not read == written == self.patch**2 * channels:
            raise ValueError(
                f"the transformer of {path} reads {read} channels and writes {written}, and its autoencoder {channels}, packed by four: "
                "only text-to-image is distilled"
            )

    def idle(self) -> Sequence[nn.Module]:
        """What its last block says of the text, which nobody reads: DDP would wait for its gradient."""
        last = self.row()[-1]
        return [last.txt_mlp, last.attn.to_add_out]  # type: ignore[list-item, union-attr]

    @staticmethod
    def instruction(pipe: Any) -> str:
        """The template of an empty prompt."""
        return str(pipe.prompt_template_encode.format(""))

    @staticmethod
    def tokens(pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """With the end of the template, without its beginning, whose states its pipeline leaves out."""
        texts = [pipe.prompt_template_encode.format(p) for p in prompts]
        return [len(ids) - pipe.prompt_template_encode_start_idx for ids in pipe.tokenizer(texts).input_ids], QWEN_TOKENS

    @staticmethod
    def context(pipe: Any, prompts: Sequence[str], device: torch.device, sizes: Tensor) -> Context:
        """Qwen's last states after the beginning of the template, filled up with zeros, which the mask leaves out.

        Raises ValueError for a pipeline that reads images besides.
        """
        if type(pipe).__name__ != "QwenImagePipeline":
            raise ValueError(f"a {type(pipe).__name__} reads images besides prompts: only text-to-image, a QwenImagePipeline, is distilled")
        found, read = pipe.encode_prompt(list(prompts), device=device, max_sequence_length=QWEN_TOKENS)
        n, length, width = found.shape
        text = torch.zeros(n, QWEN_TOKENS, width, device=device)
        mask = torch.zeros(n, QWEN_TOKENS, dtype=torch.long, device=device)
        text[:, :length], mask[:, :length] = found.float(), 1 if read is None else read
        return Context(text, mask=mask)

    def blank(self, n: int, tokens: int) -> Context:
        """Texts of QWEN_TOKENS, the longest that there are: without a mask, of which a plan could not know how much it leaves."""
        return Context(torch.zeros(n, QWEN_TOKENS, self.model.config.joint_attention_dim))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, C, H, W] the velocity. A context without mask is read whole."""
        dtype, (text, mask) = self.dtype, _read(c)
        packed, shape = self.packed(x_t.to(dtype)), x_t.shape[1:]
        places = (1, shape[1] // self.patch, shape[2] // self.patch)
        self._turn(places, x_t.device)
        out = self.model(
            hidden_states=packed,
            timestep=t.to(dtype) / 1000,
            encoder_hidden_states=text.to(dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[places]] * len(x_t),
            return_dict=False,
        )[0]
        return self.unpacked(out, shape)

    def _turn(self, places: tuple[int, int, int], device: torch.device) -> None:
        """Its positions are kept as they are made first: by a preview, training could not differentiate through them."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                self.model.pos_embed([places], max_txt_seq_len=1, device=device)


def _read(c: Context) -> tuple[Tensor, Tensor | None]:
    """Texts to the end of the longest, and the mask that they need: none where they are of one length, as its pipeline tells them."""
    if c.mask is None:
        return c.text, None
    longest = len(c.mask.any(0).nonzero())  # which a plan cannot answer, and then says nothing, rather than too little
    mask = c.mask[:, :longest]
    return c.text[:, :longest], None if bool(mask.all()) else mask
