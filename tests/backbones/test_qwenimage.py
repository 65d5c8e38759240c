"""Qwen-Image behind the family's door: text under a mask, guidance that keeps the norm, latents of films of one frame, and its students."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_resume import objects
from torch import Tensor

import suite
from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.autoencoder import factor
from ddil_lightning.backbones.outline import Outline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.qwen import QWEN_TOKENS, QwenImage
from ddil_lightning.backbones.samplers import context_of, exactly
from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.vocabulary import Vocabulary
from ddil_lightning.diffusion.denoiser import normed
from ddil_lightning.methods import SnapFusion
from ddil_lightning.records import take
from ddil_lightning.runs.export import NotAsTrained, export, verify
from ddil_lightning.runs.release import Release, release
from distilled import distilled, drawn, each, entries
from pair import Pair, ddp
from sd3 import rescheduled

PROMPTS = ["a small red circle", "a handwritten seven left of a large blue square"]
SIZES = [(16, 16), (16, 24)]
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "stochastic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "stochastic_sampling": True}),
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
}


def test_it_is_a_flow_shifted_by_the_size_of_the_image(qwen: Path) -> None:
    backbone = suite.backbone(qwen)
    network = backbone.network()
    assert isinstance(network, QwenImage) and (backbone.predicts, backbone.schedule.steps, backbone.size) == ("flow", 1000, (16, 16))
    assert (network.latent_shape, network.divisor, network.largest, network.positions((4, 8, 12))) == ((4, 128, 128), 2, None, 24)
    assert backbone.shift == pytest.approx(math.exp(0.5 + 0.4 * (16 - 256) / (8192 - 256))) and backbone.guidance == 4.0
    assert [type(block).__name__ for block in network.blocks()] == ["QwenImageTransformerBlock"] * 2 and network.blocks() == network.row()


def test_latents_are_packed_and_scaled_as_its_pipeline_does_it(qwen: Path) -> None:
    """By mean and standard deviation of each channel, as a film of one frame; decoded as a plain call decodes."""
    backbone = suite.backbone(qwen)
    pipe, vae = backbone.pipe, backbone.pipe.vae
    z = torch.arange(2 * 4 * 8 * 12.0).view(2, 4, 8, 12)
    packed = QwenImage.packed(z)
    assert torch.equal(packed, pipe._pack_latents(z, 2, 4, 8, 12)) and torch.equal(QwenImage.unpacked(packed, z.shape[1:]), z)
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(vae.config[name]).view(4, 1, 1) for name in ("latents_mean", "latents_std"))
    z, modes = backbone.encode_images(pixels), vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
    torch.testing.assert_close(z, (modes.squeeze(2) - mean) / std)
    assert z.shape == (2, 4, 8, 12) and factor(vae) == pipe.vae_scale_factor == 2
    x_T = QwenImage.packed(sampling.noise(2, (4, 8, 12), 0))
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 24, "latents": x_T}
    drawn, made = (pipe(list(PROMPTS), output_type=kind, **call).images for kind in ("pt", "latent"))
    torch.testing.assert_close(backbone.decode(QwenImage.unpacked(made, (4, 8, 12))) / 2 + 0.5, drawn)
    z.requires_grad_()
    backbone.decode(z, gradients=True).square().mean().backward()
    assert z.grad is not None and float(z.grad.abs().max()) > 0


# Text ---------------------------------------------------------------------------------------------------------------------------------


def test_text_is_encoded_as_its_pipeline_does_it(qwen: Path) -> None:
    """Within the template, whose beginning is left out, padded; guidance tells " " in a prompt's place."""
    backbone = suite.backbone(qwen)
    pipe, c, null = backbone.pipe, backbone.encode_text(PROMPTS), backbone.null()
    assert len(pipe.tokenizer(pipe.prompt_template_encode.split("{}")[0]).input_ids) == pipe.prompt_template_encode_start_idx == 34
    texts, read = pipe.encode_prompt(list(PROMPTS), device="cpu")
    assert c.text.shape == (2, QWEN_TOKENS, 12) and c.mask is not None and null.mask is not None
    assert c.mask.sum(1).tolist() == read.sum(1).tolist() == [9, 14] == backbone.network().tokens(pipe, PROMPTS)[0]
    assert torch.equal(c.text[:, :14], texts) and bool(c.text[:, 14:].eq(0).all())
    nothing, whole = pipe.encode_prompt([" "], device="cpu")
    assert whole is None and int(null.mask.sum()) == nothing.shape[1] == 6 and torch.equal(null.text[:, :6], nothing)
    long = " ".join(["a", *["red"] * 507])
    assert int(backbone.encode_text([long], truncate=True).mask.sum()) == 512  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="has 513 tokens and the text encoder reads 512: shorten it"):
        backbone.encode_text(["a", long])


