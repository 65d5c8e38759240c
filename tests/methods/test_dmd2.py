"""DMD2's losses against METHODS 4 in closed form: pseudo-loss, KL gradients of Gaussians, critic and GAN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from affine import Exact, noise
from ddil_lightning.backbones.unet import UNet
from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.methods import DMD2
from ddil_lightning.methods.dmd2 import direction, emphasis
from ddil_lightning.records import Context, LatentBatch
from ddil_lightning.training.adversary import Span, untouched
from ddil_lightning.training.gan import Gan
from ddil_lightning.training.scores import Scores
from options import options
from suite import Entry, backbone, build, captions, equal, fit

SD = NoiseSchedule.scaled_linear()
ENTRY = Entry("dmd2", DMD2, {"guidance": 2.0})


def gaussian(mu: float, s: float, a: float, b: float, **kwargs: Any) -> DMD2:
    torch.manual_seed(0)
    made: dict[str, Any] = {"gan": {"weight": 0.0, "critic_weight": 0.0}, "guidance": 1.0}
    parts = {name: kwargs.pop(name) for name in ("schedule", "critic") if name in kwargs}
    return DMD2(pipeline=Exact(mu, s, a, b, **parts), **options(DMD2, made, kwargs))


@pytest.mark.parametrize("g", [None, 1.0, 5.0])
def test_the_teachers_roll_outs_are_guided_as_the_real_score_is(g: float | None, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise their states would be those of another distribution than the student is moved to (METHODS 4, pitfalls)."""
    method = build(ENTRY, tiny, guidance=3.0, scores={"guidance": g})
    told: list[Any] = []
    forward = method.teacher.forward
    monkeypatch.setattr(method.teacher, "forward", lambda x, t, c: (told.append(c.w), forward(x, t, c))[1])
    c, x = backbone(tiny).encode_text(["a red circle"] * 2).guided(2.0), torch.randn(2, 4, 8, 8)
    method.estimates(x, torch.tensor([500, 500]), LatentBatch(x, x, x, x, c, None, x, torch.ones(2), x))
    assert method.policies.teacher is not None
    method.policies.teacher(x, 999, 749, c)
    asked = {None if w is None else float(w.unique()) for w in told}
    assert len(told) == 9 and asked == {{None: 2.0, 1.0: None, 5.0: 4.0}[g]}  # 8 steps of the teacher to an interval of the student


# The distribution-matching gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser", ["sample", "batch"])
@pytest.mark.parametrize("reflect", ["off", "real", "both"])
def test_the_pseudo_losss_gradient_is_g_over_numel(normaliser: str, reflect: str, tiny: Path) -> None:
    """With everything written out by hand from the networks' raw outputs: guidance, conversion, reflection, normaliser."""
    box = [[-0.3, -0.2, -0.25, -0.1], [0.2, 0.3, 0.15, 0.2]]
    clamped = {"reflect": "off" if reflect == "off" else "static", "reflects": {"critic": reflect == "both"}, "box": box}
    method = build(ENTRY, tiny, scores={"normaliser": normaliser, "guidance": 2.5}, guidance=3.0, **clamped)
    with torch.no_grad():
        for p in method.critic.parameters():
            p.add_(0.05 * torch.randn_like(p))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=g).requires_grad_()
    c, t = backbone(tiny).encode_text(["a red circle", "a", "a small zero"]).guided(2.0), torch.tensor([999, 749, 249])
    b = LatentBatch(x.detach(), t, t, t, c, None, t, torch.ones(3), t)
    method.matching(x, b).mean().backward()

    with torch.no_grad():
        y, tau, eps = method.adversary.diffuse(x, "matching", *method.tau)
        bar = method.backbone.pipe.scheduler.alphas_cumprod[tau].view(-1, 1, 1, 1)
        a, s = bar.sqrt(), (1 - bar).sqrt()
        torch.testing.assert_close(y, a * x + s * eps)
        unet, null = method.backbone.network(), method.backbone.null().expand(3)
        given, free = unet(y, tau, c.guided(None)), unet(y, tau, null)
        real, fake = a * y - s * (given + 1.5 * (given - free)), a * y - s * method.critic.network(y, tau, c)
        lo, hi = (torch.tensor(side).view(1, -1, 1, 1) for side in box)
        assert all(((z < lo) | (z > hi)).double().mean() > 0.1 for z in (real, fake))
        real = real if reflect == "off" else real.clamp(lo, hi)
        fake = fake.clamp(lo, hi) if reflect == "both" else fake
        scale = (x - real).abs().mean((1, 2, 3) if normaliser == "sample" else (0, 1), keepdim=True)
        expected = (fake - real) / scale / x.numel()
    assert x.grad is not None and float((x.grad - expected).abs().max()) < 1e-7


