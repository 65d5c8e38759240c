"""LoRAs by the names of a network's authors, `diffusion_model.*`: what ComfyUI adds to its weights was trained, and is read back."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

import suite
from ddil_lightning.backbones import comfy, lora, sampling
from ddil_lightning.backbones.families import family_of
from ddil_lightning.backbones.flux import Flux
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.sd3 import SD3
from ddil_lightning.backbones.source import Lora, Source
from ddil_lightning.runs.release import Release, check_formats, release
from ddil_lightning.training.sharing import merged
from distilled import entries
from fluxes import make_flux
from pixarts import make_pixart
from qwenimages import make_qwenimage
from sanas import make_sana
from sd3 import make_sd3
from zimages import make_zimage

PROMPTS = ["a small red circle", "a handwritten seven left of a large blue square"]
MAKERS: dict[str, Any] = {"sd3": make_sd3, "flux": make_flux, "qwen": make_qwenimage, "zimage": make_zimage}
DOUBLE = tuple(f"transformer_blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.to_q", "attn.to_k", "attn.add_q_proj", "ff.net.2"))
"""Of Flux; of its other blocks diffusers' converter counts on 3072 channels."""


def trained(folder: Path, **adapter: Any) -> Any:
    """A student of adapters of rank 4 and alpha 6 that is no longer its teacher."""
    method = suite.build(entries(3.0)["lcm-lora"], folder, adapter={"rank": 4, "alpha": 6.0, **adapter}).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in lora.parameters(method.outgoing.network):
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return method


def apart(method: Any, pipe: Any) -> float:
    """How far the answers of a pipeline's network are from the student's, relative to their size."""
    theirs, mine = family_of(pipe, "theirs").eval(), method.outgoing.network
    c = method.backbone.encode_text(PROMPTS)
    c = c._replace(w=torch.full((2,), 2.0)) if mine.w_conditioned else c
    x_t, t = sampling.noise(2, (mine.latent_shape[0], 8, 8), 0), torch.tensor([900.0, 300.0])
    with torch.no_grad():
        a, b = mine(x_t, t, c), theirs(x_t, t, c)
    return float((a - b).abs().max() / a.square().mean().sqrt())


@pytest.mark.parametrize("name", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "qwen", "zimage"))])
def test_a_release_is_read_back_and_answers_as_the_student(name: str, tmp_path: Path) -> None:
    """As a LoRA of a pipeline of ours, fused; by diffusers alone where it knows these names."""
    folder = MAKERS[name](tmp_path / "p")
    method = trained(folder)
    ((file, difference),) = release(method, Release(tmp_path / "out", ("comfy",), name, 4, PROMPTS))
    assert difference < 1e-4 and file.name == f"{name}_4step_comfy.safetensors"
    assert all(key.startswith("diffusion_model.") for key in load_file(file))
    assert apart(method, Pipeline(str(folder)).pipe) > 1e-2  # without it
    assert apart(method, Pipeline(Source(str(folder), lora=(Lora(str(file)),))).pipe) < 1e-5
    if name in ("qwen", "zimage"):
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        assert apart(method, pipe) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    node = {"sd3": "SD3* with shift 3", "flux": "Flux* with max_shift", "qwen": "AuraFlow* with shift", "zimage": "AuraFlow* with shift 3"}
    assert f"`{file.name}` by *Load LoRA*" in card and f"*ModelSampling{node[name]}" in card and "In diffusers" not in card


def test_diffusers_reads_the_file_of_flux(tmp_path: Path) -> None:
    folder = make_flux(tmp_path / "p")
    method = trained(folder, targets=DOUBLE)
    lora.write_comfy(tmp_path / "x.safetensors", method.outgoing.network, torch.float32)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert apart(method, pipe) > 1e-2
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    assert apart(method, pipe) < 1e-5


def pairs(layers: dict[str, tuple[int, int]], rank: int = 2) -> dict[str, comfy.Pair]:
    """Random adapters for layers of a given width that is read, and written."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return {name: comfy.Pair(normal(rank, width), normal(out, rank)) for name, (width, out) in layers.items()}


def test_diffusers_takes_the_layers_of_flux_apart_at_its_real_width() -> None:
    """A block's five products are one there; where the fifth has no adapter, zeros stand in its place."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, torch.nn.Linear) and "blocks." in name}
    widths = {name: (module.in_features, module.out_features) for name, module in layers.items()}
    for given in (widths, {name: width for name, width in widths.items() if "proj_mlp" not in name}):
        mine = pairs(given)
        made = FluxPipeline.lora_state_dict(comfy.named(Flux, network, mine, alpha=3.0))
        found = comfy.translated(Flux, network, comfy.named(Flux, network, mine, alpha=3.0)) or {}
        for name, pair in mine.items():
            for read in (made, found):
                torch.testing.assert_close(read[f"transformer.{name}.lora_A.weight"], 1.5 * pair.a)
                assert torch.equal(read[f"transformer.{name}.lora_B.weight"], pair.b)
        assert len(found) == 2 * len(mine)
        assert not any(value.any() for key, value in made.items() if key.split(".lora_")[0].removeprefix("transformer.") not in mine)


