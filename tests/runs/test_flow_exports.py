"""Students of flows that re-noise, called by diffusers alone: their pipelines hand a scheduler no generator, and draw by torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning.backbones import sampling
from ddil_lightning.methods import DMD2, LCM
from ddil_lightning.runs.export import export
from distilled import drawn
from suite import Entry, build
from zimages import make_zimage

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


@pytest.fixture(scope="module")
def zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zimage(tmp_path_factory.mktemp("zimage") / "p")


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
