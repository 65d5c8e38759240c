"""Releases: every format opens in somebody else's code and samples as the trainer does, or is refused; the code of the card runs."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import metadata_load
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoints
from ddil_lightning import servers
from ddil_lightning.backbones import lora, sampling
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.loading import load_pipeline
from ddil_lightning.backbones.source import Lora, Source
from ddil_lightning.evaluation.networks import weights
from ddil_lightning.methods import LCM, TCD
from ddil_lightning.runs import card as cards
from ddil_lightning.runs import export, release, replay
from ddil_lightning.runs.card import Card, licence_of, unlicensed
from ddil_lightning.runs.release import Push, Release
from ddil_lightning.training.options import Memory
from ddil_lightning.training.sharing import merged

PROMPTS = ["a handwritten one", ""]
FORMATS = release.FORMATS[:-1]
"""Of a U-Net: comfy is for transformers."""
LORA, KOHYA, SINGLE = "pytorch_lora_weights.safetensors", "lcm-tiny_4step_kohya.safetensors", "lcm-tiny_4step.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
RUN = {
    "config": {
        "data": {
            "prior": {"forward": 0.3, "student": 0.7, "teacher": 0.0},
            "batch_size": 32,
            "captions": {"class_path": "ddil_lightning.data.folders.Images", "init_args": {"path": "/home/somebody/my_images"}},
        },
        "model": {"init_args": {"optimizer": {"accumulate": 2}}},
    },
    "summary": {
        "rows": [{"name": "student@4", "nfe": 4, "metrics": {"frechet": 12.5}, "protocol": {"n": 256, "resize": "Lanczos to 256"}}],
        "machine": {"device": "NVIDIA H100", "date": "2026-11-26"},
        "seconds_training": 7200.0,
    },
}


def trained(source: Path | Source, **kwargs: Any) -> Any:
    """A method with a student of adapters, told no guidance, that is no longer its teacher."""
    fields = {"guidance": 2.0, "w_conditioned": False, "adapter": Adapter(4, alpha=6.0), **kwargs}
    method = LCM(pipeline=source if isinstance(source, Source) else str(source), **fields).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in lora.parameters(method.outgoing.network) or method.outgoing.network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return method


def latents(method: Any) -> torch.Tensor:
    """What the trainer itself samples in four steps."""
    policy, grid = method.deployment.sampler(4)
    return sampling.latents(method.backbone, policy, grid, PROMPTS, method.deployment.guidance)


def sampled(method: Any, pipe: Any) -> float:
    """How far a pipeline's latents are from the trainer's, relative to their size."""
    pipe.set_progress_bar_config(disable=True)
    return export.relative(latents(method), sampling.pipeline_latents(method.backbone.sharing(pipe), PROMPTS, 4, 1.0))


@pytest.fixture(scope="module")
def method(tiny: Path) -> Any:
    return trained(tiny, ema=0.9)  # its average is deployed


@pytest.fixture(scope="module")
def out(method: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of it in all formats."""
    folder = tmp_path_factory.mktemp("release") / "out"
    found = dict(release.release(method, Release(folder, FORMATS, "lcm-tiny", 4, PROMPTS, run=RUN)))
    assert max(found.values()) < 1e-4 and [path.name for path in found] == ["pipeline", LORA, KOHYA, SINGLE]
    return folder


def test_a_folder_has_what_was_asked_for_and_nothing_else(out: Path) -> None:
    assert sorted(p.name for p in out.iterdir()) == sorted(["README.md", "pipeline", LORA, KOHYA, SINGLE])
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".ckpt", ".pt")]