def test_scores_without_a_normaliser_have_the_usual_one(tiny: Path) -> None:
    method = build(ENTRY, tiny, scores=Scores(1.5, (0.1, 0.9)))
    assert (method.scores.guidance, method.normaliser, method.divergence, method.tau) == (1.5, "sample", "reverse_kl", (100, 900))


def test_a_real_score_without_guidance_is_the_teacher_alone_in_one_evaluation(tiny: Path) -> None:
    method = build(ENTRY, tiny, guidance=3.0, scores={"guidance": 1.0})
    with torch.no_grad():
        for p in method.critic.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    c, t = backbone(tiny).encode_text(["a red circle", "a", "a small zero"]).guided(2.0), torch.tensor([999, 749, 249])
    b = LatentBatch(x.detach(), t, t, t, c, None, t, torch.ones(3), t)
    method.matching(x, b).mean().backward()
    assert (method.teacher.evaluations, method.critic.evaluations) == (3, 3)
    y, tau, _ = method.adversary.diffuse(x.detach(), "matching", *method.tau)
    with torch.no_grad():
        real, fake = method.teacher(y, tau, c.guided(None)).x0, method.critic(y, tau, c).x0
        expected = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True) / x.numel()
    assert x.grad is not None and float((x.grad - expected).abs().max()) < 1e-7


def kl(method: DMD2, t: int, n: int = 4096) -> tuple[Tensor, Tensor]:
    """dKL/da and dKL/db at time `t`: the code's gradient with METHODS' weight alpha^2 / sigma^2 in place of the normaliser.

    The integrand is quadratic in (z, eps), so samples whose first two moments are exact give the integral itself.
    """
    raw = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z, eps = (torch.linalg.qr(raw - raw.mean(0))[0] * n**0.5).split(1, 1)
    b, times = noise(n)._replace(x_t=z), torch.full((n,), t)
    method.adversary.diffuse = lambda x, *args: (SD.add_noise(x, eps, times), times, eps)  # type: ignore[method-assign]
    x = method.student(b.x_t, b.t, b.c).x0
    x.retain_grad()
    method.matching(x, b).mean().backward(retain_graph=True)
    assert x.grad is not None
    with torch.no_grad():
        distance = (x - method.teacher(SD.add_noise(x, eps, times), times, b.c).x0).abs()
        g = x.grad * n * torch.maximum(distance, 1e-3 * x.abs())
        alpha, sigma = SD.at(t, x)
    net = method.student.network
    return torch.autograd.grad(((alpha / sigma).square() * g * x).mean(), (net.a, net.b))  # type: ignore[return-value]


@pytest.mark.parametrize("t", [100, 400, 800])
@pytest.mark.parametrize(("a", "b"), [(0.2, 0.8), (-1.0, 1.5)])
def test_the_gradient_is_that_of_the_kl_divergence(t: int, a: float, b: float) -> None:
    """dKL/da = alpha^2 (a - mu) / Vq and dKL/db = alpha^2 b (1 / Vq - 1 / V) for exact denoisers of both laws (METHODS 4)."""
    mu, s = 0.5, 0.7
    da, db = kl(gaussian(mu, s, a, b), t)
    alpha, sigma = float(SD.alphas[t]), float(SD.sigmas[t])
    v, vq = (alpha * b) ** 2 + sigma**2, (alpha * s) ** 2 + sigma**2
    assert float(da) == pytest.approx(alpha**2 * (a - mu) / vq, rel=1e-6)
    assert float(db) == pytest.approx(alpha**2 * b * (1 / vq - 1 / v), rel=1e-6)


def descent(method: DMD2) -> float:
    """-dL/da."""
    b = noise(4096)
    method.matching(method.student(b.x_t, b.t, b.c).x0, b).mean().backward()
    return -float(method.student.network.a.grad)


def test_descent_moves_towards_the_teacher_and_stops_there() -> None:
    assert descent(gaussian(0.5, 0.7, -0.5, 0.7)) > 1e-3 and descent(gaussian(0.5, 0.7, 1.5, 0.7)) < -1e-3
    assert abs(descent(gaussian(0.5, 0.7, 0.5, 0.7))) < 1e-12


