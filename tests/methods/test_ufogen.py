"""UFOGen against METHODS 5.7: the pair that shares a time, the regression and its label, and the sources that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.policy import solve
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.methods import UFOGen
from ddil_lightning.records import END, FORWARD, STUDENT, TEACHER, Context
from ddil_lightning.training.gan import Gan
from known import SD, Affine, Known, latents, noise
from options import options
from suite import Entry, train

ENTRY = Entry("ufogen", UFOGen, {"guidance": 2.0, "label_steps": 2, "teacher_steps": 4})
GAUSSIAN = Gaussian(0.5, 0.7, SD)


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


class Seen(Affine):
    """A critic that keeps what it was asked, and answers with a multiple of it."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)
        self.asked: list[tuple[Tensor, Tensor]] = []

    def features(self, x_t: Tensor, t: Tensor, c: Context, layers: Any = ()) -> tuple[Tensor, ...]:
        self.asked.append((x_t.detach(), t))
        return (self.b * x_t,)


def exact(teacher: nn.Module = GAUSSIAN, student: nn.Module | None = None, **kwargs: Any) -> UFOGen:
    parts = {"student": student or Affine(0.2, 0.8), "critic": Seen(), "head": nn.Linear(1, 1)}
    return UFOGen(pipeline=Known(teacher, **parts), **options(UFOGen, {"guidance": 1.0}, kwargs))


# The pair -----------------------------------------------------------------------------------------------------------------------------


def test_fake_and_real_are_noised_to_the_next_node_with_noise_of_their_own() -> None:
    method, n = exact(), 4000
    t, s = torch.tensor([999, 499, 249]).repeat(n), torch.tensor([749, 249, END]).repeat(n)
    b = latents(noise(3 * n), t, 3 + 0 * noise(3 * n), s=s, end=noise(3 * n))
    method.adversary.following(torch.zeros(3 * n, 1, dtype=torch.float64), b)
    critic: Any = method.critic.network  # type: ignore[union-attr]
    (fake, at), (real, there) = critic.asked
    assert torch.equal(at, there) and at[:3].tolist() == [749, 249, 0]
    for k, node in enumerate((749, 249, 0)):
        sigma, alpha = float(SD.sigmas[node]), float(SD.alphas[node])
        assert float(fake[k::3].std()) == pytest.approx(sigma, rel=0.05) and float(real[k::3].std()) == pytest.approx(sigma, rel=0.05)
        assert float(real[k::3].mean()) == pytest.approx(3 * alpha, abs=0.06) and abs(float(fake[k::3].mean())) < 0.06
        assert abs(float(torch.corrcoef(torch.stack([fake[k::3, 0], real[k::3, 0]]))[0, 1])) < 0.06


