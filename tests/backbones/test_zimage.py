"""Z-Image behind the family's door: texts of any length, a flow that runs the other way, guidance in its own units, and its students."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import objects
from torch import Tensor

import suite
from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.outline import Outline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.samplers import exactly
from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.vocabulary import Vocabulary
from ddil_lightning.backbones.zimage import ZImage
from ddil_lightning.runs.export import NotAsTrained, export, verify
from ddil_lightning.runs.release import Release, release
from distilled import distilled, drawn, each, entries
from pair import Pair, ddp
from sd3 import rescheduled
from zimages import make_zimage

PROMPTS = ["a small red circle", "a handwritten seven left of a large blue square"]
SIZES = [(16, 16), (16, 24)]
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "by size": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_flow_of_the_size_that_it_is_given(zimage: Path, tmp_path: Path) -> None:
    backbone = Pipeline(str(zimage))
    network = backbone.network()
    assert isinstance(network, ZImage) and (backbone.predicts, backbone.shift, backbone.schedule.steps) == ("flow", 3.0, 1000)
    assert backbone.guidance == 6.0  # guidance_scale 5, which counts from 0
    assert (backbone.size, network.divisor, network.largest, network.positions((4, 8, 12))) == ((16, 16), 2, 64, 24)
    unsaid = Pipeline(str(make_zimage(tmp_path / "unsaid", None)))
    assert unsaid.latent_shape == (4, 128, 128) and unsaid.size == (256, 256)


# Text ---------------------------------------------------------------------------------------------------------------------------------


def test_text_is_encoded_as_its_pipeline_does_it(zimage: Path) -> None:
    """Within the chat, each as long as it is."""
    backbone = Pipeline(str(zimage))
    c, null = backbone.encode_text(PROMPTS), backbone.null()
    texts, nothing = backbone.pipe.encode_prompt(list(PROMPTS), device="cpu")
    assert c.text.shape == (2, 512, 12) and c.mask is not None and null.mask is not None
    assert c.mask.sum(1).tolist() == [len(text) for text in texts] == [23, 28] and int(null.mask.sum()) == len(nothing[0]) == 19
    for mine, mask, theirs in zip([*c.text, *null.text], [*c.mask, *null.mask], [*texts, nothing[0]], strict=True):
        assert torch.equal(mine[mask.bool()], theirs) and bool(mine[~mask.bool()].eq(0).all())
    long = " ".join(["red"] * 493)
    assert int(backbone.encode_text([long], truncate=True).mask.sum()) == 512  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="has 514 tokens and the text encoder reads 512: shorten it"):
        backbone.encode_text(["a", long])


def test_masked_places_are_not_there_and_others_count(zimage: Path) -> None:
    backbone = Pipeline(str(zimage))
    x_t, t, c = noise(2, 4, 8, 8), torch.tensor([20.0, 999.0]), backbone.encode_text(PROMPTS)
    assert c.mask is not None
    network, changed = backbone.network(), c.text + (1 - c.mask[..., None]) * 9
    out = network(x_t, t, c)
    assert out.shape == x_t.shape and torch.equal(network(x_t, t, c._replace(text=changed)), out)
    assert not torch.allclose(network(x_t, t, c._replace(text=c.text.flip(0), mask=c.mask.flip(0))), out, atol=1e-3)
    alone = [network(x_t[i : i + 1], t[i : i + 1], backbone.encode_text(PROMPTS[i : i + 1])) for i in range(2)]
    torch.testing.assert_close(torch.cat(alone), out, rtol=1e-4, atol=1e-5)  # whoever is beside it
    whole = network(x_t, t, c._replace(mask=None))
    assert torch.equal(whole, network(x_t, t, c._replace(mask=torch.ones_like(c.mask)))) and not torch.allclose(whole, out, atol=1e-3)


def test_an_outline_is_as_large_as_the_pipeline(zimage: Path) -> None:
    real, outline = Pipeline(str(zimage)), Outline(str(zimage))
    c, blank = real.encode_text(PROMPTS), outline.encode_text(PROMPTS)
    assert blank.text.shape == c.text.shape and blank.mask is None and outline.size == real.size


# Samples ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [pytest.param(SIZES[0], marks=pytest.mark.slow), SIZES[1]], ids=str)
@pytest.mark.parametrize("name", ["euler", *(pytest.param(name, marks=pytest.mark.slow) for name in ("by size", "lcm"))])
def test_the_teacher_samples_as_its_pipeline_does(name: str, size: tuple[int, int], zimage: Path, tmp_path: Path) -> None:
    """On the very nodes of a plain call, with guidance and without."""
    kind, config = SCHEDULERS[name]
    made = Pipeline(Source(str(rescheduled(zimage, tmp_path / "p", kind, **config)), size=size))
    for steps in (4, 20):
        found = {}
        for g in (1.0, 4.0):
            policy, grid = exactly(made, steps, g)
            found[g] = sampling.pipeline_latents(made, PROMPTS, steps, g)
            mine = sampling.latents(made, policy, grid, PROMPTS, g if g > 1 else None)
            torch.testing.assert_close(mine, found[g], rtol=0, atol=1e-4)
        assert float((found[1.0] - found[4.0]).abs().max()) > 1e-2  # guidance counts


def test_a_call_is_told_w_where_others_are_told_g(zimage: Path) -> None:
    """Its guidance_scale 3 is pos + 3 (pos - neg), which is guidance 4 here; 0 is none, and then its network is called once."""
    backbone, (height, width) = Pipeline(str(zimage)), (16, 16)
    x_T = sampling.noise(2, backbone.latent_shape, 0)
    call: dict[str, Any] = {"num_inference_steps": 4, "height": height, "width": width, "output_type": "latent"}
    for g, scale, calls in ((1.0, 0.0, 8), (4.0, 3.0, 16)):
        with backbone.counting() as counted:
            theirs = backbone.pipe(list(PROMPTS), guidance_scale=scale, latents=x_T.clone(), **call).images
        assert counted == [calls] and torch.equal(sampling.pipeline_latents(backbone, PROMPTS, 4, g), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_is_told_the_same_time_in_training_and_in_the_pipeline(dtype: torch.dtype, zimage: Path) -> None:
    """1 - sigma in float32, by way of 1000 sigma, whatever the network computes in."""
    made, told = Pipeline(str(zimage), dtype=dtype), []
    handle = made.network().model.register_forward_pre_hook(lambda module, args: told.append(args))
    sampling.pipeline_latents(made, PROMPTS, 7, 1.0)
    theirs = told.copy()
    told.clear()
    policy, grid = exactly(made, 7, 1.0)
    sampling.latents(made, policy, grid, PROMPTS, None)
    handle.remove()
    assert len(told) == len(theirs) == 7 and float(told[0][1][0]) == 0
    for mine, other in zip(told, theirs, strict=True):
        assert mine[1].dtype == other[1].dtype == torch.float32
        torch.testing.assert_close(mine[1], other[1], rtol=0, atol=2e-7)  # its own sigmas are rounded once more
        assert mine[0][0].dtype == other[0][0].dtype == dtype
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine[2], other[2], strict=True))


# Students -----------------------------------------------------------------------------------------------------------------------------

ENTRIES = entries(4.0)
LCM, DMD2, LORA = (ENTRIES[name] for name in ("lcm", "dmd2", "lcm-lora"))


@pytest.mark.parametrize("entry", each(ENTRIES))
def test_methods_distil_it_and_diffusers_loads_the_student(entry: suite.Entry, zimage: Path, tmp_path: Path) -> None:
    """With roll-outs of both; resumed exactly; the export samples as the trainer does on the trained nodes, called by diffusers alone."""
    from diffusers import DiffusionPipeline, ZImagePipeline

    run, folder = distilled(lambda: objects(entry, zimage, "buffer"), tmp_path, PROMPTS)
    method = run.method
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is ZImagePipeline
    for height, width in SIZES:
        x_T = noise(2, 4, height // 2, width // 2)
        pipe(list(PROMPTS), 16, 16, num_inference_steps=4, guidance_scale=0.0, output_type="latent")
        torch.manual_seed(0)
        theirs = pipe(list(PROMPTS), height, width, num_inference_steps=4, guidance_scale=0.0, latents=x_T, output_type="latent").images
        torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), rtol=0, atol=2e-6)
        mine = drawn(method, x_T, suite.backbone(zimage).encode_text(PROMPTS))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=4, guidance_scale=0, height=16, width=16).images[0]" in card
    assert "`guidance_scale` 0 is right because guidance 4 is part of the weights; anything above 0 guides once more" in card
    assert Pipeline(str(folder)).shift == 3.0 and Pipeline(str(folder)).size == (16, 16)


@pytest.mark.slow
def test_adapters_are_released_in_the_pipelines_own_format(zimage: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    method = suite.build(LORA, zimage)
    with torch.no_grad():
        for p in method.student.weights():
            p.add_(0.05 * noise(*p.shape))
    made = dict(release(method, Release(tmp_path, ("diffusers", "lora"), "zimage", 4, PROMPTS)))
    assert all(difference < 1e-5 for difference in made.values()) and len(made) == 2
    keys = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {key.split(".")[1] for key in keys} == {"layers", "noise_refiner", "context_refiner"}
    assert {".".join(key.split(".")[4:-2]) for key in keys} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert "*ModelSamplingAuraFlow* with shift 3, *KSampler* with steps 4, cfg 1," in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_adapters_on_half_precision(zimage: Path, tmp_path: Path) -> None:
    """As large models are trained: Qwen and the base in bfloat16."""
    backbone = Pipeline(str(zimage), dtype=torch.bfloat16)
    built = suite.build(LORA, zimage, pipeline=backbone, updates=3, memory={"gradient_checkpointing": True})
    run = suite.fit(built, suite.captions(zimage))
    assert len(run.rows) == 3 and all(math.isfinite(row["loss"]) for row in run.rows)
    folder = export(run.method, tmp_path / "student", 4)
    assert verify(run.method, folder, PROMPTS, 4) < 1e-3
    type(backbone.pipe.scheduler)(shift=1.0).save_pretrained(folder / "scheduler")
    with pytest.raises(NotAsTrained, match="its network is told another t"):
        verify(run.method, folder, PROMPTS, 4)


def test_a_student_of_fewer_blocks(zimage: Path) -> None:
    backbone = Pipeline(Source(str(zimage), networks={"student": {"n_layers": 1}}))
    assert len(backbone.trainable().row()) == 1 and len(backbone.network().row()) == 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"networks\.student: its text width.* is 8 and the teacher's 12: it cannot take the teacher's"):
        Pipeline(Source(str(zimage), networks={"student": {"cap_feat_dim": 8}})).trainable()


# What discriminators, memory and sharding ask of it -----------------------------------------------------------------------------------


def asked(zimage: Path) -> tuple[Any, Tensor, Tensor, Any]:
    backbone = Pipeline(Source(str(zimage), size=(16, 24)))
    return backbone.trainable(), noise(2, 4, 8, 12), torch.tensor([20.0, 999.0]), backbone.encode_text(PROMPTS)


def test_features_are_the_tokens_of_the_image_that_leave_its_blocks(zimage: Path) -> None:
    """The text's, and what fills up either, come after them."""
    network, x_t, t, c = asked(zimage)
    assert network.layers == ("block0", "block1")
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(network.model.layers):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({f"block{i}": out}))
    out, found = network.with_features(x_t, t, c, ("block1", "block0"))
    assert torch.equal(out, network(x_t, t, c)) and found[0].shape == (2, 16, 4, 6) and seen["block1"].shape == (2, 64, 16)
    for name, feature in zip(("block1", "block0"), found, strict=True):
        assert torch.equal(feature[:, :, 1, 2], seen[name][:, 1 * 6 + 2])
    seen.clear()
    (early,) = network.features(x_t, t, c, ("block0",))
    assert torch.equal(early, found[1]) and "block1" not in seen  # what comes after is not run
    assert network.head(("block0", "block1"))(*found).shape == (2, 2) and network.head()(early).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("features", [False, True])
