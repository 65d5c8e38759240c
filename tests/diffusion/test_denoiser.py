"""The boundary between networks and algorithms: guidance, its embedding, NFE, order of operations, and LCM's boundary conditions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.diffusion.analytic import Mixture
from ddil_lightning.diffusion.denoiser import Consistency, Denoiser
from ddil_lightning.diffusion.reflection import Reflection
from ddil_lightning.diffusion.schedule import NoiseSchedule, Predicts
from ddil_lightning.records import END, Context, Prediction

SD = NoiseSchedule.scaled_linear()
T = torch.tensor([999, 749, 500, 250, 19])
NULL = Context(torch.zeros(1, 1, 2))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def classes(n: int) -> Context:
    text = torch.zeros(n, 1, 2)
    text[torch.arange(n), 0, torch.arange(n) % 2] = 1
    return Context(text)


class Speaks(nn.Module):
    """A mixture's exact denoiser, in any space, in any type; it remembers what it was called with."""

    def __init__(self, kind: Predicts, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        means = torch.tensor([[-1.0, 0.5], [2.0, 1.0]], dtype=torch.float64)
        self.exact, self.kind, self.dtype = Mixture([0.3, 0.7], means, 0.4, [0, 1], SD), kind, dtype
        self.calls: list[tuple[Tensor, Tensor, Context]] = []

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        self.calls.append((x_t, t, c))
        p = SD.from_x0(x_t, t, self.exact(x_t, t, c))
        out = {"eps": p.eps, "v": p.v, "x0": p.x0, "flow": p.eps - p.x0}[self.kind]
        return out.to(self.dtype)


def noisy(n: int = len(T)) -> Tensor:
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_guidance_is_two_calls_and_the_same_in_every_space(kind: Any):
    x, c, w = noisy(), classes(len(T)), torch.tensor([0.0, 1.0, 2.5, 6.5, -0.5])
    guided = Denoiser(Speaks(kind), SD, kind, null=NULL)(x, T, c.guided(w))
    plain = Denoiser(Speaks(kind), SD, kind)
    with_c, without = plain(x, T, c), plain(x, T, NULL.expand(len(T)))
    g = 1 + w.double()[:, None]  # Imagen's and diffusers' convention: out_u + g (out_c - out_u)
    for got, on, off in zip(guided, with_c, without, strict=True):
        assert torch.allclose(got, off + g * (on - off), atol=1e-9)
    reference = Denoiser(Speaks("x0"), SD, "x0", null=NULL)(x, T, c.guided(w))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(guided, reference, strict=True))


def test_w_is_g_minus_one():
    """w = 0 is the conditional answer and w = -1 the unconditional one; reading g as w would be off by one."""
    x, c = noisy(), classes(len(T))
    denoiser = Denoiser(Speaks("v"), SD, "v", null=NULL)
    assert torch.allclose(denoiser(x, T, c.guided(0.0)).v, denoiser(x, T, c).v, atol=1e-12)
    assert torch.allclose(denoiser(x, T, c.guided(-1.0)).v, denoiser(x, T, NULL.expand(len(T))).v, atol=1e-12)
    with_c, without = denoiser(x, T, c).v, denoiser(x, T, NULL.expand(len(T))).v
    assert torch.allclose(denoiser(x, T, c.guided(6.5)).v, without + 7.5 * (with_c - without), atol=1e-9)  # g = 7.5


def test_guidance_is_one_batched_call_and_neither_branch_is_told_w():
    network = Speaks("v")
    denoiser = Denoiser(network, SD, "v", null=NULL)
    denoiser(noisy(), T, classes(len(T)).guided(3.0))
    ((x, t, c),) = network.calls
    assert len(x) == len(t) == len(c.text) == 2 * len(T) and c.w is None
    assert torch.equal(c.text[len(T) :], torch.zeros(len(T), 1, 2)) and torch.equal(c.text[: len(T)], classes(len(T)).text)
    assert torch.equal(x[: len(T)], x[len(T) :]) and torch.equal(t, torch.cat([T, T]))


def test_evaluations_count_guidance_twice():
    guided, told = Denoiser(Speaks("v"), SD, "v", null=NULL), Denoiser(Speaks("v"), SD, "v")
    c = classes(len(T))
    guided(noisy(), T, c.guided(3.0))
    assert guided.evaluations == 2 * len(T)
    guided(noisy(), T, c)
    told(noisy(), T, c.guided(3.0))
    assert (guided.evaluations, told.evaluations) == (3 * len(T), len(T))


def test_a_student_that_is_told_w_gets_it():
    network = Speaks("v")
    Denoiser(network, SD, "v")(noisy(), T, classes(len(T)).guided(3.0))
    assert torch.equal(network.calls[0][2].w, torch.full((len(T),), 3.0)) and len(network.calls[0][0]) == len(T)


def test_the_null_context_borrows_size_ids():
    network, ids = Speaks("v"), torch.tensor([[512.0, 512, 0, 0, 512, 512]])
    c = classes(len(T))._replace(ids=ids.expand(len(T), 6), pooled=torch.ones(len(T), 3))
    null = NULL._replace(pooled=torch.zeros(1, 3))
    Denoiser(network, SD, "v", null=null)(noisy(), T, c.guided(3.0))
    seen = network.calls[0][2]
    assert torch.equal(seen.ids, ids.expand(2 * len(T), 6)) and seen.pooled.shape == (2 * len(T), 3)
    assert float(seen.pooled[len(T) :].abs().sum()) == 0


