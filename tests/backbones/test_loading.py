"""Pipelines in: built-in names, folders and hub ids, and every fault of one in a line that names its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddil_lightning.backbones.loading import CARD, load_pipeline, recommended
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.repositories import BUILTIN, pipeline_folder


def edited(tiny: Path, folder: Path, name: str, **values: Any) -> Path:
    """A copy of the tiny pipeline with some values of one JSON file changed."""
    shutil.copytree(tiny, folder)
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Pipeline:
    return Pipeline(str(tiny))


def test_a_folder_is_loaded_frozen(backbone: Pipeline, tiny: Path) -> None:
    parts = [p for p in backbone.pipe.components.values() if isinstance(p, torch.nn.Module)]
    assert len(parts) == 3 and not any(p.training for part in parts for p in part.modules())
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert backbone.predicts == "v" and backbone.latent_shape == (4, 8, 8) and backbone.schedule.steps == 1000
    assert backbone.guidance == 2.0 and recommended(tiny)["dataset"] == "digits"
    assert backbone.network().unet is backbone.pipe.unet  # shared, no second copy in memory


def test_eps_pipelines_say_so(tiny_eps: Path) -> None:
    assert Pipeline(str(tiny_eps)).predicts == "eps"


def test_without_a_card_guidance_is_stable_diffusions(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bare")
    (tmp_path / "bare" / "ddil.json").unlink()
    assert recommended(tmp_path / "bare") == {} and Pipeline(str(tmp_path / "bare")).guidance == 7.5


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_names_lead_to_the_packaged_weights(name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the weights are installed they are loaded; elsewhere a stand-in of the same layout takes their place."""
    folder = pipeline_folder(name)
    assert folder is not None and folder.parts[-3:] == ("miniature", "weights", BUILTIN[name])
    if not folder.is_dir():
        shutil.copytree(tiny, tmp_path / "miniature" / "weights" / BUILTIN[name])
        monkeypatch.setattr("ddil_lightning.backbones.repositories.resources.files", lambda package: tmp_path)
    made = Pipeline(name)
    x, t = torch.randn(1, *made.latent_shape), torch.tensor([500])
    assert made.network()(x, t, made.null()).shape == x.shape and made.about["dataset"] in ("shapes", "digits")


def test_missing_places_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", "./nowhere", "a/b/c", "nowhere"):
        with pytest.raises(ValueError, match=f"no pipeline at {path}"):
            pipeline_folder(path)
    assert pipeline_folder("owner/name") is None  # can only be a hub id
    for path in ("builtin/lcm", "builtin:lcm", "lcm"):  # a method's name is no pipeline's, and the hub is not asked for one of ours
        with pytest.raises(
            ValueError, match=f"no pipeline at {path}: give .*, or one of builtin, builtin/shapes, builtin/digits, builtin/flow"
        ):
            pipeline_folder(path)


def test_a_hub_id_that_cannot_be_read_is_one_line() -> None:
    with pytest.raises(ValueError, match="the pipeline owner/there-is-no-such-name could not be loaded") as error:
        load_pipeline("owner/there-is-no-such-name")
    assert "\n" not in str(error.value)


def test_folders_that_are_no_pipelines_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        Pipeline(str(tmp_path / "empty"))
    shutil.copytree(tiny, tmp_path / "headless")
    shutil.rmtree(tmp_path / "headless" / "unet")
    with pytest.raises(ValueError, match="has no U-Net"):
        Pipeline(str(tmp_path / "headless"))


def test_an_unknown_prediction_type_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "odd", "scheduler/scheduler_config.json", prediction_type="score")
    with pytest.raises(ValueError, match="predicts 'score': known are epsilon, v_prediction, sample"):
        Pipeline(str(folder))


def refused(folder: Path) -> str:
    """The one line with which a pipeline is refused."""
    with pytest.raises(ValueError) as error:
        Pipeline(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


JSON = ("model_index.json", "ddil.json", "unet/config.json", "scheduler/scheduler_config.json", "vae/config.json")


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"text"', '{"a": 1', "\xff", '{"a": ' * 5000])
def test_a_json_file_that_is_none_is_named(name: str, text: str, tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "p", "ddil.json")
    (folder / name).write_bytes(text.encode("latin-1"))
    assert str(folder / name) in refused(folder)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"guidance": "much"}, "guidance is 'much', not a number"),
        ({"guidance": True}, "guidance is True"),
        ({"steps": 0}, "steps is 0, not a step count"),
        ({"made_for": [4, "2"]}, "made_for is"),
        ({"timesteps": 999}, "timesteps is 999"),
        ({"dataset": ["shapes"]}, "dataset is"),
        *[({name: None}, f"{name} is None, not ") for name in CARD if name != "dataset"],
        ({"guidance": 10**400}, "guidance is 1000"),
        ({"guidance_scale": 1e300}, "guidance_scale is 1e+300, not a number from 0 to 1000"),
        ({"previews": "a prompt"}, "previews is 'a prompt', not a list of prompts"),
    ],
)
def test_a_card_that_says_what_cannot_be_is_named(about: dict[str, Any], said: str, tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "p", "ddil.json", **about)
    assert f"{folder / 'ddil.json'}: {said}" in refused(folder)


def test_a_card_may_name_no_data_set(tiny: Path, tmp_path: Path) -> None:
    """As those of students do that were trained on pictures of one's own."""
    assert recommended(edited(tiny, tmp_path / "p", "ddil.json", dataset=None))["dataset"] is None


