"""A pipeline's own sampler as a policy and its nodes: the latents are those of the pipeline, called as its users call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.samplers import check_alike, context_of, grid_of, named, policy_of, scale_of, transition_of
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.transitions import TCD
from ddil_lightning.records import END
from suite import METHODS, backbone, build

PROMPTS = ["a handwritten one", "a handwritten two"]


def latents(pipe: Pipeline, steps: int, g: float) -> torch.Tensor:
    x_T, shape = sampling.noise(2, pipe.latent_shape, 3), sampling.renoising(2, 3)
    return policy_of(pipe, g).sample(x_T, grid_of(pipe, steps), context_of(pipe, PROMPTS, g), shape)


@pytest.mark.parametrize("g", [1.0, 3.0])
@pytest.mark.parametrize("name", ["lcm", "tcd", "ddim", "euler"])
def test_a_sampler_by_name_is_that_of_diffusers(name: str, g: float, tiny: Path) -> None:
    pipe = named(backbone(tiny), name)
    theirs = sampling.pipeline_latents(pipe, PROMPTS, 4, g, seed=3)
    # Euler starts from its largest sigma, not from sqrt(sigma^2 + 1): 0.2 % less noise than every other sampler.
    close = 5e-3 if name == "euler" else 2e-5
    assert float((latents(pipe, 4, g) - theirs).abs().max()) < close * float(theirs.abs().max())
    assert grid_of(pipe, 4).times.tolist()[0] == 999 and grid_of(pipe, 4).times.tolist()[-1] == (0 if name == "tcd" else END)


def test_tcd_has_the_noise_of_its_authors_or_what_is_asked(tiny: Path) -> None:
    """diffusers' pipelines hand its scheduler an eta of 0 in the place of its own 0.3, by a name as in a folder that has it."""
    from diffusers import TCDScheduler

    plain = backbone(tiny)
    own = plain.stepping(TCDScheduler.from_config(plain.pipe.scheduler.config, clip_sample=False))
    asked = [named(plain, "tcd", eta) for eta in (0.0, 0.3, 0.7)]
    found = {float(pipe.called_with["eta"]): sampling.pipeline_latents(pipe, PROMPTS, 4, 2.0, seed=3) for pipe in asked}
    for pipe in (*asked, own, named(plain, "tcd")):
        eta = float(pipe.called_with["eta"])
        assert transition_of(pipe) == TCD(eta)
        assert float((latents(pipe, 4, 2.0) - found[eta]).abs().max()) < 2e-5 * float(found[eta].abs().max())
    assert own.called_with == named(plain, "tcd").called_with == {"eta": 0.3} and named(plain, "lcm").called_with == {}
    assert torch.equal(sampling.pipeline_latents(own, PROMPTS, 4, 2.0, seed=3), found[0.3])
    assert float((found[0.0] - found[0.3]).abs().max()) > 0.05 * float(found[0.3].abs().max())


def test_other_settings_of_ddim_and_a_solver_of_first_order(tiny: Path) -> None:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    config = backbone(tiny).pipe.scheduler.config
    leading = DDIMScheduler.from_config(config, timestep_spacing="leading", set_alpha_to_one=False)
    first = DPMSolverMultistepScheduler.from_config(config, solver_order=1, algorithm_type="dpmsolver++", timestep_spacing="linspace")
    for scheduler, times in ((leading, [751, 501, 251, 1, 0]), (first, [999, 749, 500, 250, END])):
        pipe = backbone(tiny).stepping(scheduler)
        assert grid_of(pipe, 4).times.tolist() == times
        theirs = sampling.pipeline_latents(pipe, PROMPTS, 4, 2.0, seed=3)
        assert float((latents(pipe, 4, 2.0) - theirs).abs().max()) < 2e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("which", [0, 4], ids=["lcm", "dmd2"])
def test_the_scheduler_of_a_student_is_read_as_its_deployment(which: int, tiny: Path) -> None:
    method = build(METHODS[which], tiny)
    deployment = method.deployment
    pipe = backbone(tiny).stepping(deployment.scheduler())
    assert grid_of(pipe, 2).times.tolist() == deployment.grid(2).times.tolist()
    assert policy_of(pipe, 1.0).transition == deployment.policy.transition


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("PNDMScheduler", {}, "PNDMScheduler of .* is no sampler of a student whose nodes are known: give it another one by name"),
        ("DDIMScheduler", {"clip_sample": True}, "has clip_sample set"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "has use_karras_sigmas set"),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, "steps down by 250 and its nodes are .999, 666, 333, 0.: set its"),
        ("LCMScheduler", {"original_inference_steps": 2}, "cannot take 4 steps"),
    ],
)
def test_a_sampler_that_is_not_known_is_refused(kind: str, options: dict[str, Any], why: str, tiny: Path) -> None:
    import diffusers

    pipe = backbone(tiny)
    scheduler = getattr(diffusers, kind).from_config({**pipe.pipe.scheduler.config, **options})
    with pytest.raises(ValueError, match=why):
        grid_of(pipe.stepping(scheduler), 4)


def test_pipelines_of_other_latents_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = backbone(tiny), Pipeline(str(tiny))
    check_alike(one, other)
    monkeypatch.setattr(other, "latent_shape", (4, 4, 4))
    with pytest.raises(
        ValueError, match=r"has latents \[4, 8, 8\] and .* \[4, 4, 4\]: give a student and a teacher of the same latent space"
    ):
        check_alike(one, other)
    monkeypatch.undo()
    other.schedule = type(one.schedule).scaled_linear(end=0.02)
    with pytest.raises(ValueError, match="other noise at the same times"):
        check_alike(one, other)


def test_the_guidance_of_a_student(tiny: Path) -> None:
    """As it is given, as its card says, and without a card none."""
    pipe = backbone(tiny)
    assert (scale_of(pipe, 2.5, 7.0), scale_of(pipe, None, 7.0)) == (2.5, 1.0)
    assert context_of(pipe, PROMPTS, 1.0).w is None and context_of(pipe, PROMPTS, 3.0).w is not None
    assert isinstance(grid_of(pipe, 4), Grid)
