"""Pipelines in: loading and its errors, students that start as their teacher, text, images, and guidance as diffusers does it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddil_lightning.backbones import autoencoder
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.unet import UNet
from ddil_lightning.diffusion.denoiser import W_EMBEDDING, Denoiser, w_embedding
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.records import Context
from ddil_lightning.training.options import Memory
from suite import METHODS

PROMPTS = ["a handwritten seven", "a small red circle left of a large blue square", "a"]
LONG = " ".join(["red"] * 40)


def states(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents of the tiny pipelines and their times."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 8, 8, generator=g), torch.randint(1000, (n,), generator=g)


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Pipeline:
    return Pipeline(str(tiny))


# Students -------------------------------------------------------------------------------------------------------------------------


def test_the_autoencoder_has_a_precision_of_its_own(tiny: Path) -> None:
    """Latents are the training's data: they are made in float32 unless somebody asks, whatever teacher and autocast are."""
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    exact = Pipeline(str(tiny)).encode_images(pixels)
    for dtype in (torch.float16, torch.bfloat16):
        half = Pipeline(str(tiny), dtype)
        assert half.pipe.vae.dtype == torch.float32 and half.pipe.unet.dtype == half.pipe.text_encoder.dtype == dtype
        latents = half.encode_images(pixels)
        assert torch.equal(latents, exact)
        images = half.decode(latents)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(half.encode_images(pixels), latents) and torch.equal(half.decode(latents), images)
    asked = Pipeline(str(tiny), vae_dtype=torch.bfloat16)
    assert asked.pipe.vae.dtype == torch.bfloat16 and asked.pipe.unet.dtype == torch.float32
    assert not torch.equal(asked.encode_images(pixels), exact)
    assert METHODS[0].method(pipeline=str(tiny), memory=Memory("bfloat16", "bfloat16")).backbone.pipe.vae.dtype == torch.bfloat16


