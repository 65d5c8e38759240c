"""Checkpoints of one file as other programs share them (Stable Diffusion 1, 2, XL), made from a pipeline: diffusers' map, inverted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def single_file(pipe: Any, file: Path, open_clip: bool = False) -> Path:
    """The weights of a pipeline as one checkpoint; `open_clip`: with the text encoder of Stable Diffusion 2 in place of 1's."""
    tensors = {f"model.diffusion_model.{unet_key(k, pipe.unet)}": v for k, v in pipe.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{vae_key(k, pipe.vae)}": vae_value(k, v) for k, v in pipe.vae.state_dict().items()}
    if getattr(pipe, "text_encoder_2", None) is not None:
        tensors |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= openclip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= openclip(pipe.text_encoder, "cond_stage_model.model.") if open_clip else clip(pipe.text_encoder, CLIP)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, file)
    return file


CLIP = "cond_stage_model.transformer."


def unet_key(key: str, unet: Any) -> str:
    name, ending = key.rsplit(".", 1)
    if name in UNET:
        return f"{UNET[name]}.{ending}"
    where, kind, number, rest = re.fullmatch(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(\w+)\.(\d+)\.(.*)", key).groups()  # type: ignore[union-attr]
    layers, j, i = unet.config.layers_per_block, int(number), int((where.split(".") + ["0"])[1])
    if kind == "resnets":
        rest = ".".join([RESNET[rest.rsplit(".", 1)[0]], ending])
    if where == "mid_block":
        return f"middle_block.{2 * j if kind == 'resnets' else 2 * j + 1}.{rest}"
    slot = int(kind == "attentions")
    if where.startswith("down"):
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (i + 1)}.0.op.{ending}"
        return f"input_blocks.{(layers + 1) * i + j + 1}.{slot}.{rest}"
    if kind == "upsamplers":
        attends = hasattr(unet.up_blocks[i], "attentions")
        return f"output_blocks.{(layers + 1) * i + layers}.{2 if attends else 1}.conv.{ending}"
    return f"output_blocks.{(layers + 1) * i + j}.{slot}.{rest}"


def vae_key(key: str, vae: Any) -> str:
    last = len(vae.config.block_out_channels) - 1
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    found = re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(\w+)", key)
    return f"{found[1]}mid.attn_1.{ATTENTION[found[2]]}.{found[3]}" if found else key


def vae_value(key: str, value: Tensor) -> Tensor:
    """Attention's projections are convolutions there."""
    return value[:, :, None, None] if "attentions" in key and value.ndim == 2 else value


def clip(model: Any, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in model.state_dict().items()}


def openclip(model: Any, prefix: str) -> dict[str, Tensor]:
    state = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    made = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
    }
    if "text_projection.weight" in state:
        made["text_projection"] = state.pop("text_projection.weight").T
    for key in [k for k in state if k.endswith("q_proj.weight") or k.endswith("q_proj.bias")]:
        parts = [state.pop(key.replace("q_proj", f"{which}_proj")) for which in "qkv"]
        layer = key.split(".")[2]
        made[f"transformer.resblocks.{layer}.attn.in_proj_{key.rsplit('.', 1)[1]}"] = torch.cat(parts)
    for key, value in state.items():
        for theirs, ours in OPEN.items():
            key = key.replace(theirs, ours)
        made[key.replace("encoder.layers.", "transformer.resblocks.")] = value
    return {prefix + k: v for k, v in made.items()}