def test_swapping_fake_and_real_flips_the_sign() -> None:
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 4, 3, 3, 3, generator=g)
    x = (real + fake) / 2  # equally far from both
    torch.testing.assert_close(direction(x, real, fake), -direction(x, fake, real))
    method, swapped = gaussian(0.5, 0.7, -0.5, 0.9), gaussian(0.5, 0.7, -0.5, 0.9)
    swapped.teacher.network, swapped.critic.network = swapped.critic.network, swapped.teacher.network
    assert descent(method) * descent(swapped) < 0


def test_the_normaliser_has_a_floor_and_nan_is_no_gradient() -> None:
    x = torch.tensor([[2.0, -2.0], [2.0, -2.0], [0.0, 0.0]])
    real, fake = torch.stack([x[0], x[1] + 1.0, x[2]]), x + torch.tensor([[0.5], [3.0], [0.0]])
    torch.testing.assert_close(direction(x, real, fake), torch.tensor([[250.0, 250.0], [2.0, 2.0], [0.0, 0.0]]))
    both = direction(x, real, fake, "batch")
    torch.testing.assert_close(both, (fake - real) * 3)  # one mean for all: |x - real| is 0, 1 and 0
    assert direction(x.half(), real.half(), fake.half()).dtype == torch.float32
    assert torch.equal(direction(x, real, fake, "none"), fake - real)  # Diff-Instruct's


# f-distill and Diff-Instruct ----------------------------------------------------------------------------------------------------------


R = (torch.linspace(-2, 2, 9, dtype=torch.float64)).exp().requires_grad_()
DIVERGENCES: dict[str, Any] = {
    "reverse_kl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "hellinger": lambda r: (1 - r.sqrt()).square(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / r).log(),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_emphasis_is_the_divergences_curvature(name: str) -> None:
    """h(r) = r^2 f''(r) of f written out, up to a factor, which the mean over the batch takes away; averaged logits count once."""
    (slope,) = torch.autograd.grad(DIVERGENCES[name](R).sum(), R, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), R)
    h = (R.square() * curvature).detach()
    logits = R.detach().log().view(-1, 1).repeat(1, 3)
    found = emphasis(logits, name, 4)  # type: ignore[arg-type]
    assert found.shape == (9, 1, 1, 1)
    torch.testing.assert_close(found.flatten().double(), h / h.mean(), rtol=1e-5, atol=1e-6)


def test_members_of_a_run_have_ratios_of_their_own() -> None:
    logits = torch.tensor([[[0.0, 9.0]], [[0.0, -9.0]]])  # [B, 1, S], and beyond the largest that counts
    found = emphasis(logits, "kl", 3)
    torch.testing.assert_close(found[:, 0, 0], torch.ones(2))
    torch.testing.assert_close(found[0, 0, 1] / found[1, 0, 1], torch.tensor(10.0).exp())


def test_the_density_ratio_weighs_the_direction(tiny: Path) -> None:
    """Against the plain method on the same numbers; and a discriminator is needed."""
    c, t = backbone(tiny).encode_text(["a red circle", "a", "a small zero"]).guided(2.0), torch.tensor([999, 749, 249])
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    b = LatentBatch(x, t, t, t, c, None, t, torch.ones(3), t)
    found = {}
    for name in ("reverse_kl", "kl"):
        method = build(ENTRY, tiny, scores={"divergence": name})
        with torch.no_grad():
            for p in [*method.critic.weights(), *method.head.parameters()]:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
        moved = x.clone().requires_grad_()
        method.matching(moved, b).mean().backward()
        found[name] = moved.grad
    y, tau, _ = method.adversary.diffuse(x, "matching", *method.tau)
    with torch.no_grad():
        r = method.head(*method.critic.features(y, tau, c)).flatten().exp()
    torch.testing.assert_close(found["kl"], found["reverse_kl"] * (r / r.mean()).view(-1, 1, 1, 1))
    assert float((r / r.mean() - 1).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="divergence = kl weighs samples by what a discriminator says of them"):
        build(ENTRY, tiny, scores={"divergence": "kl"}, gan={"weight": 0.0, "critic_weight": 0.0})
    with pytest.raises(ValueError, match="scores.divergence is 'tv': give reverse_kl"):
        build(ENTRY, tiny, scores={"divergence": "tv"})


# The critic ---------------------------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """x0 = p_t + q_t x_t, free at every time."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.p, self.q = (nn.Parameter(torch.zeros(steps, dtype=torch.float64)) for _ in range(2))

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        return self.p[t, None] + self.q[t, None] * x_t


