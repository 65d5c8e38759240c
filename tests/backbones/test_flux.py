"""Flux.1 as a family: packed latents, texts, times and nodes are its pipeline's own; dev is told its guidance, schnell is guided by CFG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.flux import T5_TOKENS, Flux
from ddil_lightning.backbones.outline import Outline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.samplers import context_of, exactly, named
from ddil_lightning.backbones.source import Source
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.methods import DMD2, LCM, SnapFusion
from fluxes import make_flux
from sd3 import rescheduled
from suite import Entry, build

PROMPTS = ["a handwritten one", "a small red circle"]
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "stochastic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "stochastic_sampling": True}),
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
}


@pytest.fixture(scope="module")
def dev(flux: Path) -> Pipeline:
    return Pipeline(str(flux))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(str(make_flux(tmp_path_factory.mktemp("flux") / "schnell", dev=False)))


def test_it_is_a_flow_by_its_own_settings(dev: Pipeline, schnell: Pipeline) -> None:
    network = dev.network()
    assert isinstance(network, Flux) and (dev.predicts, dev.schedule.steps, dev.size) == ("flow", 1000, (16, 16))
    assert (network.latent_shape, network.divisor, network.largest, network.positions((4, 8, 12))) == ((4, 128, 128), 2, None, 24)
    assert dev.shift == pytest.approx(1.58308, rel=1e-5) and schnell.shift == 1.0  # exp of mu at 16 tokens
    assert (
        (dev.guidance, schnell.guidance) == (dev.guidance_before, schnell.guidance_before) == (3.5, 1.0)
        and dev.network().w_conditioned
        and not schnell.network().w_conditioned
    )
    kinds = [type(block).__name__ for block in network.blocks()]  # what fsdp2 gathers one by one
    assert kinds == ["FluxTransformerBlock"] * 2 + ["FluxSingleTransformerBlock"] * 2 and network.blocks() == network.row()


def test_latents_are_packed_as_its_pipeline_packs_them(dev: Pipeline) -> None:
    x = torch.arange(2 * 4 * 8 * 6.0).view(2, 4, 8, 6)
    packed = Flux.packed(x)
    assert torch.equal(packed, dev.pipe._pack_latents(x, 2, 4, 8, 6)) and torch.equal(Flux.unpacked(packed, x.shape[1:]), x)


def test_texts_are_the_pipelines(dev: Pipeline) -> None:
    """T5's 512 tokens without a mask; CLIP's text is pooled."""
    c = dev.encode_text(PROMPTS)
    text, pooled, _ = dev.pipe.encode_prompt(PROMPTS, device=dev.device)
    assert c.text.shape == (2, T5_TOKENS, 32) and c.mask is None and torch.equal(c.text, text)
    assert c.pooled is not None and torch.equal(c.pooled, pooled)
    blank = Outline(dev.path).encode_text(PROMPTS)
    assert blank.text.shape == c.text.shape and blank.pooled is not None and blank.pooled.shape == c.pooled.shape
    dev.check_length(["a small red circle " * 127])
    with pytest.raises(ValueError, match=r"has 521 tokens and the text encoder reads 512: shorten it"):
        dev.encode_text(["a small red circle " * 130])


def test_what_clip_cuts_is_told_once(flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a text that T5 reads to its end."""
    made = Pipeline(str(flux))
    made.encode_text(["a small red circle " * 3])
    for _ in range(2):
        made.encode_text(["a small red circle " * 4])
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("ddil_lightning")]
    assert "'a small red circle a small" in line and "has 18 tokens and CLIP reads 16 of a text: the rest is told by T5 alone" in line


def test_latents_are_scaled_and_shifted(dev: Pipeline) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z, mean = dev.encode_images(pixels), dev.pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(z, (mean - 0.1159) * 0.3611)
    torch.testing.assert_close(dev.decode(z), dev.pipe.vae.decode(mean).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)


# As its pipeline samples ---------------------------------------------------------------------------------------------------------------


