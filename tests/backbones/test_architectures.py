"""U-Nets as they ship, and networks of another architecture than the teacher's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from published import ASYMMETRIC, SD15, SD21, SDXL, SSD1B, WEIGHTS, with_unet

import suite
from ddil_lightning.backbones import architectures, sampling
from ddil_lightning.backbones.loading import without_weights
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.unet import UNet
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.methods import DMD2, LCM, PD
from ddil_lightning.runs import export
from ddil_lightning.training.plan import Stage
from options import options

PROMPTS = ["a handwritten one", "a small red circle"]
PLAN = [Stage(steps=4, updates=1), Stage(steps=2, updates=1)]
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lcm": (LCM, {}),
    "pd": (PD, {"stages": PLAN, "teacher_steps": 8}),
    "dmd2": (DMD2, {"guidance": 2.0, "critic": {"steps": 1}}),
}


@pytest.fixture(scope="session")
def uneven(xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of SSD-1B in full: every block of another depth, heads by block, no middle."""
    return with_unet(xl, tmp_path_factory.mktemp("uneven") / "p", **ASYMMETRIC)


def made(kind: Any, source: Source, settings: dict[str, Any]) -> Any:
    usual = {"updates": 2, "optimizer": {"lr": 1e-3}, "guidance": [1.0, 4.0], "reflect": "static", "log_every": 1}
    return kind(pipeline=Pipeline(source), **options(kind, usual, settings))


# As they are published --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "count"), WEIGHTS.values(), ids=WEIGHTS)
def test_published_unets_are_known(config: dict[str, Any], count: int) -> None:
    with without_weights():
        unet = UNet(UNet2DConditionModel.from_config(config))
        told = UNet2DConditionModel.from_config({**config, **unet.told()})
        head = unet.head(unet.layers)
    assert sum(p.numel() for p in unet.parameters()) == count
    unet.check("p", 4)
    with pytest.raises(ValueError, match="its autoencoder has 16"):
        unet.check("p", 16)
    side, widths = config["sample_size"], config["block_out_channels"]
    assert unet.latent_shape == (4, side, side) and not unet.w_conditioned
    ways = [f"{way}{i}" for way in ("down", "up") for i in range(len(widths))]
    assert unet.layers == (*ways[: len(widths)], "mid", *ways[len(widths) :])
    assert [part[-1].in_channels for part in head] == [*widths, widths[-1], *reversed(widths)]  # type: ignore[index]
    kinds = [type(block).__name__ for block in unet.blocks()]
    depths = {id(SD15): 16, id(SD21): 16, id(SDXL): 70, id(SSD1B): 34}
    assert kinds.count("BasicTransformerBlock") == depths[id(config)] and set(kinds) == set(UNet.blocks_of)
    assert {k for k, _ in told.named_parameters()} - {k for k, _ in unet.unet.named_parameters()} == {"time_embedding.cond_proj.weight"}


def test_ssd_1b_may_take_the_place_of_sdxl_and_no_other(caplog: Any) -> None:
    teacher = UNet(architectures.bare(UNet2DConditionModel, SDXL))
    found = architectures.described(SSD1B, teacher, lambda: [], "student")
    assert found.partial and found.config["transformer_layers_per_block"] == [1, [2, 2], [4, 4]]
    with pytest.raises(ValueError, match=r"networks\.critic: its text width \(cross_attention_dim\) is 768 and the teacher's 2048"):
        architectures.described(SD15, teacher, lambda: [], "critic")


def test_a_whole_sdxl_is_named_where_ids_differ() -> None:
    teacher = UNet(architectures.bare(UNet2DConditionModel, SSD1B))
    with pytest.raises(ValueError, match=r"its width of pooled text and time ids .* is 2560 and the teacher's 2816"):
        architectures.described({**SDXL, "projection_class_embeddings_input_dim": 2560}, teacher, lambda: [], "student")


# In miniature -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["xl", "uneven"])
def test_our_sampler_is_the_pipelines(layout: str, request: pytest.FixtureRequest) -> None:
    """Guidance, pooled text, ids and zeros for the empty prompt as StableDiffusionXLPipeline has them."""
    backbone = Pipeline(str(request.getfixturevalue(layout)))
    assert backbone.pipe.config.force_zeros_for_empty_prompt
    teacher = Denoiser(backbone.network(), backbone.schedule, backbone.predicts, null=backbone.null())
    mine = sampling.latents(backbone, Policy(teacher, ddim), Grid.named("trailing", 4), PROMPTS, 5.0)
    theirs = sampling.pipeline_latents(backbone, PROMPTS, 4, 5.0)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["xl", "uneven"])
@pytest.mark.parametrize("name", METHODS)
def test_they_are_distilled(name: str, layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    kind, settings = METHODS[name]
    method = made(kind, Source(str(folder)), settings)
    before = [p.clone() for p in method.student.weights()]
    run = suite.fit(method, suite.captions(folder))
    assert method.student_updates == 2 and all(torch.isfinite(torch.tensor(row.get("loss", 0.0))) for row in run.rows)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, method.student.weights(), strict=True))
    assert moved > len(before) // 2


# Of another architecture ------------------------------------------------------------------------------------------------------------------

