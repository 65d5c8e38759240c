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

from ddil_lightning import export, sampling
from ddil_lightning.backbones import Backbone
from suite import METHODS, build

PROMPTS = ["a handwritten one", "", "a small red circle"]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def student(tiny: Path, which: int = 0, **kwargs: Any) -> Any:
    """A method whose student (and its average) is no longer its teacher; every weight counts, that of w too."""
    method = build(METHODS[which], tiny, **{"ema": 0.0, **kwargs}).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for p in method.deployed().parameters():
            p.add_(0.05 * torch.randn_like(p))
    return method


@pytest.mark.parametrize("which", [0, 1], ids=["w-conditioned", "fixed guidance"])
def test_a_folder_samples_as_the_trainer_does(which: int, tiny: Path, tmp_path: Path) -> None:
    method, folder = student(tiny, which), tmp_path / "out"
    assert export.deliver(method, folder, PROMPTS, 4) < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    pipe = DiffusionPipeline.from_pretrained(folder)  # as somebody does who has only diffusers
    pipe.set_progress_bar_config(disable=True)
    about = json.loads((folder / "ddil.json").read_text())
    for steps in (1, 2, 4):
        assert export.verify(method, folder, PROMPTS, steps) < 1e-4
        policy, grid = method.sampler(steps)
        mine = sampling.latents(method.backbone, policy, grid, PROMPTS, method.eval_guidance)
        theirs = sampling.pipeline_latents(pipe, PROMPTS, steps, about["guidance_scale"])
        assert export.relative(mine, theirs) < 1e-4
    assert about["timesteps"] == pipe.scheduler.timesteps.tolist() == grid.nodes.tolist()
    if which == 0:  # told another w, it answers something else
        assert export.relative(mine, sampling.pipeline_latents(pipe, PROMPTS, 4, 1.5)) > 1e-2


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
    again = Backbone(str(tmp_path / "a"))
    assert again.guidance == 2.0 and again.pipe.scheduler.config.original_inference_steps == 50
    about = export.about_student(fixed, 4)
    assert (about["guidance"], about["guidance_scale"], about["guidance_range"]) == (2.0, 1.0, [2.0, 2.0])


def test_it_is_the_average_that_is_exported(tiny: Path, tmp_path: Path) -> None:
    method = student(tiny, ema=0.9)
    export.export(method, tmp_path / "out")
    kept = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(kept[name], p) for name, p in method.average.unet.named_parameters())
    assert not all(torch.equal(kept[name], p) for name, p in method.student.network.unet.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_checked_as_strictly_and_leaves_the_method_as_it_was(dtype: torch.dtype, tiny: Path, tmp_path: Path) -> None:
    method, whole, half = student(tiny), tmp_path / "whole", tmp_path / "half"
    export.export(method, whole)
    assert export.deliver(method, half, PROMPTS, 4, dtype) < 1e-4
    exact, kept = load_file(whole / WEIGHTS), load_file(half / WEIGHTS)
    assert all(torch.equal(exact[name], p) for name, p in method.deployed().unet.named_parameters())
    assert all(torch.equal(exact[name].to(dtype), x) for name, x in kept.items()) and {x.dtype for x in kept.values()} == {dtype}
    assert (half / WEIGHTS).stat().st_size < 0.6 * (whole / WEIGHTS).stat().st_size


def test_frozen_parts_in_half_precision_are_exported_as_they_came(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = METHODS[0].method(pipeline=str(tiny), guidance=2.0, teacher_dtype="bfloat16").eval()
    assert export.deliver(method, tmp_path / "out", PROMPTS, 4) < 1e-4
    for part in (Path("text_encoder") / "model.safetensors", Path("vae") / "diffusion_pytorch_model.safetensors"):
        mine, theirs = load_file(tmp_path / "out" / part), load_file(tiny / part)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], x) for name, x in theirs.items())


def test_a_folder_that_does_not_sample_as_trained_is_not_kept(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import LCMScheduler

    method, folder = student(tiny), tmp_path / "out"
    wrong = LCMScheduler.from_config(method.scheduler().config, original_inference_steps=25)  # other timesteps
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "old").touch()
    monkeypatch.setattr(type(method), "scheduler", lambda self: wrong)
    with pytest.raises(ValueError, match=r"does not sample as the trainer does.* at 4 steps its latents differ by .* and 0.001 is allowed"):
        export.deliver(method, folder, PROMPTS, 4)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["out", "out/unet", "out/unet/old"]


def test_a_folder_that_cannot_be_written_is_not_left_in_half(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = student(tiny)
    save = type(method.deployed().unet).save_pretrained

    def full(self: Any, folder: Any, **kwargs: Any) -> None:
        save(self, folder, **kwargs)
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # no OSError

    monkeypatch.setattr(type(method.deployed().unet), "save_pretrained", full)
    for write in (lambda: export.export(method, tmp_path / "a"), lambda: export.deliver(method, tmp_path / "b", PROMPTS, 4)):
        with pytest.raises(OSError, match="No space left") as error:
            write()
        assert error.value.errno == errno.ENOSPC and str(tmp_path) in error.value.filename
    assert list(tmp_path.iterdir()) == []


def test_only_unets_are_exported(tiny: Path, tmp_path: Path) -> None:
    method = student(tiny)
    method.student.network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="only diffusers U-Nets can be exported, and this student is a Linear"):
        export.export(method, tmp_path / "out")