def test_padding_is_read_by_nobody_and_the_rest_counts(qwen: Path) -> None:
    network, x_t, t, c = asked(qwen)
    assert c.mask is not None
    out = network(x_t, t, c)
    changed = c._replace(text=c.text + (1 - c.mask[..., None]) * 9)
    assert out.shape == x_t.shape and torch.equal(network(x_t, t, changed), out)
    torch.testing.assert_close(network(x_t, t, c._replace(text=c.text[:, :14], mask=c.mask[:, :14])), out, rtol=1e-4, atol=1e-5)
    alone = take(c, slice(1, 2))
    torch.testing.assert_close(network(x_t[1:], t[1:], alone), out[1:], rtol=1e-4, atol=1e-5)  # whoever is beside it
    whole = alone._replace(text=alone.text[:, :14], mask=None)
    assert torch.equal(network(x_t[1:], t[1:], alone), network(x_t[1:], t[1:], whole))  # without a mask it is read whole
    assert not torch.allclose(network(x_t, t, c._replace(text=c.text.flip(0), mask=c.mask.flip(0))), out, atol=1e-3)


def test_an_outline_is_as_large_as_the_pipeline(qwen: Path) -> None:
    real, outline = suite.backbone(qwen), Outline(str(qwen))
    c, blank = real.encode_text(PROMPTS), outline.encode_text(PROMPTS)
    assert blank.text.shape == c.text.shape and blank.mask is None and (outline.size, outline.shift) == (real.size, real.shift)
    for name, part in outline.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            mine, theirs = part.state_dict(), getattr(real.pipe, name).state_dict()
            assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


# Samples ------------------------------------------------------------------------------------------------------------------------------


def plain(made: Pipeline, steps: int, **guidance: Any) -> Tensor:
    """QwenImagePipeline called by hand, from the noise of `sampling.latents`, and what it answers unpacked by its own hand."""
    x_T, pipe, (height, width) = sampling.noise(2, made.latent_shape, 0), made.pipe, made.size
    call = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **guidance}
    packed = pipe(list(PROMPTS), latents=pipe._pack_latents(x_T, *x_T.shape), **call).images
    return pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor).squeeze(2)  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [pytest.param(SIZES[0], marks=pytest.mark.slow), SIZES[1]], ids=str)
def test_the_teacher_samples_as_its_pipeline_does(size: tuple[int, int], qwen: Path) -> None:
    """On the very nodes of a plain call, with guidance, whose norm its pipeline sets, and without."""
    made, found = Pipeline(Source(str(qwen), size=size)), {}
    for g, said, asked in ((1.0, {}, 1), (4.0, {"negative_prompt": [" ", " "], "true_cfg_scale": 4.0}, 2)):
        for steps in (4, 20):
            theirs, (policy, grid) = plain(made, steps, **said), exactly(made, steps, g)
            with made.counting() as calls:
                mine = policy.sample(sampling.noise(2, made.latent_shape, 0), grid, context_of(made, PROMPTS, g))
            assert calls == [2 * steps * asked] and policy.denoiser.evaluations == 2 * steps * asked
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
            assert torch.equal(sampling.pipeline_latents(made, PROMPTS, steps, g), theirs)
        found[g] = theirs
    assert float((found[1.0] - found[4.0]).abs().max()) > 1e-2  # guidance counts
    assert float(made.pipe.scheduler.sigmas[-2]) == pytest.approx(0.02)  # shift_terminal


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_re_noising_draws_as_a_policy_does(name: str, qwen: Path, tmp_path: Path) -> None:
    kind, config = SCHEDULERS[name]
    made = Pipeline(str(rescheduled(qwen, tmp_path / "p", kind, **config)))
    policy, grid = exactly(made, 4, 4.0)
    mine = sampling.latents(made, policy, grid, PROMPTS, 4.0)
    torch.testing.assert_close(mine, sampling.pipeline_latents(made, PROMPTS, 4, 4.0), rtol=0, atol=1e-4)