def plain(made: Pipeline, steps: int, size: tuple[int, int], **guidance: Any) -> Tensor:
    """FluxPipeline called by hand, from the noise of `sampling.latents`, and what it answers unpacked by its own hand."""
    x_T, pipe = sampling.noise(2, made.latent_shape, 0), made.pipe
    call = {"num_inference_steps": steps, "height": size[0], "width": size[1], "output_type": "latent", **guidance}
    packed = pipe(PROMPTS, latents=pipe._pack_latents(x_T, *x_T.shape), **call).images
    return pipe._unpack_latents(packed, *size, pipe.vae_scale_factor)  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [pytest.param((16, 16), marks=pytest.mark.slow), (16, 24)], ids=["16 x 16", "16 x 24"])
def test_the_teacher_samples_as_its_pipeline_does(size: tuple[int, int], dev: Pipeline, schnell: Pipeline) -> None:
    """Dev told 3.5, asked once; schnell without guidance, and by true CFG, asked twice. On the very nodes of a plain call."""
    empty = {"negative_prompt": ["", ""], "true_cfg_scale": 4.0}
    for path, g, said, asked in ((dev.path, 3.5, {"guidance_scale": 3.5}, 1), (schnell.path, 1.0, {}, 1), (schnell.path, 4.0, empty, 2)):
        made = Pipeline(Source(path, size=size))
        for steps in (4, 20):
            theirs, (policy, grid) = plain(made, steps, size, **said), exactly(made, steps, g)
            with made.counting() as calls:
                mine = policy.sample(sampling.noise(2, made.latent_shape, 0), grid, context_of(made, PROMPTS, g))
            assert calls == [2 * steps * asked] and policy.denoiser.evaluations == 2 * steps * asked
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
            torch.testing.assert_close(sampling.pipeline_latents(made, PROMPTS, steps, g), theirs, rtol=0, atol=0)


