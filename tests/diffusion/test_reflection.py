"""Reflection: a projection of x0 estimates with eps and v re-derived, its gradients, its dynamic form, and the box."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.diffusion.analytic import UniformBox
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.reflection import Reflection, estimate_box
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.records import Context

SD = NoiseSchedule.scaled_linear()
TIMES = torch.tensor([999, 749, 500, 250, 19])
SD_CONFIG: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def context(n: int) -> Context:
    return Context(torch.zeros(n, 1, 1))


class Given(torch.nn.Module):
    """A network that says what it is told to."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        return self.out


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("straight_through", [False, True], ids=["hard", "straight-through"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_idempotent_and_inside(mode: Any, straight_through: bool, scale: float):
    reflection = Reflection([-1.0, -0.3, 0.0, 2.0], [1.0, 0.7, 4.5, 2.5], mode)
    reflected = reflection.through if straight_through else reflection
    x0 = scale * torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    once = reflected(x0)
    lo, hi = reflection.lo.view(-1, 1, 1), reflection.hi.view(-1, 1, 1)
    slack = 0.0 if mode == "static" else 1e-6
    assert bool((once >= lo - slack).all()) and bool((once <= hi + slack).all())
    assert float((reflected(once) - once).abs().max()) <= slack
    assert mode == "dynamic" or torch.equal(once, torch.minimum(torch.maximum(x0, lo), hi))


@pytest.mark.parametrize("mode", ["static", "dynamic", "off"])
def test_identity_inside_the_box(mode: Any):
    x0 = 2 * torch.rand(6, 3, 4, 4) - 1
    assert torch.allclose(Reflection(-1.0, 1.0, mode)(x0), x0, atol=1e-6)
    assert mode == "dynamic" or torch.equal(Reflection(-1.0, 1.0, mode)(x0), x0)
    assert torch.equal(Reflection(mode="off")(99 * x0), 99 * x0)


def test_points_have_channels_too():
    reflection = Reflection([0.0, -1.0], [1.0, 0.0])
    assert torch.equal(reflection(torch.tensor([[5.0, 5.0], [-5.0, -5.0]])), torch.tensor([[1.0, 0.0], [0.0, -1.0]]))


def test_projection_contracts_towards_every_point_of_the_box():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        lo = torch.randn(3, generator=generator)
        hi = lo + torch.rand(3, generator=generator) + 0.01
        x = 5 * torch.randn(16, 3, 2, 2, generator=generator)
        inside = lo.view(-1, 1, 1) + (hi - lo).view(-1, 1, 1) * torch.rand(16, 3, 2, 2, generator=generator)
        moved = Reflection(lo.tolist(), hi.tolist())(x)
        assert bool(((moved - inside).abs() <= (x - inside).abs() + 1e-6).all())


@pytest.mark.parametrize("t", TIMES.tolist())
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_reflecting_an_estimate_never_adds_error_on_bounded_data(t: int, noise: float):
    """Data uniform on [-1, 1]: the posterior mean is in the box, so a noisy estimate of it, reflected, is at least as close."""
    generator = torch.Generator().manual_seed(t)
    x0 = 2 * torch.rand(20_000, 1, generator=generator, dtype=torch.float64) - 1
    x_t = SD.add_noise(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), t)
    exact = UniformBox(-1.0, 1.0, SD)(x_t, torch.full((len(x0),), t), context(len(x0)))
    estimate = exact + noise * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    reflected = Reflection(-1.0, 1.0)(estimate)
    assert torch.equal(Reflection(-1.0, 1.0)(exact), exact)
    for truth in (exact, x0):  # the ideal answer, and the data
        before, after = (estimate - truth).square(), (reflected - truth).square()
        assert bool((after <= before).all())
        assert noise < 1 or float(after.mean()) < 0.9 * float(before.mean())


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_eps_and_v_are_derived_again(mode: Any):
    x_t, out = 2 * torch.randn(2, len(TIMES), 4, 3, 3, dtype=torch.float64)
    plain = Denoiser(Given(out), SD, "v")
    p = Denoiser(plain.network, SD, "v", reflection=Reflection(-0.5, 0.5, mode))(x_t, TIMES, context(len(TIMES)))
    free = plain(x_t, TIMES, context(len(TIMES)))
    alpha, sigma = SD.at(TIMES, x_t)
    assert torch.allclose(alpha * p.x0 + sigma * p.eps, x_t, atol=1e-12)
    assert torch.allclose(p.v, alpha * p.eps - sigma * p.x0, atol=1e-12)
    assert float(p.x0.abs().max()) <= 0.5 + 1e-6 and float(free.x0.abs().max()) > 1
    assert float((p.eps - free.eps)[2].abs().max()) > 0.3  # at t = 500 the eps of an unclipped x0 is another one


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_reflected_ddim_is_diffusers_with_its_clipped_output(mode: Any, prediction_type: str):
    """`use_clipped_model_output=True` re-derives eps as we do; diffusers' default keeps the eps of the unclipped x0."""
    from diffusers import DDIMScheduler

    how: dict[str, Any] = {"clip_sample": True} if mode == "static" else {"thresholding": True, "sample_max_value": 1e9}
    theirs = DDIMScheduler(**SD_CONFIG, timestep_spacing="trailing", prediction_type=prediction_type, **how)
    theirs.alphas_cumprod = SD.alphas[:-1].square()  # their float32 tables differ in the seventh digit; here the algorithm is tested
    theirs.set_timesteps(4)
    x_t, out = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    kind: Any = {"epsilon": "eps", "v_prediction": "v"}[prediction_type]
    denoiser = Denoiser(Given(out), SD, kind, reflection=Reflection(-1.0, 1.0, mode))
    for t, s in ((999, 749), (749, 499), (249, -1)):
        now, then = torch.tensor([t, t]), torch.tensor([s, s])
        ours = ddim(SD, x_t, denoiser(x_t, now, context(2)), now, then)
        assert torch.allclose(ours, theirs.step(out, t, x_t, use_clipped_model_output=True).prev_sample, atol=1e-6)
        if s == 499:
            assert float((ours - theirs.step(out, t, x_t).prev_sample).abs().max()) > 0.1


def test_gradients_of_the_three_roles():
    x0 = torch.tensor([[[0.5, 3.0, -3.0]]])

    def gradient(reflection: Any) -> list[float]:
        x = x0.clone().requires_grad_()
        (reflection(x) * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
        return x.grad.flatten().tolist()

    assert gradient(Reflection()) == [1, 0, 0]  # a saturated coordinate hears nothing: for targets only
    assert gradient(Reflection().through) == [1, 2, 4]  # the student's output in a marginal-matching loss
    assert gradient(Reflection(mode="off")) == [1, 2, 4]  # the student's prediction in a regression loss
    assert torch.equal(Reflection().through(x0), Reflection()(x0))


def test_dynamic_mode_is_per_sample():
    generator = torch.Generator().manual_seed(2)
    calm = 2 * torch.rand(1, 3, 8, 8, generator=generator) - 1
    wild = 7 * torch.randn(1, 3, 8, 8, generator=generator)
    reflection = Reflection(-4.5, 4.5, "dynamic")
    both = reflection(torch.cat([calm, wild]))
    assert torch.allclose(both[:1], calm, atol=1e-6)  # its neighbour's outliers are none of its business
    q = (wild / 4.5).abs().flatten().quantile(0.995)
    assert float(q) > 1 and torch.allclose(both[1:], wild.clamp(-4.5 * q, 4.5 * q) / q, atol=1e-5)
    assert float(both.abs().max()) <= 4.5 + 1e-5
    # Beyond the threshold only the shape matters: a sample twice as wild ends at the same place.
    assert torch.allclose(reflection(2 * wild), reflection(wild), atol=1e-5)
    assert not torch.allclose(reflection(wild), Reflection(-4.5, 4.5)(wild), atol=0.1)


def test_dynamic_mode_scales_about_the_centre_of_the_box():
    x = torch.tensor([[[1.0, 3.0, 5.0, 11.0, -5.0]]])  # centre 3, half-width 1
    out = Reflection(2.0, 4.0, "dynamic", quantile=1.0)(x)
    assert torch.allclose(out, torch.tensor([[[2.75, 3.0, 3.25, 4.0, 2.0]]]))


def test_saturation_counts_entries_outside():
    x = torch.zeros(2, 2, 2, 2)
    x[1, 0, 0, 0], x[1, 1, 1, 1], x[0, 1] = 1.5, -9.0, 1.0  # 1.0 is inside the second channel's box
    assert Reflection([-1.0, -2.0], [1.0, 2.0]).saturation(x).tolist() == [0.0, 0.25]


def test_the_box_belongs_to_the_checkpoint_and_follows_the_type():
    a, b = Reflection([-1.0, -2.0], [1.0, 2.0]), Reflection([-9.0, -9.0], [9.0, 9.0])
    b.load_state_dict(a.state_dict())
    x = 5 * torch.randn(3, 2, 2, 2, dtype=torch.float64)
    assert torch.equal(a(x), b(x)) and a(x).dtype == torch.float64


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"mode": "clip"}, "off, static or dynamic, not 'clip'"),
        ({"lo": 1.0, "hi": 1.0}, "lo < hi in every channel, got lo=1.0, hi=1.0"),
        ({"lo": [0.0, 1.0], "hi": [1.0, 0.5]}, "lo < hi"),
        ({"lo": [0.0, 0.0], "hi": 1.0}, "lo < hi"),
    ],
)
def test_boxes_that_cannot_be(kwargs: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        Reflection(**kwargs)


def test_estimated_box():
    """Uniform data on [a, b]: quantiles 0.05 % and 99.95 %, then 5 % wider in all."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.tensor([-1.0, 0.0, 10.0]), torch.tensor([1.0, 4.0, 11.0])
    x = a.view(-1, 1, 1) + (b - a).view(-1, 1, 1) * torch.rand(400, 3, 16, 16, generator=generator)
    lo, hi = (torch.tensor(v) for v in estimate_box(x))
    width = b - a
    for got, want in ((lo, a - 0.0245 * width), (hi, b + 0.0245 * width)):
        assert bool(((got - want).abs() < 0.002 * width).all())
    assert float(Reflection(lo.tolist(), hi.tolist()).saturation(x).max()) == 0
    outlier = x.clone()
    outlier[0, 0, 0, 0] = 1e6
    assert estimate_box(outlier)[1][0] == pytest.approx(float(hi[0]), abs=0.01)  # one broken image does not open the box


def test_estimated_box_reads_a_sample_of_large_latents_and_points():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 2, 64, 64, generator=generator)
    (lo, _), (few, _) = (box[0] for box in (estimate_box(x), estimate_box(x, entries=500)))
    assert few == pytest.approx(lo, abs=0.01) and estimate_box(x, entries=500) == estimate_box(x, entries=500)
    assert estimate_box(torch.tensor([[0.0, 5.0], [2.0, 7.0]]), widen=0.0) == ([0.0, 5.0], [2.0, 7.0])
    # Each side is one of the entries, by its place among all of them, ties and a broken one included.
    values = torch.cat([x[:, :1].flatten(), x[:9, :1].flatten(), torch.tensor([float("nan")])])[None]
    ordered, last = values.sort(dim=1).values[0], values.shape[1] - 1
    exact = [float(ordered[round(share * last)]) for share in (0.0005, 0.9995)]
    assert [side[0] for side in estimate_box(values[None], widen=0.0, entries=values.shape[1])] == exact
    for empty in (torch.zeros(0, 4, 2, 2), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"latents \[N, C, \.\.\.\], got shape"):
            estimate_box(empty)
