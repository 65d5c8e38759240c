"""Student out: the exported folder samples as the trainer does, says what it is, and is there whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.loading import load_pipeline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.runs import export
from ddil_lightning.training.options import Memory
from suite import METHODS, build

PROMPTS = ["a handwritten one", "", "a small red circle"]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def student(tiny: Path, which: int = 0, **kwargs: Any) -> Any:
    """A method whose student (and its average) is no longer its teacher; every weight counts, that of w too."""
    method = build(METHODS[which], tiny, **{"ema": 0.0, **kwargs}).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for p in method.deployment.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return method


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["w-conditioned", "fixed guidance"])
def test_a_folder_samples_as_the_trainer_does(which: int, tiny: Path, tmp_path: Path) -> None:
    method, folder = student(tiny, which), tmp_path / "out"
    assert export.deliver(method, folder, PROMPTS, 4) < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    pipe = DiffusionPipeline.from_pretrained(folder)  # as somebody does who has only diffusers
    pipe.set_progress_bar_config(disable=True)
    about = json.loads((folder / "ddil.json").read_text())
    for steps in (1, 2, 4):
        assert export.verify(method, folder, PROMPTS, steps) < 1e-4
        policy, grid = method.deployment.sampler(steps)
        mine = sampling.latents(method.backbone, policy, grid, PROMPTS, method.eval_guidance)
        theirs = sampling.pipeline_latents(method.backbone.sharing(pipe), PROMPTS, steps, about["guidance_scale"])
        assert export.relative(mine, theirs) < 1e-4
    assert about["timesteps"] == pipe.scheduler.timesteps.tolist() == grid.nodes.tolist()
    if which == 0:  # told another w, it answers something else
        assert export.relative(mine, sampling.pipeline_latents(method.backbone.sharing(pipe), PROMPTS, 4, 1.5)) > 1e-2


def test_a_folder_says_what_it_is(tiny: Path, tmp_path: Path) -> None:
    method, fixed = student(tiny, guidance=[1.0, 4.0]), student(tiny, 1)
    method.student_updates = 123
    export.export(method, tmp_path / "a", steps=3)
    assert json.loads((tmp_path / "a" / "ddil.json").read_text()) == {
        "method": "LCM", "student_updates": 123, "steps": 3, "made_for": [4, 2, 1], "guidance": 2.0,
        "guidance_scale": 2.0, "guidance_range": [1.0, 4.0], "timesteps": [999, 679, 339], "dataset": "digits", "teacher": str(tiny),
    }  # fmt: skip
    card = (tmp_path / "a" / "README.md").read_text()
    assert "A 3-step student" in card and "123 student updates" in card and "guidance_scale=2)" in card and "999, 679, 339" in card
    again = Pipeline(str(tmp_path / "a"))
    assert again.guidance == 2.0 and again.pipe.scheduler.config.original_inference_steps == 50
    about = export.about_student(fixed, 4)
    assert (about["guidance"], about["guidance_scale"], about["guidance_range"]) == (2.0, 1.0, [2.0, 2.0])


def test_it_is_the_average_that_is_exported(tiny: Path, tmp_path: Path) -> None:
    method = student(tiny, ema=0.9)
    export.export(method, tmp_path / "out")
    kept = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(kept[name], p) for name, p in method.average.unet.named_parameters())
    assert not all(torch.equal(kept[name], p) for name, p in method.student.network.unet.named_parameters())


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
def test_half_precision_is_checked_as_strictly_and_leaves_the_method_as_it_was(dtype: torch.dtype, tiny: Path, tmp_path: Path) -> None:
    method, whole, half = student(tiny), tmp_path / "whole", tmp_path / "half"
    export.export(method, whole)
    assert export.deliver(method, half, PROMPTS, 4, dtype) < 1e-4
    exact, kept = load_file(whole / WEIGHTS), load_file(half / WEIGHTS)
    assert all(torch.equal(exact[name], p) for name, p in method.deployment.network.unet.named_parameters())
    assert all(torch.equal(exact[name].to(dtype), x) for name, x in kept.items()) and {x.dtype for x in kept.values()} == {dtype}
    assert (half / WEIGHTS).stat().st_size < 0.6 * (whole / WEIGHTS).stat().st_size


@pytest.mark.slow
def test_frozen_parts_in_half_precision_are_exported_as_they_came(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = METHODS[0].method(pipeline=str(tiny), guidance=2.0, memory=Memory("bfloat16")).eval()
    assert export.deliver(method, tmp_path / "out", PROMPTS, 4) < 1e-4
    for part in (Path("text_encoder") / "model.safetensors", Path("vae") / "diffusion_pytorch_model.safetensors"):
        mine, theirs = load_file(tmp_path / "out" / part), load_file(tiny / part)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], x) for name, x in theirs.items())


def test_a_folder_that_does_not_sample_as_trained_is_kept_under_another_name(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing that was trained is deleted, and no older pipeline either."""
    from diffusers import LCMScheduler

    method, folder = student(tiny), tmp_path / "out"
    wrong = LCMScheduler.from_config(method.deployment.scheduler().config, original_inference_steps=25)  # other timesteps
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "old").touch()
    monkeypatch.setattr(type(method.backbone), "scheduler", lambda *args: wrong)
    said = r"does not sample as the trainer does: at 4 steps its latents differ by .*, where rounding explains .*"
    said += r": LCMScheduler walks t = \[999, \d+, \d+, \d+\], and the student is deployed on \[999, 759, 499, 259\]; it is kept as .*ified"
    with pytest.raises(export.NotAsTrained, match=said):
        export.deliver(method, folder, PROMPTS, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-unverified"] and [p.name for p in folder.rglob("*")] == [
        "unet",
        "old",
    ]
    assert load_file(tmp_path / "out-unverified" / WEIGHTS)
    (tmp_path / "out-unverified" / "ddil.json").write_text("{}")  # now it is somebody's
    with pytest.raises(export.NotAsTrained, match="it is kept as .*out-unverified-2$"):
        export.deliver(method, folder, PROMPTS, 4)
    assert load_file(tmp_path / "out-unverified-2" / WEIGHTS) and (tmp_path / "out-unverified" / "ddil.json").read_text() == "{}"


