"""Flow transformers as their repositories publish them, at their real width and with fewer blocks, and pipelines of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from published import CLIP_G, CLIP_L, VAE, filled

SD35: dict[str, Any] = {
    "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24,
    "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
}  # fmt: skip
"""stabilityai/stable-diffusion-3.5-medium, which has 24 blocks, two attentions in the first 13."""
FLUX: dict[str, Any] = {
    "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096,
    "num_attention_heads": 24, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip
"""black-forest-labs/FLUX.1-dev, which has 19 blocks of two streams and 38 of one."""
WIDE: dict[str, Any] = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
T5_WIDTH = 4096


def write(folder: Path, kind: str, side: int, blocks: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder of `kind` "sd35" or "flux" for images of `side` pixels, of its real width and so many `blocks` (Flux: of each kind).

    With random weights in `dtype`. Its T5 has no layers: texts are encoded before a training, and then the encoders are not needed.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
    from diffusers.models import FluxTransformer2DModel, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ddil_lightning.miniature import flow, networks, shapes

    tokenizer = networks.build_tokenizer(shapes.WORDS, 77)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    t5 = flow.silent(len(tokenizer), T5_WIDTH).to(dtype)
    if kind == "flux":
        parts: dict[str, Any] = {
            "transformer": filled(lambda: FluxTransformer2DModel(**FLUX, num_layers=blocks, num_single_layers=blocks), dtype),
            "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            "vae": filled(lambda: AutoencoderKL(**WIDE, scaling_factor=0.3611, shift_factor=0.1159, sample_size=side), dtype),
            "text_encoder": filled(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L, **ids)), dtype),
            **{"tokenizer": tokenizer, "text_encoder_2": t5, "tokenizer_2": tokenizer},
        }
        pipe: Any = FluxPipeline(**parts)
    else:
        own = {"num_layers": blocks, "dual_attention_layers": tuple(range((blocks + 1) // 2)), "sample_size": side // 8}
        parts = {
            "transformer": filled(lambda: SD3Transformer2DModel(**SD35, **own), dtype),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": filled(lambda: AutoencoderKL(**WIDE, scaling_factor=1.5305, shift_factor=0.0609, sample_size=side), dtype),
            "text_encoder": filled(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L, **ids)), dtype),
            "text_encoder_2": filled(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, **ids)), dtype),
            **{"text_encoder_3": t5, "tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": tokenizer},
        }
        pipe = StableDiffusion3Pipeline(**parts)
    pipe.save_pretrained(folder)
    return folder
