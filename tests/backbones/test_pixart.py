"""PixArt behind the family's door: its text under the mask, samples as its pipelines make them, students that they load."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import objects
from torch import Tensor

import suite
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.outline import Outline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.vocabulary import Vocabulary
from ddil_lightning.data.cachefile import cached
from ddil_lightning.data.notices import Notices
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.processes import Processes
from ddil_lightning.runs.export import export, verify
from ddil_lightning.runs.release import check_formats
from ddil_lightning.training.plan import Stage
from distilled import distilled
from pixarts import make_pixart

PROMPTS = ["a small red circle", "a handwritten seven left of a large blue square"]
ALPHA = "PixArtAlphaPipeline"
CALL = {"clean_caption": False, "use_resolution_binning": False}


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Alpha's for latents of 128 x 128: it is told the size of the image, though its configuration does not say so."""
    return make_pixart(tmp_path_factory.mktemp("pixart") / "alpha", 256, ALPHA)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Text ---------------------------------------------------------------------------------------------------------------------------------


def test_text_is_encoded_as_its_pipeline_does_it(pixart: Path, alpha: Path) -> None:
    for folder, length in ((pixart, 300), (alpha, 120)):
        backbone = Pipeline(str(folder))
        c, null = backbone.encode_text(PROMPTS), backbone.null()
        text, mask, no_text, no_mask = backbone.pipe.encode_prompt(PROMPTS, True, negative_prompt="", device="cpu")
        assert c.text.shape == (2, length, 16) and c.mask is not None and null.mask is not None
        assert torch.equal(c.text, text) and torch.equal(c.mask, mask) and c.mask.sum(1).tolist() == [5, 10]
        assert torch.equal(null.text, no_text[:1]) and torch.equal(null.mask, no_mask[:1]) and int(null.mask.sum()) == 1
        assert torch.equal(backbone.encode_text([" A Small RED circle "]).text, c.text[:1])
        long = " ".join(["Red"] * length)
        backbone.check_length([long.removesuffix(" Red")])
        with pytest.raises(ValueError, match=f"has {length + 1} tokens and the text encoder reads {length}: shorten it"):
            backbone.encode_text(["a", long])
        assert int(backbone.encode_text([long], truncate=True).mask.sum()) == length  # type: ignore[union-attr]


def test_masked_places_do_not_count_and_others_do(pixart: Path) -> None:
    backbone = Pipeline(str(pixart))
    x_t, t, c = noise(2, 4, 8, 8), torch.tensor([20, 999]), backbone.encode_text(PROMPTS)
    assert c.mask is not None
    network, changed = backbone.network(), c.text + (1 - c.mask[..., None]) * 9
    out = network(x_t, t, c)
    assert out.shape == x_t.shape and torch.equal(network(x_t, t, c._replace(text=changed)), out)
    assert not torch.allclose(network(x_t, t, c._replace(mask=torch.ones_like(c.mask))), out, atol=1e-3)
    with pytest.raises(ValueError, match="reads its text under a mask, which this context lacks"):
        network(x_t, t, c._replace(mask=None))


def test_the_mask_goes_through_a_cache(pixart: Path, tmp_path: Path) -> None:
    backbone, captions = Pipeline(str(pixart)), suite.Pictures()
    for _ in range(2):  # written, and read again
        made = cached(tmp_path / "cache", captions, backbone, False, 0, Notices(), Processes())
    batch = made[[4, 1]]
    c = backbone.encode_text(captions.prompts([4, 1]))
    assert batch.c.mask is not None and c.mask is not None and batch.c.mask.dtype == torch.int64
    assert torch.equal(batch.c.mask, c.mask) and torch.equal(batch.c.text, c.text.half().float())


def test_blank_texts_are_as_large_as_real_ones(pixart: Path, alpha: Path) -> None:
    for folder in (pixart, alpha):
        real, blank = Pipeline(str(folder)).encode_text(PROMPTS), Outline(str(folder)).encode_text(PROMPTS)
        assert [x is None for x in real] == [x is None for x in blank]
        assert real.text.shape[2] == blank.text.shape[2] and blank.text.shape[1] == 300 and blank.mask is not None
        assert real.mask is not None and blank.mask.dtype == real.mask.dtype and bool(blank.mask.all())