def test_guidance_has_the_norm_of_the_conditional_answer(qwen: Path) -> None:
    """Token by token, in the teacher's role; of another family nothing is set."""
    made = suite.backbone(qwen)
    teacher, x, t = made.role("teacher"), sampling.noise(2, (4, 8, 8), 1), torch.tensor([999, 40])
    c, network, time = made.encode_text(PROMPTS), made.network(), made.schedule.time(t)
    out_c, out_u = network(x, time, c), network(x, time, made.null().expand(2))
    guided = out_u + 4.0 * (out_c - out_u)
    packed = QwenImage.packed(guided)
    packed = packed * QwenImage.packed(out_c).norm(dim=-1, keepdim=True) / packed.norm(dim=-1, keepdim=True)
    answer = teacher.output(teacher(x, t, c.guided(3.0)))
    torch.testing.assert_close(answer.float(), QwenImage.unpacked(packed, (4, 8, 8)), rtol=1e-4, atol=1e-5)
    assert float((answer - guided).abs().max()) > 1e-2
    teacher.network.norm_patch = None
    torch.testing.assert_close(teacher.output(teacher(x, t, c.guided(3.0))).float(), guided, rtol=1e-4, atol=1e-5)
    del teacher.network.norm_patch
    assert torch.equal(normed(torch.zeros(1, 2, 2, 4), torch.ones(1, 2, 2, 4), 2), torch.zeros(1, 2, 2, 4))  # no 0 / 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_is_told_the_same_in_training_and_in_the_pipeline(dtype: torch.dtype, qwen: Path) -> None:
    """sigma in the type of the latents, as they are rounded, and texts as long as the longest, under a mask where one is shorter."""
    made, told = Pipeline(str(qwen), dtype=dtype), []
    handle = made.network().model.register_forward_pre_hook(lambda m, args, kwargs: told.append(kwargs), with_kwargs=True)
    sampling.pipeline_latents(made, PROMPTS, 7, 1.0)
    theirs = told.copy()
    told.clear()
    policy, grid = exactly(made, 7, 1.0)
    sampling.latents(made, policy, grid, PROMPTS, None)
    handle.remove()
    assert len(told) == len(theirs) == 7
    for mine, other in zip(told, theirs, strict=True):
        assert mine["hidden_states"].dtype == other["hidden_states"].dtype == dtype and mine["img_shapes"] == other["img_shapes"]
        assert mine["timestep"].dtype == other["timestep"].dtype and torch.equal(mine["timestep"], other["timestep"])
        for name in ("encoder_hidden_states", "encoder_hidden_states_mask"):
            assert mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name]), name


# Students -----------------------------------------------------------------------------------------------------------------------------

ENTRIES = entries(4.0)
LCM, DMD2, LORA = (ENTRIES[name] for name in ("lcm", "dmd2", "lcm-lora"))


