"""Random miniatures of Stable Diffusion 3, by diffusers' own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ddil_lightning.testing.subject import WORDS

SHIFTED: dict[str, Any] = {"shift": 3.0}
"""Stable Diffusion 3's scheduler, as it is published."""
NETWORK: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
"""Two attentions in the first block and norms of queries and keys, as in 3.5."""


def t5_tokenizer() -> Any:
    """T5's kind of tokenizer, of the tests' words."""
    from transformers import T5TokenizerFast

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{word}" for word in WORDS), *letters]
    return T5TokenizerFast(vocab=[(piece, -float(i) / 10) for i, piece in enumerate(dict.fromkeys(pieces))], extra_ids=0)


def rescheduled(source: Path, folder: Path, kind: str = "FlowMatchEulerDiscreteScheduler", **scheduler: Any) -> Path:
    """A copy of a pipeline with another scheduler."""
    import diffusers

    shutil.copytree(source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
    getattr(diffusers, kind)(**scheduler).save_pretrained(folder / "scheduler")
    return folder


def make_sd3(folder: Path, t5: bool = True, **scheduler: Any) -> Path:
    """An untrained Stable Diffusion 3 in miniature: 8 x 8 latents of 4 channels, scaled and shifted; `t5` with the third text encoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from ddil_lightning.miniature import networks

    torch.manual_seed(3)
    sizes = networks.Sizes(image=16, tokens=16, text=16, autoencoder=(8, 8), unet=(16, 32))
    tokenizer = networks.build_tokenizer(WORDS, sizes.tokens)
    small = networks.build_text_encoder(len(tokenizer), sizes).config.to_dict()
    clip = CLIPTextConfig(**{**small, "hidden_size": 8, "intermediate_size": 16, "projection_dim": 8, "num_hidden_layers": 2})
    t5_words = t5_tokenizer()
    reader = T5EncoderModel(T5Config(vocab_size=len(t5_words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    transformer = SD3Transformer2DModel(**NETWORK)
    with torch.no_grad():  # diffusers starts some of them at 0, and then nothing that is told arrives
        for p in transformer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    vae = networks.build_autoencoder(sizes)
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**SHIFTED, **scheduler}),
        vae=vae.eval(),
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer,
        text_encoder_3=reader if t5 else None,
        tokenizer_3=t5_words if t5 else None,
    )
    pipe.save_pretrained(folder)
    return folder
