"""Z-Image (Cai et al. 2025): one stream of image and text in a flow that runs from noise at time 0, told Qwen's states of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.transformers import Transformer
from ddil_lightning.diffusion.denoiser import to_w
from ddil_lightning.records import Context

QWEN_TOKENS = 512
"""What its pipeline reads of Qwen at most, its max_sequence_length, the chat around the prompt included; none of it is padding."""
PATCH = 2
"""The side of the patches that its pipeline asks for, of those that a network may have embeddings for."""
TRAINED = 128
"""The sides of latents of its plain call, which its configuration does not say."""


class ZImage(Transformer):
    """A ZImageTransformer2DModel as a network `(x_t, t, c) -> eps - x0`: told 1 - sigma, which it multiplies by its t_scale, and negated.

    Texts are as long as they are: a context has them with a mask, the network without what that leaves out. Image and text are one
    sequence, the image's tokens first. Its pipeline says w where others say g: guidance_scale 0 is none.
    """

    flow = True
    passes_sigmas = True
    blocks_of = ("ZImageTransformerBlock",)
    called_size = (1024, 1024)
    authors = MappingProxyType({})  # it has queries, keys and values in one, but knows those of diffusers in it
    sized = ()
    resizable = False  # there is no sample_size

    @staticmethod
    def scale(g: float) -> float:
        """Its pipeline adds guidance_scale times the difference to the conditional answer."""
        return to_w(g)

    def row(self) -> Sequence[nn.Module]:
        """The blocks of both, after those that refine either."""
        return list(self.model.layers)

    @property
    def patch(self) -> int:
        """The side of a patch in latents."""
        return PATCH

    @property
    def width(self) -> int:
        """F, of a token."""
        return int(self.model.config.dim)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, 128, 128]."""
        return self.model.config.in_channels, TRAINED, TRAINED

    @property
    def largest(self) -> int:
        """Its positions are tables, one for each axis."""
        return int(min(self.model.config.axes_lens[1:])) * PATCH

    def check(self, path: str, channels: int | None) -> None:
        """Raises ValueError for a network that reads images besides, has no patches of 2, or latents of other than so many `channels`."""
        config = self.model.config
        if config.siglip_feat_dim is not None or PATCH not in config.all_patch_size:
            raise ValueError(
                f"the transformer of {path} has siglip_feat_dim = {config.siglip_feat_dim} and patches of {list(config.all_patch_size)}: "
                "only text-to-image is distilled, without SigLIP's images and in patches of 2"
            )
        super().check(path, channels)

    def spaces(self) -> dict[str, Any]:
        """Latents, and the width of the text states."""
        return {"number of latent channels": self.model.config.in_channels, "text width (cap_feat_dim)": self.model.config.cap_feat_dim}

    @staticmethod
    def instruction(pipe: Any) -> str:
        """The chat around an empty prompt."""
        return _chat(pipe, "")

    @staticmethod
    def tokens(pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """With the chat around them."""
        return [len(ids) for ids in pipe.tokenizer([_chat(pipe, p) for p in prompts]).input_ids], QWEN_TOKENS

    @staticmethod
    def context(pipe: Any, prompts: Sequence[str], device: torch.device, sizes: Tensor) -> Context:
        """Qwen's last states but one of the whole chat, filled up with zeros, which the mask leaves out."""
        found, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        text = torch.zeros(len(found), QWEN_TOKENS, found[0].shape[1], device=device)
        mask = torch.zeros(len(found), QWEN_TOKENS, dtype=torch.long, device=device)
        for i, states in enumerate(found):
            text[i, : len(states)], mask[i, : len(states)] = states.float(), 1
        return Context(text, mask=mask)

    def blank(self, n: int, tokens: int) -> Context:
        """Texts of QWEN_TOKENS, the longest that there are: without a mask, of which a plan could not know how much it leaves."""
        return Context(torch.zeros(n, QWEN_TOKENS, self.model.config.cap_feat_dim))

    def tail(self) -> Sequence[nn.Module]:
        """Its layers and the projection onto patches, which its embeddings come after by name alone."""
        return self.model.layers, self.model.all_final_layer[f"{PATCH}-1"].linear

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, C, H, W] the velocity. A context without mask is read whole."""
        self._turn(x_t.device)
        dtype = self.dtype
        texts = list(c.text.to(dtype))
        if c.mask is not None:
            texts = [text[mask.bool()] for text, mask in zip(texts, c.mask, strict=True)]
        images = list(x_t.to(dtype).unsqueeze(2).unbind(0))
        out = self.model(images, (1000 - t) / 1000, texts, patch_size=PATCH, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    def _turn(self, device: torch.device) -> None:
        """Its tables of positions: made by the network in a preview, training could not differentiate through them."""
        rope = self.model.rope_embedder
        if rope.freqs_cis is None or rope.freqs_cis[0].device != device:
            with torch.inference_mode(False):
                made = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
                rope.freqs_cis = [table.to(device) for table in made]


def _chat(pipe: Any, prompt: str) -> str:
    """What its pipeline makes of a prompt before it is read."""
    messages = [{"role": "user", "content": prompt}]
    return str(pipe.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True))
