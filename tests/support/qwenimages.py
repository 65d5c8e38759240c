"""Random miniatures of Qwen-Image, by diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from zimages import tokenizer

SHIFTED: dict[str, Any] = {
    "use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9,
    "shift_terminal": 0.02,
}  # fmt: skip
"""Its scheduler, as it is published."""
NETWORK: dict[str, Any] = {
    "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
"""Two blocks, on patches of 2 x 2 x 4 numbers."""
TEMPLATE = "the image by detailing color shape size texture quantity text spatial relationships of objects and background".split()
"""Words of its pipeline's template, a token each, so that its beginning is the 34 tokens whose states are left out."""


def make_qwenimage(folder: Path, **network: Any) -> Path:
    """An untrained Qwen-Image in miniature, whose card says images of 16 x 16: latents of 8 x 8 x 4, half as large as images."""
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(7)
    words = tokenizer([*("\u0120" + word for word in TEMPLATE), "system", "Describe", "user", "assistant"])
    text = {
        "vocab_size": len(words), "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.5, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]},
    }  # fmt: skip
    seen = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 12, "fullatt_block_indexes": [0]}
    transformer = diffusers.QwenImageTransformer2DModel(**{**NETWORK, **network})
    with torch.no_grad():  # as large as a trained one's, so that what it is told shows
        for p in transformer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
    )  # fmt: skip
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SHIFTED),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=seen)),
        tokenizer=words,
        transformer=transformer,
    ).save_pretrained(folder)
    (folder / "ddil.json").write_text(json.dumps({"dataset": "digits", "size": [16, 16]}))
    return folder