SMALLER = {"layers_per_block": 1, "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None}


@pytest.mark.parametrize("name", ["lcm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dmd2", "pd"))])
def test_a_smaller_student_is_distilled_and_exported(name: str, uneven: Path, tmp_path: Path, caplog: Any) -> None:
    """With blocks of the teacher where they fit, and in DMD2 with a larger critic, whose features its discriminator reads."""
    kind, settings = METHODS[name]
    networks: dict[str, Any] = {"student": SMALLER, **({"critic": {"block_out_channels": [16, 48]}} if name == "dmd2" else {})}
    with caplog.at_level(logging.INFO):
        method = made(kind, Source(str(uneven), networks=networks), settings)
    assert any(message.startswith("student: ") and "tensors are the teacher's, the rest are new" in message for message in caplog.messages)
    teacher, student = (sum(p.numel() for p in role.network.parameters()) for role in (method.teacher, method.student))
    assert student < teacher
    fits = {k: v for k, v in method.teacher.network.state_dict().items() if k in method.student.network.state_dict()}
    same = [k for k, v in method.student.network.state_dict().items() if k in fits and torch.equal(v, fits[k])]
    assert 20 < len(same) < len(fits)
    if name == "dmd2":
        assert sum(p.numel() for p in method.critic.network.parameters()) > teacher
    if name == "lcm":
        assert [p.shape for p in method.target.parameters()] == [p.shape for p in method.student.parameters()]
    suite.fit(method, suite.captions(uneven))
    assert export.deliver(method.eval(), tmp_path / "student", PROMPTS, 2) < 1e-3
    again = DiffusionPipeline.from_pretrained(tmp_path / "student", feature_extractor=None, image_encoder=None)
    assert again.unet.config.layers_per_block == 1 and again.unet.config.sample_size == 8


@pytest.mark.slow
def test_a_network_with_weights_of_its_own_starts_from_them(xl: Path, uneven: Path) -> None:
    """A pipeline or the folder of its network; in float32, and as large as the teacher's samples."""
    theirs = Pipeline(str(uneven)).network().state_dict()
    for path, dtype in ((uneven, torch.float32), (uneven / "unet", torch.bfloat16)):
        student = Pipeline(Source(str(xl), networks={"student": str(path)}), dtype).trainable(w_conditioned=True)
        assert not student.unet.time_embedding.cond_proj.weight.any()
        state = student.state_dict()
        assert all(torch.equal(v, state[k]) and state[k].dtype == torch.float32 for k, v in theirs.items())
    # and a student is the teacher's copy where only the critic is another
    plain = Pipeline(Source(str(xl), networks={"critic": str(uneven)}))
    assert all(torch.equal(a, b) for a, b in zip(plain.trainable().parameters(), plain.network().parameters(), strict=True))
    assert plain.role("critic").network.unet.mid_block is None


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ({"layers": 1}, "has 'layers', which no UNet2DConditionModel has"),
        ({"layers_per_block": [1]}, "no UNet2DConditionModel could be made of it"),
        ({"in_channels": 9}, r"its number of latent channels is \(9, 4\) and the teacher's \(4, 4\)"),
        ({"_class_name": "FluxTransformer2DModel"}, "is a FluxTransformer2DModel and the teacher's network a UNet2DConditionModel"),
        ("/nowhere", "could not be loaded: no unet at /nowhere"),
        ("owner/name", "HF_HUB_OFFLINE is set, and the hub's cache .* has no config.json of it"),
    ],
    ids=["key", "config", "channels", "class", "path", "hub"],
)
def test_networks_that_do_not_fit_are_named(said: Any, refusal: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=rf"^model\.pipeline\.networks\.student.*{refusal}") as error:
        Pipeline(Source(str(tiny), networks={"student": said})).trainable()
    assert "\n" not in str(error.value)


def test_adapters_and_another_base_do_not_go_together(tiny: Path) -> None:
    from ddil_lightning.backbones.adapters import Adapter

    backbone = Pipeline(Source(str(tiny), networks={"student": {"layers_per_block": 2}}))
    with pytest.raises(ValueError, match=r"networks\.student has another base than the adapters: add student to model\.adapter\.whole"):
        backbone.role("student", adapter=Adapter(rank=2))
    assert backbone.role("critic", adapter=Adapter(rank=2)).own


@pytest.mark.parametrize("small", [pytest.param(True, marks=pytest.mark.slow), False], ids=["drawn", "assigned"])
@pytest.mark.parametrize("stored", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
def test_weights_are_the_stored_ones_however_the_network_is_made(
    stored: str, small: bool, tiny: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    """A large network gets memory for its weights once, from the file; what it equals is the same."""
    folder = tiny
    if stored == "float16":
        pipe = DiffusionPipeline.from_pretrained(tiny, safety_checker=None, feature_extractor=None, image_encoder=None)
        pipe.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
        folder = tmp_path / "half"
    monkeypatch.setattr(architectures, "SMALL", 2**24 if small else 0)
    exact = Pipeline(str(folder)).network().state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        backbone = Pipeline(str(folder), dtype)
        for told in (False, True):
            student = backbone.trainable(told)
            made = student.state_dict()
            assert all(torch.equal(v, made[k]) for k, v in exact.items())
            assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in backbone.network().parameters()}
            assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