@pytest.mark.parametrize("value", [[], ["diffusers"], ["diffusers", None], [1, 2], ["a", "b", "c"]], ids=repr)
def test_an_index_that_lists_no_component_is_named(value: Any, tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "p", "model_index.json", unet=value)
    assert refused(folder) == f'{folder / "model_index.json"}: unet is {value!r}, not ["library", "class"] or [null, null]: copy it anew'


WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_are_cut_short_or_incomplete_or_not_finite_are_named(part: str, tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "p", "ddil.json")
    file = folder / part / f"{WEIGHTS[part]}.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert f"the weights {file} are cut short or damaged" in refused(folder)
    last = list(tensors)[-1]
    save_file({k: v for k, v in tensors.items() if k != last}, file, {"format": "pt"})
    assert f"the file of its {part} lacks some of the weights" in refused(folder)
    for bad in (float("nan"), float("inf")):
        tensors[last].view(-1)[-1] = bad
        save_file(tensors, file, {"format": "pt"})
        assert f"has NaN or infinite weights in its {part} (" in refused(folder)
    file.unlink()
    assert str(folder) in refused(folder)
    shutil.rmtree(folder / part)
    assert f"no folder {part}/" in refused(folder) or "has no U-Net" in refused(folder)


def test_a_lora_that_was_left_in_the_weights_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "p", "ddil.json")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("to_q.weight"))
    tensors[key.replace("to_q.weight", "to_q.base_layer.weight")] = tensors.pop(key)
    tensors[key.replace("to_q.weight", "to_q.lora_A.default.weight")] = torch.zeros(4, 16)
    save_file(tensors, file, {"format": "pt"})
    said = refused(folder)
    assert f"the weights {file} still have a LoRA in them" in said and "pipe.fuse_lora()" in said


def test_pipelines_that_are_no_text_to_image_are_refused(tiny: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    folder = edited(tiny, tmp_path / "p", "ddil.json")
    config = UNet2DConditionModel.load_config(str(folder / "unet"))
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")
    said = refused(folder)
    assert "reads 9 channels and writes 4" in said and "no inpainting" in said
    UNet2DConditionModel.from_config({**config, "out_channels": 8}).save_pretrained(folder / "unet")
    assert "reads 4 channels and writes 8" in refused(folder)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("StableDiffusionImg2ImgPipeline", ": give the StableDiffusionPipeline of this model"),
        ("StableDiffusionXLInpaintPipeline", ": give the StableDiffusionXLPipeline of this model"),
        ("StableDiffusion3ControlNetInpaintingPipeline", ""),
        ("FluxControlImg2ImgPipeline", ": give the FluxPipeline of this model"),
        ("QwenImageEditPlusPipeline", ": give the QwenImagePipeline of this model"),
    ],
)
def test_pipelines_that_are_given_a_picture_say_which_one_to_give(kind: str, told: str, tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "p", "ddil.json")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    with pytest.raises(ValueError) as error:
        load_pipeline(folder)
    said = "which is given a picture besides the prompt, and only text-to-image pipelines are distilled"
    assert str(error.value) == f"the pipeline {folder} is a {kind}, {said}{told}"


def test_files_that_are_no_checkpoints_are_told_what_to_do(tmp_path: Path) -> None:
    told = {"sd.safetensors": "are cut short or damaged", "sd.ckpt": "is a pickled file, which may run code", "x.txt": "is a file and no"}
    for name, said in told.items():
        (tmp_path / name).write_bytes(b"x")
        assert said in refused(tmp_path / name)
    for key, said in {"unet.lora_A.weight": "is a LoRA: give the pipeline", "down_blocks.0.weight": "is no whole checkpoint"}.items():
        save_file({key: torch.zeros(1)}, tmp_path / "sd.safetensors")
        assert said in refused(tmp_path / "sd.safetensors")


@pytest.mark.parametrize("path", ["a\0b/c", "owner/na\nme", "\ud800/x", "~nosuchuser/x"])
def test_paths_that_are_none_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="no pipeline at"):
        pipeline_folder(path)


@pytest.mark.slow
def test_what_distillation_does_not_use_is_neither_loaded_nor_exported(tiny: Path, tmp_path: Path) -> None:
    """Stable Diffusion 1.5's safety checker and feature extractor are 1.2 GB, in every folder of every stage."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    from ddil_lightning.runs import export
    from suite import METHODS

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "projection_dim": 8}
    config = CLIPConfig(text_config=small, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=8)
    parts = load_pipeline(tiny).components
    parts |= {"safety_checker": StableDiffusionSafetyChecker(config), "feature_extractor": CLIPImageProcessor(size=8, crop_size=8)}
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "teacher")
    method = METHODS[1].method(pipeline=str(tmp_path / "teacher"), guidance=2.0, w_conditioned=False).eval()
    assert method.backbone.pipe.safety_checker is None and len(method.backbone.parts()) == 3
    export.deliver(method, tmp_path / "plain", ["a digit"], 2)
    export.deliver(method, tmp_path / "asked", ["a digit"], 2, safety_checker=True)
    assert not (tmp_path / "plain" / "safety_checker").exists() and not (tmp_path / "plain" / "feature_extractor").exists()
    assert (tmp_path / "asked" / "safety_checker" / "model.safetensors").is_file()
    assert load_pipeline(tmp_path / "asked", spare=False).safety_checker is not None