def authors_sd3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of Stable Diffusion 3 by its authors' names, as diffusers' converter reads them; what it swaps is swapped back."""
    plain = {
        "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1",
    }  # fmt: skip
    blocks = {
        "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k", "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k", "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
    }  # fmt: skip
    named = plain | {f"transformer_blocks.{i}.{a}": f"joint_blocks.{i}.{b}" for i in range(3) for a, b in blocks.items()}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".") if key not in plain else (key, "", "")
        if layer in named:
            swapped = layer in ("norm_out.linear", "transformer_blocks.2.norm1_context.linear")
            found[f"{named[layer]}.{kind}" if kind else named[layer]] = torch.cat(value.chunk(2)[::-1]) if swapped else value
    for name, ours in (SD3.authors or {}).items():
        for i, kind in itertools.product(range(3), ("weight", "bias")):
            stack = [f"{layer.format(i)}.{kind}" for layer in ours]
            if stack[0] in state:
                found[f"{name.format(i)}.{kind}"] = torch.cat([state[key] for key in stack])
    return found


def test_what_is_added_to_the_authors_weights_is_what_was_trained(sd3: Path, tmp_path: Path) -> None:
    """As ComfyUI adds it, alpha / rank up down, and read by diffusers' converter of whole checkpoints."""
    ends = ("attn.to_q", "attn.to_v", "attn2.to_k", "to_out.0", "add_k_proj", "to_add_out", "ff.net.0.proj", "ff_context.net.2")
    method = trained(sd3, targets=ends)
    network = method.outgoing.network
    lora.write_comfy(tmp_path / "x.safetensors", network, torch.float32)
    stored = load_file(tmp_path / "x.safetensors")
    state = authors_sd3(dict(method.backbone.network().model.state_dict()))
    names = {key.rpartition(".")[0] for key in stored if key.endswith(".alpha")}
    assert len(stored) == 3 * len(names) == 3 * 18
    for name in names:
        down, up, alpha = (stored[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = f"{name.removeprefix('diffusion_model.')}.weight"
        state[weight] = state[weight] + float(alpha) / len(down) * up @ down
    made = convert_sd3_transformer_checkpoint_to_diffusers(state)
    with merged(method):
        whole = method.deployment.network.model.state_dict()
    assert made.keys() == whole.keys()
    assert all(torch.allclose(made[key], value, atol=1e-6) for key, value in whole.items())


def test_a_lora_of_others_may_be_one_for_the_whole_stack(sd3: Path, tmp_path: Path) -> None:
    """One A for queries, keys and values, as most trainers have it, in the other spelling; alpha is the rank by default."""
    network = Pipeline(str(sd3)).pipe.transformer
    name = "joint_blocks.0.x_block.attn.qkv"
    (pair,) = pairs({name: (16, 48)}, 3).values()
    save_file(
        {f"diffusion_model.{name}.lora_A.weight": pair.a, f"diffusion_model.{name}.lora_B.weight": pair.b}, tmp_path / "x.safetensors"
    )
    fused = Pipeline(Source(str(sd3), lora=(Lora(str(tmp_path / "x.safetensors"), scale=0.5),))).pipe.transformer
    before, after = network.state_dict(), fused.state_dict()
    stack = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    added = torch.cat([after[key] - before[key] for key in stack])
    torch.testing.assert_close(added, 0.5 * pair.b @ pair.a, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], after[key]) for key in before if key not in stack)


def test_names_that_are_not_the_authors_are_left_to_diffusers(sd3: Path) -> None:
    network = Pipeline(str(sd3)).pipe.transformer
    one = {"diffusion_model.joint_blocks.0.x_block.attn.proj.lora_A.weight": torch.ones(1, 16)}
    assert comfy.translated(SD3, network, one) is None  # half an adapter
    for name in ("transformer.transformer_blocks.0.attn.to_q", "diffusion_model.joint_blocks.0.x_block.other"):
        state = {f"{name}.lora_A.weight": torch.ones(1, 16), f"{name}.lora_B.weight": torch.ones(16, 1)}
        assert comfy.translated(SD3, network, state) is None


@pytest.mark.parametrize(
    ("make", "adapter", "said"),
    [
        (None, {}, "how ComfyUI names the layers of a UNet is not known here: choose diffusers or lora or kohya"),
        (make_sana, {}, "how ComfyUI names the layers of a Sana is not known here: choose diffusers or lora"),
        (make_pixart, {}, "how ComfyUI names the layers of a PixArt is not known here: choose diffusers"),
        (
            make_sd3,
            {"targets": ["proj_out"]},
            "proj_out, which has an adapter, is no layer of its own in ComfyUI: choose diffusers or lora",
        ),
    ],
    ids=["unet", "sana", "pixart", "layer"],
)
def test_what_has_no_such_names_is_refused_in_one_line(make: Any, adapter: Any, said: str, light: Path, tmp_path: Path) -> None:
    method = suite.build(entries(3.0)["lcm-lora"], make(tmp_path / "p") if make else light, adapter={"rank": 2, **adapter})
    with pytest.raises(ValueError, match=f"^--format comfy: {said}$"):
        check_formats(method, ["comfy"])
