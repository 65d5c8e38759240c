"""Pipelines from what people have: files of a variant alone, single files, the hub's cache, another autoencoder, LoRAs."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import checkpoints
import commandline
import suite
from ddil_lightning import servers
from ddil_lightning.backbones import repositories
from ddil_lightning.backbones.loading import load_pipeline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.source import Lora, Source
from ddil_lightning.backbones.weights import variants
from ddil_lightning.commands.restore import restore
from ddil_lightning.methods import LCM
from ddil_lightning.runs import export
from ddil_lightning.training.options import Memory
from ddil_lightning.training.vision import Dino

NONE: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
PROMPTS = ["a handwritten one", "a small red circle"]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def refused(source: Any) -> str:
    with pytest.raises(ValueError) as error:
        Pipeline(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def half(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the variant fp16 alone, as many repositories have them."""
    folder = tmp_path_factory.mktemp("half") / "p"
    DiffusionPipeline.from_pretrained(tiny, dtype=torch.float16, **NONE).save_pretrained(folder, variant="fp16")
    return folder


# Variants ---------------------------------------------------------------------------------------------------------------------------------


def test_files_of_weights_are_told_by_their_names() -> None:
    names = {
        "diffusion_pytorch_model.safetensors": None,
        "model.safetensors": None,
        "model-00001-of-00002.safetensors": None,
        "diffusion_pytorch_model.fp16.safetensors": "fp16",
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors": "fp16",
        "diffusion_pytorch_model-00001-of-00002.fp16.safetensors": "fp16",
        "diffusion_pytorch_model.non_ema.safetensors": "non_ema",
    }
    assert {name: variants([name]) for name in names} == {name: {variant} for name, variant in names.items()}
    assert variants(["model.onnx", "config.json", "pytorch_model.bin", "lora.safetensors"]) == set()
    assert variants(["pytorch_model.fp16.bin"], "bin") == {"fp16"}


