"""SANA behind the family's door: Gemma's text after an instruction, DC-AE's latents, samples and students as its pipeline has them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import suite
from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.flows import nodes
from ddil_lightning.backbones.outline import Outline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.samplers import exactly, named
from ddil_lightning.backbones.sana import Sana
from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.vocabulary import Vocabulary
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.runs.export import export, verify
from ddil_lightning.runs.release import Release, check_formats, release
from ddil_lightning.testing.checks import TOTAL
from distilled import distilled, each, entries
from pair import Pair, ddp
from sanas import FLOW, captions, instruction, make_sana
from sd3 import rescheduled

PROMPTS = ["a small red circle", "a handwritten seven left of a large blue square"]
SIZES = [(32, 32), (32, 64)]
ONE_SLOW = [pytest.param(SIZES[0], marks=pytest.mark.slow), SIZES[1]]
EULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
}


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SANA-1.5, with norms of queries and keys; times in other units, and positions as the largest have them."""
    more = {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.5, "interpolation_scale": 2.0}
    return make_sana(tmp_path_factory.mktemp("sana") / "newer", **more)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_flow_by_its_own_settings(sana: Path) -> None:
    """Those of DPM-Solver++, which is no scheduler of flow matching by its name."""
    backbone = Pipeline(str(sana))
    network = backbone.network()
    assert type(backbone.pipe.scheduler).__name__ == "DPMSolverMultistepScheduler" and isinstance(network, Sana)
    assert (backbone.predicts, backbone.shift, backbone.schedule.steps) == ("flow", 3.0, 1000)
    assert backbone.guidance == 4.5
    assert (backbone.latent_shape, backbone.size, network.divisor, network.largest) == ((4, 8, 8), (32, 32), 1, None)


@pytest.mark.parametrize("name", ["euler", "ddim", "lcm"])
def test_another_sampler_walks_its_own_nodes(sana: Path, name: str) -> None:
    """Shifted by 3, with no last step from next to the data: the settings of DPM-Solver++ have names that flow schedulers do not read."""
    backbone = Pipeline(str(sana))
    sigmas = torch.tensor([1.0, 0.9, 0.75, 0.5], dtype=torch.float64)
    made = named(backbone, name)
    assert torch.allclose(nodes(made.pipe.scheduler, 4, made.network(), made.latent_shape), sigmas, atol=1e-6)
    assert torch.allclose(nodes(backbone.pipe.scheduler, 4, backbone.network(), backbone.latent_shape), sigmas, atol=1e-3)
    policy, grid = exactly(made, 4, 4.5)
    mine = sampling.latents(made, policy, grid, PROMPTS, 4.5)
    torch.testing.assert_close(mine, sampling.pipeline_latents(made, PROMPTS, 4, 4.5), rtol=0, atol=1e-4)


# Text ---------------------------------------------------------------------------------------------------------------------------------


def test_text_is_encoded_as_its_pipeline_does_it(sana: Path) -> None:
    """After the instruction of a plain call, but for the empty prompt of guidance; in small letters."""
    backbone = Pipeline(str(sana))
    c, null = backbone.encode_text(PROMPTS), backbone.null()
    lines = instruction().split("\n")
    text, mask, no_text, no_mask = backbone.pipe.encode_prompt(PROMPTS, True, device="cpu", complex_human_instruction=lines)
    assert c.text.shape == (2, 300, 12) and c.mask is not None and null.mask is not None
    assert torch.equal(c.text, text) and torch.equal(c.mask, mask) and c.mask.sum(1).tolist() == [5, 10]
    assert torch.equal(null.text, no_text[:1]) and torch.equal(null.mask, no_mask[:1]) and int(null.mask.sum()) == 1
    assert torch.equal(backbone.encode_text([" A Small RED circle "]).text, c.text[:1])
    bare = backbone.pipe.encode_prompt(PROMPTS, False, device="cpu")[0]
    assert float((c.text - bare)[:, 1:4].abs().max()) > 0.1  # the instruction is read


def test_a_text_is_too_long_where_its_pipeline_would_cut_it(sana: Path) -> None:
    backbone, long = Pipeline(str(sana)), " ".join(["Red"] * 299)
    backbone.check_length([long])
    with pytest.raises(ValueError, match="has 301 tokens and the text encoder reads 300: shorten it"):
        backbone.encode_text(["a", long + " red"])
    cut, whole = backbone.encode_text([long + " red"], truncate=True), backbone.encode_text([long])
    assert cut.mask is not None and torch.equal(cut.text, whole.text) and int(cut.mask.sum()) == 300


