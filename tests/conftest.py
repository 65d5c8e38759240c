"""Fixtures: a random miniature pipeline on disk (seconds to make, the same layout as Stable Diffusion's) and small encoded data."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from ddil_lightning.testing.subject import WORDS, make_pipeline

if TYPE_CHECKING:
    from pair import Pair

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell starts its background jobs so: Ctrl-C would then be ignored rightly
    signal.signal(signal.SIGINT, signal.default_int_handler)


PAIRED = (
    "test_sharding",
    "test_processes",
    "test_lockstep",
    "test_metrics",
    "test_cachefolder",
    "test_several_sizes",
    "test_generation",
    "test_validation",
)
"""Files that use `pair`. They are one to those who share out the files, so that its two interpreters import everything once."""
LONG = (
    *PAIRED, "test_readme", "test_methods", "test_tail", "test_fit_cli", "test_stages", "test_bad_input", "test_configs", "test_resume",
    "test_contributing", "test_release", "test_fuzz", "test_older_runs", "test_commands", "test_assembly", "test_callbacks", "test_lcm",
    "test_checkpoint", "test_schedulers", "test_plan", "test_quantising", "test_comparing", "test_notebooks", "test_benchmarks",
    "test_flux_students", "test_zimage", "test_sana", "test_qwenimage",
)  # fmt: skip
"""Files of ten seconds and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: processes that take a file at a time then end together."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As --dist loadfile, but for the files of PAIRED."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "paired" if Path(file).stem in PAIRED else file

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Statistics of real images are kept for one run of the tests, and not in the cache of whoever runs it."""
    os.environ["DDIL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random miniature pipeline (v-prediction)."""
    return make_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny")


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one level, and attention in the middle alone: half the time of a call, for tests that train."""
    return make_pipeline(tmp_path_factory.mktemp("pipelines") / "light", unet=(32,))


@pytest.fixture(scope="session")
def tiny_eps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with eps-prediction, as Stable Diffusion 1.5."""
    return make_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-eps", "epsilon")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def sd15(tiny_eps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of Stable Diffusion 1.5: eps, PNDM, a safety checker, and no word of ours about it."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "projection_dim": 8}
    config = CLIPConfig(text_config=small, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=8)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    parts = StableDiffusionPipeline.from_pretrained(tiny_eps, safety_checker=None, feature_extractor=None, image_encoder=None).components
    parts |= {"safety_checker": StableDiffusionSafetyChecker(config), "feature_extractor": CLIPImageProcessor(size=8, crop_size=8)}
    parts["scheduler"] = PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    folder = tmp_path_factory.mktemp("sd15") / "stable-diffusion-v1-5"
    StableDiffusionPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ssd1b(xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of SSD-1B: two text encoders, eps, Euler steps, a U-Net without a middle block's attention."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(xl, feature_extractor=None, image_encoder=None)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe.scheduler = EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, "mid_block_type": None})
    folder = tmp_path_factory.mktemp("ssd1b") / "SSD-1B"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature of Stable Diffusion 3, a flow: three text encoders, pooled text, scaled and shifted latents."""
    from sd3 import make_sd3

    return make_sd3(tmp_path_factory.mktemp("sd3") / "tiny-sd3")


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature of Flux.1 dev, a flow in packed latents that is told its guidance."""
    from fluxes import make_flux

    return make_flux(tmp_path_factory.mktemp("flux") / "tiny-flux")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature of Qwen-Image, a flow in packed latents with text under a mask."""
    from qwenimages import make_qwenimage

    return make_qwenimage(tmp_path_factory.mktemp("qwen") / "tiny-qwen")


@pytest.fixture(scope="session")
def zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature of Z-Image, a flow whose text and image go through its blocks as one stream."""
    from zimages import make_zimage

    return make_zimage(tmp_path_factory.mktemp("zimage") / "tiny-zimage")


@pytest.fixture(scope="session")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature of SANA, a flow with linear attention, Gemma and an autoencoder of its own."""
    from sanas import make_sana

    return make_sana(tmp_path_factory.mktemp("sana") / "tiny-sana")


@pytest.fixture(scope="session")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature of PixArt-Sigma, a transformer that is no flow."""
    from pixarts import make_pixart

    return make_pixart(tmp_path_factory.mktemp("pixart") / "tiny-pixart")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes that run functions as one process group: `pair.run(job, ...)`."""
    from pair import Pair

    made = Pair(tmp_path_factory.mktemp("pair"))
    yield made
    made.workers.close()


TINY_RUN = """
model:
  class_path: LCM
  init_args: {{pipeline: {pipeline}, guidance: [1.0, 3.0], updates: 12, optimizer: {{lr: 1.0e-3}}, reflect: static, ema: 0.9, log_every: 1}}
data: {{batch_size: 8, prior: {{forward: 0.75, student: 0.25}}, rollouts: {{every: 4}}}}
test: {{n: 0}}
previews: {{every: 6, count: 2, teacher_steps: [4], student_steps: [2, 1]}}
checkpoints: {{every: 4}}
"""


@pytest.fixture(scope="session")
def tiny_config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of ddil-fit, tiny.yaml: twelve updates on the random pipeline."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(TINY_RUN.format(pipeline=tiny))
    return path


@pytest.fixture(scope="session")
def finished(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of it: the run folder runs/tiny/<time> below a folder of its own. Nobody may change it."""
    from ddil_lightning.commands.fitting import fit as ddil_fit

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        assert ddil_fit(["--config", str(tiny_config)]) == 0
        return (Path("runs") / "tiny" / "latest").resolve()