def test_prompts_are_searched_among_its_words(pixart: Path) -> None:
    backbone = Pipeline(str(pixart))
    vocabulary = Vocabulary(backbone)
    assert vocabulary.longest == 299
    rows = vocabulary.rows(PROMPTS[0])
    embeddings = vocabulary.table[rows].repeat(2, 1, 1).requires_grad_()
    made = vocabulary.encode(embeddings)
    assert torch.equal(made.text, backbone.encode_text(PROMPTS[:1] * 2).text)
    (slope,) = torch.autograd.grad((made.text * made.mask[..., None]).square().sum(), embeddings)  # type: ignore[index]
    assert bool((slope != 0).any(2).all())


# Samples ------------------------------------------------------------------------------------------------------------------------------


def sampled(backbone: Pipeline, x: Tensor, steps: int, g: float) -> Tensor:
    """By the teacher of this library and the scheduler of the pipeline."""
    teacher, scheduler, c = backbone.role("teacher"), backbone.pipe.scheduler, backbone.encode_text(PROMPTS).guided(g - 1)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(teacher(x, t.expand(len(x)), c).eps, t, x).prev_sample
    return x


@pytest.mark.parametrize("size", [pytest.param((16, 16), marks=pytest.mark.slow), (16, 24)])
@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", ["pixart", "alpha"])
@torch.no_grad()
def test_its_samples_are_the_pipelines_own(which: str, steps: int, size: tuple[int, int], request: pytest.FixtureRequest) -> None:
    """Guided, by DPM-Solver++ as it comes and by DDIM; alpha's are told the size."""
    from diffusers import DDIMScheduler

    backbone = Pipeline(Source(str(request.getfixturevalue(which)), size=size))
    x_T = noise(2, *backbone.latent_shape)
    (height, width), call = size, {"num_inference_steps": steps, "guidance_scale": 4.5, "output_type": "latent", **CALL}

    def theirs() -> Tensor:
        return backbone.pipe(PROMPTS, latents=x_T.clone(), height=height, width=width, **call).images  # type: ignore[no-any-return]

    expected = theirs()
    torch.testing.assert_close(sampled(backbone, x_T, steps, 4.5), expected, rtol=1e-4, atol=1e-4)
    call["guidance_scale"] = 1.0  # by the caption alone
    torch.testing.assert_close(sampled(backbone, x_T, steps, 1.0), theirs(), rtol=1e-4, atol=1e-4)
    call["guidance_scale"] = 4.5
    config = backbone.pipe.scheduler.config
    backbone.pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    policy, c = Policy(backbone.role("teacher"), ddim), backbone.encode_text(PROMPTS)
    torch.testing.assert_close(policy.sample(x_T, Grid.named("trailing", steps), c.guided(3.5)), theirs(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(policy.sample(x_T, Grid.named("trailing", steps), c), theirs(), atol=1e-2)  # guidance counts


def test_it_is_told_the_size_of_every_image(alpha: Path) -> None:
    backbone = Pipeline(Source(str(alpha), size=(16, 24)))
    assert backbone.guidance == 4.5
    sizes = torch.tensor([[30, 20, 4, 0, 16, 24], [24, 40, 0, 3, 24, 24]])
    c, x_t, t = backbone.encode_text(PROMPTS, sizes=sizes), noise(2, 4, 8, 12), torch.tensor([20, 999])
    told = {"resolution": sizes[:, 4:].float(), "aspect_ratio": torch.tensor([[16 / 24], [1.0]])}
    kwargs = {"encoder_hidden_states": c.text, "encoder_attention_mask": c.mask, "timestep": t, "return_dict": False}
    expected = backbone.pipe.transformer(x_t, added_cond_kwargs=told, **kwargs)[0]
    assert expected.shape[1] == 8 and torch.equal(backbone.network()(x_t, t, c), expected[:, :4])
    with pytest.raises(ValueError, match="is told the image's size, which this context lacks"):
        backbone.network()(x_t, t, c._replace(ids=None))


# Students -----------------------------------------------------------------------------------------------------------------------------

PLAN = [Stage(kind="eps_to_v", updates=2), Stage(steps=8, updates=2), Stage(steps=4, updates=4)]  # the second ends at the cut
LCM = suite.Entry("lcm", suite.LCM, {"w_conditioned": False, "guidance": 4.5})
PD = suite.Entry("pd", suite.PD, {"w_conditioned": False, "guidance": 4.5, "stages": PLAN, "teacher_steps": 16})
DMD2 = suite.Entry("dmd2", suite.DMD2, {"guidance": 4.5, "critic": {"steps": 2}, "gan": {"layers": ["block0", "block1"]}})
LORA = suite.Entry("lcm-lora", suite.LCM, {"w_conditioned": False, "guidance": 4.5, "adapter": suite.LORA})


@pytest.mark.parametrize("entry", [LORA, *(pytest.param(e, marks=pytest.mark.slow) for e in (LCM, PD, DMD2))], ids=lambda entry: entry.name)
def test_methods_distil_it_and_diffusers_loads_the_student(entry: suite.Entry, pixart: Path, tmp_path: Path) -> None:
    """With roll-outs of both; resumed exactly; the export samples as the trainer does, called by diffusers alone."""
    from diffusers import DiffusionPipeline, PixArtSigmaPipeline

    run, folder = distilled(lambda: objects(entry, pixart, "buffer"), tmp_path, PROMPTS)
    c = suite.pictures(pixart).c
    for chunk in run.data.buffer._chunks:  # a rolled-out state keeps the mask of its caption
        assert chunk.c.mask.dtype == torch.int64 and c.mask is not None
        nearest = torch.stack([(c.text - text.float()).flatten(1).abs().amax(1).argmin() for text in chunk.c.text])
        assert torch.equal(chunk.c.mask, c.mask[nearest])
    method, n = run.method, run.method.deployment.steps[0]
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is PixArtSigmaPipeline
    policy, grid = method.deployment.sampler(n)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    mine = policy.sample(x_T := noise(2, 4, 8, 8), grid, suite.backbone(pixart).encode_text(PROMPTS), seeds)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    theirs = pipe(PROMPTS, num_inference_steps=n, guidance_scale=1.0, latents=x_T, generator=seeds, output_type="latent", **CALL).images
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    before, after = suite.backbone(pixart).pipe.transformer.state_dict(), pipe.transformer.state_dict()
    for name in ("proj_out.weight", "proj_out.bias"):  # [p, q, channel]: the learned variance is the teacher's
        rows = [(x[name].unflatten(0, (2, 2, 8))[:, :, :4], x[name].unflatten(0, (2, 2, 8))[:, :, 4:]) for x in (before, after)]
        assert torch.equal(rows[0][1], rows[1][1])
    assert not torch.equal(before["proj_out.weight"], after["proj_out.weight"])
    assert "num_inference_steps=" in (card := (folder / "README.md").read_text())
    assert "clean_caption=False, use_resolution_binning=False).images[0]" in card


@pytest.mark.slow
def test_adapters_on_half_precision(pixart: Path, tmp_path: Path) -> None:
    """As large models are trained: T5, which keeps some of its weights in float32, and the base in bfloat16."""
    backbone = Pipeline(str(pixart), dtype=torch.bfloat16)
    run = suite.fit(suite.build(LORA, pixart, pipeline=backbone, updates=3), suite.captions(pixart))
    assert len(run.rows) == 3 and all(math.isfinite(row["loss"]) for row in run.rows)
    folder = export(run.method, tmp_path / "student", 4)
    assert verify(run.method, folder, PROMPTS, 4) < 1e-3


def test_a_student_of_another_size_says_it_in_its_card(pixart: Path, tmp_path: Path) -> None:
    """Its positions are counted in shares of sample_size, so that no other one may be written into its configuration."""
    backbone = Pipeline(Source(str(pixart), size=24))
    method = suite.build(LCM, pixart, pipeline=backbone)
    folder = export(method, tmp_path / "student", 4)
    assert verify(method, folder, PROMPTS, 4) < 1e-4
    assert "height=24, width=24, clean_caption=False" in (folder / "README.md").read_text()
    assert json.loads((folder / "transformer" / "config.json").read_text())["sample_size"] == 8


def test_a_student_of_fewer_blocks(pixart: Path, tmp_path: Path) -> None:
    backbone = Pipeline(Source(str(pixart), networks={"student": {"num_layers": 1}}))
    student = backbone.trainable()
    assert len(student.blocks()) == 1 and len(backbone.network().blocks()) == 2
    kept = backbone.network().model.transformer_blocks[0].state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in student.model.transformer_blocks[0].state_dict().items())
    with pytest.raises(ValueError, match=r"networks\.student: its text width.* is 8 and the teacher's 16: it cannot take the teacher's"):
        Pipeline(Source(str(pixart), networks={"student": {"caption_channels": 8}})).trainable()


# What discriminators, memory and sharding ask of it -----------------------------------------------------------------------------------


def asked(pixart: Path) -> tuple[Any, Tensor, Tensor, Any]:
    backbone = Pipeline(Source(str(pixart), size=(16, 24)))
    return backbone.trainable(), noise(2, 4, 8, 12), torch.tensor([20, 999]), backbone.encode_text(PROMPTS)


def test_features_are_the_tokens_that_leave_its_blocks(pixart: Path) -> None:
    network, x_t, t, c = asked(pixart)
    assert network.layers == ("block0", "block1")
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(network.model.transformer_blocks):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({f"block{i}": out}))
    out, found = network.with_features(x_t, t, c, ("block1", "block0"))
    assert torch.equal(out, network(x_t, t, c)) and found[0].shape == (2, 24, 4, 6)
    for name, feature in zip(("block1", "block0"), found, strict=True):
        assert torch.equal(feature[:, :, 1, 2], seen[name][:, 1 * 6 + 2])
    (early,) = network.features(x_t, t, c, ("block0",))
    assert torch.equal(early, found[1])
    assert network.head(("block0", "block1"))(*found).shape == (2, 2) and network.head()(early).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="gan.layers has 'mid': PixArt has block0, block1"):
        network.features(x_t, t, c, ("mid",))