def test_masked_places_do_not_count_and_others_do(sana: Path) -> None:
    backbone = Pipeline(str(sana))
    x_t, t, c = noise(2, 4, 8, 8), torch.tensor([20.0, 999.0]), backbone.encode_text(PROMPTS)
    assert c.mask is not None
    network, changed = backbone.network(), c.text + (1 - c.mask[..., None]) * 9
    out = network(x_t, t, c)
    assert out.shape == x_t.shape and torch.equal(network(x_t, t, c._replace(text=changed)), out)
    assert not torch.allclose(network(x_t, t, c._replace(mask=torch.ones_like(c.mask))), out, atol=1e-3)
    assert not torch.allclose(network(x_t, t, c._replace(text=c.text.flip(0), mask=c.mask.flip(0))), out, atol=1e-3)
    with pytest.raises(ValueError, match="reads its text under a mask, which this context lacks"):
        network(x_t, t, c._replace(mask=None))


def test_an_outline_is_as_large_as_the_pipeline(sana: Path) -> None:
    real, outline = Pipeline(str(sana)), Outline(str(sana))
    c, blank = real.encode_text(PROMPTS), outline.encode_text(PROMPTS)
    assert blank.text.shape == c.text.shape and blank.mask is not None and c.mask is not None
    assert blank.mask.dtype == c.mask.dtype and blank.mask.shape == c.mask.shape and bool(blank.mask.all())
    assert (outline.size, outline.latent_shape) == (real.size, real.latent_shape)


def test_prompts_are_not_searched(sana: Path) -> None:
    with pytest.raises(ValueError, match="reads a prompt within other words, so that none stands alone"):
        Vocabulary(Pipeline(str(sana)))


# Latents ------------------------------------------------------------------------------------------------------------------------------


def test_latents_are_the_one_answer_of_its_autoencoder(sana: Path) -> None:
    """DC-AE has no distribution, and no shift."""
    backbone, pixels = Pipeline(str(sana)), noise(3, 3, 32, 64).clamp(-1, 1)
    z = backbone.encode_images(pixels)
    own = backbone.pipe.vae.encode(pixels).latent
    assert z.shape == (3, 4, 8, 16)
    torch.testing.assert_close(z, own * 0.41407)
    torch.testing.assert_close(backbone.decode(z), backbone.pipe.vae.decode(own).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    z.requires_grad_()
    (slope,) = torch.autograd.grad(backbone.decode(z, gradients=True).square().sum(), z)
    assert float(slope.abs().min()) > 0


def test_a_large_image_is_encoded_and_decoded_in_tiles(sana: Path) -> None:
    backbone, seen = Pipeline(str(sana)), []
    for name in ("encode", "decode"):
        own = getattr(backbone.pipe.vae, name)
        setattr(backbone.pipe.vae, name, lambda x, own=own, **kw: seen.append(backbone.pipe.vae.use_tiling) or own(x, **kw))
    z = backbone.encode_images(torch.zeros(1, 3, 1024, 1056))
    assert z.shape == (1, 4, 256, 264) and backbone.decode(z).shape == (1, 3, 1024, 1056)
    assert seen == [True, True] and not backbone.pipe.vae.use_tiling


# Samples ------------------------------------------------------------------------------------------------------------------------------


def sampled(backbone: Pipeline, x: Tensor, steps: int, g: float) -> Tensor:
    """By the network of this library and the scheduler of the pipeline, whose times are whole: 899 where sigma is 0.8999."""
    scheduler, c = backbone.pipe.scheduler, backbone.encode_text(PROMPTS).guided(g - 1 if g > 1 else None)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas[:-1].double().flip(0)
    schedule = NoiseSchedule(1 - sigmas, sigmas, scheduler.timesteps.flip(0))
    teacher = Denoiser(backbone.network(), schedule, "flow", backbone.null() if g > 1 else None)
    for k, t in enumerate(scheduler.timesteps):
        velocity = schedule.output("flow", teacher(x, torch.tensor([steps - 1 - k] * len(x)), c))
        x = scheduler.step(velocity, t, x).prev_sample
    return x


@pytest.mark.parametrize("size", ONE_SLOW, ids=str)
@pytest.mark.parametrize("which", ["sana", "newer"])
@torch.no_grad()
def test_its_samples_are_the_pipelines_own(which: str, size: tuple[int, int], request: pytest.FixtureRequest) -> None:
    """By its own DPM-Solver++, with guidance and without, called as its users call it."""
    backbone = Pipeline(Source(str(request.getfixturevalue(which)), size=size))
    x_T = sampling.noise(2, backbone.latent_shape, 0)
    for steps in (4, 20):
        made = {g: sampling.pipeline_latents(backbone, PROMPTS, steps, g) for g in (1.0, 4.5)}
        for g, theirs in made.items():
            torch.testing.assert_close(sampled(backbone, x_T, steps, g), theirs, rtol=0, atol=1e-4)
        assert float((made[1.0] - made[4.5]).abs().max()) > 1e-2  # guidance counts


@pytest.mark.parametrize("size", ONE_SLOW, ids=str)
@pytest.mark.parametrize("name", EULERS)
def test_the_teacher_samples_as_its_pipeline_does(name: str, size: tuple[int, int], newer: Path, tmp_path: Path) -> None:
    """With schedulers of flow matching, on the very nodes of a plain call."""
    kind, config = EULERS[name]
    made = Pipeline(Source(str(rescheduled(newer, tmp_path / "p", kind, **config)), size=size))
    for steps in (4, 20):
        for g in (1.0, 4.5):
            policy, grid = exactly(made, steps, g)
            mine = sampling.latents(made, policy, grid, PROMPTS, g if g > 1 else None)
            torch.testing.assert_close(mine, sampling.pipeline_latents(made, PROMPTS, steps, g), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_is_told_the_same_in_training_and_in_the_pipeline(dtype: torch.dtype, newer: Path, tmp_path: Path) -> None:
    """sigma 1000 timestep_scale in float32, whatever the network computes in; texts under their mask."""
    made, told = Pipeline(str(rescheduled(newer, tmp_path / "p", shift=3.0)), dtype=dtype), []

    def listen(module: Any, args: Any, kwargs: Any) -> None:
        named = dict(zip(("hidden_states", "encoder_hidden_states", "timestep"), args, strict=False))
        told.append({**named, **kwargs})

    handle = made.network().model.register_forward_pre_hook(listen, with_kwargs=True)
    sampling.pipeline_latents(made, PROMPTS, 7, 1.0)
    theirs = told.copy()
    told.clear()
    policy, grid = exactly(made, 7, 1.0)
    sampling.latents(made, policy, grid, PROMPTS, None)
    handle.remove()
    assert len(told) == len(theirs) == 7 and float(told[0]["timestep"][0]) == 500.0
    for mine, other in zip(told, theirs, strict=True):
        assert mine["timestep"].dtype == torch.float32 and torch.equal(mine["timestep"], other["timestep"])
        assert mine["hidden_states"].dtype == other["hidden_states"].dtype == dtype
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            assert mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name])