def rounded_to_10_bits(x: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def test_verification_computes_in_full_precision_and_one_layout(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32, the default of convolutions on GPUs, makes differences of 1e-3 between two layouts: here 10 bits wherever it is allowed.

    The emulation rounds the weights of one of the two, as another kernel would, and shows that the flags and the layouts are what decides.
    """
    method, folder = student(tiny), tmp_path / "out"
    export.export(method, folder)
    convolve, layouts = torch.nn.functional.conv2d, set()

    def emulated(x: torch.Tensor, w: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        last = w.is_contiguous(memory_format=torch.channels_last)
        if min(w.shape[1:]) > 1:
            layouts.add(last)
        tf32 = torch.backends.cudnn.allow_tf32 and not last
        return convolve(rounded_to_10_bits(x), rounded_to_10_bits(w), *args, **kwargs) if tf32 else convolve(x, w, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", emulated)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    assert before[0] and export.verify(method, folder, PROMPTS, 4) < 1e-4
    assert layouts == {True}  # channels last, as in training
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before
    pipe = load_pipeline(folder)
    policy, grid = method.deployment.sampler(4)
    mine = sampling.latents(method.backbone, policy, grid, PROMPTS, method.eval_guidance)
    assert (
        export.relative(mine, sampling.pipeline_latents(method.backbone.sharing(pipe), PROMPTS, 4, method.eval_guidance)) > 3e-4
    )  # what it refused


@pytest.mark.slow
def test_the_tolerance_is_that_of_the_very_network(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that amplifies is given more room, and the same difference is refused in a calm one."""
    method, folder = student(tiny), tmp_path / "out"
    export.export(method, folder)
    policy, grid = method.deployment.sampler(4)
    latents = lambda: sampling.latents(method.backbone, policy, grid, PROMPTS, method.eval_guidance)  # noqa: E731
    calm = export.sensitivity(method.backbone, policy, grid, PROMPTS, method.eval_guidance, 0, latents())
    assert 1e-6 < calm < 1e-3
    theirs = sampling.pipeline_latents
    monkeypatch.setattr(sampling, "pipeline_latents", lambda *args: theirs(*args) * (1 + 2e-3))
    with pytest.raises(export.NotAsTrained):
        export.verify(method, folder, PROMPTS, 4)
    monkeypatch.setattr(export, "sensitivity", lambda *args: 100 * calm)
    assert 1e-3 < export.verify(method, folder, PROMPTS, 4) < 1e-2


@pytest.mark.slow
def test_the_end_of_every_stage_is_tried_on_the_untrained_student(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddil_lightning.methods import PD
    from ddil_lightning.training.plan import Stage

    plan = [Stage(steps=8, updates=1), Stage(steps=4, updates=1), Stage(steps=2, updates=1)]
    method = PD(pipeline=str(tiny), guidance=2.0, w_conditioned=False, stages=plan, teacher_steps=16, rule="linspace").eval()
    tried: list[int] = []
    compare = export.compare
    monkeypatch.setattr(
        export, "compare", lambda method, deployment, made, prompts, n: tried.append(n) or compare(method, deployment, made, prompts, n)
    )
    export.rehearse(method, tmp_path / "p", PROMPTS, 1)
    assert tried == [8, 4, 1] and method.stage == 0 and len(method.grid) == 8  # the last one at the step count that is asked for
    scheduler = type(method.backbone).scheduler
    monkeypatch.setattr(
        type(method.backbone), "scheduler", lambda *args: type(s := scheduler(*args)).from_config(s.config, use_karras_sigmas=True)
    )
    with pytest.raises(export.NotAsTrained, match="at 8 steps"):
        export.rehearse(method, tmp_path / "q", PROMPTS, None)


def test_all_components_are_converted(tiny: Path, tmp_path: Path) -> None:
    method = student(tiny)
    assert export.deliver(method, tmp_path / "half", PROMPTS, 4, torch.float16) < 1e-3
    for part in (WEIGHTS, Path("vae") / WEIGHTS.name, Path("text_encoder") / "model.safetensors"):
        assert {x.dtype for x in load_file(tmp_path / "half" / part).values() if x.is_floating_point()} == {torch.float16}, part
    assert {p.dtype for part in method.backbone.parts() for p in part.parameters()} == {torch.float32}


def test_a_folder_that_cannot_be_written_is_not_left_in_half(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = student(tiny)
    save = type(method.deployment.network.unet).save_pretrained

    def full(self: Any, folder: Any, **kwargs: Any) -> None:
        save(self, folder, **kwargs)
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # no OSError

    monkeypatch.setattr(type(method.deployment.network.unet), "save_pretrained", full)
    for write in (lambda: export.export(method, tmp_path / "a"), lambda: export.deliver(method, tmp_path / "b", PROMPTS, 4)):
        with pytest.raises(OSError, match="No space left") as error:
            write()
        assert error.value.errno == errno.ENOSPC and str(tmp_path) in error.value.filename
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_holds_a_network_of_its_own_family_alone(tiny: Path, tmp_path: Path) -> None:
    method = student(tiny)
    method.student.network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="hold a UNet, and this student is a Linear"):
        export.export(method, tmp_path / "out")
