"""Pipelines in: loading and its errors, students that start as their teacher, text, images, and guidance as diffusers does it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import WORDS
from ddil_lightning.backbones import BUILTIN, W_EMBEDDING, Backbone, UNet, load_pipeline, pipeline_folder, recommended, w_embedding
from ddil_lightning.denoiser import Denoiser
from ddil_lightning.schedule import Grid
from ddil_lightning.solver import Policy
from ddil_lightning.types import Context

PROMPTS = ["a handwritten seven", "a small red circle left of a large blue square", "a"]
LONG = " ".join(["red"] * 40)


def edited(tiny: Path, folder: Path, name: str, **values: Any) -> Path:
    """A copy of the tiny pipeline with some values of one JSON file changed."""
    shutil.copytree(tiny, folder)
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def states(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents of the tiny pipelines and their times."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 8, 8, generator=g), torch.randint(1000, (n,), generator=g)


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Backbone:
    return Backbone(str(tiny))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature of the SDXL class: two text encoders, pooled text and size ids."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ddil_lightning.miniature import networks

    torch.manual_seed(1)
    sizes = networks.Sizes(image=16, tokens=16, text=16, autoencoder=(8, 8), unet=(16, 32))
    tokenizer = networks.build_tokenizer(WORDS, sizes.tokens)
    small = networks.build_text_encoder(len(tokenizer), sizes)
    config = CLIPTextConfig(**{**small.config.to_dict(), "hidden_size": 24, "intermediate_size": 48, "projection_dim": 20})
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        norm_num_groups=8,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    pipe = StableDiffusionXLPipeline(
        vae=networks.build_autoencoder(sizes),
        text_encoder=CLIPTextModel(small.config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=networks.build_scheduler(),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("xl") / "tiny-xl"
    pipe.save_pretrained(folder)
    return folder


# Loading --------------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_frozen(backbone: Backbone, tiny: Path) -> None:
    parts = [p for p in backbone.pipe.components.values() if isinstance(p, torch.nn.Module)]
    assert len(parts) == 3 and not any(p.training for part in parts for p in part.modules())
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert backbone.predicts == "v" and backbone.latent_shape == (4, 8, 8) and backbone.schedule.steps == 1000
    assert backbone.guidance == 2.0 and recommended(tiny)["dataset"] == "digits"
    assert backbone.teacher().unet is backbone.pipe.unet  # shared, no second copy in memory


def test_eps_pipelines_say_so(tiny_eps: Path) -> None:
    assert Backbone(str(tiny_eps)).predicts == "eps"


def test_without_a_card_guidance_is_stable_diffusions(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bare")
    (tmp_path / "bare" / "ddil.json").unlink()
    assert recommended(tmp_path / "bare") == {} and Backbone(str(tmp_path / "bare")).guidance == 7.5


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_names_lead_to_the_packaged_weights(name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the weights are installed they are loaded; elsewhere a stand-in of the same layout takes their place."""
    folder = pipeline_folder(name)
    assert folder is not None and folder.parts[-3:] == ("miniature", "weights", BUILTIN[name])
    if not folder.is_dir():
        shutil.copytree(tiny, tmp_path / "miniature" / "weights" / BUILTIN[name])
        monkeypatch.setattr("ddil_lightning.backbones.resources.files", lambda package: tmp_path)
    made = Backbone(name)
    x, t = torch.randn(1, *made.latent_shape), torch.tensor([500])
    assert made.teacher()(x, t, made.null()).shape == x.shape and made.about["dataset"] in ("shapes", "digits")


def test_missing_places_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", "./nowhere", "a/b/c", "nowhere"):
        with pytest.raises(ValueError, match=f"no pipeline at {path}"):
            pipeline_folder(path)
    assert pipeline_folder("owner/name") is None  # can only be a hub id


def test_a_hub_id_that_cannot_be_read_is_one_line() -> None:
    with pytest.raises(ValueError, match="the pipeline owner/there-is-no-such-name could not be loaded") as error:
        load_pipeline("owner/there-is-no-such-name")
    assert "\n" not in str(error.value)


def test_folders_that_are_no_pipelines_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        Backbone(str(tmp_path / "empty"))
    shutil.copytree(tiny, tmp_path / "headless")
    shutil.rmtree(tmp_path / "headless" / "unet")
    with pytest.raises(ValueError, match="has no U-Net"):
        Backbone(str(tmp_path / "headless"))