# Students -----------------------------------------------------------------------------------------------------------------------------

ENTRIES = entries(4.5)
LCM, DMD2, LORA = (ENTRIES[name] for name in ("lcm", "dmd2", "lcm-lora"))


@pytest.mark.parametrize("entry", each(ENTRIES))
def test_methods_distil_it_and_diffusers_loads_the_student(entry: suite.Entry, sana: Path, tmp_path: Path) -> None:
    """With roll-outs of both; resumed exactly; the export samples as the trainer does on the trained nodes, called by diffusers alone."""
    from diffusers import DiffusionPipeline, SanaPipeline

    def objects() -> tuple[Any, Any]:
        return suite.build(entry, sana, updates=TOTAL), captions(sana)

    run, folder = distilled(objects, tmp_path, PROMPTS)
    assert all(chunk.c.mask.dtype == torch.int64 for chunk in run.data.buffer._chunks)
    method = run.method
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is SanaPipeline and pipe.transformer.config.sample_size == 8
    policy, grid = method.deployment.sampler(4)
    for height, width in SIZES:
        x_T, seeds = noise(2, 4, height // 4, width // 4), [torch.Generator().manual_seed(i) for i in range(2)]
        mine = policy.sample(x_T, grid, suite.backbone(sana).encode_text(PROMPTS), seeds)
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", "use_resolution_binning": False}
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        theirs = pipe(PROMPTS, latents=x_T, generator=seeds, height=height, width=width, **call).images
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), rtol=0, atol=2e-6)
    card = (folder / "README.md").read_text()
    assert "height=32, width=32, use_resolution_binning=False).images[0]" in card  # a plain call makes 1024 x 1024
    assert "| nodes | sigma 1, 0.9, 0.75, 0.5 at 4 steps |" in card
    assert Pipeline(str(folder)).shift == 3.0


def test_a_plain_call_makes_one_size_whatever_the_network(sana: Path) -> None:
    for size, said in (((32, 32), True), ((1024, 1024), True), ((32, 64), True)):
        assert Pipeline(Source(str(sana), size=size)).says_size is said
    large = Pipeline(str(sana))
    large._network.model.register_to_config(sample_size=256)
    large.latent_shape = large._network.latent_shape
    assert large.size == (1024, 1024) and not large.says_size


