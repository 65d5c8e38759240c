"""Moment matching against METHODS 5.6 in closed form: the posterior, both turns, their fixed point, and the ancestral sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.backbones.samplers import grid_of, transition_of
from ddil_lightning.diffusion import transitions
from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.transitions import Posterior
from ddil_lightning.methods import MomentMatching
from ddil_lightning.records import END, LatentBatch
from ddil_lightning.runs import export
from known import SD, Affine, Known, latents, noise, whitened
from options import options
from suite import Entry, backbone, build

ENTRY = Entry("moments", MomentMatching, {"guidance": 2.0, "ema": 0.0})
GAUSSIAN = Gaussian(0.5, 0.7, SD)
T, S = 749, 600


def exact(student: Any, critic: Any, **kwargs: Any) -> MomentMatching:
    return MomentMatching(pipeline=Known(GAUSSIAN, student=student, critic=critic), **options(MomentMatching, {"guidance": 1.0}, kwargs))


def controlled(method: MomentMatching, monkeypatch: pytest.MonkeyPatch, n: int = 512) -> LatentBatch:
    """Latents at T of the law N(0, 1) and noise of the posterior at S, with exact moments."""
    z, eps = whitened(n, 2).split(1, 1)
    monkeypatch.setattr(transitions, "normal", lambda like, generator: eps.to(like))
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full((n,), (S - 499 + 0.5) / (T - 499)))
    return latents(z, T, s=torch.full((n,), 499))


def coefficients(t: int, s: int) -> tuple[float, float, float]:
    """q(z_s | z_t, x) = N(p z_t + q x, v)."""
    a, b = (float(SD.alphas[k]) for k in (t, s)), (float(SD.sigmas[k]) for k in (t, s))
    (alpha_t, alpha_s), (sigma_t, sigma_s) = a, b
    r = (alpha_t * sigma_s / (sigma_t * alpha_s)) ** 2
    return alpha_t * sigma_s**2 / (alpha_s * sigma_t**2), alpha_s * (1 - r), sigma_s**2 * (1 - r)


# The posterior ------------------------------------------------------------------------------------------------------------------------


def test_z_s_has_the_posteriors_moments_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    method = exact(Affine(0.2, 0.3), GAUSSIAN)
    b = controlled(method, monkeypatch)
    x = method.student(b.x_t, b.t, b.c).x0
    z, s = method.earlier(x, b, "matching")
    p, q, v = coefficients(T, S)
    assert s.tolist() == [S] * len(s) and not z.requires_grad
    mean = p * b.x_t + q * x.detach()
    rest = z - mean
    assert float(rest.mean()) == pytest.approx(0, abs=1e-12) and float(rest.square().mean()) == pytest.approx(v, rel=1e-9)
    assert float((rest * b.x_t).mean()) == pytest.approx(0, abs=1e-12)


def test_s_lies_between_the_node_and_the_next() -> None:
    method, n = exact(Affine(0.2, 0.3), GAUSSIAN), 4000
    t = torch.tensor([999, 749, 249]).repeat(n)
    b = latents(noise(3 * n), t, s=torch.tensor([749, 499, END]).repeat(n))
    for k, (low, high) in enumerate(((749, 999), (499, 749), (0, 249))):
        s = method.earlier(b.x_t, b, "matching")[1][k::3].double()
        assert low <= int(s.min()) < low + 5 and high - 5 < int(s.max()) < high
        assert float(s.mean()) == pytest.approx((low + high - 1) / 2, abs=6)


# Both turns ---------------------------------------------------------------------------------------------------------------------------


def gradient(method: MomentMatching, b: LatentBatch) -> Tensor:
    x = method.student(b.x_t, b.t, b.c).x0
    loss = method.matching(x, b).mean()
    return torch.autograd.grad(loss, x)[0]


def test_the_students_gradient_is_the_weighted_gap_of_the_two_means(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Gaussian(-0.3, 0.9, SD)
    method = exact(Affine(0.2, 0.3), other, cap=1.5)
    b = controlled(method, monkeypatch)
    z, s = method.earlier(method.student(b.x_t, b.t, b.c).x0, b, "matching")
    w = min(1 + float(SD.alphas[S] / SD.sigmas[S]) ** 2, 1.5)
    assert 1 < w < 1.5 and float(method.weight(torch.tensor([10]), z)) == 1.5
    expected = w * (other(z, s, b.c) - GAUSSIAN(z, s, b.c)) / len(z)
    torch.testing.assert_close(gradient(method, b), expected)


def test_where_the_auxiliary_agrees_with_the_teacher_the_student_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    method = exact(Affine(0.2, 0.3), GAUSSIAN)
    assert float(gradient(method, controlled(method, monkeypatch)).abs().max()) == 0


def best(a: float, b: float, t: int, s: int) -> tuple[float, float]:
    """E[x | z_s] = m + k z_s of the student x = a + b z_t of z_t ~ N(0, 1), whose z_s = (p + q b) z_t + q a + sqrt(v) n."""
    p, q, v = coefficients(t, s)
    slope = p + q * b
    k = b * slope / (slope**2 + v)
    return a - k * q * a, k


def test_the_auxiliarys_optimum_is_the_mean_of_the_students_and_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its loss at S, which is quadratic: at (E[x | z_s] + h_T(z_s)) / 2 the gradient is nothing, beside it it is not."""
    a, b = 0.2, 0.3
    m, k = best(a, b, T, S)
    alpha, sigma = float(SD.alphas[S]), float(SD.sigmas[S])
    gain = alpha * 0.49 / ((0.7 * alpha) ** 2 + sigma**2)
    optimum = ((m + 0.5 - gain * alpha * 0.5) / 2, (k + gain) / 2)
    for off in (0.0, 0.1):
        critic = Affine(optimum[0] + off, optimum[1])
        method = exact(Affine(a, b), critic)
        batch = controlled(method, monkeypatch)
        loss = method.adversary.following(method.student(batch.x_t, batch.t, batch.c).x0.detach(), batch)
        found = torch.autograd.grad(loss, (critic.a, critic.b))
        w = 1 + (alpha / sigma) ** 2
        assert float(found[0]) == pytest.approx(4 * w * off, abs=1e-6)
        assert abs(float(found[1])) < 1e-6 or off


