"""Pipelines as single files in the layout of Stable Diffusion's own code (LDM, SGM), which ComfyUI, A1111 and `from_single_file` read.

No table of ours says which name becomes which: the names that may occur are put through diffusers' own converters, and what comes out is
read backwards. So a file is right where diffusers reads such files rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.weights import hushed

UNET, VAE = "model.diffusion_model.", "first_stage_model."
RESNET = ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3", "emb_layers.1", "skip_connection")
"""What a residual block of the U-Net is made of in that layout."""
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The components of a pipeline that such a file holds."""


def checkpoint(pipe: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a pipeline in `dtype` under the names of a single file. Raises ValueError, naming it, for what has no place in one."""
    check(pipe.unet)
    both = getattr(pipe, "text_encoder_2", None) is not None
    found = {**_named(pipe.unet, UNET, _unet_names(pipe.unet)), **_named(pipe.vae, VAE, _vae_names(pipe.vae), convolutions=True)}
    first = "conditioner.embedders.0." if both else "cond_stage_model."
    # OpenCLIP's activation is the exact GELU, OpenAI's a quick one: the two have layouts of their own.
    of_openai = both or pipe.text_encoder.config.hidden_act != "gelu"
    found |= _clip(pipe.text_encoder, f"{first}transformer.") if of_openai else _open_clip(pipe.text_encoder, f"{first}model.")
    if both:
        found |= _open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return {name: value.detach().to("cpu", dtype).contiguous() for name, value in found.items()}


def check(unet: Any) -> None:
    """Raises ValueError for a U-Net that single files have no place for."""
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(
            "a single file has no place for the embedding by which this student is told its guidance: choose --format diffusers, or "
            "train with model.w_conditioned=false"
        )
    if not isinstance(unet.config.layers_per_block, int):
        raise ValueError(f"a single file has {unet.config.layers_per_block} layers a block in no layout: choose --format diffusers")


def load(kind: Any, file: Path, config: Path, dtype: torch.dtype) -> Any:
    """The pipeline of class `kind` in a single file, as diffusers reads it; all that is no weight comes from the folder `config`."""
    with hushed():
        pipe = kind.from_single_file(str(file), config=str(config), local_files_only=True, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _named(model: nn.Module, prefix: str, names: Mapping[str, str], convolutions: bool = False) -> dict[str, Tensor]:
    """The state of a model under other names. `convolutions`: all its matrices are convolutions of 1 x 1 there."""
    state: dict[str, Tensor] = model.state_dict()
    homeless = [key for key in state if key not in names]
    if homeless:
        raise ValueError(f"a single file has no place for {homeless[0]} of the {type(model).__name__}: choose --format diffusers")
    return {prefix + names[k]: v[:, :, None, None] if convolutions and v.ndim == 2 else v for k, v in state.items()}


def _converted(convert: Callable[..., Mapping[str, Any]], prefix: str, names: Iterator[str], config: Any) -> dict[str, str]:
    """diffusers' name -> the name in a file, of those `names` that its converter knows."""
    marks = {prefix + name: torch.empty(0) for name in names}
    known = {id(mark): name.removeprefix(prefix) for name, mark in marks.items()}
    return {key: known[id(mark)] for key, mark in convert(marks, config).items() if mark is not None}


def _unet_names(unet: Any) -> dict[str, str]:
    from diffusers.loaders import single_file_utils as utils

    return _converted(utils.convert_ldm_unet_checkpoint, UNET, _may_be_in_unet(unet), dict(unet.config))


def _may_be_in_unet(unet: Any) -> Iterator[str]:
    from diffusers.loaders import single_file_utils as utils

    for table in utils.DIFFUSERS_TO_LDM_MAPPING["unet"].values():
        yield from table.values()
    keys, n = list(unet.state_dict()), unet.config.layers_per_block + 1
    within = sorted({key.split(".attentions.")[1].partition(".")[2] for key in keys if ".attentions." in key})
    residual = [f"{name}.{kind}" for name in RESNET for kind in ("weight", "bias")]
    for i in range(n * len(unet.down_blocks)):
        if i:
            yield from (f"input_blocks.{i}.0.{name}" for name in (*residual, "op.weight", "op.bias"))
            yield from (f"input_blocks.{i}.1.{name}" for name in within)
        # What enlarges comes after the attention, where there is one.
        place = 2 if any(key.startswith(f"up_blocks.{i // n}.attentions.") for key in keys) else 1
        yield from (f"output_blocks.{i}.0.{name}" for name in residual)
        yield from (f"output_blocks.{i}.1.{name}" for name in within)
        if i % n == n - 1:
            yield from (f"output_blocks.{i}.{place}.conv.{kind}" for kind in ("weight", "bias"))
    for i in (0, 2):
        yield from (f"middle_block.{i}.{name}" for name in residual)
    yield from (f"middle_block.1.{name}" for name in within)


def _vae_names(vae: Any) -> dict[str, str]:
    from diffusers.loaders import single_file_utils as utils

    return _converted(utils.convert_ldm_vae_checkpoint, VAE, _may_be_in_vae(vae), dict(vae.config))


def _may_be_in_vae(vae: Any) -> Iterator[str]:
    from diffusers.loaders import single_file_utils as utils

    yield from utils.DIFFUSERS_TO_LDM_MAPPING["vae"].values()
    residual = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
    places = [("encoder", "down", "downsample", len(vae.encoder.down_blocks)), ("decoder", "up", "upsample", len(vae.decoder.up_blocks))]
    names = []
    for part, way, sampler, count in places:
        names += [f"{part}.mid.block_{i}.{name}" for i in (1, 2) for name in residual]
        names += [f"{part}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")]
        for i in range(count):
            names.append(f"{part}.{way}.{i}.{sampler}.conv")
            names += [f"{part}.{way}.{i}.block.{j}.{name}" for j in range(vae.config.layers_per_block + 1) for name in residual]
    yield from (f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


def _states(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    """The state of a text encoder by the names of all versions of transformers: some leave out the first part."""
    for key, value in encoder.state_dict().items():
        yield (key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"), value


def _clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in _states(encoder)}


def _open_clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's layout: queries, keys and values are one matrix, and the projection is transposed."""
    from diffusers.loaders import single_file_utils as utils

    tables = utils.DIFFUSERS_TO_LDM_MAPPING["openclip"]
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, value in _states(encoder):
        if key in tables["layers"]:
            found[prefix + tables["layers"][key]] = value.T if key == "text_projection.weight" else value
            continue
        for theirs, its in tables["transformer"].items():
            key = key.replace(theirs, its)
        stem, _, kind = key.rpartition(".")
        if stem.endswith(("q_proj", "k_proj", "v_proj")):
            joined.setdefault(f"{prefix}transformer.{stem[:-7]}.in_proj_{kind}", {})[stem[-6]] = value
        else:
            found[f"{prefix}transformer.{key}"] = value
    return found | {name: torch.cat([parts[q] for q in "qkv"]) for name, parts in joined.items()}