def test_the_only_variant_is_taken_by_itself(half: Path, tiny: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        found = Pipeline(str(half))
    assert caplog.messages.count(f"the pipeline {half} has files of the variant fp16 alone, which are read") == 1
    assert found.source.variant == "fp16" and found.network().model.dtype == torch.float32
    assert same(found.network().model, DiffusionPipeline.from_pretrained(tiny, dtype=torch.float16, **NONE).unet.float())
    bare = Pipeline(str(half), bare=True)
    assert bare.encoders() == found.encoders() and all(p.is_meta for p in bare.network().parameters())


def test_a_variant_is_read_where_a_component_has_it(tiny: Path, tmp_path: Path, half: Path) -> None:
    """Plain files beside those of a variant: which is read is what was asked for, component by component."""
    folder = shutil.copytree(tiny, tmp_path / "p")
    shutil.copy(half / "unet" / "diffusion_pytorch_model.fp16.safetensors", folder / "unet")
    plain, asked = Pipeline(str(folder)), Pipeline(Source(str(folder), variant="fp16"), torch.bfloat16)
    assert plain.source.variant is None and same(plain.network(), Pipeline(str(tiny)).network())
    exact = asked.trainable().state_dict()
    assert all(torch.equal(v.half().float(), exact[k]) for k, v in plain.network().state_dict().items())
    assert not all(torch.equal(v, exact[k]) for k, v in plain.network().state_dict().items())
    assert plain.encoders() != asked.encoders()  # these are in bfloat16


def test_variants_that_are_not_there_are_refused_with_those_that_are(half: Path, tiny: Path, tmp_path: Path) -> None:
    assert refused(Source(str(half), variant="bf16")) == f"the pipeline {half} has no files of the variant 'bf16': it has the variant fp16"
    assert refused(Source(str(tiny), variant="fp16")) == f"the pipeline {tiny} has no files of the variant 'fp16': it has none"
    with pytest.raises(ValueError, match="variant is 'a.b': give the word between the dots"):
        Source("a", variant="a.b")
    folder = shutil.copytree(half, tmp_path / "two")
    for file in folder.glob("*/*.fp16.safetensors"):
        shutil.copy(file, file.with_name(file.name.replace("fp16", "ema")))
    assert "has no plain files for its text_encoder: it has the variants ema, fp16; say which by model.pipeline.variant" in refused(
        str(folder)
    )
    (folder / "vae" / "diffusion_pytorch_model.ema.safetensors").unlink()
    assert "has neither plain files nor those of the variant 'ema' for its vae" in refused(Source(str(folder), variant="ema"))


def test_pickled_weights_are_refused_with_a_way_out(tiny: Path, tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(tiny, **NONE).save_pretrained(tmp_path / "p", safe_serialization=False)
    said = refused(str(tmp_path / "p"))
    assert "as a pickled .bin file alone, which may run code" in said and "use_safetensors=False).save_pretrained(FOLDER)" in said


@pytest.mark.parametrize("spelling", ["stable_diffusion", "diffusers", "transformers"])
def test_spared_entries_are_not_looked_at(spelling: str, tiny: Path, tmp_path: Path) -> None:
    """Old repositories name classes that are no more, and download scripts leave their folders out."""
    folder = shutil.copytree(tiny, tmp_path / "p")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": [spelling, "StableDiffusionSafetyChecker"], "feature_extractor": ["transformers", "CLIPFeatureExtractor"]}
    index |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert Pipeline(str(folder)).encoders() == Pipeline(str(tiny)).encoders()


# The hub ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub's cache in a folder of the test's own, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def in_cache(cache: Path, repository: str, folder: Path) -> Path:
    """A folder as the hub's client keeps a repository."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(folder, place / "snapshots" / ("0" * 40)))


def test_a_repository_in_the_cache_is_a_folder(cache: Path, half: Path) -> None:
    snapshot = in_cache(cache, "owner/name", half)
    found = Pipeline("owner/name", torch.bfloat16)
    assert found.path == "owner/name" and found.source.variant == "fp16"
    assert same(found.trainable(), Pipeline(str(half)).trainable())
    shutil.rmtree(snapshot / "vae")
    assert "has no folder vae/, HF_HUB_OFFLINE is set, and the hub's cache lacks it: fetch it" in refused("owner/name")


def test_nothing_is_fetched_in_silence(cache: Path, tiny: Path, tmp_path: Path) -> None:
    missing = "could not be loaded: HF_HUB_OFFLINE is set, and the hub's cache"
    for source in ("owner/none", Source(str(tiny), vae="owner/none"), Source(str(tiny), lora=(Lora("owner/none"),))):
        said = refused(source)
        assert f"owner/none {missing} {cache} has no " in said and "(hf download owner/none)" in said


def test_a_hub_that_does_not_answer_is_asked_once(cache: Path, half: Path, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """On a node without a network its client tried for half a minute a file, of a pipeline that lies in the cache."""
    in_cache(cache, "owner/name", half)
    asked: list[str] = []

    def nobody(host: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        raise socket.gaierror("no address")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers.unreachable.cache_clear()
    try:
        assert same(Pipeline("owner/name", torch.bfloat16).trainable(), Pipeline(str(half)).trainable())
        assert repositories.listed("owner/name")["unet"]
        for source in ("owner/none", Source(str(tiny), vae="owner/none"), Source(str(tiny), lora=(Lora("owner/none"),))):
            assert "does not answer (no address), and the hub's cache" in refused(source)
        with pytest.raises(ValueError, match="holds no vision transformer"):
            Dino("owner/none")
    finally:
        servers.unreachable.cache_clear()
    assert len(asked) == 1


def test_a_repository_that_is_online_is_fetched_by_what_it_has(half: Path, monkeypatch: Any, cache: Path) -> None:
    """The variant is known from the list of its files, before anything is downloaded; what is spared is not."""
    asked: dict[str, Any] = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs)
        return str(half)

    files = [str(path.relative_to(half)) for path in half.rglob("*")] + ["safety_checker/model.safetensors"]
    monkeypatch.setattr(repositories, "listing", lambda name: (files, ""))
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert Pipeline("owner/name").encoders() == Pipeline(str(half)).encoders()
    assert asked["variant"] == "fp16" and asked["safety_checker"] is None and asked["use_safetensors"]


@pytest.mark.parametrize(
    ("listing", "line"),
    [
        ({"unet": ["diffusers", "UNetMotionModel"]}, r"^the pipeline owner/name denoises with a UNetMotionModel: known are UNet2D.*, SD3"),
        ({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "has the scheduler FlowMatch.*, and its UNet is no flow, so"),
        (
            {"unet": [None, None], "transformer": ["diffusers", "SD3Transformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]},
            r"^the pipeline owner/name has the scheduler DDIMScheduler, and its SD3 is a flow, so give it FlowMatchEulerDiscrete",
        ),
    ],
    ids=["family", "scheduler", "flow"],
)
def test_what_is_not_distilled_is_refused_before_its_weights_are_fetched(
    listing: dict[str, Any], line: str, tiny: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """By its model_index.json, which alone is fetched."""
    index = json.loads((tiny / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **listing}))

    def fetched(name: str, file: str, **kwargs: Any) -> str:
        assert (name, file) == ("owner/name", "model_index.json")
        return str(tmp_path / file)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing else is asked for")

    monkeypatch.setattr(repositories, "no_hub", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    monkeypatch.setattr(repositories, "fetched", never)
    monkeypatch.setattr("ddil_lightning.backbones.loading.fetched", never)
    with pytest.raises(ValueError, match=line):
        Pipeline("owner/name")


# Single files -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SDXL", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SD1", "SD2"))])
def test_a_checkpoint_of_one_file_is_its_pipeline(kind: str, tiny: Path, xl: Path, tmp_path: Path) -> None:
    folder = xl if kind == "SDXL" else tiny
    pipe = load_pipeline(folder)
    file = checkpoints.single_file(pipe, tmp_path / "sd.safetensors", open_clip=kind == "SD2")
    source = Source(str(file), config=str(folder))
    found, named = Pipeline(source), Pipeline(str(folder))
    for name in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "SDXL" else [])):
        assert same(getattr(found.pipe, name), getattr(pipe, name)), name
    assert found.encoders() == named.encoders() and (found.predicts, found.latent_shape) == (named.predicts, named.latent_shape)
    lower = Pipeline(source, torch.bfloat16)
    assert (lower.network().model.dtype, lower.pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert same(lower.trainable(), named.trainable()) and all(p.is_meta for p in Pipeline(source, bare=True).network().parameters())


def test_settings_that_a_single_file_lacks_are_asked_for(tiny: Path, tmp_path: Path, cache: Path) -> None:
    file = checkpoints.single_file(load_pipeline(tiny), tmp_path / "sd.safetensors")
    said = refused(str(file))
    assert (
        "holds weights alone" in said
        and "stable-diffusion-v1-5" in said
        and "by model.pipeline.config" in said
        and "HF_HUB_OFFLINE" in said
    )
    settings = shutil.copytree(tiny, tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors"))
    assert Pipeline(Source(str(file), config=str(settings))).encoders() == Pipeline(str(tiny)).encoders()
    in_cache(cache, "stable-diffusion-v1-5/stable-diffusion-v1-5", settings)
    assert Pipeline(str(file)).encoders() == Pipeline(str(tiny)).encoders()
    assert "is a pickled file" in refused(str(shutil.copy(file, tmp_path / "sd.ckpt")))
    assert "model.pipeline.config is for single files" in refused(Source(str(tiny), config=str(tiny)))
    assert "is a single file: leave it out" in refused(Source(str(file), variant="fp16", config=str(tiny)))


# What comes from elsewhere ----------------------------------------------------------------------------------------------------------------


def test_another_autoencoder_makes_the_latents(tiny: Path, half: Path, tmp_path: Path) -> None:
    """A pipeline's, or one of its own; caches know it, and it is exported."""
    other = DiffusionPipeline.from_pretrained(tiny, **NONE).vae
    with torch.no_grad():
        other.quant_conv.weight.mul_(2)
    other.register_to_config(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "vae")
    plain, found = Pipeline(str(tiny)), Pipeline(Source(str(tiny), vae=str(tmp_path / "vae")))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = other.encode(pixels).latent_dist.mean * 0.5
    torch.testing.assert_close(found.encode_images(pixels), expected)
    assert found.encoders() != plain.encoders() and same(Pipeline(Source(str(tiny), vae=str(tiny))).pipe.vae, plain.pipe.vae)
    assert refused(Source(str(tiny), vae="/nowhere")).startswith("model.pipeline.vae: /nowhere could not be loaded: no vae at /nowhere")


@pytest.mark.slow
def test_what_comes_from_elsewhere_is_exported(tiny: Path, lora: Path, half: Path, tmp_path: Path) -> None:
    source = Source(str(tiny), vae=str(half), lora=(Lora(str(lora)),))
    for memory in (Memory(), Memory("bfloat16")):
        method = LCM(pipeline=source, guidance=2.0, w_conditioned=False, memory=memory).eval()
        assert export.deliver(method, tmp_path / memory.teacher_dtype, PROMPTS, 2) < 1e-3
        made = load_pipeline(tmp_path / memory.teacher_dtype)
        assert same(made.vae, load_pipeline(half).vae) and same(made.unet, Pipeline(source).network().model)
        assert same(made.text_encoder, load_pipeline(tiny).text_encoder)


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as diffusers writes it, with an alpha that is not its rank."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = DiffusionPipeline.from_pretrained(tiny, **NONE).unet
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    about = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, get_peft_model_state_dict(unet), unet_lora_adapter_metadata=about)
    return folder


@pytest.mark.slow
def test_a_lora_becomes_a_part_of_the_teacher(lora: Path, tiny: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny, **NONE)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    source = Source(str(tiny), lora=(Lora(str(lora), scale=0.5),))
    found, plain = Pipeline(source), Pipeline(str(tiny))
    assert same(found.network().model, pipe.unet) and not same(found.network(), plain.network())
    assert same(
        Pipeline(Source(str(tiny), lora=(Lora(str(lora / "pytorch_lora_weights.safetensors"), scale=0.5),))).network(), found.network()
    )
    assert same(Pipeline(source, torch.bfloat16).trainable(), found.network())
    assert all(p.is_meta for p in Pipeline(source, bare=True).network().parameters()) and found.encoders() == plain.encoders()


def test_loras_that_cannot_be_fused_are_named(lora: Path, tiny: Path, tmp_path: Path) -> None:
    def told(path: Path | str, **kwargs: Any) -> str:
        return refused(Source(str(tiny), lora=(Lora(str(path), **kwargs),))).removeprefix(
            f"the LoRA {path} could not be fused into the pipeline: "
        )

    assert told("/nowhere").startswith("no LoRA at /nowhere")
    assert told(lora, weight_name="x.safetensors") == (
        "the folder has the files pytorch_lora_weights.safetensors: say by weight_name which of them it is"
    )
    (tmp_path / "lora.bin").write_bytes(b"x")
    assert told(tmp_path / "lora.bin").startswith("it is a pickled file")
    from safetensors.torch import save_file

    save_file({"transformer.to_q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    assert told(tmp_path / "other.safetensors") == "it has no weights for any of its networks"
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    assert "header too small" in told(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"lora\.scale is 1000: give a number from -100 to 100"):
        Lora("x", scale=1000)


# Configs ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_config_says_it_and_a_run_is_rebuilt_from_it(
    tiny_config: Path, half: Path, lora: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The record in YAML; config.yaml repeats it, and a checkpoint is restored and exported by it."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(tiny_config.read_text())
    networks = {"student": {"layers_per_block": 2}}
    config["model"]["init_args"] |= {
        "pipeline": {"path": str(half), "variant": "fp16", "lora": [{"path": str(lora)}], "networks": networks}
    }
    config["model"]["init_args"] |= {"updates": 2}
    config["previews"], config["checkpoints"], config["data"]["captions"] = {"every": 0}, {"every": 2}, "Digits"
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    code, _, err = commandline.fit(capsys, "--config", "mine.yaml")
    assert code == 0, err
    run = next(Path("runs/mine").glob("2*"))
    kept = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["pipeline"]
    assert Source.of(kept) == Source(str(half), variant="fp16", lora=(Lora(str(lora)),), networks=networks)  # type: ignore[arg-type]
    method = restore(run)
    assert method.backbone.source == Source.of(kept) and method.outgoing.network.unet.config.layers_per_block == 2
    assert same(method.outgoing.network.unet, load_pipeline(run / "pipeline").unet)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.pipeline={path: builtin, variant: bf16}"], "has no files of the variant 'bf16': it has none"),
        (["model.pipeline={path: builtin, varant: fp16}"], "varant"),
        (["model.pipeline={path: builtin, networks: {teacher: {}}}"], "networks names the teacher"),
        (["model.pipeline=builtin", "model.pipeline.vae=builtin"], "names no pipeline: give model.pipeline.path as well"),
    ],
    ids=["variant", "key", "teacher", "no path"],
)
def test_what_a_config_says_in_vain_is_one_line(words: list[str], said: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in commandline.refused(capsys, "--config", "lcm.yaml", *words)


def test_a_pipeline_takes_what_a_path_says() -> None:
    assert Source.of("a/b") == Source("a/b") and Source.of(Path("a")) == Source("a")
    with pytest.raises(ValueError, match=r"model\.pipeline has no 'varant': it has path, variant, config, vae, lora, networks"):
        Source.of({"path": "a", "varant": "b"})


def test_a_card_tells_the_teacher_as_it_was_distilled() -> None:
    """With its LoRAs, autoencoder, size and shift, and without the students' architectures."""
    whole = Source("a", vae="v", lora=(Lora("l", scale=0.5),), size=(64, 32), shift=3.0, networks={"student": "small"})
    card = json.loads(json.dumps({"teacher": whole.path, "teacher_options": whole.options}))
    assert Source.of_card(card) == Source("a", vae="v", lora=(Lora("l", scale=0.5),), size=(64, 32), shift=3.0)
    assert Source("a").options == {} and Source.of_card({"teacher": "a"}) == Source("a") and Source.of_card({}) is None


@pytest.mark.slow
def test_students_of_a_half_precision_folder_train(half: Path) -> None:
    run = suite.train(suite.METHODS[0], half, updates=2)
    assert run.method.student_updates == 2 and {p.dtype for p in run.method.student.parameters()} == {torch.float32}
