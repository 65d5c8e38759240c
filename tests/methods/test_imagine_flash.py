"""Imagine Flash against METHODS 5.2 in closed form: the shifted reconstruction, the noise correction, and what the export says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands.entries import parsed
from ddil_lightning.commands.rack import ready
from ddil_lightning.diffusion.analytic import Corrupted, Gaussian, PointMass
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.transitions import NoiseCorrected, ddim
from ddil_lightning.methods import ImagineFlash
from ddil_lightning.methods.imagine_flash import Shift
from ddil_lightning.records import END
from ddil_lightning.runs import export
from known import SD, Affine, Known, latents, noise, whitened
from options import options
from suite import Entry, build

ENTRY = Entry("imagine-flash", ImagineFlash, {"guidance": 2.0, "ema": 0.0})
GAUSSIAN = Gaussian(0.5, 0.7, SD)


def exact(teacher: Any, student: Any, **kwargs: Any) -> ImagineFlash:
    return ImagineFlash(pipeline=Known(teacher, student=student), **options(ImagineFlash, {"guidance": 1.0}, kwargs))


def error(method: ImagineFlash, n: int = 256, t: int = 749) -> float:
    """The loss at one node, with samples whose moments are exact."""
    z, eps = whitened(n, 2).split(1, 1)
    b = latents(SD.add_noise(0.5 + 0 * z, z, t), t)
    with torch.no_grad():
        x = method.student(b.x_t, b.t, b.c).x0
        return float((x - method.reconstruction(x, b, eps)).square().mean())


# The loss -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver_steps", [1, 3])
def test_on_a_point_mass_the_loss_is_zero_for_the_exact_student_alone(solver_steps: int) -> None:
    point = PointMass(0.5, SD)
    assert error(exact(point, point, solver_steps=solver_steps)) < 1e-24
    assert error(exact(point, Corrupted(point, bias=0.3), solver_steps=solver_steps)) == pytest.approx(0.09)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05, 0.0])
def test_for_the_exact_student_of_a_gaussian_the_loss_goes_to_zero_with_the_shifted_time(share: float) -> None:
    """xT - mu = g (alpha (xS - mu) + sigma eps), so L = (1 - g alpha)^2 Var xS + g^2 sigma^2, of the order of sigma^2 at t' -> 0."""
    alpha, sigma = float(SD.alphas[749]), float(SD.sigmas[749])
    variance = (alpha * 0.49 / ((alpha * 0.7) ** 2 + sigma**2) * sigma) ** 2
    a, s = float(SD.alphas[round(share * 1000)]), float(SD.sigmas[round(share * 1000)])
    gain = a * 0.49 / ((a * 0.7) ** 2 + s**2)
    expected = (1 - gain * a) ** 2 * variance + (gain * s) ** 2
    assert error(exact(GAUSSIAN, GAUSSIAN, shift=Shift(share, share))) == pytest.approx(expected, rel=1e-6)
    assert share or expected < 1e-3