def test_the_critics_regression_converges_to_the_closed_form() -> None:
    """On outputs of law N(a, b^2) the minimiser of `following` is their exact denoiser, at every time."""
    steps, a, b = 8, -0.4, 0.6
    coarse = NoiseSchedule(torch.linspace(0.98, 0.1, steps).double(), (1 - torch.linspace(0.98, 0.1, steps).double() ** 2).sqrt())
    table, exact = Table(steps), Gaussian(a, b, coarse)
    method = gaussian(0.0, 1.0, a, b, schedule=coarse, critic=table, teacher_steps=8)
    batch = noise(8192)
    x = a + b * (batch.x_t - batch.x_t.mean()) / batch.x_t.std()
    optimizer = torch.optim.Adam(table.parameters(), lr=0.1)
    for k in range(150):
        method.adversary.updates = k  # new noise
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - k / 150)
        optimizer.zero_grad()
        method.adversary.following(x, batch).backward()
        optimizer.step()
    t = torch.arange(steps)
    for y in (-1.0, 2.0):
        points = torch.full((steps, 1), y, dtype=torch.float64)
        torch.testing.assert_close(table(points, t, batch.c), exact(points, t, batch.c), rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_the_denoising_target_is_the_networks_own_space(kind: Any) -> None:
    schedule = NoiseSchedule.flow() if kind == "flow" else SD
    x0, eps, t = *torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([1, 250, 500, 750, 998])
    out = schedule.target(kind, x0, eps, t)
    p = schedule.prediction(kind, schedule.add_noise(x0, eps, t), t, out)
    torch.testing.assert_close(p.x0, x0)
    torch.testing.assert_close(p.eps, eps)


# The GAN ------------------------------------------------------------------------------------------------------------------------------


def with_data(tiny: Path, **kwargs: Any) -> tuple[DMD2, LatentBatch, Tensor]:
    """A method, a batch whose data have captions of their own, and outputs of the student."""
    method = build(ENTRY, tiny, reflect="off", **kwargs)
    c, own = (backbone(tiny).encode_text(words) for words in (["a red circle", "a"], ["a zero", "a one"]))
    x, real = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([999, 499])
    return method, LatentBatch(x, t, t, t, c.guided(1.0), real, t * 0 + 1, torch.tensor([1.0, 0.5]), t, own), x.clone()


@pytest.mark.parametrize("layers", [(), ("up0", "down0", "mid")], ids=["bottleneck", "several"])
@pytest.mark.parametrize("whose", ["critic", "teacher"])
def test_the_critics_loss_by_hand(whose: str, layers: tuple[str, ...], tiny: Path) -> None:
    """Denoising in v, fake logits from the same noisy outputs, real logits from noised data under the data's own captions."""
    method, b, x = with_data(tiny, gan={"features": whose, "critic_weight": 0.3, "layers": layers})
    loss = float(method.adversary.following(x, b).detach())
    (y, t, eps), (z, t_real, _) = method.adversary.diffuse(x, "critic"), method.adversary.diffuse(b.real, "real")
    alpha, sigma = SD.at(t, x)
    net = method.critic.network if whose == "critic" else method.teacher.network
    with torch.no_grad():
        denoising = (method.critic.network(y, t, b.c) - (alpha * eps - sigma * x)).square().mean((1, 2, 3))
        fake, real = (method.head(*net.features(*args, layers)).flatten(1) for args in ((y, t, b.c), (z, t_real, b.real_c)))
        assert fake.shape == (2, len(layers) or 1)
        expected = (b.weight * (denoising + 0.3 * softplus(fake).mean(1)) + 0.3 * softplus(-real).mean(1)).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert not torch.equal(t, t_real) and int(t.max()) <= 999 and method.tau == (20, 980)


@pytest.mark.parametrize("whose", ["critic", "teacher"])
def test_an_answer_of_the_critic_serves_both_losses_of_a_turn(whose: str, tiny: Path) -> None:
    """The student's gradient to the bit, and the critic's loss by hand, where matching looked; real samples are at times of that span."""
    method, b, x = with_data(tiny, gan={"features": whose, "critic_weight": 0.3}, scores={"tau": (0.4, 0.6), "share": True})
    critic, span = method.critic, Span(low=400, high=600)
    heard, gradients = method.adversary.hear(x, b, "matching", span), []
    for given in (heard, None):
        leaf = x.clone().requires_grad_()
        method.matching(leaf, b, given).sum().backward()
        gradients.append(leaf.grad)
    assert equal(*gradients) and float(gradients[0].abs().max()) > 0  # type: ignore[union-attr]
    (y, t, eps), (z, t_real, _) = (method.adversary.diffuse(u, name, 400, 600) for u, name in ((x, "matching"), (b.real, "real")))
    before, loss = critic.evaluations, method.adversary.following(x, b, heard=heard)
    assert critic.evaluations == before + (2 if whose == "critic" else 0) and all(400 <= u <= 600 for u in (*t.tolist(), *t_real.tolist()))
    alpha, sigma = SD.at(t, x)
    net = critic.network if whose == "critic" else method.teacher.network
    with torch.no_grad():
        if whose == "teacher":  # whose features nobody has asked for yet
            y_fake, t_fake, _ = method.adversary.diffuse(x, "critic", 400, 600)
        else:
            y_fake, t_fake = y, t
        denoising = (critic.network(y, t, b.c) - (alpha * eps - sigma * x)).square().mean((1, 2, 3))
        fake, real = (method.head(*net.features(*args)).flatten(1) for args in ((y_fake, t_fake, b.c), (z, t_real, b.real_c)))
        expected = (b.weight * (denoising + 0.3 * softplus(fake).mean(1)) + 0.3 * softplus(-real).mean(1)).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.head.parameters())
    assert all(p.grad is not None for p in critic.parameters())


