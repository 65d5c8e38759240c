"""Single files: diffusers reads ours as the pipeline that they were made of, bit by bit, and they have the names that other tools know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file

from ddil_lightning.backbones import ldm
from ddil_lightning.backbones.loading import load_pipeline, without_weights
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.unet import UNet


@pytest.fixture(scope="module")
def sd2(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of Stable Diffusion 2.x: OpenCLIP's text encoder, linear projections around the attention."""
    pipe: Any = load_pipeline(tiny)
    pipe.text_encoder.config.hidden_act = "gelu"
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "use_linear_projection": True})
    folder = tmp_path_factory.mktemp("sd2") / "tiny-2"
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("which", ["tiny_eps", "sd2", "xl", pytest.param("ssd1b", marks=pytest.mark.slow)])
def test_diffusers_reads_the_very_pipeline(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder, file = request.getfixturevalue(which), tmp_path / "student.safetensors"
    pipe: Any = load_pipeline(folder)
    save_file(ldm.checkpoint(pipe, torch.float32), file)
    again = ldm.load(type(pipe), file, folder, torch.float32)
    parts = [name for name in ldm.PARTS if getattr(pipe, name, None) is not None]
    assert len(parts) == (4 if which in ("xl", "ssd1b") else 3)
    for name in parts:
        mine, theirs = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items()), name
    stored = load_file(file)
    assert (ldm.checkpoint(again, torch.float16)[next(iter(stored))]).dtype == torch.float16
    # As those who wrote the format have it: attention of the autoencoder by convolutions, OpenCLIP's queries, keys and values in one.
    assert stored["first_stage_model.decoder.mid.attn_1.q.weight"].ndim == 4
    joined = "model.transformer.resblocks.0.attn.in_proj_weight"
    assert (f"cond_stage_model.{joined}" in stored) == (which == "sd2")
    assert (f"conditioner.embedders.1.{joined}" in stored) == (len(parts) == 4)


SD = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "kind", "known"),
    [
        (SD, "v1", ("output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.11.0.skip_connection.weight")),
        ({**SD, "cross_attention_dim": 1024, "use_linear_projection": True}, "v2", ("input_blocks.2.1.proj_in.weight",)),
        (XL, None, ("output_blocks.2.2.conv.weight", "label_emb.0.2.bias", "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight")),
    ],
    ids=["sd15", "sd2", "sdxl"],
)  # fmt: skip
def test_real_u_nets_have_the_names_that_other_tools_know_them_by(config: Any, kind: str | None, known: tuple[str, ...]) -> None:
    """Real architectures without memory for weights; the names are those in the published checkpoints."""
    with without_weights():
        unet = UNet2DConditionModel(**config)
    names, state = ldm._unet_names(unet), unet.state_dict()
    used = {names[key] for key in state}
    assert len(used) == len(state) and set(known) <= used
    # kohya's names of adapters lose the dots: every layer that has one by default is found again by diffusers.
    layers = {
        key.removesuffix(".weight") for key, value in state.items() if value.ndim > 1 and key.removesuffix(".weight").endswith(UNet.adapts)
    }
    made = convert_state_dict_to_kohya({f"unet.{layer}.lora_{part}.weight": torch.empty(1, 1) for layer in layers for part in "AB"})
    found, _ = _convert_non_diffusers_lora_to_diffusers(made)
    again = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in found.items()})
    assert len(layers) > 200 and {key.partition(".lora_")[0] for key in again} == layers
    if kind:
        assert infer_diffusers_model_type({f"{ldm.UNET}{names[key]}": value for key, value in state.items()}) == kind


def test_what_has_no_place_is_refused(tiny: Path) -> None:
    """diffusers would drop the embedding of the guidance without a word."""
    told = Pipeline(str(tiny)).trainable(w_conditioned=True).model
    with pytest.raises(
        ValueError, match="no place for the embedding by which this student is told its guidance: choose --format diffusers"
    ):
        ldm.check(told)
    other = UNet2DConditionModel.from_config(
        {**Pipeline(str(tiny)).pipe.unet.config, "encoder_hid_dim": 4, "encoder_hid_dim_type": "text_proj"}
    )
    with pytest.raises(ValueError, match="no place for encoder_hid_proj.weight of the UNet2DConditionModel"):
        ldm._named(other, ldm.UNET, ldm._unet_names(other))
