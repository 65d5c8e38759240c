"""Every scheduler that Stable Diffusion repositories ship: a student's own is made from the forward process and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from published import SCHEDULERS

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.loading import load_pipeline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.schedulers import PROCESS, process, student
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import TCD, Posterior, ddim, renoise
from ddil_lightning.methods import DMD2, LCM, PD
from ddil_lightning.runs import export
from ddil_lightning.training.plan import Stage

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "prediction_type": "v_prediction"}
DPM, SINGLE, EULER = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler"
SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {  # the class and what its configuration says besides Stable Diffusion's betas
    "SD1.5": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "SD2.1": ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    "DDIM, clipped": ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.5}),
    "DDIM, thresholded": ("DDIMScheduler", {"thresholding": True, "sample_max_value": 0.5}),
    "DDIM, trailing": ("DDIMScheduler", {"timestep_spacing": "trailing", "steps_offset": 0}),
    "SDXL": (EULER, {"timestep_spacing": "leading", "interpolation_type": "linear", "sample_max_value": 1.0}),
    "SDXL-Turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "SDXL-Lightning": (EULER, {"timestep_spacing": "trailing"}),
    "Euler, Karras": (EULER, {"use_karras_sigmas": True}),
    "Euler, exponential": (EULER, {"use_exponential_sigmas": True}),
    "Euler, beta": (EULER, {"use_beta_sigmas": True}),
    "Euler, own sigmas": (EULER, {"sigma_min": 0.03, "sigma_max": 14.0, "final_sigmas_type": "sigma_min"}),
    "Euler, continuous": (EULER, {"timestep_type": "continuous"}),
    "DPM++ 2M": (DPM, {}),
    "DPM++ 2M Karras": (DPM, {"use_karras_sigmas": True}),
    "DPM++ 2M exponential": (DPM, {"use_exponential_sigmas": True}),
    "DPM++ 2M beta": (DPM, {"use_beta_sigmas": True}),
    "DPM++ 2M Lu": (DPM, {"use_lu_lambdas": True, "euler_at_final": True}),
    "DPM++ 2M flow": (DPM, {"use_flow_sigmas": True, "flow_shift": 3.0}),
    "DPM++ 2M SDE Karras": (DPM, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    "DPM++ 3M": (DPM, {"solver_order": 3, "solver_type": "heun", "lower_order_final": False, "lambda_min_clipped": -5.1}),
    "DPM++ thresholded": (DPM, {"thresholding": True, "variance_type": "learned_range", "timestep_spacing": "leading"}),
    "DPM": (DPM, {"algorithm_type": "dpmsolver++", "steps_offset": 0, "timestep_spacing": "trailing"}),
    "DPM++ S Karras": (SINGLE, {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {"solver_type": "bh2", "use_karras_sigmas": True, "predict_x0": True}),
    "DEIS": ("DEISMultistepScheduler", {"solver_order": 2}),
    "Heun Karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2 a": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    "LMS": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "DDPM": ("DDPMScheduler", {"clip_sample": True, "variance_type": "fixed_small"}),
    "LCM": ("LCMScheduler", {"original_inference_steps": 100, "timestep_scaling": 5.0}),
    "TCD": ("TCDScheduler", {"original_inference_steps": 50}),
    "SA": ("SASolverScheduler", {}),
    "linear": ("DDIMScheduler", {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}),
    "cosine": ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    "own betas": (DPM, {"trained_betas": torch.linspace(0.001, 0.02, 1000).tolist(), "use_karras_sigmas": True}),
    "zero SNR": (EULER, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    "zero SNR, DDIM": ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
}
OTHER_PROCESS = ("linear", "cosine", "own betas", "zero SNR", "zero SNR, DDIM")
PLAN = [Stage(steps=4, updates=1), Stage(steps=2, updates=1)]
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lcm": (LCM, {"guidance": 2.0, "w_conditioned": False}),
    "dmd2": (DMD2, {"guidance": 2.0}),
    "pd": (PD, {"guidance": 2.0, "w_conditioned": False, "stages": PLAN, "teacher_steps": 8}),
    "pd-linspace": (PD, {"guidance": 2.0, "w_conditioned": False, "stages": PLAN, "teacher_steps": 8, "rule": "linspace"}),
}
PROMPTS = ["a handwritten one", "a small red circle"]


def teacher(name: str, tiny: Path, folder: Path) -> Pipeline:
    """The tiny pipeline with one of these schedulers, through its folder."""
    kind, own = SHIPPED[name]
    known = getattr(diffusers, kind)
    shutil.copytree(tiny, folder)
    shutil.rmtree(folder / "scheduler")
    known.from_config({**SD, **own}).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
    return Pipeline(str(folder))


def made(method: str, backbone: Pipeline) -> Any:
    cls, kwargs = METHODS[method]
    torch.manual_seed(0)
    built = cls(pipeline=backbone, **kwargs).eval()
    with torch.no_grad():
        for p in built.deployment.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return built


def said(scheduler: Any) -> dict[str, Any]:
    """The class and the whole configuration of a scheduler, less the list of what was left to its defaults."""
    return {"class": type(scheduler), **{k: v for k, v in scheduler.config.items() if k != "_use_default_values"}}


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the methods' schedulers are on a plain teacher, which test_export and test_dmd2_turns compare by samples."""
    backbone = teacher("DPM++ 2M", tiny, tmp_path_factory.mktemp("plain") / "p")
    return {name: said(made(name, backbone).deployment.scheduler()) for name in METHODS}