def test_features_are_the_critics_and_the_students_side_of_the_gan(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer once read the teacher's features; nothing of the teacher is called for the GAN."""
    method, b, x = with_data(tiny)
    monkeypatch.setattr(type(method.teacher.network), "features", None)
    monkeypatch.setattr(method.critic.network, "features", lambda *args: method.critic.network.with_features(*args)[1])
    x.requires_grad_()
    with untouched(method.critic, method.head):
        loss = method.adversary.realism(x, b)
        loss.mean().backward()
    y, t, _ = method.adversary.diffuse(x, "realism")
    logits = method.head(*method.critic.network.with_features(y, t, b.c)[1])
    torch.testing.assert_close(loss, softplus(-logits).flatten())
    assert float(x.grad.abs().max()) > 0
    assert all(p.grad is None and p.requires_grad for part in (method.critic, method.head) for p in part.parameters())


def test_what_was_frozen_before_a_turn_is_frozen_after_it() -> None:
    """A base that adapters share, which came out of a turn with gradients on."""
    part = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    with untouched(part, None):
        assert not any(p.requires_grad for p in part.parameters())
    assert [p.requires_grad for p in part.parameters()] == [False, False, True, True]


def test_without_its_weight_the_student_asks_the_discriminator_nothing(tiny: Path) -> None:
    method, b, x = with_data(tiny, gan={"weight": 0.0})
    assert method.adversary.realism(x, b) == 0.0 and method.critic.evaluations == method.teacher.evaluations == 0
    assert method.head is not None and build(ENTRY, tiny, gan={"weight": 0.0, "critic_weight": 0.0}).head is None


def test_features_are_the_bottlenecks_and_cost_no_decoder(tiny: Path) -> None:
    net = backbone(tiny).trainable()
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([3, 999]), backbone(tiny).encode_text(["a", "a zero"])
    called: list[nn.Module] = []
    handle = net.unet.up_blocks[0].register_forward_hook(lambda module, args, out: called.append(module))
    (features,) = net.features(x, t, c)
    assert not called
    out, (same,) = net.with_features(x, t, c)
    assert len(called) == 1 and torch.equal(features, same) and torch.equal(out, net(x, t, c))
    handle.remove()
    assert not net.unet.mid_block._forward_hooks
    net.unet.mid_block = None  # as in U-Nets that were pruned: then the last block of the encoder is the bottleneck
    (other,) = net.features(x, t, c)
    assert other.shape == features.shape and not torch.equal(other, features)
    assert backbone(tiny).head()(features).shape == (2, 1, 1, 1) and features.shape[1] == net.unet.config.block_out_channels[-1]


def small_unet(blocks: int) -> UNet:
    from diffusers import UNet2DConditionModel

    widths = tuple(8 * (i + 1) for i in range(blocks))
    kinds: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * blocks, "up_block_types": ("UpBlock2D",) * blocks}
    sizes = {"sample_size": 16, "layers_per_block": 1, "cross_attention_dim": 4, "attention_head_dim": 4, "norm_num_groups": 4}
    return UNet(UNet2DConditionModel(block_out_channels=widths, **kinds, **sizes))


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_features_of_any_layer_have_a_head_that_fits_and_cost_nothing_behind_it(blocks: int) -> None:
    net = small_unet(blocks)
    x, t, c = torch.randn(2, 4, 16, 16), torch.tensor([3, 999]), Context(torch.randn(2, 3, 4))
    assert net.layers == (*(f"down{i}" for i in range(blocks)), "mid", *(f"up{i}" for i in range(blocks)))
    run: list[str] = []
    for name, block in net._depths().items():
        block.register_forward_pre_hook(lambda module, args, name=name: run.append(name))
    for i, name in enumerate(net.layers):
        run.clear()
        (features,) = net.features(x, t, c, [name])
        assert run == list(net.layers[: i + 1]) and net.head([name])(features).shape == (2, 1, 1, 1)
    run.clear()
    asked = ["mid", "down0"]
    several = net.features(x, t, c, asked)
    assert run == [*net.layers[:blocks], "mid"]
    out, same = net.with_features(x, t, c, asked)
    assert all(torch.equal(a, b) for a, b in zip(several, same, strict=True)) and torch.equal(out, net(x, t, c))
    assert torch.equal(several[0], net.features(x, t, c)[0]) and torch.equal(several[1], net.features(x, t, c, ["down0"])[0])
    assert net.head(asked)(*several).shape == (2, 2)
    for wrong, said in ((["middle"], "gan.layers has 'middle': UNet has down0, "), (["mid", "mid"], "each is read once")):
        with pytest.raises(ValueError, match=said):
            net.head(wrong)
    with pytest.raises(ValueError, match="without a discriminator: set gan.weight and gan.critic_weight"):
        Gan(layers=("mid",))