def teacher(method: Any, out: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(method.backbone.path, safety_checker=None)
    pipe.scheduler = LCMScheduler.from_pretrained(out / "pipeline" / "scheduler")
    return pipe


@pytest.mark.parametrize("name", [LORA, KOHYA])
def test_diffusers_loads_the_adapters_on_their_teacher(name: str, method: Any, out: Path) -> None:
    pipe = teacher(method, out)
    assert sampled(method, pipe) > 1e-2  # without them
    pipe.load_lora_weights(str(out), weight_name=name)
    assert sampled(method, pipe) < 1e-4


def test_peft_alone_reads_rank_and_alpha_in_the_header(method: Any, out: Path) -> None:
    with safe_open(out / LORA, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.lora_alpha"]) == (4, 6)
    unet = UNet2DConditionModel.from_pretrained(Path(method.backbone.path) / "unet")
    config = LoraConfig(**{key.removeprefix("unet."): value for key, value in said.items()})
    inject_adapter_in_model(config, unet)
    found = set_peft_model_state_dict(unet, {k.removeprefix("unet."): v for k, v in load_file(out / LORA).items()})
    assert not found.unexpected_keys
    pipe = teacher(method, out)
    pipe.unet = unet.eval()
    assert sampled(method, pipe) < 1e-4


def test_safetensors_alone_merges_kohyas_keys(method: Any, out: Path) -> None:
    """As ComfyUI and A1111 do: W + (alpha / rank) up down, found by a layer's name with underscores."""
    stored, state, whole = load_file(out / KOHYA), load_file(Path(method.backbone.path) / UNET), load_file(out / "pipeline" / UNET)
    layers = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in state if name.endswith(".weight")}
    ours = {key.partition(".")[0] for key in stored}
    assert ours <= layers.keys() and len(stored) == 3 * len(ours) > 100
    for layer in ours:
        down, up, alpha = (stored[f"{layer}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert float(alpha) == 6.0 and len(down) == 4
        delta = up.flatten(1) @ down.flatten(1) * float(alpha) / len(down)
        state[layers[layer]] = state[layers[layer]] + delta.view(state[layers[layer]].shape)
    assert all(torch.allclose(value, whole[name], atol=1e-6) for name, value in state.items())


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.S)


def drawn(code: str) -> Any:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code, names)
    return torch.from_numpy(numpy.asarray(names["image"]).copy()).float()


def test_the_code_of_the_card_draws_one_image_in_every_format(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the scheduler that it spells out: a single file and adapters come without one."""
    monkeypatch.chdir(out)
    codes = blocks((out / "README.md").read_text())
    assert [name in code for code, name in zip(codes, ("from_pretrained", LORA, KOHYA, SINGLE), strict=True)] == [True] * 4
    first, *others = [drawn(code) for code in codes]
    assert first.std() > 1 and all((first - other).abs().max() <= 1 for other in others)
    monkeypatch.chdir(out / "pipeline")
    (code,) = blocks(Path("README.md").read_text())
    assert torch.equal(drawn(code), first)


@pytest.mark.slow
def test_the_code_of_a_half_precision_card_loads_it_in_its_type(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers reads the type of a pipeline's files off for its text encoder alone, and its call then ended in an error of torch."""
    monkeypatch.chdir(tmp_path)
    list(release.release(trained(light), Release(tmp_path, ("diffusers", "lora"), "x", 4, PROMPTS, dtype=torch.bfloat16)))
    codes = blocks(Path("README.md").read_text())
    first, other = (drawn(code) for code in codes)
    assert first.std() > 1 and (first - other).abs().mean() < 4
    assert [", dtype=torch.bfloat16)" in code for code in codes] == [True, False]  # adapters: in the type of their training


def test_the_code_of_adapters_loads_their_teacher_in_the_type_of_the_training(light: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """That of their file is another question: a base in bfloat16 was read in float32, in which nobody had compared them."""
    monkeypatch.chdir(tmp_path)
    method = trained(light, memory=Memory("bfloat16"))
    list(release.release(method, Release(tmp_path, ("lora",), "x", 4, PROMPTS)))
    (code,) = blocks(Path("README.md").read_text())
    assert f'from_pretrained("{light}", dtype=torch.bfloat16)' in code and "import torch\n" in code and 'pipe.to("cuda")' in code
    assert {value.dtype for value in load_file(LORA).values()} == {torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of torch_dtype
        names: dict[str, Any] = {}
        exec(code.replace("# pipe.to", "assert pipe.to").replace('"cuda")', '"cpu")'), names)
    assert names["pipe"].unet.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_code_of_adapters_makes_the_teacher_of_all_that_it_was_made_of(tiny: Path, light: Path, tmp_path: Path) -> None:
    """With a LoRA fused into it and another autoencoder, as in training; the student's were loaded on the bare pipeline."""
    style = trained(light, adapter=Adapter(2))
    lora.write(StableDiffusionPipeline, tmp_path / "style.safetensors", style.outgoing.network, torch.float32)
    vae = tmp_path / "vae"
    DiffusionPipeline.from_pretrained(tiny, safety_checker=None, feature_extractor=None, image_encoder=None).vae.save_pretrained(vae)
    source = Source(str(light), vae=str(vae), lora=(Lora(str(tmp_path), "style.safetensors", scale=0.5),))
    method = trained(source)
    list(release.release(method, Release(tmp_path / "out", ("lora",), "x", 4, PROMPTS)))
    text = (tmp_path / "out/README.md").read_text()
    assert "at 0.5, the autoencoder `vae`" in text
    names: dict[str, Any] = {}
    (code,) = blocks(text)
    exec(code.replace('load_lora_weights(".",', f'load_lora_weights("{tmp_path / "out"}",').partition("image = ")[0], names)
    assert sampled(method, names["pipe"]) < 1e-4


@pytest.mark.slow
def test_a_single_file_is_a_teacher_like_any_other(light: Path, tmp_path: Path) -> None:
    """Its card asked for a folder."""
    file = checkpoints.single_file(load_pipeline(light), tmp_path / "one.safetensors")
    method = trained(Source(str(file), config=str(light)))
    list(release.release(method, Release(tmp_path / "out", ("diffusers", "lora"), release.default_name("lcm", str(file)), 4, PROMPTS)))
    text = (tmp_path / "out/README.md").read_text()
    assert "A 4-step student of `one`" in text and f'from_single_file("{file}", config="{light}")' in text
    names: dict[str, Any] = {}
    exec(blocks(text)[1].replace('load_lora_weights(".",', f'load_lora_weights("{tmp_path / "out"}",').partition("image = ")[0], names)
    assert sampled(method, names["pipe"]) < 1e-4


def test_a_card_says_what_the_hub_and_a_reader_need(out: Path, tiny: Path) -> None:
    about, card = metadata_load(out / "README.md"), (out / "README.md").read_text()
    assert about["base_model"] == "tiny" and about["base_model_relation"] == "finetune" and about["license"] == "other"
    assert (about["library_name"], about["pipeline_tag"]) == ("diffusers", "text-to-image") and {"ddil", "lcm", "few-step"} <= {
        *about["tags"]
    }
    said = (
        "0.3 forward, 0.7 student, 0 teacher", "999, 759, 499, 259 at 4 steps", "guidance 2 is part of the weights; 0 means the same",
        "rank 4, alpha 6; strength 1, others are not tested", "16 x 16 pixels", "Images `my_images`", "batch 32 x 2 a device",
        "NVIDIA H100", "2 hours of training", "| student@4 | 4 | 12.50 |", "n 256; resize: Lanczos to 256", "*ModelSamplingDiscrete*",
        "sampler_name lcm, scheduler sgm_uniform", "at most 10 of 1000", "strength 1.5",
    )  # fmt: skip
    assert [text for text in said if text not in card] == [] and "somebody" not in card
    assert "by ddil-lightning, 0 student updates" in card and "](http" not in card  # no page that is not there


def card(method: Any, **known: Any) -> str:
    return export.card(method, 4, **known).text()


def test_a_card_of_adapters_alone_and_one_for_the_hub(method: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text(card(method, files={"lora": LORA}, licence="mit", hub="me/few"))
    about, text = metadata_load(tmp_path / "card.md"), (tmp_path / "card.md").read_text()
    assert about["base_model_relation"] == "adapter" and "lora" in about["tags"] and about["license"] == "mit"
    assert str(tiny.parent) not in text and f'load_lora_weights("me/few", weight_name="{LORA}")' in text
    told = LCM(pipeline=str(tiny), guidance=[1.0, 4.0])
    assert "within the trained range (1 to 4)" in card(told) and "0 something that it was never trained on" in card(told)


def licences(method: Any, teacher: str, **known: Any) -> dict[str, Any]:
    """What the header of a student's card says of its licence, and of nothing else."""
    made = export.card(method, 4, **known)
    text = dataclasses.replace(made, about={**made.about, "teacher": teacher}).text()
    return {key: value for key, value in yaml.safe_load(text.split("---")[1]).items() if key.startswith("license")}


def test_the_licence_is_the_teachers(method: Any, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    (tmp_path / "unet").mkdir()
    assert licences(method, str(tmp_path)) == {"license": "other"}
    for said, found in {
        "license: creativeml-openrail-m": {"license": "creativeml-openrail-m"},
        "license: other\nlicense_name: mine\nlicense_link: LICENSE.md": {"license": "other", "license_name": "mine"},
        "license: other\nlicense_link: https://x/y": {"license": "other", "license_link": "https://x/y"},
        "license: [mit]": {"license": "other"},
        "license_name: mine": {"license": "other"},
        "license: [": {"license": "other"},
    }.items():
        (tmp_path / "README.md").write_text(f"---\n{said}\n---\n")
        assert licences(method, str(tmp_path)) == found, said
    assert licences(method, str(tmp_path), licence="mit") == {"license": "mit"}


def test_the_licence_of_a_teacher_of_the_hub_is_fetched(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers fetches no card with a pipeline: every student of Stable Diffusion went out as `other`."""
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: flux\nlicense_link: LICENSE.md\n---\n# Flux\n")
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository != "some/flux":
            raise OSError("no such repository, or no network")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert licence_of("some/flux") == {} and not asked  # HF_HUB_OFFLINE is set
    monkeypatch.setattr(weights, "no_hub", lambda: None)
    link = "https://huggingface.co/some/flux/blob/main/LICENSE.md"
    assert licences(method, "some/flux") == {"license": "other", "license_name": "flux", "license_link": link}
    assert licences(method, "nobody/nothing") == {"license": "other"}
    assert asked == [("some/flux", "README.md"), ("nobody/nothing", "README.md")]
    for said, bare in {"license: mit": False, "license: other": True, "license: other\nlicense_name: flux": False}.items():
        (tmp_path / "README.md").write_text(f"---\n{said}\n---\n")
        assert unlicensed(tmp_path / "README.md") == bare


def test_no_licence_is_waited_for_where_there_is_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The hub's client tries a refused port for half a minute, line by line, and a firewall that answers nothing for six."""
    constants, hub = huggingface_hub.constants, "http://127.0.0.1:9"
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path), "ENDPOINT": hub}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: pytest.fail("the client was asked"))
    monkeypatch.setattr(servers, "unreachable", cache(servers.unreachable.__wrapped__))  # others have asked before
    assert licence_of("some/flux") == {} and capfd.readouterr() == ("", "")


def test_a_rehearsal_asks_nobody_for_a_licence(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "licence_of", lambda teacher: pytest.fail("the teacher's card was looked for"))
    export.rehearse(method, tmp_path / "rehearsal", PROMPTS, None)
    assert "license: other" in (tmp_path / "rehearsal" / "README.md").read_text()


@pytest.mark.slow
def test_half_precision_is_checked_as_strictly(method: Any, tmp_path: Path) -> None:
    exact = [p.clone() for p in method.outgoing.network.parameters()]
    found = dict(release.release(method, Release(tmp_path / "out", FORMATS[2:], "lcm-tiny", 2, PROMPTS, torch.float16)))
    assert max(found.values()) < 1e-4 and [p.name for p in found] == [
        "lcm-tiny_2step_kohya.safetensors",
        "lcm-tiny_2step.safetensors",
    ]
    for path in found:
        stored = load_file(path)
        assert {value.dtype for key, value in stored.items() if not key.endswith(".alpha")} == {torch.float16}, path
    assert all(torch.equal(a, b) for a, b in zip(exact, method.outgoing.network.parameters(), strict=True))


@pytest.mark.slow
def test_sdxl_goes_out_for_other_tools(xl: Path, tmp_path: Path) -> None:
    """Under names of diffusers for kohya's too, which ComfyUI and A1111 read of SDXL as well."""
    found = dict(release.release(trained(xl), Release(tmp_path, FORMATS[2:], "x", 4, PROMPTS)))
    assert len(found) == 2 and max(found.values()) < 1e-4
    assert "lora_unet_up_blocks_0_attentions_0_proj_in.alpha" in load_file(tmp_path / "x_4step_kohya.safetensors")


def test_a_student_that_is_a_whole_network_goes_out_in_one_file(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = trained(light, adapter=Adapter())
    ((path, difference),) = release.release(method, Release(tmp_path, ["single-file"], "x", 4, PROMPTS, torch.bfloat16))
    assert difference < 1e-4
    pipe = StableDiffusionPipeline.from_single_file(str(path), config=str(light))
    pipe.scheduler = method.deployment.scheduler()
    with export.rounded(method.outgoing.network.parameters(), torch.bfloat16):
        assert sampled(method, pipe) < 0.05  # whose text encoder is rounded too
    (code,) = blocks((tmp_path / "README.md").read_text())
    assert f'from_single_file("x_4step.safetensors", config="{light}", dtype=torch.bfloat16)' in code and "height=16, width=16" in code
    monkeypatch.chdir(tmp_path)
    assert drawn(code).shape == (16, 16, 3)


def test_a_single_file_alone_is_read_with_the_settings_of_its_architecture(tiny: Path, light: Path) -> None:
    """Without them diffusers takes every U-Net with a text width of 1024 for Stable Diffusion 2.1 at 768, and SSD-1B for SDXL."""
    files = {"single-file": SINGLE}

    def read(source: Source, **known: Any) -> list[str]:
        return re.findall(rf'from_single_file\("{SINGLE}", (.*)\)', card(trained(source, adapter=Adapter()), files=files, **known))

    smaller = {"student": str(light)}
    assert read(Source(str(tiny), networks=smaller)) == [f'config="{light}"']
    assert read(Source(str(tiny), networks={"student": str(light / "unet")})) == read(Source(str(tiny), networks={"student": {}})) == []
    assert read(Source(str(tiny), vae=str(light))) == [f'config="{tiny}", vae=vae']
    (said,) = read(Source("builtin"))
    assert said == 'config=str(files("ddil_lightning") / "miniature" / "weights" / "shapes")'


def test_a_merged_network_stays_off_the_device(light: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = trained(light)
    monkeypatch.setattr(type(method), "device", torch.device("meta"))
    with merged(method):
        assert {p.device.type for p in method.deployment.network.parameters()} == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True])
def test_a_base_in_half_precision_needs_no_second_network_in_float32(told: bool, light: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Weights are held against each other one by one, and both samplers have the answers of the network in training."""
    method, asked = trained(light, memory=Memory("bfloat16"), w_conditioned=told), []

    def watched(deployment: Any, made: Any, *args: Any) -> Any:
        asked.append((deployment.network is method.outgoing.network, made.network().model.dtype))
        return replay.replayed(deployment, made, *args)

    monkeypatch.setattr(export, "replayed", watched)
    export.rehearse(method, tmp_path / "rehearsal", PROMPTS, None)
    formats = FORMATS[:1] if told else FORMATS
    found = dict(release.release(method, Release(tmp_path, formats, "x", 4, PROMPTS)))
    assert max(found.values()) < 1e-5 and asked == [(True, torch.bfloat16)] * (1 + len(formats))
    stored, mine = load_file(tmp_path / "pipeline" / UNET), method.backbone.merged(method.outgoing.network).model.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in stored.items())


@pytest.mark.slow
def test_a_replay_tells_another_time_guidance_or_text(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = LCM(pipeline=str(tiny), guidance=2.0).eval()
    deployment, made = method.deployment, copy.copy(method.backbone)
    made.pipe = copy.copy(method.backbone.pipe)
    made.stands_in(method.outgoing.network)
    made.pipe.scheduler = deployment.scheduler()
    mine, theirs = replay.replayed(deployment, made, PROMPTS, 4)
    assert export.relative(mine, theirs) < 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(type(deployment), "guidance_scale", 3.0)
        assert replay.replayed(deployment, made, PROMPTS, 4) == "its network is told another timestep_cond"
    made.pipe.scheduler = LCMScheduler.from_config(made.pipe.scheduler.config, original_inference_steps=25)
    assert replay.replayed(deployment, made, PROMPTS, 4) == "its network is told another timestep"
    made.pipe.scheduler = deployment.scheduler()
    monkeypatch.setattr(
        type(made),
        "encode_text",
        lambda self, prompts, **kwargs: method.backbone.network().context(self.pipe, prompts[::-1], self.device, 16),
    )
    assert replay.replayed(deployment, made, PROMPTS, 4) == "its network is told another encoder_hidden_states"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("kohya", "bfloat16"),
        pytest.param("single-file", "float32", marks=pytest.mark.slow),
        pytest.param("kohya", "float32", marks=pytest.mark.slow),
        pytest.param("single-file", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_what_does_not_sample_as_trained_gets_another_name(kind: str, dtype: Any, light: Path, tmp_path: Path, monkeypatch: Any) -> None:
    method = trained(light, memory=Memory(dtype))
    wrong = LCMScheduler.from_config(method.deployment.scheduler().config, original_inference_steps=25)
    monkeypatch.setattr(type(method.backbone), "scheduler", lambda *args: wrong)
    given = Release(tmp_path, [kind], "x", 4, PROMPTS)
    with pytest.raises(export.NotAsTrained, match=r"does not sample as the trainer does.*; it is kept as .*-unverified.safetensors"):
        list(release.release(method, given))
    file = Path(given.file(kind))
    assert [p.name for p in tmp_path.iterdir()] == [f"{file.stem}-unverified.safetensors"]


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_weights_that_are_read_otherwise_are_found(dtype: Any, light: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Also those that no latent depends on, and in half precision by the weights themselves."""
    method, checkpoint = trained(light, memory=Memory(dtype)), release.ldm.checkpoint
    key = "first_stage_model.decoder.conv_out.bias"

    def other(*args: Any) -> dict[str, Any]:
        found = checkpoint(*args)
        return {**found, key: found[key] + 1}

    monkeypatch.setattr(release.ldm, "checkpoint", other)
    with pytest.raises(export.NotAsTrained, match=r"the vae in x_4step.safetensors is not as it was written: decoder.conv_out.bias"):
        list(release.release(method, Release(tmp_path, ["single-file"], "x", 4, PROMPTS)))
    write = release.lora.write_kohya

    def rescaled(file: Path, *args: Any) -> None:
        write(file, *args)
        save_file({k: v * 2 if k.endswith(".alpha") else v for k, v in load_file(file).items()}, file)

    monkeypatch.setattr(release.lora, "write_kohya", rescaled)
    with pytest.raises(export.NotAsTrained, match=r"the adapter of .* is another one when diffusers reads the file"):
        list(release.release(method, Release(tmp_path, ["kohya"], "x", 4, PROMPTS)))


@pytest.mark.parametrize(
    ("fields", "formats", "said"),
    [
        ({"adapter": Adapter()}, ["lora"], "has no adapters, which --format lora, kohya and comfy hold: choose diffusers or single-file"),
        ({"w_conditioned": True}, ["kohya"], "told its guidance by an embedding that is trained whole.*choose --format diffusers"),
        ({"adapter": Adapter(4, full=("conv_out",))}, ["lora"], r"trained whole \(conv_out, by adapter.full\).*diffusers or single-file"),
        ({"w_conditioned": True, "adapter": Adapter()}, ["single-file"], "no place for the embedding by which this student is told"),
    ],
)
def test_a_student_that_a_format_cannot_hold_is_refused_before_anything_is_written(
    fields: Any, formats: list[str], said: str, tiny: Path, tmp_path: Path
) -> None:
    method = LCM(pipeline=str(tiny), **{"guidance": 2.0, "w_conditioned": False, "adapter": Adapter(4), **fields})
    with pytest.raises(ValueError, match=said) as refused:
        list(release.release(method, Release(tmp_path / "out", ["diffusers", *formats], "x", 4, PROMPTS)))
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_names_are_those_of_config_and_teacher(tiny: Path) -> None:
    assert release.default_name("lcm_lora", str(tiny)) == "lcm_lora-tiny"
    assert release.default_name("my run", "stabilityai/stable-diffusion-xl-base-1.0") == "my_run-stable_diffusion_xl_base_1.0"
    assert release.default_name(None, "builtin") == "student-shapes"


# To the hub --------------------------------------------------------------------------------------------------------------------------

TOKEN = "hf_thisIsNobodysToken"


class Hub:
    """The hub's client as far as it is asked, with what it was asked."""

    private: bool | None = None  # of the repository, None where there is none
    fails: Exception | None = None

    def __init__(self, token: str) -> None:
        assert token == TOKEN
        self.calls: list[Any] = []
        type(self).last = self

    def whoami(self) -> None:
        if self.fails is not None:
            raise self.fails

    def repo_info(self, name: str) -> Any:
        if self.private is None:
            raise huggingface_hub.errors.RepositoryNotFoundError("none", response=SimpleNamespace(headers={}, request=None))
        return self

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
        self.calls.append((name, private, exist_ok))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id: str, folder_path: str, path_in_repo: str, ignore_patterns: list[str]) -> None:
        self.calls.append((Path(folder_path).name, path_in_repo, ignore_patterns))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """No connection is made: the client is another one, and offline is off."""
    made = type("Made", (Hub,), {})
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made


def test_a_release_goes_to_a_private_repository_with_the_pipeline_on_top(light: Path, hub: Any, tmp_path: Path) -> None:
    method = trained(light)
    given = Release(tmp_path / "out", ["diffusers", "lora"], "x", 4, PROMPTS, hub="me/few")
    push = Push("me/few")
    list(release.release(method, given))
    assert push.upload(given) == "https://hub/me/few"
    assert hub.last.calls == [("me/few", True, True), ("pipeline", ".", ["README.md"]), ("out", ".", ["pipeline/**"])]
    texts = [file.read_text() for file in given.out.rglob("*") if file.suffix in (".json", ".md")]
    assert len(texts) > 6 and not [text for text in texts if TOKEN in text or str(Path(method.backbone.path).parent) in text]
    DiffusionPipeline.from_pretrained(given.out / "pipeline")  # it still is one
    Push("me/few", public=True).upload(given)
    assert hub.last.calls[0] == ("me/few", False, True)


def test_what_cannot_be_pushed_is_known_before_anything_is_computed(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--push me is no name|--push me names no owner"):
        Push("me")
    with pytest.raises(ValueError, match="--push a//b is no name of a repository, such as owner/name"):
        Push("a//b")
    hub.private = False
    with pytest.raises(ValueError, match="everybody can read this repository; say --public"):
        Push("me/few")
    assert Push("me/few", public=True).name == "me/few"
    hub.fails = RuntimeError(f"401: {TOKEN}\nis not known")
    with pytest.raises(ValueError, match=r"--push me/few failed \(RuntimeError: 401: \*\*\* is not known\)") as refused:
        Push("me/few")
    assert refused.value.__cause__ is None and refused.value.__suppress_context__  # nor in a traceback
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="needs a token of yours that may write: set HF_TOKEN"):
        Push("me/few")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        Push("me/few")


def test_a_card_says_what_comfyui_leaves_of_tcd(light: Path) -> None:
    """It has no TCD: its ddim is TCD without noise, and the strength that the student was measured at is lost."""
    lost = "trained and measured, with new noise of strength 0.3 (TCDScheduler):\nddim takes the same steps without any"
    fields = {"guidance": 2.0, "w_conditioned": False, "adapter": Adapter(2)}
    for gamma, told in ((0.3, True), (0.0, False)):
        text = card(TCD(pipeline=str(light), gamma=gamma, **fields), files={"lora": LORA})
        assert (lost in text) == told and "sampler_name ddim" in text


def test_a_card_is_a_value(method: Any) -> None:
    """The scheduler that it spells out has every option that is not its class's own."""
    made = export.card(method, 4)
    assert isinstance(made, Card) and made.adapter == (4, 6.0)
    (said,) = re.findall(r"LCMScheduler\(.*\)", card(method, files={"lora": LORA}))
    again = eval(said)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {k: v for k, v in made.scheduler.config.items() if k[0] != "_"}