@pytest.mark.parametrize(("side", "limit", "largest"), [(16, 2**20, 5), (16, 600, 2), (16, 256, 1), (32, 600, 1)])
def test_the_autoencoder_works_on_so_many_pixels(side: int, limit: int, largest: int, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 images at a time, whatever their size, took 13 to 21 GB at 512 pixels. An image that is too large itself is tiled."""
    backbone, seen = Pipeline(str(tiny)), []
    monkeypatch.setattr(autoencoder, "PIXELS", limit)
    encode, decode = backbone.pipe.vae.encode, backbone.pipe.vae.decode
    watch = lambda call, scale: lambda x, *args, **kwargs: (seen.append((len(x), x.shape[2] * scale)), call(x, *args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(backbone.pipe.vae, "encode", watch(encode, 1))
    monkeypatch.setattr(backbone.pipe.vae, "decode", watch(decode, backbone.pipe.vae_scale_factor))
    images = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode_images(images)
    back = backbone.decode(latents)
    assert back.shape == images.shape and max(n for n, _ in seen) == largest and {edge for _, edge in seen} == {side}
    if side * side <= limit:
        monkeypatch.setattr(autoencoder, "PIXELS", 2**20)
        torch.testing.assert_close(backbone.encode_images(images), latents, rtol=0, atol=1e-5)  # chunks change nothing
        torch.testing.assert_close(backbone.decode(latents), back, rtol=0, atol=1e-5)


def test_tiles_are_for_the_one_image_that_is_too_large(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, tiled = Pipeline(str(tiny)), []
    vae = backbone.pipe.vae
    monkeypatch.setattr(vae, "_encode", lambda x, call=vae._encode: (tiled.append(vae.use_tiling), call(x))[1])
    for limit in (2**20, 100):
        monkeypatch.setattr(autoencoder, "PIXELS", limit)
        backbone.encode_images(torch.zeros(1, 3, 16, 16))
    assert tiled == [False, True] and vae.use_tiling is False


def test_a_student_starts_as_its_teacher_at_every_w(backbone: Pipeline) -> None:
    (x, t), c = states(3), backbone.encode_text(PROMPTS)
    expected = backbone.network()(x, t, c)
    plain, told = backbone.trainable(), backbone.trainable(w_conditioned=True)
    assert torch.equal(plain(x, t, c), expected)
    for w in (0.0, 1.5, torch.tensor([-1.0, 3.0, 14.0])):
        assert torch.equal(told(x, t, c.guided(w)), expected)
    assert (plain.w_conditioned, told.w_conditioned) == (False, True)
    assert told.unet.config.time_cond_proj_dim == W_EMBEDDING and plain.unet.config.time_cond_proj_dim is None


def test_w_reaches_the_student_through_training_only(backbone: Pipeline) -> None:
    (x, t), c = states(3), backbone.encode_text(PROMPTS)
    student = backbone.trainable(w_conditioned=True)
    projection = student.unet.time_embedding.cond_proj
    assert not projection.weight.any() and projection.bias is None
    student(x, t, c.guided(2.0)).square().mean().backward()
    assert projection.weight.grad is not None and projection.weight.grad.abs().sum() > 0
    with torch.no_grad():
        projection.weight.add_(projection.weight.grad, alpha=-10)
    assert not torch.allclose(student(x, t, c.guided(0.0)), student(x, t, c.guided(2.0)), atol=1e-5)


def test_w_conditioned_networks_insist_on_w(backbone: Pipeline) -> None:
    (x, t), c = states(3), backbone.encode_text(PROMPTS)
    with pytest.raises(ValueError, match="carries no w"):
        backbone.trainable(w_conditioned=True)(x, t, c)


def test_the_student_is_trainable_and_shares_nothing(backbone: Pipeline) -> None:
    student = backbone.role("student", recompute=True).network
    theirs = {p.data_ptr() for p in backbone.pipe.unet.parameters()}
    assert all(p.requires_grad and p.dtype == torch.float32 and p.data_ptr() not in theirs for p in student.parameters())
    assert all(m.training for m in student.modules())
    assert student.unet.is_gradient_checkpointing and not backbone.pipe.unet.is_gradient_checkpointing


def test_students_of_half_precision_teachers_are_float32(tiny: Path) -> None:
    half = Pipeline(str(tiny), dtype=torch.bfloat16)
    student = half.trainable(w_conditioned=True)
    assert next(half.pipe.unet.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    c = half.encode_text(PROMPTS)
    assert c.text.dtype == half.encode_images(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
    x, t = states(3)
    exact = Pipeline(str(tiny)).network()(x, t, c)
    rounded = half.network()(x, t, c)
    assert rounded.dtype == torch.bfloat16 and student(x, t, c.guided(1.0)).dtype == torch.float32
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.05)


def test_w_embedding_is_lcms(backbone: Pipeline) -> None:
    """Against the formula of latent consistency models, as diffusers' pipeline computes it."""
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([0.0, 1.0, 6.5, 13.0])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(SimpleNamespace(), w, embedding_dim=W_EMBEDDING)
    torch.testing.assert_close(w_embedding(w), expected, rtol=0, atol=2e-3)  # angles up to 13000 in float32
    assert w_embedding(w).shape == (4, W_EMBEDDING)


# Encoders -------------------------------------------------------------------------------------------------------------------------


def test_text_of_a_plain_pipeline(backbone: Pipeline) -> None:
    c = backbone.encode_text(PROMPTS)
    assert c.text.shape == (3, 16, 16) and c.pooled is c.ids is c.w is None and not c.text.requires_grad
    assert torch.equal(c.text[1:2], backbone.encode_text(PROMPTS[1:2]).text)
    assert backbone.null().text.shape == (1, 16, 16)


def test_long_prompts_are_refused_by_name_or_cut(backbone: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"the prompt 'red red .*\.\.\.' has 42 tokens and the text encoder reads 16"):
        backbone.encode_text(["a", LONG])
    assert torch.equal(backbone.encode_text([LONG], truncate=True).text, backbone.encode_text([" ".join(["red"] * 14)]).text)


def test_what_is_cut_as_asked_is_not_told_of_every_batch(backbone: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines of every batch, of a run on captions from the web, would bury all others."""
    told: list[str] = []
    monkeypatch.setattr("logging.Logger.handle", lambda self, record: told.append(record.getMessage()))
    backbone.pipe.encode_prompt([LONG], "cpu", 1, False)
    assert any("was truncated because CLIP" in line for line in told)
    told.clear()
    backbone.encode_text([LONG], truncate=True)
    assert not any("truncated" in line for line in told)


def test_half_a_character_is_refused_cut_or_not(backbone: Pipeline) -> None:
    for ask in (backbone.encode_text, backbone.check_length, lambda prompts: backbone.encode_text(prompts, truncate=True)):
        with pytest.raises(ValueError, match=r"the prompt '\\ud800' is a text with \\ud800, half a character that no tokenizer takes"):
            ask(["a", "\ud800"])


def test_images_go_in_and_out_in_shape_and_scale(backbone: Pipeline) -> None:
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode_images(images)
    assert latents.shape == (5, *backbone.latent_shape) and torch.equal(latents, backbone.encode_images(images))
    vae = backbone.pipe.vae
    torch.testing.assert_close(latents / vae.config.scaling_factor, vae.encode(images).latent_dist.mean)
    back = backbone.decode(latents)
    assert back.shape == images.shape and back.abs().max() <= 1


# The SDXL class -------------------------------------------------------------------------------------------------------------------


def test_text_of_an_sdxl_pipeline(xl: Path) -> None:
    made = Pipeline(str(xl))
    assert (made.guidance, made.guidance_before) == (5.0, 7.5)  # a plain call's, and that of a run that was begun without one
    c = made.encode_text(PROMPTS)
    assert c.text.shape == (3, 16, 40) and c.pooled is not None and c.pooled.shape == (3, 20)
    assert c.ids is not None and c.ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    x, t = states(3)
    student = made.trainable(w_conditioned=True)
    assert torch.equal(student(x, t, c.guided(3.0)), made.network()(x, t, c))
    other = c._replace(pooled=c.pooled + 1)
    assert not torch.allclose(made.network()(x, t, other), made.network()(x, t, c))  # the pooled text is not dropped


@pytest.mark.parametrize("kind", ["tiny", "tiny_eps", "xl"])
def test_guided_sampling_is_the_pipelines_own(kind: str, request: pytest.FixtureRequest) -> None:
    """Text, null context, guidance, conversion and DDIM together against diffusers' pipeline call: out = out_u + g (out_c - out_u)."""
    made, g = Pipeline(str(request.getfixturevalue(kind))), 3.0
    x_t = states(3)[0]
    kwargs: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "latents": x_t.clone()}
    expected = made.pipe(prompt=PROMPTS, guidance_scale=g, **kwargs).images
    teacher = Denoiser(made.network(), made.schedule, made.predicts, null=made.null())
    got = Policy(teacher, ddim).sample(x_t, Grid.named("trailing", 4), made.encode_text(PROMPTS).guided(g - 1))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert teacher.evaluations == 2 * 3 * 4


def test_networks_take_contexts_of_any_record(backbone: Pipeline) -> None:
    """A text mask is handed on, and masked words do not count."""
    x, t = states(1)
    text = backbone.encode_text(PROMPTS[:1]).text
    mask = torch.ones(1, 16)
    mask[:, 8:] = 0
    noisy = text.clone()
    noisy[:, 8:] += 5
    net: UNet = backbone.network()
    torch.testing.assert_close(net(x, t, Context(noisy, mask=mask)), net(x, t, Context(text, mask=mask)))
    assert not torch.allclose(net(x, t, Context(noisy)), net(x, t, Context(text)), atol=1e-6)


def test_the_student_of_a_half_precision_teacher_starts_from_the_stored_weights(tiny: Path) -> None:
    stored, half = Pipeline(str(tiny)).trainable(), Pipeline(str(tiny), torch.bfloat16)
    assert next(half.network().parameters()).dtype == torch.bfloat16
    rounded = False
    for (name, a), b in zip(stored.named_parameters(), half.trainable().parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b), name
        rounded |= not torch.equal(a, a.bfloat16().float())
    assert rounded
