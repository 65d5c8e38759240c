"""Stable Diffusion 3 as a family: its texts, sizes, times and guidance are its pipeline's own, and what it cannot be told is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.samplers import exactly, grid_of, named, policy_of
from ddil_lightning.backbones.sd3 import SD3, T5_TOKENS
from ddil_lightning.backbones.source import Source
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.methods import LCM
from ddil_lightning.miniature import flow
from sd3 import make_sd3, rescheduled

PROMPTS = ["a handwritten one", "a small red circle"]
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "by size": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "terminal": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.02}),
    "stochastic": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
}


@pytest.fixture(scope="module")
def backbone(sd3: Path) -> Pipeline:
    return Pipeline(str(sd3))


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(str(make_sd3(tmp_path_factory.mktemp("sd3") / "no-t5", t5=False)))


def test_it_is_a_flow_by_its_own_settings(backbone: Pipeline, without_t5: Pipeline) -> None:
    network = backbone.network()
    assert isinstance(network, SD3) and (backbone.predicts, backbone.shift, backbone.schedule.steps) == ("flow", 3.0, 1000)
    assert backbone.guidance == 7.0
    assert (network.latent_shape, network.divisor, network.largest, network.positions((4, 8, 4))) == ((4, 8, 8), 2, 16, 8)
    assert [type(block).__name__ for block in network.blocks()] == ["JointTransformerBlock"] * 3  # what fsdp2 gathers one by one
    assert without_t5.pipe.text_encoder_3 is None


@pytest.mark.parametrize("name", ["backbone", "without_t5"])
def test_texts_are_the_pipelines(name: str, request: pytest.FixtureRequest) -> None:
    """CLIP's 16 tokens, padded to T5's width, then 256 of T5, or none where these are zeros; without a mask."""
    made: Pipeline = request.getfixturevalue(name)
    c = made.encode_text(PROMPTS)
    text, null, pooled, null_pooled = made.pipe.encode_prompt(PROMPTS, None, None, device=made.device)
    n = 16 if name == "without_t5" else 16 + T5_TOKENS
    assert c.text.shape == (2, n, 32) and c.mask is None and torch.equal(c.text, text[:, :n]) and not text[:, n:].any()
    assert c.pooled is not None and torch.equal(c.pooled, pooled) and bool(c.text[:, :16, 16:].eq(0).all())
    torch.testing.assert_close((made.null().text, made.null().pooled), (null[:1, :n], null_pooled[:1]))
    blank = made.network().blank(2, 16)
    assert blank.text.shape == text.shape and blank.pooled is not None and blank.pooled.shape == c.pooled.shape


@pytest.mark.parametrize("silent", [False, True], ids=["no T5", "a T5 that says nothing"])
def test_zeros_in_the_place_of_t5_are_asked_once(silent: bool, without_t5: Pipeline) -> None:
    """The network and its plain pipeline, which asks all 256; and a plain call after ours, on the very same network, is what it was."""
    made = without_t5
    if silent:
        made = copy.copy(without_t5)
        made.pipe = copy.copy(without_t5.pipe)
        made.pipe.register_modules(text_encoder_3=flow.silent(len(made.pipe.tokenizer), 32), tokenizer_3=made.pipe.tokenizer)
    before = sampling.pipeline_latents(made, PROMPTS, 4, 4.0)
    policy, grid = exactly(made, 4, 4.0)
    mine = sampling.latents(made, policy, grid, PROMPTS, 4.0)
    torch.testing.assert_close(mine, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(sampling.pipeline_latents(made, PROMPTS, 4, 4.0), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"has 22 tokens and the text encoder reads 16: shorten it"):
        made.encode_text(["a small red circle " * 5])


def test_a_text_is_too_long_for_t5_or_where_there_is_none_for_clip(backbone: Pipeline, without_t5: Pipeline) -> None:
    backbone.check_length(["a small red circle " * 60])
    with pytest.raises(ValueError, match=r"has 281 tokens and the text encoder reads 256: shorten it"):
        backbone.encode_text(["a small red circle " * 70])
    with pytest.raises(ValueError, match=r"has 22 tokens and the text encoder reads 16: shorten it"):
        without_t5.encode_text(["a small red circle " * 5])
    counts = [made.network().cut_tokens(made.pipe, ["a small red circle " * 5]) for made in (backbone, without_t5)]
    assert counts == [([22], 16), ([], 0)]  # CLIP cuts beside T5; alone it counts itself


def test_latents_are_scaled_and_shifted(backbone: Pipeline) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = backbone.encode_images(pixels)
    mean = backbone.pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(z, (mean - 0.0609) * 1.5305)
    torch.testing.assert_close(backbone.decode(z), backbone.pipe.vae.decode(mean).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)


# As its pipeline samples ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [pytest.param(None, marks=pytest.mark.slow), (16, 8)], ids=["16 x 16", "16 x 8"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("by size", "stochastic", "terminal") else ()) for n in SCHEDULERS]
)
def test_the_teacher_samples_as_its_pipeline_does(name: str, size: Any, sd3: Path, tmp_path: Path) -> None:
    """On the very nodes of a plain call, whatever has been done to them, with and without guidance."""
    kind, config = SCHEDULERS[name]
    made = Pipeline(Source(str(rescheduled(sd3, tmp_path / "p", kind, **config)), size=size))
    for steps in (4, 20):
        for g in (1.0, 4.0):
            policy, grid = exactly(made, steps, g)
            assert policy.transition == (renoise if name in ("stochastic", "lcm") else ddim)
            mine = sampling.latents(made, policy, grid, PROMPTS, g if g > 1 else None)
            torch.testing.assert_close(mine, sampling.pipeline_latents(made, PROMPTS, steps, g), rtol=0, atol=1e-4)


def test_a_wrong_node_would_be_seen(backbone: Pipeline) -> None:
    """The bound of the test above is far below what the single shift of the last node does."""
    theirs = sampling.pipeline_latents(backbone, PROMPTS, 4, 4.0)
    near = sampling.latents(backbone, policy_of(backbone, 4.0), grid_of(backbone, 4), PROMPTS, 4.0)
    even = sampling.latents(backbone, policy_of(backbone, 4.0), Grid.named("trailing", 4), PROMPTS, 4.0)
    assert 1e-4 < (by_rounding := float((near - theirs).abs().max())) < 0.05 and 5 * by_rounding < float((even - theirs).abs().max())


def test_re_noising_depends_on_the_sample_alone(sd3: Path, tmp_path: Path) -> None:
    """Its pipeline hands its scheduler no generator: by torch's global numbers an image would depend on what was drawn before."""
    made = Pipeline(str(rescheduled(sd3, tmp_path / "p", "FlowMatchLCMScheduler", shift=3.0)))
    torch.manual_seed(1)
    first = sampling.pipeline_latents(made, PROMPTS, 2, 1.0)
    torch.manual_seed(2)
    torch.testing.assert_close(sampling.pipeline_latents(made, PROMPTS, 2, 1.0, chunk=1), first, rtol=1e-5, atol=1e-5)
    assert "step" not in vars(made.pipe.scheduler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_is_told_the_same_time_in_training_and_in_the_pipeline(dtype: torch.dtype, sd3: Path) -> None:
    """sigma 1000 in float32, whatever the network computes in: in bfloat16 749 would be 748. Latents, texts and pooled texts too."""
    made, told = Pipeline(str(sd3), dtype=dtype), []

    def listen(module: Any, args: Any, kwargs: Any) -> None:
        told.append(
            (
                args[0] if args else kwargs["hidden_states"],
                kwargs["timestep"],
                kwargs["encoder_hidden_states"],
                kwargs["pooled_projections"],
            )
        )

    handle = made.network().model.register_forward_pre_hook(listen, with_kwargs=True)
    sampling.pipeline_latents(made, PROMPTS, 7, 1.0)
    theirs = told.copy()
    told.clear()
    policy, grid = exactly(made, 7, 1.0)
    sampling.latents(made, policy, grid, PROMPTS, None)
    handle.remove()
    assert len(told) == len(theirs) == 7
    for mine, other in zip(told, theirs, strict=True):
        assert mine[1].dtype == torch.float32 and torch.equal(mine[1], other[1])
        assert all(a.dtype == b.dtype == dtype for a, b in zip(mine[::2], other[::2], strict=True))
        assert torch.equal(mine[2], other[2]) and torch.equal(mine[3], other[3])


def test_another_sampler_by_name(backbone: Pipeline) -> None:
    made = named(backbone, "lcm")
    assert type(made.pipe.scheduler).__name__ == "FlowMatchLCMScheduler" and made.pipe.scheduler.config.shift == 3.0
    policy, grid = exactly(made, 4, 2.0)
    torch.testing.assert_close(
        sampling.latents(made, policy, grid, PROMPTS, 2.0), sampling.pipeline_latents(made, PROMPTS, 4, 2.0), rtol=0, atol=1e-4
    )
    for name in ("tcd", "ddim-ts20"):
        with pytest.raises(ValueError, match=f"is a flow, which is not sampled by {name}: known are lcm, ddim, euler"):
            named(backbone, name)
    solved = backbone.with_solver(True)
    assert sampling.pipeline_latents(solved, PROMPTS, 20, 2.0).isfinite().all()
    with pytest.raises(ValueError, match="the DPMSolverMultistepScheduler of .* has nodes that are not known"):
        exactly(solved, 4, 2.0)


# What methods ask of it ------------------------------------------------------------------------------------------------------------------


def asked(n: int = 2, shape: tuple[int, ...] = (4, 8, 4)) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)), torch.tensor([900.0, 35.5])[:n]


