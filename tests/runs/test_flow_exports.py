"""Students of flows that re-noise, called by diffusers alone: their pipelines hand a scheduler no generator, and draw by torch's own."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.methods import DMD2, LCM
from ddil_lightning.runs.export import export, relative
from ddil_lightning.runs.replay import replayed
from distilled import drawn
from sd3 import make_sd3, rescheduled
from suite import LORA, Entry, build

PROMPTS = ["a handwritten one", "a small red circle"]
SIZE = (16, 24)
EVEN: dict[str, Any] = {"solver_steps": 40, "rollouts": (4,)}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {"lcm": (LCM, EVEN), "dmd2": (DMD2, {})}
CALLS: dict[str, dict[str, float]] = {
    "sd3": {"guidance_scale": 1.0},
    "flux": {"guidance_scale": 3.5},
    "qwen": {"true_cfg_scale": 1.0},
    "zimage": {"guidance_scale": 0.0},
}
"""How a student's card says that each is called: Flux is told the guidance, of the others it is a part of the weights."""


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", CALLS)
@torch.no_grad()
def test_a_plain_call_makes_the_trainers_samples(family: str, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """From the same numbers, which Flux and Qwen-Image draw for packed latents, at another size than the trained one."""
    from diffusers import DiffusionPipeline

    kind, own = METHODS[name]
    told = {"w_conditioned": family == "flux"} if kind is LCM else {}
    method = build(Entry(name, kind, {**own, **told, "guidance": 3.5}), request.getfixturevalue(family))
    for p in method.student.weights():  # another network than the teacher's
        p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    pipe = DiffusionPipeline.from_pretrained(export(method, tmp_path / "student", 4))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == "FlowMatchLCMScheduler"
    network, (height, width) = method.backbone.network(), SIZE
    x_T = sampling.noise(2, (network.latent_shape[0], height // pipe.vae_scale_factor, width // pipe.vae_scale_factor), 0)
    torch.manual_seed(0)
    call = {"num_inference_steps": 4, "height": height, "width": width, "latents": network.packed(x_T), "output_type": "latent"}
    theirs = network.unpacked(pipe(list(PROMPTS), **call, **CALLS[family]).images, x_T.shape[1:])
    c = method.backbone.encode_text(PROMPTS)
    mine = drawn(method, x_T, c.guided(2.5) if method.deployment.told else c)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# Adapters on half precision, whose network answers both samplers -------------------------------------------------------------------------


def lean(folder: str | Path, steps: int) -> Any:
    """LCM as adapters on a base in bfloat16, made for `steps`, another network than its teacher's."""
    own = {"solver_steps": 40, "rollouts": (steps,), "w_conditioned": False, "guidance": 3.5, "adapter": LORA}
    method = build(Entry("lcm", LCM, own), Path(folder), pipeline=Pipeline(str(folder), dtype=torch.bfloat16))
    with torch.no_grad():
        for p in method.student.weights():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return method


def beside(method: Any, steps: int) -> Pipeline:
    """The pipeline with the student's scheduler, as an export that is read again has it; its network is not asked."""
    made = copy.copy(method.backbone)
    made.pipe = copy.copy(made.pipe)
    made.pipe.scheduler = method.deployment.made_scheduler(steps)
    return made


@pytest.mark.parametrize("made", [pytest.param("builtin/flow", marks=pytest.mark.slow), "sd3"])
@torch.no_grad()
def test_a_text_that_is_told_in_fewer_tokens_is_the_same(made: str, tmp_path: Path) -> None:
    """Without T5 the student's network is told one of the 256 zeros that Stable Diffusion 3's pipeline tells it, and how many there are."""
    method = lean(make_sd3(tmp_path / "sd3", t5=False) if made == "sd3" else made, 4)
    mine, theirs = replayed(method.deployment, beside(method, 4), PROMPTS, 4)
    assert relative(mine, theirs) < 1e-5


@pytest.mark.parametrize("shift", [3.0, 6.0])
@torch.no_grad()
def test_a_time_may_be_off_by_roundings_of_the_whole_range(shift: float, zimage: Path, tmp_path: Path) -> None:
    """Z-Image is told 1 - sigma, of which one near pure noise is no more exact than sigma is. A node of one time earlier is another."""
    folder = rescheduled(zimage, tmp_path / "shifted", shift=shift)
    for steps in (5, 10):
        method = lean(folder, steps)
        made, before = beside(method, steps), method.deployment.grid(steps).nodes[1] + 1
        mine, theirs = replayed(method.deployment, made, PROMPTS, steps)
        assert relative(mine, theirs) < 1e-5
        made.pipe.scheduler.set_timesteps = moved(made.pipe.scheduler, 1000 * method.backbone.schedule.sigmas[before])
        assert replayed(method.deployment, made, PROMPTS, steps) == "its network is told another t"


def moved(scheduler: Any, to: Any) -> Any:
    """A scheduler's set_timesteps whose second node is told as another time."""
    walk = scheduler.set_timesteps

    @functools.wraps(walk)
    def walked(*args: Any, **kwargs: Any) -> None:
        walk(*args, **kwargs)
        scheduler.timesteps[1] = to

    return walked
