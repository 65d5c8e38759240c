"""Prompts to latents: noise that depends on the sample alone, and nothing that the starting noise already was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.callbacks import ShiftProbe
from ddil_lightning.streams import normal
from suite import METHODS, build, captions

PROMPTS = [f"a handwritten {word}" for word in "one two three four five six seven".split()]


def correlation(a: Tensor, b: Tensor) -> float:
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


def renoised(method: Any, n: int, seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The numbers of the first re-noising of every sample."""
    seen: list[Tensor] = []

    def kept(like: Tensor, generator: Any) -> Tensor:
        seen.append(normal(like, generator))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr("ddil_lightning.diffusion.transitions.normal", kept)
        policy, grid = method.deployment.sampler(2)
        sampling.latents(method.backbone, policy, grid, PROMPTS[:n], 2.0, seed, chunk)
    return torch.cat(seen)


@pytest.mark.parametrize("which", [0, 4], ids=["lcm", "dmd2"])
def test_re_noising_is_independent_of_the_noise_at_the_start(which: int, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = build(METHODS[which], tiny).eval()
    start, again = sampling.noise(7, method.backbone.latent_shape, 5), renoised(method, 7, 5, 128, monkeypatch)
    every = [abs(correlation(a, b)) for a in start for b in again]
    assert max(every) < 5 / start[0].numel() ** 0.5  # of 256 numbers, all 49 pairs
    assert abs(float(again.std()) - 1) < 0.1


def test_an_image_depends_neither_on_its_batch_nor_on_its_place(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = build(METHODS[0], tiny).eval()
    whole = renoised(method, 7, 5, 128, monkeypatch)
    assert torch.equal(whole, renoised(method, 7, 5, 2, monkeypatch))
    assert torch.equal(whole[3:], renoised(method, 4, 8, 3, monkeypatch))  # sample 3 of seed 5 is sample 0 of seed 8
    policy, grid = method.deployment.sampler(4)
    draw = lambda n, seed, chunk: sampling.latents(method.backbone, policy, grid, PROMPTS[:n], 2.0, seed, chunk)  # noqa: E731
    torch.testing.assert_close(draw(7, 0, 128), draw(7, 0, 3), rtol=0, atol=1e-5)


def test_a_diffusers_pipeline_draws_the_same_numbers(tiny: Path) -> None:
    generators = lambda: sampling.renoising(3, 9)  # noqa: E731
    from diffusers.utils.torch_utils import randn_tensor

    like = torch.empty(3, 4, 8, 8)
    assert torch.equal(normal(like, generators()), randn_tensor(like.shape, generator=generators(), device=like.device, dtype=like.dtype))
    pipe = Pipeline(str(tiny))
    whole = sampling.pipeline_latents(pipe, PROMPTS, 2, 2.0, seed=1)
    torch.testing.assert_close(whole, sampling.pipeline_latents(pipe, PROMPTS, 2, 2.0, seed=1, chunk=2), rtol=0, atol=1e-5)


def test_the_shift_probe_compares_independent_sets(tiny: Path) -> None:
    """The numbers that a roll-out starts from and re-noises with, and those of both references: none of them twice."""
    from types import SimpleNamespace

    method, data, seen = build(METHODS[0], tiny).eval(), captions(tiny), []
    data.trainer = SimpleNamespace(lightning_module=method)  # type: ignore[assignment]
    probe = ShiftProbe(count=8, steps=2)
    fresh = probe._noise

    def kept(batch: Any, of: Any, seed: int) -> Tensor:
        seen.append(fresh(batch, of, seed))
        return seen[-1]

    probe._noise = kept  # type: ignore[method-assign]
    probe.measure(method, data)
    seen += [normal(seen[0], sampling.renoising(8, seed)) for seed in (probe.seed, probe.seed + 8)]
    rows = torch.cat(seen).flatten(1)
    assert len(rows) == 5 * 8
    found = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(found.abs().max()) < 5.5 / rows.shape[1] ** 0.5


def test_a_scheduler_that_fails_is_refused_with_its_step_count(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else is called a matter of steps: what a network raises passes."""
    from diffusers import DPMSolverMultistepScheduler

    class Short(DPMSolverMultistepScheduler):
        def set_timesteps(self, num_inference_steps: Any = None, **kwargs: Any) -> None:
            super().set_timesteps(num_inference_steps, **kwargs)
            self.sigmas = self.sigmas[:2]

    pipeline = Pipeline(str(tiny))
    short = pipeline.stepping(Short.from_config(pipeline.pipe.scheduler.config))
    assert sampling.pipeline_latents(short, PROMPTS[:1], 1, 2.0).isfinite().all()
    why = f"^{tiny} cannot be sampled in 3 steps by its Short \\(IndexError: index 2 is out of bounds .*\\): give another number of steps"
    with pytest.raises(ValueError, match=why):
        sampling.pipeline_latents(short, PROMPTS[:1], 3, 2.0)

    monkeypatch.setattr(Short, "step", lambda self, out, t, x, **kwargs: (x * float("nan"),))
    with pytest.raises(ValueError, match=r"cannot be sampled in 1 step by its Short \(its latents are not finite\): give another number"):
        sampling.check_finite(short, sampling.pipeline_latents(short, PROMPTS[:1], 1, 2.0), 1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Short, "step", full)
    with pytest.raises(torch.OutOfMemoryError, match="^no memory$"):
        sampling.pipeline_latents(short, PROMPTS[:1], 1, 2.0)

    def lost(*args: Any) -> None:
        raise IndexError("of the network")

    pipeline.network().model.register_forward_pre_hook(lost)
    with pytest.raises(IndexError, match="^of the network$"):
        sampling.pipeline_latents(pipeline, PROMPTS[:1], 1, 2.0)