def test_the_students_verdict_by_hand() -> None:
    """softplus(-(w k (alpha_s x + sigma_s eps) + bias)), and its gradient in x."""
    method = exact()
    b = latents(noise(16), 749, noise(16, seed=5), s=torch.full((16,), 499), end=noise(16))
    x = noise(16, seed=6).requires_grad_()
    with method.adversary.still():
        loss: Any = method.adversary.realism(x, b)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    eps = torch.randn(16, 1, generator=method.adversary.generator("realism", torch.device("cpu")), dtype=torch.float64)
    head: Any = method.head
    logit = (SD.alphas[499] * x + SD.sigmas[499] * eps) * float(head.weight) + float(head.bias)
    torch.testing.assert_close(loss, (1 + (-logit).exp()).log()[:, 0], rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(gradient, -SD.alphas[499] * float(head.weight) * (-logit).sigmoid(), rtol=1e-4, atol=1e-6)


# The regression -----------------------------------------------------------------------------------------------------------------------


def test_the_regression_is_weighted_by_alpha_and_vanishes_for_the_exact_student() -> None:
    z, t = noise(64), torch.tensor([999, 749, 499, 249]).repeat(16)
    x0 = torch.full((64, 1), 0.5, dtype=torch.float64)
    b = latents(SD.add_noise(x0, z, t), t, x0, end=x0, noise=z)
    method = exact(PointMass(0.5, SD), PointMass(0.5, SD))
    assert float(method.regression(method.student(b.x_t, b.t, b.c).x0, b).max()) < 1e-20
    torch.testing.assert_close(method.regression(x0 + 0.3, b), SD.alphas[t] * 0.09)


def test_the_minimiser_of_the_regression_is_the_posterior_mean() -> None:
    """Which is what the exact denoiser answers: the gradient of a shift of it is nothing on average, of a wrong one it is not."""
    n, z = 40_000, noise(40_000, 2)
    x0 = 0.5 + 0.7 * z[:, :1]
    b = latents(SD.add_noise(x0, z[:, 1:], 499), 499, x0, end=x0)
    method = exact()
    for shift, expected in ((0.0, 0.0), (0.2, 2 * 0.2 * float(SD.alphas[499]))):
        x = (GAUSSIAN(b.x_t, b.t, b.c) + shift).requires_grad_()
        (gradient,) = torch.autograd.grad(method.regression(x, b).sum(), x)
        assert float(gradient.mean()) == pytest.approx(expected, abs=0.01), n


@pytest.mark.parametrize("steps", [1, 2, 400])
def test_the_teachers_flow_ends_where_it_should(steps: int) -> None:
    """On a point mass in any number of steps; on a Gaussian in many at the exact map of its ODE."""
    x, t, c = noise(4), torch.tensor([999, 749, 499, 249]), latents(noise(4), 0).c
    end = solve(Denoiser(PointMass(0.5, SD), SD, "x0"), x, t, c, steps)
    torch.testing.assert_close(end, torch.full_like(end, 0.5))
    if steps == 400:
        exact_end = GAUSSIAN.flow(x, t, torch.full_like(t, END))
        torch.testing.assert_close(solve(Denoiser(GAUSSIAN, SD, "x0"), x, t, c, steps), exact_end, rtol=0, atol=0.02)


def test_roll_outs_get_the_teachers_label_and_data_their_own() -> None:
    method = exact(label_steps=3)
    x, t = noise(4), torch.tensor([999, 749, 499, 249])
    source, real = torch.tensor([FORWARD, STUDENT, TEACHER, FORWARD]), noise(4, seed=8)
    b = latents(x, t, real, source=source)
    label = solve(method.teacher, x, t, b.c, 3)
    torch.testing.assert_close(method.clean(b), torch.stack([real[0], label[1], label[2], real[3]]))
    before = method.teacher.evaluations
    assert method.clean(b._replace(source=source * 0)) is real and method.teacher.evaluations == before
    # What a same-timestep control has put in the buffer is noised from another picture than the batch's.
    control = b._replace(source=source * 0, slot=torch.tensor([-1, 3, -1, -1]))
    torch.testing.assert_close(method.clean(control), torch.stack([real[0], label[1], real[2], real[3]]))


# Sources ------------------------------------------------------------------------------------------------------------------------------


def test_without_labels_roll_outs_are_refused_and_the_line_says_what_helps() -> None:
    with pytest.raises(
        ValueError, match=r"gives 0\.5 to student latents, on which UFOGen has no target: its sources are forward; set model"
    ) as no:
        exact().check_prior(SamplingPrior(0.5, 0.5, 0.0))
    assert "\n" not in str(no.value)
    exact(label_steps=1).check_prior(SamplingPrior(0.5, 0.25, 0.25))
    exact().check_prior(SamplingPrior())


@pytest.mark.parametrize(
    "features", [pytest.param("critic", marks=pytest.mark.slow), "teacher", pytest.param("initial", marks=pytest.mark.slow)]
)
def test_a_run_trains_student_and_discriminator(features: str, tiny: Path) -> None:
    run = train(ENTRY, tiny, updates=2, gan={"features": features}, critic={"steps": 2})
    trained = {name.split(".")[0] for name, p in run.method.named_parameters() if p.requires_grad}
    assert trained == {"student", "head", *(["critic"] if features == "critic" else [])}
    assert run.method.student_updates == 2 and run.method.adversary.updates == 4 and run.rows[-1]["reconstruction"] > 0


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"gan": Gan()}, "UFOGen is a diffusion GAN, and gan.weight is 0"),
        ({"label_steps": -1}, "label_steps is -1: give a number from 0"),
        ({"reconstruction": -0.5}, "reconstruction is -0.5: give a number from 0"),
    ],
)
def test_bad_options_are_refused_in_a_line(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        exact(**kwargs)