@pytest.mark.parametrize("features", [False, True])
def test_gradients_are_the_same_with_checkpointing(features: bool, pixart: Path) -> None:
    """Also of features alone, whose forward ends within a block that is computed again."""
    network, x_t, t, c = asked(pixart)
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


def test_its_blocks_and_its_last_layer(pixart: Path) -> None:
    network = asked(pixart)[0]
    assert network.blocks() == list(network.model.transformer_blocks)
    assert network.last_layer() is network.model.proj_out.weight
    adapted = Pipeline(str(pixart)).adapted(Adapter(2, targets=["attn1.to_q"]))
    name = next(name for name, p in adapted.named_parameters() if p is adapted.last_layer())
    assert name.startswith("transformer.transformer_blocks.1.attn1.to_q.lora_")


# What it refuses ----------------------------------------------------------------------------------------------------------------------


def test_what_it_has_no_place_for_is_refused(pixart: Path) -> None:
    with pytest.raises(ValueError, match=r"^PixArt cannot be told the guidance: set model\.w_conditioned to false$"):
        suite.build(suite.Entry("lcm", suite.LCM), pixart)
    with pytest.raises(ValueError, match="PixArt cannot be told the time that it jumps to"):
        Pipeline(str(pixart)).trainable(s_conditioned=True)
    method = suite.build(LORA, pixart)
    with pytest.raises(ValueError, match="--format lora: diffusers loads no LoRA into a PixArtSigmaPipeline; choose diffusers"):
        check_formats(method, ["lora"])
    with pytest.raises(ValueError, match="--format kohya is for U-Nets, and this student is a PixArt"):
        check_formats(method, ["kohya"])


