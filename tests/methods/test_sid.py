"""SiD against its closed form on Gaussians, and its gradient's way through both networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from affine import SD, Exact, noise
from ddil_lightning.methods import SiD
from ddil_lightning.records import LatentBatch
from ddil_lightning.training.scores import Normalised
from options import options
from suite import Entry, backbone, build

MU, S = 0.5, 0.7
ENTRY = Entry("sid", SiD, {"guidance": 2.0})


def gradient(a: float, b: float, t: int, alpha: float) -> tuple[float, float]:
    """dL / d(a, b) of the code without its normaliser, for exact networks that are held fixed: L is quadratic, so exact moments do."""
    method = SiD(pipeline=Exact(MU, S, a, b), **options(SiD, {"guidance": 1.0, "alpha": alpha}))
    raw = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z, eps = (torch.linalg.qr(raw - raw.mean(0))[0] * 4096**0.5).split(1, 1)
    batch, times, net = noise(4096)._replace(x_t=z), torch.full((4096,), t), method.student.network
    method.adversary.diffuse = lambda x, *args: (SD.add_noise(x, eps, times), times, eps)  # type: ignore[method-assign]
    x = method.student(batch.x_t, batch.t, batch.c).x0
    scaled = method.identity(x, batch)
    with torch.no_grad():
        distance = (x - method.teacher(SD.add_noise(x, eps, times), times, batch.c).x0).abs()[:, 0]
        scale = torch.maximum(distance, 1e-3 * x.abs()[:, 0])
    return tuple(float(g) for g in torch.autograd.grad((scale * scaled).mean(), (net.a, net.b)))  # type: ignore[return-value]


@pytest.mark.parametrize("t", [100, 400, 800])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
@pytest.mark.parametrize(("a", "b"), [(0.2, 0.8), (-1.0, 1.5)])
def test_the_gradient_in_closed_form(a: float, b: float, alpha: float, t: int) -> None:
    """E (d0 + d1 y)(g0 + g1 y - x) with y = A x + s e, x = a + b z, f = c + k y: by hand, the networks fixed."""
    big_a, s = float(SD.alphas[t]), float(SD.sigmas[t])
    k_t, k_p = (big_a * sd**2 / (big_a**2 * sd**2 + s**2) for sd in (S, b))
    c_t, c_p = (m * (1 - big_a * k) for m, k in ((MU, k_t), (a, k_p)))
    d0, d1 = c_t - c_p, k_t - k_p
    g0, g1 = c_t - alpha * d0, k_t - alpha * d1
    da = d1 * big_a * (g0 + (g1 * big_a - 1) * a) + (d0 + d1 * big_a * a) * (g1 * big_a - 1)
    db = 2 * d1 * big_a * (g1 * big_a - 1) * b
    assert gradient(a, b, t, alpha) == pytest.approx((da, db), rel=1e-6, abs=1e-9)


def test_descent_moves_to_the_teacher_and_stops_there() -> None:
    assert gradient(-0.5, S, 400, 1.0)[0] < -1e-3 and gradient(1.5, S, 400, 1.0)[0] > 1e-3
    assert gradient(MU, 0.4, 400, 1.0)[1] < -1e-3 and gradient(MU, 1.2, 400, 1.0)[1] > 1e-3
    assert gradient(MU, S, 400, 1.0) == pytest.approx((0, 0), abs=1e-12)


def test_the_gradient_passes_through_both_networks_and_stays_out_of_them(tiny: Path) -> None:
    method = build(ENTRY, tiny, reflect="off")
    c, t = backbone(tiny).encode_text(["a red circle"]).guided(1.0), torch.tensor([999])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    b = LatentBatch(x.detach(), t, t, t, c, None, t, torch.ones(1), t)
    with torch.no_grad():
        for p in method.critic.weights():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    with method.adversary.still():
        loss = method.identity(x, b)
        loss.sum().backward()
    assert all(p.grad is None for role in ("critic", "teacher") for p in method.roles[role].network.parameters())
    assert x.grad is not None
    without = x.grad.clone()
    # With the networks' answers held, what is left is the gradient of the term in x alone.
    x.grad = None
    with torch.no_grad():
        y, tau, _ = method.adversary.diffuse(x, "matching", *method.tau)
        real, fake = method.estimates(y, tau, b)
        scale = (x - real).abs().mean((1, 2, 3), keepdim=True)
        held = -(real - fake) / scale / x[0].numel()
    assert float((without - held).abs().max()) > 1e-2 * float(held.abs().max())


def test_over_the_batch_the_normaliser_is_one_mean_for_each_position() -> None:
    """So that a sample's own two coordinates, or the members of a run, have no say in each other."""
    losses = {}
    for name in ("sample", "batch", "none"):
        method = SiD(pipeline=Exact(MU, S, 0.2, 0.8), **options(SiD, {"guidance": 1.0, "scores": {"normaliser": name}}))
        b = noise(64)
        with torch.no_grad():
            x = method.samples(b.x_t, b.t, b.c)
            y, t, _ = method.adversary.diffuse(x, "matching", *method.tau)
            distance = (x - method.estimates(y, t, b)[0]).abs()[:, 0]
            losses[name] = method.identity(x, b)
    torch.testing.assert_close(losses["batch"], losses["none"] / distance.mean())
    torch.testing.assert_close(losses["sample"], losses["none"] / torch.maximum(distance, 1e-3 * x.abs()[:, 0]))
    with pytest.raises(ValueError, match=r"^scores\.normaliser is 'rows': give sample, batch, none"):
        Normalised(normaliser="rows")  # type: ignore[arg-type]


def test_no_such_alpha(tiny: Path) -> None:
    with pytest.raises(ValueError, match="alpha is nan"):
        build(ENTRY, tiny, alpha=float("nan"))