def test_gradients_are_the_same_with_checkpointing(features: bool, zimage: Path) -> None:
    network, x_t, t, c = asked(zimage)
    grads = []
    for on in (False, True):
        network.recompute(on)
        network.zero_grad()
        loss = network.features(x_t, t, c, ("block0", "block1")) if features else (network(x_t, t, c),)
        sum(x.square().mean() for x in loss).backward()
        grads.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and (features or len(grads[0]) == len(list(network.parameters())))
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert float(grads[0]["transformer.cap_embedder.1.weight"].abs().max()) > 0


def test_a_preview_leaves_nothing_that_training_stumbles_over(zimage: Path) -> None:
    """Its positions are made when they are first needed, which may be under inference_mode."""
    network, x_t, t, c = asked(zimage)
    with torch.inference_mode():
        network(x_t, t, c)
    network(x_t, t, c).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_its_blocks_and_its_last_layer(zimage: Path) -> None:
    network = asked(zimage)[0]
    model = network.model
    assert network.blocks() == [*model.noise_refiner, *model.context_refiner, *model.layers]
    assert network.last_layer() is model.all_final_layer["2-1"].linear.weight
    adapted = Pipeline(str(zimage)).adapted(Adapter(2))
    name = next(name for name, p in adapted.named_parameters() if p is adapted.last_layer())
    assert name.startswith("transformer.layers.1.attention.to_out.0.lora_")


