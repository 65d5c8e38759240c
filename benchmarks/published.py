"""Networks as their repositories publish them (config.json of unet/, text_encoder/, vae/), and pipelines of them with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

COMMON: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True,
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
    "out_channels": 4,
}  # fmt: skip
SD: dict[str, Any] = {
    **COMMON, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SD15: dict[str, Any] = {**SD, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
SD21: dict[str, Any] = {
    **SD, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False, "num_class_embeds": None,
    "only_cross_attention": False, "sample_size": 96, "upcast_attention": True, "use_linear_projection": True,
}  # fmt: skip
SDXL: dict[str, Any] = {
    **COMMON, "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "class_embed_type": None, "class_embeddings_concat": False,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 2048, "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "dual_cross_attention": False,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": None, "use_linear_projection": True,
}  # fmt: skip
SSD1B: dict[str, Any] = {
    **SDXL, "attention_type": "default", "dropout": 0.0, "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1], "transformer_layers_per_block": [1, [2, 2], [4, 4]],
}  # fmt: skip
WEIGHTS = {"sd15": (SD15, 859_520_964), "sd21": (SD21, 865_910_724), "sdxl": (SDXL, 2_567_463_684), "ssd1b": (SSD1B, 1_331_334_404)}
"""With the number of their weights."""

ASYMMETRIC: dict[str, Any] = {
    "block_out_channels": [16, 32], "layers_per_block": 2, "attention_head_dim": [2, 4], "transformer_layers_per_block": [1, [2, 1]],
    "reverse_transformer_layers_per_block": [[1, 2, 1], 1], "mid_block_type": None, "use_linear_projection": True,
}  # fmt: skip
"""What SSD-1B and its kin change of a tiny SDXL: every block of another depth, and the middle left out."""

SCHEDULERS: dict[str, dict[str, Any]] = {
    "SD1.5": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "trained_betas": None,
    },
    "SD2.1": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "v_prediction",
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
    "SD2.1-base": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.10.0.dev0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
    "SD2.1, zero SNR": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.16.1", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "timestep_spacing": "trailing", "trained_betas": None,
    },
    "SDXL": {
        "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear", "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
    },
}  # fmt: skip
"""scheduler_config.json of these repositories, the keys of other classes that they kept included."""


def with_unet(folder: Path, made: Path, **changes: Any) -> Path:
    """The pipeline of a folder with a U-Net of a changed configuration and random weights."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None, image_encoder=None)
    torch.manual_seed(2)
    pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, **changes})
    pipe.save_pretrained(made)
    return made


CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768,
    "hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77,
}  # fmt: skip
CLIP_G: dict[str, Any] = {
    **CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
    "hidden_act": "gelu",
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def write(folder: Path, kind: str, side: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A pipeline folder of a `kind` of WEIGHTS for images of `side` pixels, at its real size, with random weights in `dtype`.

    Its vocabulary is the built-in pipeline's, because the published one is not a configuration: fewer words, the same 77 places.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ddil_lightning.miniature import networks, shapes

    large = kind in ("sdxl", "ssd1b")
    tokenizer = networks.build_tokenizer(shapes.WORDS, 77)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    unet = filled(lambda: UNet2DConditionModel.from_config({**WEIGHTS[kind][0], "sample_size": side // 8}), dtype)
    vae = filled(lambda: AutoencoderKL(**VAE, scaling_factor=0.13025 if large else 0.18215, sample_size=side), dtype)
    text = filled(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L, **ids)), dtype)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "text_encoder": text, "tokenizer": tokenizer, "scheduler": scheduler}
    if large:
        second = filled(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, **ids)), dtype)
        pipe: Any = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


def filled(make: Any, dtype: torch.dtype) -> Any:
    """A network that `make` makes, with random weights in `dtype`, of a size that signals pass through; made once, and in that type."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = make()
    generator = torch.Generator().manual_seed(0)
    for module, name, p in _places(network):
        value = torch.ones(p.shape, dtype=dtype) if p.ndim == 1 and name == "weight" else torch.zeros(p.shape, dtype=dtype)
        if p.ndim > 1:
            # torch has no normal numbers in half precision that are as fast as uniform ones; of this width their deviation is the same.
            value.uniform_(-(3**0.5), 3**0.5, generator=generator).mul_(0.7 * p[0].numel() ** -0.5)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    return network.eval()


def _places(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            yield module, name, p