OWN_PROCESS = [name for name in SHIPPED if name not in OTHER_PROCESS]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if k % 9 else ()) for k, n in enumerate(OWN_PROCESS)])
def test_a_teachers_ways_to_sample_are_not_the_students(name: str, tiny: Path, tmp_path: Path, plain: dict[str, Any]) -> None:
    backbone = teacher(name, tiny, tmp_path / "p")
    assert torch.equal(backbone.schedule.alphas, NoiseSchedule.scaled_linear().alphas)
    for method, expected in plain.items():
        assert said(made(method, backbone).deployment.scheduler()) == expected, method


@pytest.mark.parametrize("method", ["lcm", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "lcm")])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if k % 2 else ()) for k, n in enumerate(OTHER_PROCESS)])
def test_a_forward_process_of_its_own_survives(name: str, method: str, tiny: Path, tmp_path: Path) -> None:
    """Compared by samples, through the folder; the flags of the process are those of the teacher."""
    built = made(method, teacher(name, tiny, tmp_path / "p"))
    config, given = built.deployment.scheduler().config, built.backbone.pipe.scheduler.config
    assert all(config[key] == given[key] for key in PROCESS if key in given)
    export.deliver(built, tmp_path / "out", PROMPTS, built.deployment.steps[0])


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "Euler, Karras"])
def test_pd_by_linspace_from_a_karras_teacher(name: str, tiny: Path, tmp_path: Path) -> None:
    """This was refused after the training: latents differed by 0.67."""
    built = made("pd-linspace", teacher(name, tiny, tmp_path / "p"))
    assert export.deliver(built, tmp_path / "out", PROMPTS, 4) < 1e-4
    assert built.deployment.scheduler().config.use_karras_sigmas is False


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_scheduler_without_betas_is_refused(kind: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHIPPED, kind, (kind, {}))  # with betas that an earlier class has left in its configuration
    with pytest.raises(ValueError, match="has the scheduler .*, and its UNet is no flow|has neither betas nor a flow") as error:
        teacher(kind, tiny, tmp_path / "p")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_forward_process_is_diffusers(name: str) -> None:
    """diffusers keeps 2^-24 of a variance where there is none left at zero terminal SNR."""
    kind, own = SHIPPED[name]
    scheduler = getattr(diffusers, kind).from_config({**SD, **own})
    found = NoiseSchedule.from_scheduler(scheduler).alphas[:-1].square()
    torch.testing.assert_close(found, scheduler.alphas_cumprod.double(), rtol=2e-5, atol=1e-7)


UNETS: Any = SimpleNamespace(flow=False)