def test_the_guidance_that_it_is_told_counts(dev: Pipeline) -> None:
    """The bound of the test above is far below what another guidance does, and the role of the teacher is asked once."""
    teacher, x, t = dev.role("teacher"), sampling.noise(2, (4, 8, 8), 1), torch.tensor([999, 40])
    c = dev.encode_text(PROMPTS)
    one, two = (teacher.output(teacher(x, t, c.guided(g - 1.0))) for g in (3.5, 3.4))
    assert teacher.null is None and teacher.evaluations == 4 and float((one - two).abs().max()) > 1e-3
    direct = dev.pipe.transformer(
        hidden_states=Flux.packed(x), timestep=dev.schedule.time(t).float() / 1000, guidance=torch.tensor([3.5, 3.5]),
        pooled_projections=c.pooled, encoder_hidden_states=c.text, txt_ids=torch.zeros(T5_TOKENS, 3),
        img_ids=dev.pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32), return_dict=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(one.float(), Flux.unpacked(direct, (4, 8, 8)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_re_noising_draws_as_a_policy_does(name: str, flux: Path, tmp_path: Path) -> None:
    """In latents as they are, though its pipeline steps in packed ones, and hands its scheduler no generator."""
    kind, config = SCHEDULERS[name]
    made = Pipeline(str(rescheduled(flux, tmp_path / "p", kind, **config)))
    policy, grid = exactly(made, 4, 3.5)
    mine = sampling.latents(made, policy, grid, PROMPTS, 3.5)
    torch.testing.assert_close(mine, sampling.pipeline_latents(made, PROMPTS, 4, 3.5), rtol=0, atol=1e-4)
    assert "step" not in vars(made.pipe.scheduler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_is_told_the_same_in_training_and_in_the_pipeline(dtype: torch.dtype, flux: Path) -> None:
    """sigma in the type of the latents, as they are rounded: in bfloat16 the second node is not what it is in float32."""
    made, told = Pipeline(str(flux), dtype=dtype), []
    handle = made.network().model.register_forward_pre_hook(lambda m, args, kwargs: told.append(kwargs), with_kwargs=True)
    sampling.pipeline_latents(made, PROMPTS, 7, 3.5)
    theirs = told.copy()
    told.clear()
    policy, grid = exactly(made, 7, 3.5)
    sampling.latents(made, policy, grid, PROMPTS, 3.5)
    handle.remove()
    exact = float(policy.schedule.time(grid.nodes[1]) / 1000)
    assert len(told) == len(theirs) == 7 and (float(told[1]["timestep"][0]) != exact) is (dtype == torch.bfloat16)
    for mine, other in zip(told, theirs, strict=True):
        for name in ("timestep", "guidance", "pooled_projections", "encoder_hidden_states", "img_ids", "txt_ids"):
            assert mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name]), name
        assert mine["hidden_states"].dtype == dtype and mine["timestep"].dtype == dtype and mine["guidance"].dtype == torch.float32


@torch.no_grad()
def test_a_rounded_time_is_of_the_size_of_half_precision() -> None:
    """A whole copy is trained in float32 and told exact times, which its pipeline rounds once it is loaded in bfloat16: of a trained flow
    that changes the answers on a student's nodes about as much as the rest of bfloat16 does."""
    whole, half = (Pipeline("builtin/flow", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    nodes = Grid.named("trailing", 20).nodes
    x_0, noise = sampling.pipeline_latents(whole, PROMPTS[1:], 4, 3.0), sampling.noise(20, whole.latent_shape, 1)
    sigma, time, c = whole.schedule.at(nodes, x_0)[1], whole.schedule.time(nodes), whole.encode_text(PROMPTS[1:]).expand(20)
    x_t, rounded = (1 - sigma) * x_0 + sigma * noise, (time.bfloat16() / 1000).float() * 1000
    exact = whole.network()(x_t, time, c)
    others = whole.network()(x_t, rounded, c), half.network()(x_t, time, c).float()
    by_time, by_the_rest = (float((other - exact).square().mean() / exact.square().mean()) ** 0.5 for other in others)
    assert 0 < by_time < 2 * by_the_rest < 0.03


def test_another_sampler_by_name(dev: Pipeline) -> None:
    made = named(dev, "lcm")
    assert type(made.pipe.scheduler).__name__ == "FlowMatchLCMScheduler"
    policy, grid = exactly(made, 4, 2.0)
    mine = sampling.latents(made, policy, grid, PROMPTS, 2.0)
    torch.testing.assert_close(mine, sampling.pipeline_latents(made, PROMPTS, 4, 2.0), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="hands its scheduler sigmas or a shift, for which DPM-Solver.* is not set up here: use euler"):
        dev.with_solver(True)


# What methods ask of it ------------------------------------------------------------------------------------------------------------------


def asked(made: Pipeline, shape: tuple[int, ...] = (4, 8, 12)) -> tuple[Tensor, Tensor, Any]:
    return sampling.noise(2, shape, 1), torch.tensor([900.0, 35.5]), made.encode_text(PROMPTS).guided(2.5)


def test_features_are_what_leaves_blocks_of_both_kinds(dev: Pipeline) -> None:
    network, (x, t, c) = dev.network(), asked(dev)
    kept: dict[int, Tensor] = {}
    handles = [block.register_forward_hook(lambda m, args, out, i=i: kept.update({i: out[1]})) for i, block in enumerate(network.row())]
    out, found = network.with_features(x, t, c, ["block1", "block3"])
    assert torch.equal(out, network(x, t, c)) and [f.shape for f in found] == [(2, 16, 4, 6)] * 2
    for i, feature in zip((1, 3), found, strict=True):
        assert torch.equal(feature[:, :, 1, 2], kept[i][:, 1 * 6 + 2])  # the image's tokens, without the text's
    kept.clear()
    (middle,) = network.features(x, t, c)
    assert torch.equal(middle.flatten(2).transpose(1, 2), kept[2]) and 3 not in kept  # what comes after is not run
    for handle in handles:
        handle.remove()
    assert network.head(["block1", "block3"])(*found).shape == (2, 2) and network.head()(middle).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="gan.layers has 'mid': Flux has block0, block1, block2, block3"):
        network.features(x, t, c, ["mid"])


def test_gradient_checkpointing_has_the_same_gradient(dev: Pipeline) -> None:
    x, t, c = asked(dev)
    found = []
    for recompute in (False, True):
        network = dev.trainable()
        network.recompute(recompute)
        out, (features,) = network.with_features(x, t, c)
        (out.square().mean() + features.square().mean()).backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    assert all(p is not None and torch.equal(p, found[1][name]) for name, p in found[0].items())
    assert float(found[0]["transformer.time_text_embed.guidance_embedder.linear_1.weight"].abs().max()) > 0  # type: ignore[union-attr]


def test_a_student_that_is_told_anyway_says_so(dev: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """And trains: a run that was begun with the option goes on."""
    own = {"w_conditioned": False, "solver_steps": 40, "rollouts": (4,)}
    method = build(Entry("lcm", LCM, own), Path(dev.path), pipeline=dev)
    assert method.student.network.w_conditioned  # type: ignore[union-attr]
    assert "is told its guidance, and so is its student, whatever model.w_conditioned = false says" in caplog.text


# What it refuses -------------------------------------------------------------------------------------------------------------------------


def test_what_it_is_not_told_is_refused_in_one_line(dev: Pipeline, schnell: Pipeline, tmp_path: Path) -> None:
    x, t, c = asked(dev)
    with pytest.raises(ValueError, match="^this Flux is told its guidance, but the context carries no w: give it guidance g"):
        dev.network()(x, t, c.guided(None))
    with pytest.raises(ValueError, match="which this context lacks: encode prompts by its own pipeline"):
        dev.network()(x, t, c._replace(pooled=None))
    with pytest.raises(ValueError, match=r"^this Flux has no embedding of the guidance .*: set model.w_conditioned to false$"):
        build(Entry("lcm", LCM, {"solver_steps": 40, "rollouts": (4,)}), Path(schnell.path), pipeline=schnell)
    with pytest.raises(ValueError, match="DMD2's student is not told the guidance: give one number, not 1.0 to 4.0"):
        build(Entry("dmd2", DMD2), Path(schnell.path), pipeline=schnell)
    with pytest.raises(ValueError, match="is told its guidance, and is not guided by the empty prompt besides: take another method"):
        build(Entry("snapfusion", SnapFusion, {"steps": 4}), Path(dev.path), pipeline=dev)
    with pytest.raises(ValueError, match="multiples of 8 pixels, not of 20 x 16: the nearest is 16 x 16"):
        Pipeline(Source(dev.path, size=(20, 16)))
    with pytest.raises(ValueError, match=r"its embedding of the guidance \(guidance_embeds\) is False and the teacher's True"):
        Pipeline(Source(dev.path, networks={"student": {"guidance_embeds": False}})).trainable()
    packed = dev.network().packed(x)
    with pytest.raises(
        ValueError, match=r"^latents are \[B, C, h, w\], not \(2, 24, 16\): the network packs them itself, so unpack them first$"
    ):
        dev.network()(packed, t, c)
    with pytest.raises(
        ValueError, match=r"^images are \[B, 3, H, W\] in \[-1, 1\], not \(2, 24, 16\): latents, packed or not, are decoded to"
    ):
        dev.encode_images(packed)
    with pytest.raises(
        ValueError, match=r"^latents are \[B, 4, h, w\], not \(2, 24, 16\); packed ones are made so by the network's unpacked"
    ):
        dev.decode(packed)
    make_flux(tmp_path / "fill", in_channels=32, out_channels=16)
    with pytest.raises(ValueError, match="reads 32 channels and writes 16, and its autoencoder 4, packed by four: only"):
        Pipeline(str(tmp_path / "fill"))


def test_a_student_of_fewer_blocks_of_both_kinds(dev: Pipeline) -> None:
    made = Pipeline(Source(dev.path, networks={"student": {"num_layers": 1, "num_single_layers": 1}})).trainable()
    assert len(made.blocks()) == 2 and made.w_conditioned and made(*asked(dev)).shape == (2, 4, 8, 12)
    assert {name: value for name, value in made.spaces().items() if "guidance" not in name} == {
        "number of latent channels": 4, "text width (joint_attention_dim)": 32, "text width (pooled_projection_dim)": 8,
    }  # fmt: skip
