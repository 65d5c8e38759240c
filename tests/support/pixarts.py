"""Random miniatures of PixArt, by diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ddil_lightning.testing.subject import WORDS

NETWORK: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24, "caption_channels": 16,
}  # fmt: skip


def tokenizer() -> Any:
    """T5's kind of tokenizer, of the tests' words."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0)]
    return T5Tokenizer(vocab=[*special, *((f"▁{word}", -2.0) for word in WORDS)], extra_ids=0, model_max_length=512)


def make_pixart(folder: Path, side: int = 16, kind: str = "PixArtSigmaPipeline", **network: Any) -> Path:
    """An untrained PixArt in miniature: T5 of one layer, transformer of two, images of `side` pixels, latents of half of that."""
    import diffusers
    from transformers import T5Config, T5EncoderModel

    from ddil_lightning.miniature import networks

    torch.manual_seed(2)
    words = tokenizer()
    text = T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    getattr(diffusers, kind)(
        tokenizer=words,
        text_encoder=T5EncoderModel(text),
        vae=networks.build_autoencoder(networks.Sizes(image=side, autoencoder=(8, 8))),
        transformer=diffusers.PixArtTransformer2DModel(**{**NETWORK, "sample_size": side // 2, **network}),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    (folder / "ddil.json").write_text(json.dumps({"dataset": "digits"}))
    return folder
