"""Random miniatures of Flux.1, by diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ddil_lightning.testing.subject import WORDS
from sd3 import t5_tokenizer

SHIFTED: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0}
"""Dev's scheduler as it is published; schnell's has neither."""
NETWORK: dict[str, Any] = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
"""Two blocks of two streams and two of one, on patches of 2 x 2 x 4 numbers."""


def make_flux(folder: Path, dev: bool = True, **network: Any) -> Path:
    """An untrained Flux in miniature, whose card says images of 16 x 16: latents of 8 x 8 x 4. `dev`: told its guidance; else schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from ddil_lightning.miniature import networks

    torch.manual_seed(5)
    sizes = networks.Sizes(image=16, tokens=16, text=16, autoencoder=(8, 8), unet=(16, 32))
    tokenizer, words = networks.build_tokenizer(WORDS, sizes.tokens), t5_tokenizer()
    small = networks.build_text_encoder(len(tokenizer), sizes).config.to_dict()
    clip = CLIPTextConfig(**{**small, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2})
    transformer = FluxTransformer2DModel(**{**NETWORK, "guidance_embeds": dev, **network})
    with torch.no_grad():  # as large as a trained one's, so that what it is told shows
        for p in transformer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    vae = networks.build_autoencoder(sizes)
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**(SHIFTED if dev else {})),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        tokenizer_2=words,
    ).save_pretrained(folder)
    (folder / "ddil.json").write_text(json.dumps({"dataset": "digits", "size": [16, 16]}))
    return folder