def test_sizes_that_its_patches_do_not_divide_are_refused(pixart: Path) -> None:
    with pytest.raises(ValueError, match="sides are multiples of 8 pixels, not of 20 x 16: the nearest is 16 x 16"):
        Pipeline(Source(str(pixart), size=(20, 16)))


def test_networks_of_another_task_are_refused(tmp_path: Path) -> None:
    make_pixart(tmp_path, in_channels=8, out_channels=16)
    with pytest.raises(ValueError, match="reads 8 channels and writes 16, and its autoencoder has 4: only text-to-image is distilled"):
        Pipeline(str(tmp_path))


@pytest.mark.parametrize(("kind", "side"), [("PixArtSigmaPipeline", 256), (ALPHA, 16)])
def test_a_size_that_its_pipeline_never_says_is_refused(kind: str, side: int, tmp_path: Path) -> None:
    backbone = Pipeline(str(make_pixart(tmp_path, side, kind, use_additional_conditions=True)))
    with pytest.raises(ValueError, match="told the image's size .* set it to false, or mend model_index.json"):
        backbone.encode_text(PROMPTS)


def test_its_first_class_in_diffusers_is_known(pixart: Path, tmp_path: Path) -> None:
    """The published pipelines name their transformer a Transformer2DModel, as it once was."""
    shutil.copytree(pixart, old := tmp_path / "old")
    for file, name in ((old / "model_index.json", "model_index"), (old / "transformer" / "config.json", "config")):
        said = json.loads(file.read_text())
        if name == "config":
            said |= {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "use_linear_projection": False, "norm_num_groups": 32}
        else:
            said["transformer"] = ["diffusers", "Transformer2DModel"]
        file.write_text(json.dumps(said))
    backbone, plain = Pipeline(str(old)), Pipeline(str(pixart))
    assert suite.digest(backbone.network()) == suite.digest(plain.network())
    assert suite.digest(backbone.trainable()) == suite.digest(plain.trainable()) and backbone.trainable().w_conditioned is False
    assert Outline(str(old)).encode_text(PROMPTS).text.shape == (2, 300, 16)
    bare = Pipeline(str(old), bare=True)
    assert type(bare.network()) is type(plain.network())