@pytest.mark.parametrize("solver_steps", [1, 4])
def test_the_reconstruction_by_hand(solver_steps: int) -> None:
    """y = alpha_t' x + sigma_t' eps, then DDIM steps of the teacher to the end: each is affine for a Gaussian."""
    method = exact(GAUSSIAN, GAUSSIAN, solver_steps=solver_steps)
    x, eps, t = noise(5), noise(5, seed=4), torch.tensor([999, 749, 749, 499, 249])
    found = method.reconstruction(x, latents(x, t), eps)
    for i, time in enumerate(t.tolist()):
        stops = [round(0.02 * 1000 + 0.58 * time)]
        stops += [stops[0] * k // solver_steps for k in range(solver_steps - 1, 0, -1)] + [END]
        y = float(SD.alphas[stops[0]] * x[i] + SD.sigmas[stops[0]] * eps[i])
        for now, then in zip(stops, stops[1:], strict=False):
            (a, s), (a2, s2) = ((float(SD.alphas[k]), float(SD.sigmas[k])) for k in (now, then))
            x0 = 0.5 + a * 0.49 / (a * a * 0.49 + s * s) * (y - a * 0.5)
            y = a2 * x0 + s2 * (y - a * x0) / s
        assert float(found[i]) == pytest.approx(y, rel=1e-9)


def test_no_gradient_flows_through_the_noised_sample() -> None:
    """dL/da of a generator a + b x_t is 2 (x - xT) / n summed, as if xT were data; through y it would be smaller."""
    method = exact(GAUSSIAN, Affine(1.5, 0.1))
    b = latents(noise(64), 999)
    kept: list[Tensor] = []
    method.descend = lambda optimizer, loss, name="loss": kept.append(loss)  # type: ignore[assignment,return-value,method-assign]
    method.optimizers = lambda: None  # type: ignore[assignment,method-assign]
    method._noise = lambda like: noise(64, seed=4)  # type: ignore[method-assign]
    method._trainer = None
    method.training_step(b, 0)
    (a,) = torch.autograd.grad(kept[0], [method.student.network.a])
    x = (1.5 + 0.1 * b.x_t).detach()
    target = method.reconstruction(x, b, noise(64, seed=4))
    assert float(a) == pytest.approx(float(2 * (x - target).mean()), rel=1e-6) and abs(float(a)) > 0.1


def test_the_shift_rises_and_stays_below_the_students_own_time() -> None:
    t, nodes = torch.arange(1000), torch.tensor([999, 749, 499, 249])
    for shift in (Shift(), Shift(0.3, 0.9), Shift(0, 1), Shift(0.5, 0.5)):
        there = shift(t, 1000)
        assert bool((there.diff() >= 0).all()) and bool((there <= t).all()) and bool((there >= 0).all())
    assert Shift()(nodes, 1000).tolist() == [599, 454, 309, 164]


def test_a_shift_that_falls_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^shift\.low = 0\.7 is above shift\.high = 0\.6: give shares of T that rise"):
        Shift(0.7)


# The sampler --------------------------------------------------------------------------------------------------------------------------


def test_the_correction_is_ddim_where_the_network_answers_with_the_noise_itself() -> None:
    x = noise(6)
    t, s = torch.full((6,), 999), torch.tensor([749, 499, 249, 0, END, 749])
    right, wrong = (SD.prediction("eps", x, t, out) for out in (x, 0.9 * x))
    step = NoiseCorrected(999)
    torch.testing.assert_close(step(SD, x, right, t, s), ddim(SD, x, right, t, s), rtol=0, atol=1e-12)
    alpha, sigma = SD.at(s, x)
    torch.testing.assert_close(step(SD, x, wrong, t, s), alpha * wrong.x0 + sigma * x, rtol=0, atol=1e-12)
    assert float((step(SD, x, wrong, t, s) - ddim(SD, x, wrong, t, s))[:3].abs().max()) > 0.05
    later = torch.full((6,), 749)
    torch.testing.assert_close(step(SD, x, wrong, later, s.clamp(max=499)), ddim(SD, x, wrong, later, s.clamp(max=499)), rtol=0, atol=0)


def test_roll_outs_and_inference_take_the_corrected_step() -> None:
    method, plain = exact(GAUSSIAN, GAUSSIAN), exact(GAUSSIAN, GAUSSIAN, noise_correction=False)
    assert method.policies.student.transition == method.deployment.policy.transition == NoiseCorrected(999)
    assert plain.policies.student.transition == plain.deployment.policy.transition == ddim
    assert plain.deployment.remark == "" and plain.deployment.exported.policy.transition == ddim
    assert method.deployment.exported.policy.transition == ddim
    assert [g.nodes.tolist() for g in map(method.deployment.grid, (4, 2, 1))] == [[999, 749, 499, 249], [999, 499], [999]]


def test_the_export_samples_as_ddim_and_its_card_says_so(tiny: Path, tmp_path: Path) -> None:
    method = build(ENTRY, tiny).eval()
    assert export.deliver(method, tmp_path / "p", ["a red circle"], 4) < 1e-3
    assert json.loads((tmp_path / "p" / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    assert "by ddim-nc" in json.loads((tmp_path / "p" / "ddil.json").read_text())["sampler"]
    card = (tmp_path / "p" / "README.md").read_text()
    assert "| sampler | DDIM, as its scheduler steps. It was trained and measured with noise correction" in card
    c, x = method.backbone.encode_text(["a red circle"]).guided(1.0), torch.randn(1, 4, 8, 8)
    corrected = method.deployment.policy.sample(x, method.grid, c)
    assert float((corrected - Policy(method.deployment.denoiser, ddim).sample(x, method.grid, c)).abs().max()) > 1e-3
    # By its name the export samples as the trainer does.
    entry = parsed(f"{tmp_path / 'p'}:ddim-nc#4")
    pipe = ready(entry, Pipeline(entry.at()))
    made = sampling.pipeline_latents(pipe, ["a red circle"], 4, 1.0, seed=3)
    own = sampling.latents(method.backbone, *method.deployment.sampler(4), ["a red circle"], 1.0, seed=3)
    torch.testing.assert_close(made, own, rtol=0, atol=1e-4)
    assert str(pipe.remedy) == "nc" and "DDIMScheduler" in type(pipe.pipe.scheduler).__name__


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"teacher_steps": 30}, "teacher_steps = 30 is no multiple of steps = 4"),
        ({"rollouts": (3,)}, r"t = 666 is not a node of .* the finer grid must contain the coarser"),
        ({"guidance": [1.0, 4.0]}, "student is not told the guidance: give one number"),
        ({"solver_steps": 0}, "solver_steps is 0: give a number from 1"),
    ],
)
def test_bad_options_are_refused_in_a_line(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        exact(GAUSSIAN, GAUSSIAN, **kwargs)
    assert "\n" not in str(refused.value)
