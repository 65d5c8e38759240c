"""Distances with their limits, averages in closed form, and the exact consistency function, whose loss is zero."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.backbones.roles import lerp_
from ddil_lightning.bounds import above, at_least, fraction, seeds, within
from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.denoiser import Consistency, Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import Distance, mse, per_sample, pseudo_huber
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import Context

SD = NoiseSchedule.scaled_linear()
MU, STD = 0.8, 0.5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pair(n: int = 5) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, n, 3, 4, 4, dtype=torch.float64)
    return a, b


def test_losses_are_per_sample():
    a, b = pair()
    for loss in (mse(a, b), pseudo_huber(a, b), Distance("mse")(a, b), Distance("huber")(a, b)):
        assert loss.shape == (5,)
    assert torch.allclose(mse(a, b), torch.stack([((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)]))
    assert torch.equal(per_sample(torch.tensor([[1.0, 3.0], [5.0, 5.0]])), torch.tensor([2.0, 5.0]))
    other = b.clone()
    other[3] += 1  # one broken sample leaves the others' losses alone: the buffer ranks them
    assert torch.equal(mse(a, other)[:3], mse(a, b)[:3])


@pytest.mark.parametrize("shape", [(2,), (2, 1, 4, 4), (1, 3, 4, 4), (2, 3, 4)])
@pytest.mark.parametrize("loss", [mse, pseudo_huber, Distance("mse"), Distance("huber")])
def test_tensors_of_two_shapes_are_refused(loss: Any, shape: tuple[int, ...]) -> None:
    """Broadcast, they were the loss of other pairs, or of a batch's mean."""
    a, b = torch.randn(2, 3, 4, 4), torch.randn(shape)
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=re.escape(f"tensors of the shapes {list(one.shape)} and {list(other.shape)}: give both the")):
            loss(one, other)


def test_huber_limits():
    """h -> 0 is |a - b|, h -> inf is (a - b)^2 / (2 h)."""
    a, b = pair()
    assert torch.allclose(pseudo_huber(a, b, 1e-9), per_sample((a - b).abs()), atol=2e-9)
    assert torch.allclose(2 * 1e4 * pseudo_huber(a, b, 1e4), mse(a, b), rtol=1e-6)
    assert torch.equal(Distance("huber", 0.1)(a, b), pseudo_huber(a, b, 0.1)) and torch.equal(Distance("mse", 0.1)(a, b), mse(a, b))


@pytest.mark.parametrize("h", [1e-3, 0.03, 1.0])
def test_huber_between_its_limits(h: float):
    a, b = pair()
    loss = pseudo_huber(a, b, h)
    assert bool((loss <= per_sample((a - b).abs())).all()) and bool((loss <= mse(a, b) / (2 * h)).all()) and bool((loss > 0).all())
    assert torch.equal(pseudo_huber(a, a, h), torch.zeros(5, dtype=torch.float64)) and torch.equal(loss, pseudo_huber(b, a, h))
    d = torch.tensor([[3.0]], dtype=torch.float64)
    assert float(pseudo_huber(d, 0 * d, h)) == pytest.approx((9 + h * h) ** 0.5 - h, rel=1e-12)


def test_huber_gradient_is_bounded_and_finite_at_zero():
    a, b = pair()
    a[0] = b[0]
    a.requires_grad_(), b.requires_grad_()
    pseudo_huber(a, b.detach(), 1e-3).sum().backward()
    d = (a - b).detach()
    assert torch.allclose(a.grad, d / (d.square() + 1e-6).sqrt() / a[0].numel(), atol=1e-12)
    assert float(a.grad.abs().max()) <= 1 / a[0].numel() and float(a.grad[0].abs().max()) == 0
    assert b.grad is None  # the target is not trained