def test_adapters_are_released_in_the_pipelines_own_format(sana: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    backbone = Pipeline(Source(str(sana), vae=str(sana)))  # an autoencoder that is named is loaded by its own class
    method = suite.build(LORA, sana, pipeline=backbone)
    with torch.no_grad():
        for p in method.student.weights():
            p.add_(0.05 * noise(*p.shape))
    made = dict(release(method, Release(tmp_path, ("diffusers", "lora"), "sana", 4, PROMPTS)))
    assert all(difference < 1e-5 for difference in made.values()) and len(made) == 2
    keys = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {".".join(key.split(".")[4:-2]) for key in keys} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert all(key.startswith("transformer.transformer_blocks.") for key in keys)
    card = (tmp_path / "README.md").read_text()
    assert "from diffusers import AutoencoderDC" in card and "height=32, width=32, use_resolution_binning=False" in card
    assert "ComfyUI" not in card  # which does not know it
    with pytest.raises(ValueError, match="--format kohya is for U-Nets, and this student is a Sana"):
        check_formats(method, ["kohya"])


@pytest.mark.slow
def test_adapters_on_half_precision(sana: Path, tmp_path: Path) -> None:
    """As large models are trained: Gemma and the base in bfloat16."""
    backbone = Pipeline(str(sana), dtype=torch.bfloat16)
    memory = {"gradient_checkpointing": True}
    run = suite.fit(suite.build(LORA, sana, pipeline=backbone, updates=3, memory=memory), captions(sana))
    assert len(run.rows) == 3 and all(math.isfinite(row["loss"]) for row in run.rows)
    folder = export(run.method, tmp_path / "student", 4)
    assert verify(run.method, folder, PROMPTS, 4) < 1e-3


def test_a_student_of_another_size_is_the_same_network(newer: Path, tmp_path: Path) -> None:
    """Where it has positions they are counted in shares of sample_size, so that no other one may be written into its configuration."""
    method = suite.build(LCM, newer, pipeline=Pipeline(Source(str(newer), size=(64, 64))))
    folder = export(method, tmp_path / "student", 4)
    assert verify(method, folder, PROMPTS, 4) < 1e-4
    assert "height=64, width=64, use_resolution_binning=False" in (folder / "README.md").read_text()
    assert json.loads((folder / "transformer" / "config.json").read_text())["sample_size"] == 8
    assert Pipeline(str(folder)).size == (64, 64)


def test_a_student_of_fewer_blocks(sana: Path) -> None:
    backbone = Pipeline(Source(str(sana), networks={"student": {"num_layers": 1}}))
    student = backbone.trainable()
    assert len(student.blocks()) == 1 and len(backbone.network().blocks()) == 2
    kept = backbone.network().model.transformer_blocks[0].state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in student.model.transformer_blocks[0].state_dict().items())
    with pytest.raises(ValueError, match=r"networks\.student: its text width.* is 8 and the teacher's 12: it cannot take the teacher's"):
        Pipeline(Source(str(sana), networks={"student": {"caption_channels": 8}})).trainable()


# What discriminators, memory and sharding ask of it -----------------------------------------------------------------------------------


def asked(sana: Path) -> tuple[Any, Tensor, Tensor, Any]:
    backbone = Pipeline(Source(str(sana), size=(32, 64)))
    return backbone.trainable(), noise(2, 4, 8, 16), torch.tensor([20.0, 999.0]), backbone.encode_text(PROMPTS)


def test_features_are_the_tokens_that_leave_its_blocks(sana: Path) -> None:
    network, x_t, t, c = asked(sana)
    assert network.layers == ("block0", "block1")
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(network.model.transformer_blocks):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({f"block{i}": out}))
    out, found = network.with_features(x_t, t, c, ("block1", "block0"))
    assert torch.equal(out, network(x_t, t, c)) and found[0].shape == (2, 16, 8, 16)
    for name, feature in zip(("block1", "block0"), found, strict=True):
        assert torch.equal(feature[:, :, 1, 2], seen[name][:, 1 * 16 + 2])
    seen.clear()
    (early,) = network.features(x_t, t, c, ("block0",))
    assert torch.equal(early, found[1]) and "block1" not in seen  # what comes after is not run
    assert network.head(("block0", "block1"))(*found).shape == (2, 2) and network.head()(early).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="gan.layers has 'mid': Sana has block0, block1"):
        network.features(x_t, t, c, ("mid",))