def test_an_unknown_prediction_type_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "odd", "scheduler/scheduler_config.json", prediction_type="score")
    with pytest.raises(ValueError, match="predicts 'score': known are epsilon, v_prediction, sample"):
        Backbone(str(folder))


# Students -------------------------------------------------------------------------------------------------------------------------


def test_flow_matching_is_refused_and_not_read_as_noise(tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "flow", "scheduler/scheduler_config.json")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}))
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="flow-matching scheduler, which is not supported with a U-Net yet"):
        Backbone(str(folder))


def test_the_autoencoder_stays_in_single_precision_where_half_would_overflow(tiny: Path) -> None:
    """As diffusers does for `force_upcast`; bfloat16 has the range, and a trainer's autocast does not reach the encoders."""
    half, pixels = Backbone(str(tiny), torch.float16), torch.rand(2, 3, 16, 16) * 2 - 1
    assert half.pipe.vae.dtype == torch.float32 and half.pipe.unet.dtype == torch.float16
    assert Backbone(str(tiny), torch.bfloat16).pipe.vae.dtype == torch.bfloat16
    latents = half.encode_images(pixels)
    images = half.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.encode_images(pixels), latents) and torch.equal(half.decode(latents), images)


def test_a_student_starts_as_its_teacher_at_every_w(backbone: Backbone) -> None:
    (x, t), c = states(3), backbone.encode_text(PROMPTS)
    expected = backbone.teacher()(x, t, c)
    plain, told = backbone.student(), backbone.student(w_conditioned=True)
    assert torch.equal(plain(x, t, c), expected)
    for w in (0.0, 1.5, torch.tensor([-1.0, 3.0, 14.0])):
        assert torch.equal(told(x, t, c.guided(w)), expected)
    assert (plain.w_conditioned, told.w_conditioned) == (False, True)
    assert told.unet.config.time_cond_proj_dim == W_EMBEDDING and plain.unet.config.time_cond_proj_dim is None


def test_w_reaches_the_student_through_training_only(backbone: Backbone) -> None:
    (x, t), c = states(3), backbone.encode_text(PROMPTS)
    student = backbone.student(w_conditioned=True)
    projection = student.unet.time_embedding.cond_proj
    assert not projection.weight.any() and projection.bias is None
    student(x, t, c.guided(2.0)).square().mean().backward()
    assert projection.weight.grad is not None and projection.weight.grad.abs().sum() > 0
    with torch.no_grad():
        projection.weight.add_(projection.weight.grad, alpha=-10)
    assert not torch.allclose(student(x, t, c.guided(0.0)), student(x, t, c.guided(2.0)), atol=1e-5)


def test_w_conditioned_networks_insist_on_w(backbone: Backbone) -> None:
    (x, t), c = states(3), backbone.encode_text(PROMPTS)
    with pytest.raises(ValueError, match="carries no w"):
        backbone.student(w_conditioned=True)(x, t, c)


def test_the_student_is_trainable_and_shares_nothing(backbone: Backbone) -> None:
    student = backbone.student(gradient_checkpointing=True)
    theirs = {p.data_ptr() for p in backbone.pipe.unet.parameters()}
    assert all(p.requires_grad and p.dtype == torch.float32 and p.data_ptr() not in theirs for p in student.parameters())
    assert all(m.training for m in student.modules())
    assert student.unet.is_gradient_checkpointing and not backbone.pipe.unet.is_gradient_checkpointing