def test_a_distance_that_is_none():
    with pytest.raises(ValueError, match="'huber' or 'mse', not 'l1'"):
        Distance("l1", 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("h", [0.0, -1.0, 1e-30, 1e4, 1e300, float("inf"), float("nan")])
def test_a_width_that_float32_cannot_compute_with(h: float):
    with pytest.raises(ValueError, match=re.escape("is at most 1000 and, squared in float32, still above 0, got " + f"{h:g}")):
        Distance("huber", h)


@pytest.mark.parametrize(
    "value", [10**400, 10**5000, [1, 10**400], float("inf"), float("nan"), True, "1"], ids=lambda value: str(type(value))
)
def test_a_number_that_no_float_holds_is_refused_in_a_line(value: Any):
    """`math.isfinite` raises OverflowError for a whole number of 400 digits, and `repr` ValueError for one of 5000."""
    for check in (partial(at_least, 0), partial(above, 0), partial(within, 0, 1), fraction):
        with pytest.raises(ValueError, match="^lr is .*: give (a number|numbers) ") as error:
            check(lr=value)
        assert len(str(error.value)) < 200
    if not isinstance(value, list):
        with pytest.raises(ValueError, match="^seed is .*: give a whole number from 0 to 4294967295$"):
            seeds(seed=value)


@pytest.mark.parametrize("h", [1e-12, 1e3])
def test_the_narrowest_and_the_widest_distance_train_in_float32(h: float):
    Distance("huber", h)
    a, b = (x.float() for x in pair())
    a[0] = b[0]
    pseudo_huber(a.requires_grad_(), b, h).sum().backward()
    assert bool(a.grad.isfinite().all()) and bool(a.grad[1:].ne(0).all()) and not bool(a.grad[0].any())


# Averages -----------------------------------------------------------------------------------------------------------------------


def networks() -> tuple[nn.Module, nn.Module]:
    average, online = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    return average.requires_grad_(False), online


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_averages_in_closed_form(decay: float):
    """Towards constant weights: decay^n a + (1 - decay^n) w after n updates."""
    average, online = networks()
    start = [p.clone() for p in average.parameters()]
    before = [p.detach().clone() for p in online.parameters()]
    for _ in range(4):
        lerp_(average, online, decay)
    for a, a0, w, w0 in zip(average.parameters(), start, online.parameters(), before, strict=True):
        assert torch.allclose(a, decay**4 * a0 + (1 - decay**4) * w, atol=1e-6) and not a.requires_grad
        assert torch.equal(w, w0) and w.requires_grad and w.grad is None
    assert decay == 0 or not torch.equal(next(average.parameters()), next(online.parameters()))


def test_averages_copy_buffers():
    average, online = networks()
    online.train()(torch.randn(8, 3))
    lerp_(average, online, 0.99)
    assert torch.equal(average[1].running_mean, online[1].running_mean) and int(average[1].num_batches_tracked) == 1
    with pytest.raises((RuntimeError, ValueError)):
        lerp_(nn.Linear(3, 4), nn.Linear(3, 5), 0.9)


# The consistency function -------------------------------------------------------------------------------------------------------


class Exact(nn.Module):
    """f*(x, t) = mu + S (x - alpha mu) / sqrt(alpha^2 S^2 + sigma^2): where the flow of Gaussian data ends."""

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        alpha, sigma = SD.at(t, x_t)
        return MU + STD * (x_t - alpha * MU) / ((alpha * STD).square() + sigma.square()).sqrt()


def consistency(x: Tensor, t: Tensor, boundary: bool = False) -> Tensor:
    denoiser = Denoiser(Exact(), SD, "x0")
    c = Context(torch.zeros(len(x), 1, 1))
    return (Consistency(denoiser) if boundary else denoiser)(x, t, c).x0


def test_the_exact_consistency_function_has_no_loss():
    """With the exact flow as the solver, at every node of LCM's grid; with the boundary conditions, down to the last interval."""
    grid, law = Grid.consistency(), Gaussian(MU, STD, SD)
    t, s = grid.times[:-1], grid.times[1:]
    x = torch.randn(50, 16, dtype=torch.float64)
    x_s = law.flow(x, t, s)
    assert float(pseudo_huber(consistency(x, t), consistency(x_s, s)).max()) < 1e-12
    bounded = mse(consistency(x, t, boundary=True), consistency(x_s, s, boundary=True))
    assert float(bounded[:-1].max()) < 1e-9
    # at s = 0 the boundary f(x, 0) = x says that x_0 is clean, which sigma_0 = 0.029 is not quite
    assert 1e-9 < float(bounded[-1]) < 1e-3
    assert float(mse(consistency(x, t), consistency(x_s, t)).min()) > 1e-7  # a wrong time does have a loss


def test_with_ddim_the_loss_is_second_order_in_the_step():
    law = Denoiser(Gaussian(MU, STD, SD), SD, "x0")
    x = torch.randn(64, 16, dtype=torch.float64)
    c = Context(torch.zeros(64, 1, 1))

    def error(step: int) -> float:
        x_s = Policy(law).step(x, 600, 600 - step, c)
        t, s = torch.full((64,), 600), torch.full((64,), 600 - step)
        return float(mse(consistency(x, t), consistency(x_s, s)).mean()) ** 0.5

    assert error(80) / error(40) == pytest.approx(4, rel=0.1) and error(40) / error(20) == pytest.approx(4, rel=0.1)