def test_guidance_comes_first_and_reflection_once():
    """Branches that are clipped one by one and then extrapolated leave the box; clipping after guidance cannot."""
    x, c = noisy(), classes(len(T)).guided(6.5)
    reflection = Reflection(-1.0, 1.5)
    free = Denoiser(Speaks("eps"), SD, "eps", null=NULL)(x, T, c)
    p = Denoiser(Speaks("eps"), SD, "eps", null=NULL, reflection=reflection)(x, T, c)
    alpha, sigma = SD.at(T, x)
    assert torch.allclose(p.x0, reflection(free.x0), atol=1e-12) and float(free.x0.max()) > 2
    assert torch.allclose(alpha * p.x0 + sigma * p.eps, x, atol=1e-12)
    off = Denoiser(Speaks("eps"), SD, "eps", null=NULL, reflection=Reflection(-1.0, 1.0, "off"))(x, T, c)
    assert all(torch.equal(a, b) for a, b in zip(off, free, strict=True))


def test_half_precision_networks_are_raised_before_guidance():
    x, c, w = noisy().float(), classes(len(T)), 6.5
    network = Speaks("v", torch.bfloat16)
    p = Denoiser(network, SD, "v", null=NULL)(x, T, c.guided(w))
    on, off = network(x, T, c).float(), network(x, T, NULL.expand(len(T))).float()
    assert {y.dtype for y in p} == {torch.float32}
    assert torch.allclose(p.v, on + w * (on - off), atol=1e-6)
    assert not torch.allclose((on.bfloat16() + w * (on.bfloat16() - off.bfloat16())).float(), p.v, atol=1e-6)


def test_times_reach_the_network_as_integers():
    network = Speaks("v")
    Denoiser(network, SD, "v")(noisy().bfloat16(), T, classes(len(T)))
    assert network.calls[0][1].dtype == torch.long and network.calls[0][1].tolist() == T.tolist()  # bf16(999) is 1000


def test_gradients_reach_the_network():
    class Linear(nn.Linear):
        def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:  # type: ignore[override]
            return super().forward(x_t)

    denoiser = Denoiser(Linear(2, 2), SD, "eps", null=NULL)
    denoiser(noisy().float(), T, classes(len(T)).guided(2.0)).v.square().sum().backward()
    assert float(denoiser.network.weight.grad.abs().sum()) > 0


# What a student is told ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [256, 64])
def test_w_embedding_is_that_of_diffusers_pipeline(dim: int):
    from diffusers import LatentConsistencyModelPipeline

    from ddil_lightning.diffusion.denoiser import w_embedding

    w = torch.tensor([-1.0, 0.0, 0.5, 6.5, 13.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)
    assert torch.allclose(w_embedding(w, dim), theirs, atol=1e-6)
    assert w_embedding(w.double(), dim).shape == (5, dim)


# LCM's boundary conditions --------------------------------------------------------------------------------------------------------


def given(x0: Tensor) -> Consistency:
    class Constant(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
            return x0

    return Consistency(Denoiser(Constant(), SD, "x0"))


def test_consistency_is_the_identity_at_zero():
    x, x0 = torch.randn(2, 6, 4, 3, 3)
    p = given(x0)(x, torch.zeros(6, dtype=torch.long), classes(6))
    assert torch.equal(p.x0, x)


def test_consistency_scalings():
    """c_skip = sd^2 / ((k t)^2 + sd^2), c_out = k t / sqrt((k t)^2 + sd^2): as LCMScheduler has them; 6.9e-6 and 1 at the first node."""
    from diffusers import LCMScheduler

    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for t in (0, 1, 19, 259, 999):
        skip, out = LCMScheduler(timestep_scaling=10.0).get_scalings_for_boundary_condition_discrete(t)
        now = torch.tensor([t])
        assert float(given(zero)(one, now, classes(1)).x0) == pytest.approx(skip, rel=1e-6)
        assert float(given(one)(zero, now, classes(1)).x0) == pytest.approx(out, rel=1e-6)
    assert float(given(zero)(one, torch.tensor([19]), classes(1)).x0) == pytest.approx(6.9e-6, rel=0.01)


def test_consistency_is_a_denoiser():
    x, x0 = torch.randn(2, len(T), 4, dtype=torch.float64)
    f = given(x0)
    p: Prediction = f(x, T, classes(len(T)))
    alpha, sigma = SD.at(T, x)
    assert f.schedule is SD and f.denoiser.evaluations == len(T)
    assert torch.allclose(alpha * p.x0 + sigma * p.eps, x, atol=1e-9) and torch.allclose(p.v, alpha * p.eps - sigma * p.x0, atol=1e-9)
    assert torch.allclose(p.x0, x0, atol=2e-5)  # from the first node on, the boundary term is too small to see


def test_a_denoiser_at_the_end_says_the_point_itself():
    x = noisy()
    p = Denoiser(Speaks("v"), SD, "v")(x, torch.full_like(T, END), classes(len(T)))
    assert torch.allclose(p.x0, x, atol=1e-12)