@pytest.mark.parametrize("entry", each(ENTRIES))
def test_methods_distil_it_and_diffusers_loads_the_student(entry: suite.Entry, qwen: Path, tmp_path: Path) -> None:
    """With roll-outs of both; resumed exactly; the export samples as the trainer does on the trained nodes, called by diffusers alone."""
    from diffusers import DiffusionPipeline, QwenImagePipeline

    run, folder = distilled(lambda: objects(entry, qwen, "buffer"), tmp_path, PROMPTS)
    method = run.method
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is QwenImagePipeline
    grid = method.deployment.grid(4)
    nodes = [*method.backbone.schedule.sigmas[grid.nodes[:4]].tolist(), 0.0]
    for height, width in SIZES:
        x_T = sampling.noise(2, (4, height // 2, width // 2), 0)
        call: dict[str, Any] = {"num_inference_steps": 4, "true_cfg_scale": 1.0, "output_type": "latent"}
        torch.manual_seed(0)
        theirs = pipe(list(PROMPTS), height=height, width=width, latents=QwenImage.packed(x_T), **call).images
        torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor(nodes), rtol=0, atol=1e-5)
        mine = drawn(method, x_T, suite.backbone(qwen).encode_text(PROMPTS))
        torch.testing.assert_close(mine, QwenImage.unpacked(theirs, x_T.shape[1:]), rtol=1e-4, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=4, true_cfg_scale=1, height=16, width=16).images[0]" in card
    assert "`true_cfg_scale` 1 is right because guidance 4 is part of the weights" in card and "ComfyUI" not in card
    assert Pipeline(str(folder)).size == (16, 16)


@pytest.mark.slow
def test_a_student_that_is_guided_keeps_the_norm_too(qwen: Path, tmp_path: Path) -> None:
    """As its users guide it, with the negative prompt that its card says."""
    entry = suite.Entry("snapfusion", SnapFusion, {"steps": 4, "guided": 0.5, "guidance": [1.0, 4.0]})
    method = suite.fit(suite.build(entry, qwen, updates=2), suite.captions(qwen)).method
    folder = export(method, tmp_path / "student", 4)
    assert verify(method, folder, PROMPTS, 4) < 1e-4
    assert 'true_cfg_scale=4, negative_prompt=" "' in (folder / "README.md").read_text()


def test_adapters_are_released_in_the_pipelines_own_format(qwen: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    method = suite.build(LORA, qwen)
    with torch.no_grad():
        for p in method.student.weights():
            p.add_(0.05 * sampling.noise(1, p.shape, 0)[0])
    made = dict(release(method, Release(tmp_path, ("diffusers", "lora"), "qwen", 4, PROMPTS)))
    assert all(difference < 1e-5 for difference in made.values()) and len(made) == 2
    keys = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {".".join(key.split(".")[3:-2]) for key in keys} == {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"}


@pytest.mark.slow
def test_adapters_on_half_precision(qwen: Path, tmp_path: Path) -> None:
    """As large models are trained: Qwen and the base in bfloat16."""
    backbone = Pipeline(str(qwen), dtype=torch.bfloat16)
    built = suite.build(LORA, qwen, pipeline=backbone, updates=3, memory={"gradient_checkpointing": True})
    run = suite.fit(built, suite.captions(qwen))
    assert len(run.rows) == 3 and all(math.isfinite(row["loss"]) for row in run.rows)
    folder = export(run.method, tmp_path / "student", 4)
    assert verify(run.method, folder, PROMPTS, 4) < 1e-3
    type(backbone.pipe.scheduler)(shift=1.0).save_pretrained(folder / "scheduler")
    with pytest.raises(NotAsTrained, match="its network is told another timestep"):
        verify(run.method, folder, PROMPTS, 4)


# What discriminators, memory and sharding ask of it -----------------------------------------------------------------------------------


def asked(qwen: Path) -> tuple[Any, Tensor, Tensor, Any]:
    backbone = suite.backbone(qwen)
    return backbone.trainable(), sampling.noise(2, (4, 8, 12), 1), torch.tensor([900.0, 35.5]), backbone.encode_text(PROMPTS)


def test_features_are_the_tokens_of_the_image_that_leave_its_blocks(qwen: Path) -> None:
    network, x_t, t, c = asked(qwen)
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(network.row()):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({f"block{i}": out[1]}))
    out, found = network.with_features(x_t, t, c, ("block1", "block0"))
    assert torch.equal(out, network(x_t, t, c)) and found[0].shape == (2, 16, 4, 6) and seen["block1"].shape == (2, 24, 16)
    for name, feature in zip(("block1", "block0"), found, strict=True):
        assert torch.equal(feature[:, :, 1, 2], seen[name][:, 1 * 6 + 2])
    seen.clear()
    (early,) = network.features(x_t, t, c, ("block0",))
    assert torch.equal(early, found[1]) and "block1" not in seen  # what comes after is not run
    assert network.head(("block0", "block1"))(*found).shape == (2, 2) and network.head()(early).shape == (2, 1, 1, 1)


def test_gradient_checkpointing_has_the_same_gradient(qwen: Path) -> None:
    """Also after a preview under inference_mode, in which its positions are made. What its last block says of the text has none."""
    network, x_t, t, c = asked(qwen)
    with torch.inference_mode():
        network(x_t, t, c)
    grads = []
    for recompute in (False, True):
        network.recompute(recompute)
        network.zero_grad()
        out, (features,) = network.with_features(x_t, t, c)
        (out.square().mean() + features.square().mean()).backward()
        grads.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert grads[0].keys() == {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(network.idle()) == 2 and not any(p.requires_grad for part in network.idle() for p in part.parameters())
    assert network.last_layer() is network.model.proj_out.weight and float(grads[0]["transformer.txt_in.weight"].abs().max()) > 0


def both_ways(rank: int, folder: Path) -> dict[str, Any]:
    """Rows of DMD2 with a GAN at two depths, whole and sharded, and of LCM by a DDP that does not look for what has no gradient."""
    suite.backbone(folder)  # loading it draws numbers, and the first run's head would begin with others
    ways: dict[str, Any] = {"ddp": ddp(DMD2), "fsdp2": {"strategy": "fsdp2", "devices": 2, "num_nodes": 1}}
    found = {name: suite.fit(suite.build(DMD2, folder, updates=2), suite.captions(folder), **way).rows for name, way in ways.items()}
    return found | {"whole": suite.fit(suite.build(LCM, folder, updates=2), suite.captions(folder), **ddp(LCM)).rows}


@pytest.mark.slow
def test_it_is_sharded_by_its_blocks(pair: Pair, qwen: Path) -> None:
    for found in pair.run(both_ways, qwen):
        assert len(found["ddp"]) == len(found["fsdp2"]) == len(found["whole"]) == 2
        for a, b in zip(found["ddp"], found["fsdp2"], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_student_of_fewer_blocks(qwen: Path) -> None:
    made = Pipeline(Source(str(qwen), networks={"student": {"num_layers": 1}}))
    assert len(made.trainable().row()) == 1 and len(made.network().row()) == 2  # type: ignore[attr-defined]
    assert made.network().spaces() == {"number of latent channels": 4, "text width (joint_attention_dim)": 12}


# What it refuses ----------------------------------------------------------------------------------------------------------------------


def test_what_it_has_no_place_for_is_refused(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^QwenImage cannot be told the guidance: set model\.w_conditioned to false$"):
        suite.build(suite.Entry("lcm", suite.LCM, {"solver_steps": 40, "rollouts": (4,)}), qwen)
    with pytest.raises(ValueError, match="reads a prompt within other words, so that none stands alone"):
        Vocabulary(suite.backbone(qwen))
    with pytest.raises(ValueError, match="sides are multiples of 8 pixels, not of 20 x 16: the nearest is 16 x 16"):
        Pipeline(Source(str(qwen), size=(20, 16)))
    with pytest.raises(ValueError, match="its QwenImage is a flow, so give it FlowMatchEulerDiscreteScheduler"):
        Pipeline(str(rescheduled(qwen, tmp_path / "ddim", "DDIMScheduler")))
    check = suite.backbone(qwen).network().check
    for config, line in (
        ({"guidance_embeds": True}, "has guidance_embeds set: only text-to-image is distilled, .* no embedding of the guidance"),
        ({"zero_cond_t": True}, "has zero_cond_t set: only text-to-image is distilled, no editing"),
        ({"in_channels": 32}, "reads 32 channels and writes 16, and its autoencoder 4, packed by four: only text-to-image"),
    ):
        model = suite.backbone(qwen).network().model
        monkeypatch.setattr(model, "_internal_dict", type(model.config)({**model.config, **config}))
        with pytest.raises(ValueError, match=line):
            check("owner/name", 4)
        monkeypatch.undo()
    with pytest.raises(ValueError, match="a SimpleNamespace reads images besides prompts: only text-to-image, a QwenImagePipeline, is"):
        QwenImage.context(SimpleNamespace(), PROMPTS, torch.device("cpu"), torch.zeros(2, 6))