def test_without_a_gan_no_features_are_asked_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that gives none can be a critic."""
    method, b, x = with_data(tiny, gan={"weight": 0.0, "critic_weight": 0.0})
    monkeypatch.setattr(type(method.critic.network), "with_features", None)
    assert float(method.adversary.following(x, b).detach()) > 0 and method.critic.evaluations == len(x)


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["critic", "teacher"])
def test_a_gan_on_several_layers_trains(whose: str, tiny: Path) -> None:
    gan = {"layers": ["down0", "up1"], "features": whose}
    before = build(ENTRY, tiny, gan=gan).head.state_dict()
    run = fit(build(ENTRY, tiny, gan=gan, updates=2), captions(tiny))
    after = run.method.head.state_dict()
    assert {name.partition(".")[0] for name in after} == {"0", "1"} and all(row["gan"] > 0 for row in run.rows)
    assert all(not torch.equal(after[name], before[name]) for name in after if name.endswith("weight"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gan": {"weight": 1e300}}, "gan.weight is 1e+300: give a number from 0 to 1000"),
        ({"gan": {"critic_weight": -1.0}}, "gan.critic_weight is -1.0: give a number from 0 to 1000"),
        ({"critic": {"steps": 0}}, "critic.steps is 0: give a number from 1 to 1e+06"),
        ({"critic": {"lr": float("inf")}}, "critic.lr is inf: give a number from 0 to 10"),
        ({"critic": {"lr": -1.0}}, "critic.lr is -1.0: give a number from 0 to 10"),
        (
            {"gan": {"kind": "hinge"}, "scores": {"divergence": "kl"}},
            "scores.divergence = kl takes the discriminator's logit for that of a density ratio, which it is of the logistic loss alone: "
            "set model.gan.kind to softplus, not hinge",
        ),
        ({"teacher_steps": 4 * 10**12}, "teacher_steps is 4000000000000: give a number from 1 to 1000"),
        ({"rollouts": (4, 10**12)}, "rollouts is (4, 1000000000000): give numbers from 1 to 1000"),
        ({"scores": {"tau": (0.02, 1e300)}}, "scores.tau is (0.02, 1e+300): give numbers from 0 to 1"),
        ({"scores": {"tau": (0.5,)}}, "scores.tau is [0.5]: give 2 numbers"),
        ({"scores": {"tau": (0.9, 0.1)}}, "scores.tau is [0.9, 0.1]: give shares of T with 0 <= tau[0] < tau[1] <= 1"),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_told_by_its_own_rule(wrong: dict[str, Any], said: str, tiny: Path) -> None:
    with pytest.raises(ValueError) as error:
        build(ENTRY, tiny, **wrong)
    assert str(error.value) == said


def test_a_range_of_times_that_rounds_to_the_last_one_is_that_one(tiny: Path) -> None:
    assert build(ENTRY, tiny, scores={"tau": (0.9999, 1.0)}).tau == (999, 999)