def test_students_of_half_precision_teachers_are_float32(tiny: Path) -> None:
    half = Backbone(str(tiny), dtype=torch.bfloat16)
    student = half.student(w_conditioned=True)
    assert next(half.pipe.unet.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    c = half.encode_text(PROMPTS)
    assert c.text.dtype == half.encode_images(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
    x, t = states(3)
    exact = Backbone(str(tiny)).teacher()(x, t, c)
    rounded = half.teacher()(x, t, c)
    assert rounded.dtype == torch.bfloat16 and student(x, t, c.guided(1.0)).dtype == torch.float32
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.05)


def test_w_embedding_is_lcms(backbone: Backbone) -> None:
    """Against the formula of latent consistency models, as diffusers' pipeline computes it."""
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([0.0, 1.0, 6.5, 13.0])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(SimpleNamespace(), w, embedding_dim=W_EMBEDDING)
    torch.testing.assert_close(w_embedding(w), expected, rtol=0, atol=2e-3)  # angles up to 13000 in float32
    assert w_embedding(w).shape == (4, W_EMBEDDING)


# Encoders -------------------------------------------------------------------------------------------------------------------------


def test_text_of_a_plain_pipeline(backbone: Backbone) -> None:
    c = backbone.encode_text(PROMPTS)
    assert c.text.shape == (3, 16, 16) and c.pooled is c.ids is c.w is None and not c.text.requires_grad
    assert torch.equal(c.text[1:2], backbone.encode_text(PROMPTS[1:2]).text)
    assert backbone.null().text.shape == (1, 16, 16)


def test_long_prompts_are_refused_by_name_or_cut(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"the prompt 'red red .*\.\.\.' has 42 tokens and the text encoder reads 16"):
        backbone.encode_text(["a", LONG])
    assert torch.equal(backbone.encode_text([LONG], truncate=True).text, backbone.encode_text([" ".join(["red"] * 14)]).text)


def test_images_go_in_and_out_in_shape_and_scale(backbone: Backbone) -> None:
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode_images(images)
    assert latents.shape == (5, *backbone.latent_shape) and torch.equal(latents, backbone.encode_images(images))
    vae = backbone.pipe.vae
    torch.testing.assert_close(latents / vae.config.scaling_factor, vae.encode(images).latent_dist.mean)
    back = backbone.decode(latents, chunk=2)
    assert back.shape == images.shape and back.abs().max() <= 1
    torch.testing.assert_close(back, backbone.decode(latents), rtol=0, atol=1e-5)  # chunks change nothing


# The SDXL class -------------------------------------------------------------------------------------------------------------------


def test_text_of_an_sdxl_pipeline(xl: Path) -> None:
    made = Backbone(str(xl))
    c = made.encode_text(PROMPTS)
    assert c.text.shape == (3, 16, 40) and c.pooled is not None and c.pooled.shape == (3, 20)
    assert c.ids is not None and c.ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    x, t = states(3)
    student = made.student(w_conditioned=True)
    assert torch.equal(student(x, t, c.guided(3.0)), made.teacher()(x, t, c))
    other = c._replace(pooled=c.pooled + 1)
    assert not torch.allclose(made.teacher()(x, t, other), made.teacher()(x, t, c))  # the pooled text is not dropped


@pytest.mark.parametrize("kind", ["tiny", "tiny_eps", "xl"])
def test_guided_sampling_is_the_pipelines_own(kind: str, request: pytest.FixtureRequest) -> None:
    """Text, null context, guidance, conversion and DDIM together against diffusers' pipeline call: out = out_u + g (out_c - out_u)."""
    made, g = Backbone(str(request.getfixturevalue(kind))), 3.0
    x_t = states(3)[0]
    kwargs: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "latents": x_t.clone()}
    expected = made.pipe(prompt=PROMPTS, guidance_scale=g, **kwargs).images
    teacher = Denoiser(made.teacher(), made.schedule, made.predicts, null=made.null())
    got = Policy(teacher, "ddim").sample(x_t, Grid.named("trailing", 4), made.encode_text(PROMPTS).guided(g - 1))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert teacher.evaluations == 2 * 3 * 4


def test_networks_take_contexts_of_any_record(backbone: Backbone) -> None:
    """A text mask is handed on, and masked words do not count."""
    x, t = states(1)
    text = backbone.encode_text(PROMPTS[:1]).text
    mask = torch.ones(1, 16)
    mask[:, 8:] = 0
    noisy = text.clone()
    noisy[:, 8:] += 5
    net: UNet = backbone.teacher()
    torch.testing.assert_close(net(x, t, Context(noisy, mask=mask)), net(x, t, Context(text, mask=mask)))
    assert not torch.allclose(net(x, t, Context(noisy)), net(x, t, Context(text)), atol=1e-6)


def test_the_student_of_a_half_precision_teacher_starts_from_the_stored_weights(tiny: Path) -> None:
    stored, half = Backbone(str(tiny)).student(), Backbone(str(tiny), torch.bfloat16)
    assert next(half.teacher().parameters()).dtype == torch.bfloat16
    rounded = False
    for (name, a), b in zip(stored.named_parameters(), half.student().parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b), name
        rounded |= not torch.equal(a, a.bfloat16().float())
    assert rounded