@pytest.mark.parametrize("features", [False, True])
def test_gradients_are_the_same_with_checkpointing(features: bool, sana: Path) -> None:
    """Also of features alone, whose forward ends within a block that is computed again."""
    network, x_t, t, c = asked(sana)
    grads = []
    for on in (False, True):
        network.recompute(on)
        network.zero_grad()
        loss = network.features(x_t, t, c, ("block0", "block1")) if features else (network(x_t, t, c),)
        sum(x.square().mean() for x in loss).backward()
        grads.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and (features or len(grads[0]) == len(list(network.parameters())))
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert float(grads[0]["transformer.transformer_blocks.0.attn2.to_k.weight"].abs().max()) > 0


def test_its_blocks_and_its_last_layer(sana: Path) -> None:
    network = asked(sana)[0]
    assert network.blocks() == list(network.model.transformer_blocks)
    assert network.last_layer() is network.model.proj_out.weight
    adapted = Pipeline(str(sana)).adapted(Adapter(2))
    name = next(name for name, p in adapted.named_parameters() if p is adapted.last_layer())
    assert name.startswith("transformer.transformer_blocks.1.attn2.to_out.0.lora_")


def both_ways(rank: int, folder: Path) -> dict[str, Any]:
    """Rows of DMD2 with a GAN at two depths, whole and sharded."""
    suite.backbone(folder)  # loading it draws numbers, and the first run's head would begin with others
    ways: dict[str, Any] = {"ddp": ddp(DMD2), "fsdp2": {"strategy": "fsdp2", "devices": 2, "num_nodes": 1}}
    return {name: suite.fit(suite.build(DMD2, folder, updates=2), captions(folder), **way).rows for name, way in ways.items()}


@pytest.mark.slow
def test_it_is_sharded_by_its_blocks(pair: Pair, sana: Path) -> None:
    for found in pair.run(both_ways, sana):
        assert len(found["ddp"]) == len(found["fsdp2"]) == 2
        for a, b in zip(found["ddp"], found["fsdp2"], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


# What it refuses ----------------------------------------------------------------------------------------------------------------------


def test_what_it_has_no_place_for_is_refused(sana: Path) -> None:
    with pytest.raises(ValueError, match=r"^Sana cannot be told the guidance: set model\.w_conditioned to false$"):
        suite.build(suite.Entry("lcm", suite.LCM, {"solver_steps": 40, "rollouts": (4,)}), sana)
    with pytest.raises(ValueError, match="Sana cannot be told the time that it jumps to"):
        Pipeline(str(sana)).trainable(s_conditioned=True)
    with pytest.raises(ValueError, match="sides are multiples of 8 pixels, not of 30 x 32: the nearest is 32 x 32"):
        Pipeline(Source(str(sana), size=(30, 32)))


@pytest.mark.parametrize(
    ("network", "line"),
    [
        (
            {"guidance_embeds": True},
            r"^the transformer of .* is told the guidance \(guidance_embeds\), as SANA-Sprint's is: .* SANA-1.5, .*$",
        ),
        ({"in_channels": 8}, "reads 8 channels and writes 4, and its autoencoder has 4: only text-to-image is distilled"),
    ],
    ids=["sprint", "other task"],
)
def test_networks_of_another_task_are_refused(network: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=line):
        Pipeline(str(make_sana(tmp_path, **network)))


def test_schedulers_that_do_not_fit_are_refused(sana: Path, tmp_path: Path) -> None:
    for name, (kind, config, line) in {
        "ddim": ("DDIMScheduler", {}, "its Sana is a flow, so give it FlowMatchEulerDiscreteScheduler"),
        "dpm": ("DPMSolverMultistepScheduler", {}, "its Sana is a flow, so give it FlowMatchEulerDiscreteScheduler"),
        "sized": (
            "FlowMatchEulerDiscreteScheduler",
            {"use_dynamic_shifting": True},
            "and Sana has no rule for it: give model.pipeline.shift",
        ),
    }.items():
        with pytest.raises(ValueError, match=line):
            Pipeline(str(rescheduled(sana, tmp_path / name, kind, **config)))
    moved = Pipeline(str(rescheduled(sana, tmp_path / "moved", "DPMSolverMultistepScheduler", **{**FLOW, "flow_shift": 1.0})))
    assert moved.shift == 1.0 and moved.schedule.time(Grid.named("trailing", 4).nodes).tolist() == [1000.0, 750.0, 500.0, 250.0]
    with pytest.raises(ValueError, match="the DPMSolverMultistepScheduler of .* has nodes that are not known"):
        exactly(moved, 4, 2.0)
