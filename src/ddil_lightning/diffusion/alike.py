"""Attention to many tokens that are all the same, asked once: softmax over N equal keys is softmax over one whose logit is log N larger.

A text that a pipeline pads with zeros behind no encoder's mask (Stable Diffusion 3 without T5) is such a run of tokens, which stay equal in
every block: each sees the same things and has no position. Nothing is left out, the sum has fewer terms.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Alike:
    """diffusers' joint attention (`JointAttnProcessor2_0`), in which the last token of the text stands for `alike` of its kind.

    `alike` comes with the call (`joint_attention_kwargs`); without it this is the same attention as diffusers' own.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        alike: int = 1,
    ) -> Any:
        """The outputs [B, L, D] of the image's tokens and [B, M, D] of the text's, or of the image's alone where there is no text."""
        q, k, v = (heads(attn, to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = normed(attn.norm_q, q), normed(attn.norm_k, k)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](merged(F.scaled_dot_product_attention(q, k, v))))
        text = [heads(attn, to(encoder_hidden_states)) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        text[:2] = normed(attn.norm_added_q, text[0]), normed(attn.norm_added_k, text[1])
        q, k, v = (torch.cat(both, dim=2) for both in zip((q, k, v), text, strict=True))
        out = merged(F.scaled_dot_product_attention(q, k, v, attn_mask=louder(k, alike) if alike > 1 else None))
        seen, read = out.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        return attn.to_out[1](attn.to_out[0](seen)), read if attn.context_pre_only else attn.to_add_out(read)


def louder(k: Tensor, n: int) -> Tensor:
    """[1, L] what the logits of keys k [B, H, L, D] are raised by, of which the last is n keys."""
    bias = k.new_zeros(1, k.shape[2])
    bias[:, -1] = math.log(n)
    return bias


def heads(attn: Any, x: Tensor) -> Tensor:
    """[B, H, L, D / H] of [B, L, D]."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """[B, L, D] of [B, H, L, D / H]."""
    return x.transpose(1, 2).flatten(2)


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """x, normalised where the network does that."""
    return x if norm is None else norm(x)