@pytest.mark.parametrize("config", SCHEDULERS.values(), ids=SCHEDULERS)
def test_published_files_are_read_as_their_class_reads_them(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    schedule, predicts, _ = process(scheduler, "p", UNETS, (4, 8, 8))
    torch.testing.assert_close(schedule.alphas[:-1].square(), scheduler.alphas_cumprod.double(), rtol=2e-5, atol=1e-7)
    assert predicts == ("v" if config.get("prediction_type") == "v_prediction" else "eps")
    assert (float(schedule.alphas[-2]) == 0) == bool(config.get("rescale_betas_zero_snr"))


@pytest.mark.parametrize("kind", ["PNDMScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler", "LMSDiscreteScheduler"])
def test_a_class_that_does_not_rescale_has_no_zero_snr(kind: str) -> None:
    """Though the file that it was made from, by a class that does, says so; the student's scheduler is as the teacher's."""
    config = {**SCHEDULERS["SD2.1, zero SNR"], "_class_name": kind}
    scheduler = getattr(diffusers, kind).from_config(config)
    assert scheduler.config["rescale_betas_zero_snr"]
    schedule, *_ = process(scheduler, "p", UNETS, (4, 8, 8))
    torch.testing.assert_close(schedule.alphas[:-1].square(), scheduler.alphas_cumprod.double(), rtol=2e-5, atol=1e-7)
    made = student(scheduler, ddim, "v_prediction", "trailing", 4)
    torch.testing.assert_close(made.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("transition", [ddim, renoise, TCD(), Posterior()], ids=str)
@pytest.mark.parametrize("name", ["SD2.1", "own betas", "zero SNR", "zero SNR, DDIM"])
def test_the_first_times_of_a_forward_process_are_its_own(name: str, transition: Any) -> None:
    """Of a student that starts below the last: betas that were rescaled to zero SNR are not rescaled once more."""
    kind, own = SHIPPED[name]
    scheduler = getattr(diffusers, kind).from_config({**SD, **own})
    made = student(scheduler, transition, "v_prediction", "trailing", 4, times=400)
    torch.testing.assert_close(made.alphas_cumprod, scheduler.alphas_cumprod[:400])


def test_eps_at_zero_terminal_snr_is_refused() -> None:
    scheduler = diffusers.DDIMScheduler.from_config({**SCHEDULERS["SD2.1, zero SNR"], "prediction_type": "epsilon"})
    with pytest.raises(
        ValueError, match=r"^the pipeline p predicts epsilon and has zero terminal SNR .* or rescale_betas_zero_snr to false$"
    ):
        process(scheduler, "p", UNETS, (4, 8, 8))


OTHERS = ("SDXL-Turbo", "DPM++ 2M Karras", "UniPC", "DEIS", "LMS", "zero SNR")


@pytest.mark.parametrize("name", ["SD1.5", "SDXL", "Heun Karras", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_teachers_own_steps_are_sampled(name: str, tiny: Path, tmp_path: Path) -> None:
    """A row of a table is what the pipeline itself draws from the same noise, with as many evaluations as its scheduler needs."""
    backbone = teacher(name, tiny, tmp_path / "p")
    assert type(backbone.pipe.scheduler).__name__ == SHIPPED[name][0]
    with backbone.counting() as calls:
        made = sampling.pipeline_latents(backbone, PROMPTS, 4, 2.0, seed=5)
    steps = len(backbone.pipe.scheduler.timesteps)
    assert calls[0] == 2 * len(PROMPTS) * steps and steps >= 4 and made.isfinite().all()
    noise = sampling.noise(2, backbone.latent_shape, 5)
    kwargs: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent", "latents": noise}
    fresh = load_pipeline(tmp_path / "p")
    torch.testing.assert_close(fresh(PROMPTS, generator=sampling.renoising(2, 5), **kwargs).images, made, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [61, 103, 121, 206])
def test_a_step_count_that_diffusers_rounds_to_one_more_is_refused(steps: int) -> None:
    """Its arange of trailing times has one at -1 besides, at which no student is trained."""
    teacher = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    with pytest.raises(ValueError, match=rf"not stand on the {steps} trailing nodes below 1000 .*it makes {steps + 1}.*: take another"):
        student(teacher, ddim, "v_prediction", "trailing", steps)
    for fine in (3, 60, 62):
        made = student(teacher, ddim, "v_prediction", "trailing", fine)
        made.set_timesteps(fine)
        assert made.timesteps.tolist() == Grid.named("trailing", fine).nodes.tolist()