def test_with_the_optimal_auxiliary_the_students_mean_moves_to_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    for a, sign in ((-0.4, 1), (1.4, -1)):
        m, k = best(a, 0.0, T, S)
        alpha, sigma = float(SD.alphas[S]), float(SD.sigmas[S])
        gain = alpha * 0.49 / ((0.7 * alpha) ** 2 + sigma**2)
        method = exact(Affine(a, 0.0), Affine((m + 0.5 - gain * alpha * 0.5) / 2, (k + gain) / 2))
        moved = -float(gradient(method, controlled(method, monkeypatch)).sum())
        assert moved * sign > 0.05


def test_turns_move_a_generators_mean_to_the_teachers() -> None:
    """Both turns as they are, on pure noise in one step of T: the student learns a law of the right mean."""
    coarse = options(MomentMatching, {"guidance": 1.0, "steps": 1, "rollouts": (1,), "teacher_steps": 4})
    critic = Affine(0.0, 0.1)
    method = MomentMatching(pipeline=Known(Gaussian(0.5, 0.1, SD), student=Affine(-0.5, 0.1), critic=critic), **coarse)
    student, auxiliary = (torch.optim.Adam(part.parameters(), lr=lr) for part, lr in ((method.student, 0.02), (critic, 0.05)))
    for k in range(150):
        method.adversary.updates = k
        b = latents(noise(128, seed=k), 999)
        x = method.student(b.x_t, b.t, b.c).x0
        for optimizer, loss in ((student, method.matching(x, b).mean()), (auxiliary, method.adversary.following(x.detach(), b))):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert float(method.student.network.a) == pytest.approx(0.5, abs=0.12)


# The sampler --------------------------------------------------------------------------------------------------------------------------


def test_the_export_samples_by_ancestral_steps_with_the_same_noise(tiny: Path, tmp_path: Path) -> None:
    method = build(ENTRY, tiny).eval()
    for steps in (4, 2):
        assert export.deliver(method, tmp_path / "p", ["a red circle", "a zero"], steps) < 1e-3
    config = json.loads((tmp_path / "p" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDPMScheduler" and config["variance_type"] == "fixed_small" and not config["clip_sample"]
    pipe = backbone(tiny).stepping(method.deployment.scheduler())
    assert transition_of(pipe) == Posterior() and grid_of(pipe, 4).times.tolist() == Grid.named("trailing", 4).times.tolist()
    assert "sampler_name ddpm" in (tmp_path / "p" / "README.md").read_text() or "ComfyUI" not in (tmp_path / "p" / "README.md").read_text()


def test_an_ancestral_scheduler_needs_nodes_at_equal_distances(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"^DDPMScheduler steps down by T // N: 3 steps do not divide the 1000 times"):
        backbone(tiny).scheduler(Posterior(), "eps", "trailing", 3)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [({"cap": 0.5}, "cap is 0.5: give a number of at least 1"), ({"steps": 3}, "steps = 3 does not divide the schedule's 1000 times")],
)
def test_bad_options_are_refused_in_a_line(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        exact(Affine(0, 1), GAUSSIAN, **kwargs)