def test_features_are_what_leaves_the_blocks(backbone: Pipeline) -> None:
    network, (x, t), c = backbone.network(), asked(), backbone.encode_text(PROMPTS)
    kept: list[Tensor] = []
    handle = network.model.transformer_blocks[1].register_forward_hook(lambda m, args, out: kept.append(out[1]))
    out, (first, second) = network.with_features(x, t, c, ["block1", "block2"])
    handle.remove()
    assert torch.equal(out, network(x, t, c)) and first.shape == second.shape == (2, 16, 4, 2)
    assert torch.equal(first.flatten(2).transpose(1, 2), kept[0])
    runs: list[int] = []
    handle = network.model.transformer_blocks[2].register_forward_hook(lambda m, args, out: runs.append(1))
    (middle,) = network.features(x, t, c)
    handle.remove()
    assert torch.equal(middle, first) and not runs  # what comes after is not run
    logits = network.head(["block1", "block2"])(first, second)
    assert logits.shape == (2, 2) and network.head()(network.features(*asked(shape=(4, 8, 16)), c)[0]).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="gan.layers has 'mid': SD3 has block0, block1, block2"):
        network.features(x, t, c, ["mid"])


def test_gradient_checkpointing_has_the_same_gradient(backbone: Pipeline) -> None:
    (x, t), c = asked(), backbone.encode_text(PROMPTS)
    found = []
    for recompute in (False, True):
        network = backbone.trainable()
        network.recompute(recompute)
        out, (features,) = network.with_features(x, t, c)
        (out.square().mean() + features.square().mean()).backward()
        found.append([p.grad for p in network.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed) if plain is not None else None
    assert sum(g is not None for g in found[1]) > 90


# What it refuses -------------------------------------------------------------------------------------------------------------------------


def test_what_it_is_not_told_is_refused_in_one_line(backbone: Pipeline, sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^SD3 cannot be told the guidance: set model.w_conditioned to false$"):
        LCM(pipeline=backbone, guidance=[2.0, 8.0], solver_steps=40, rollouts=(4,))
    with pytest.raises(ValueError, match=r"^rollouts has 3, which does not divide solver_steps = 50: .*solver_steps=40 model.rollouts"):
        LCM(pipeline=backbone, w_conditioned=False)
    with pytest.raises(ValueError, match="which this context lacks: encode prompts by its own pipeline"):
        backbone.network()(*asked(), backbone.encode_text(PROMPTS)._replace(pooled=None))
    for size, line in (
        ((16, 40), "has positions for sides of 32 pixels at most, not of 16 x 40"),
        ((16, 12), "multiples of 8 pixels, not of 16 x 12"),
    ):
        with pytest.raises(ValueError, match=line):
            Pipeline(Source(str(sd3), size=size))
    other = rescheduled(sd3, tmp_path / "ddim", "DDIMScheduler")
    with pytest.raises(
        ValueError, match="has the scheduler DDIMScheduler, and its SD3 is a flow, so give it FlowMatchEulerDiscreteScheduler$"
    ):
        Pipeline(str(other))
    inverted = rescheduled(sd3, tmp_path / "inverted", shift=3.0, invert_sigmas=True)
    with pytest.raises(ValueError, match="has invert_sigmas set, whose times run the other way"):
        Pipeline(str(inverted))


def test_a_shift_of_its_own(sd3: Path, tiny: Path, tmp_path: Path) -> None:
    """It moves the nodes of all grids, is the same network, and is for flows alone."""
    made = Pipeline(Source(str(sd3), shift=1.0))
    teacher = Policy(Denoiser(made.network(), made.schedule, made.predicts, made.null()), ddim)
    nodes = Grid.named("trailing", 4).nodes
    assert made.shift == 1.0 and made.schedule.time(nodes).tolist() == [1000.0, 750.0, 500.0, 250.0]
    assert teacher.sample(*(sampling.noise(2, (4, 8, 8), 0), Grid.named("trailing", 4)), made.encode_text(PROMPTS)).isfinite().all()
    dynamic = Pipeline(Source(str(rescheduled(sd3, tmp_path / "d", use_dynamic_shifting=True)), size=(16, 8)))
    assert dynamic.shift == pytest.approx(1.58094, rel=1e-5)  # exp of mu at 8 positions
    with pytest.raises(ValueError, match="^model.pipeline.shift = 3 is for flows, and .* has a UNet: leave it out$"):
        Pipeline(Source(str(tiny), shift=3.0))
    with pytest.raises(ValueError, match="model.pipeline.shift"):
        Source(str(sd3), shift=0.0)


def test_another_architecture_keeps_latents_and_texts(backbone: Pipeline) -> None:
    spaces = backbone.network().spaces()
    assert spaces == {"number of latent channels": 4, "text width (joint_attention_dim)": 32, "text width (pooled_projection_dim)": 16}
    made = Pipeline(Source(backbone.path, networks={"student": {"num_layers": 2}})).trainable()
    assert len(made.blocks()) == 2 and made(*asked(), backbone.encode_text(PROMPTS)).shape == (2, 4, 8, 4)