def both_ways(rank: int, folder: Path) -> dict[str, Any]:
    """Rows of DMD2 with a GAN at two depths, whole and sharded."""
    suite.backbone(folder)  # loading it draws numbers, and the first run's head would begin with others
    ways: dict[str, Any] = {"ddp": ddp(DMD2), "fsdp2": {"strategy": "fsdp2", "devices": 2, "num_nodes": 1}}
    return {name: suite.fit(suite.build(DMD2, folder, updates=2), suite.captions(folder), **way).rows for name, way in ways.items()}


@pytest.mark.slow
def test_it_is_sharded_by_its_blocks(pair: Pair, zimage: Path) -> None:
    for found in pair.run(both_ways, zimage):
        assert len(found["ddp"]) == len(found["fsdp2"]) == 2
        for a, b in zip(found["ddp"], found["fsdp2"], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


# What it refuses ----------------------------------------------------------------------------------------------------------------------


def test_what_it_has_no_place_for_is_refused(zimage: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^ZImage cannot be told the guidance: set model\.w_conditioned to false$"):
        suite.build(suite.Entry("lcm", suite.LCM, {"solver_steps": 40, "rollouts": (4,)}), zimage)
    with pytest.raises(ValueError, match="reads a prompt within other words, so that none stands alone"):
        Vocabulary(Pipeline(str(zimage)))
    with pytest.raises(ValueError, match="sides are multiples of 8 pixels, not of 18 x 16: the nearest is 16 x 16"):
        Pipeline(Source(str(zimage), size=(18, 16)))
    with pytest.raises(ValueError, match="has positions for sides of 128 pixels at most, not of 16 x 136"):
        Pipeline(Source(str(zimage), size=(16, 136)))
    with pytest.raises(ValueError, match="its ZImage is a flow, so give it FlowMatchEulerDiscreteScheduler"):
        Pipeline(str(rescheduled(zimage, tmp_path / "ddim", "DDIMScheduler")))
    for name, network, line in (
        ("omni", {"siglip_feat_dim": 8}, "has siglip_feat_dim = 8 and patches of .2.: only text-to-image is distilled"),
        ("wide", {"in_channels": 8}, "reads 8 channels and writes 8, and its autoencoder has 4"),
    ):
        with pytest.raises(ValueError, match=line):
            Pipeline(str(make_zimage(tmp_path / name, **network)))
