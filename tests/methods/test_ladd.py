"""LADD and its discriminator against METHODS 5.3 in closed form: both sides' losses, R1, what is real, and where gradients go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.backbones.network import Network
from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.denoiser import s_embedding
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.methods import LADD
from ddil_lightning.records import STUDENT, TEACHER, Context, LatentBatch
from ddil_lightning.training.gan import Gan, LogitNormal, leaves, slope
from ddil_lightning.training.vision import ToldHeads, embedding
from known import SD, Affine, Known, latents, noise
from options import options
from suite import Entry, backbone, build, train

ENTRY = Entry("ladd", LADD, {"guidance": 2.0})


class Seen(Gaussian):
    """A teacher whose one layer's features are k x_t, with a parameter k that must stay as it is."""

    layers = ("whole",)

    def __init__(self) -> None:
        super().__init__(0.5, 0.7, SD)
        self.k = nn.Parameter(torch.tensor(3.0, dtype=torch.float64), requires_grad=False)

    def features(self, x_t: Tensor, t: Tensor, c: Any, layers: Any = ()) -> tuple[Tensor, ...]:
        assert tuple(layers) == self.layers
        return (self.k * x_t,)


class Linear(nn.Module):
    """D(f) = sum(w f): its slope and its gradients are w."""

    def __init__(self, *w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float32))

    def forward(self, f: Tensor) -> Tensor:
        return (self.w * f).sum(1, keepdim=True)


def exact(w: float = 0.5, **kwargs: Any) -> LADD:
    return LADD(pipeline=Known(Seen(), student=Affine(0.2, 0.8), head=Linear(w)), **options(LADD, {"guidance": 1.0}, kwargs))


def captions_of(method: LADD, x: Tensor, c: Context) -> LatentBatch:
    """Latents x that are data as well, of captions c."""
    return latents(x, 999, real=x.flip(0), c=c.guided(0.0), real_c=c)


def batch(n: int = 64, **kwargs: Any) -> LatentBatch:
    return latents(noise(n), 999, 0.5 + 0.7 * noise(n, seed=5), **kwargs)


# The losses ---------------------------------------------------------------------------------------------------------------------------


def test_both_sides_of_both_losses() -> None:
    logits = torch.tensor([[-2.0, 0.5], [3.0, 1.0]], dtype=torch.float64)
    soft, hinge = Gan(1, 1), Gan(1, 1, kind="hinge")
    torch.testing.assert_close(soft.fake(logits), (1 + logits.exp()).log().mean(1))
    torch.testing.assert_close(hinge.fake(logits), torch.tensor([0.75, 3.0], dtype=torch.float64))
    torch.testing.assert_close(hinge.real(logits), torch.tensor([1.75, 0.0], dtype=torch.float64))
    torch.testing.assert_close(hinge.fooling(logits), -logits.mean(1))
    for gan in (soft, hinge):
        torch.testing.assert_close(gan.real(logits), gan.fake(-logits))  # swapping real and fake is swapping D's sign
    torch.testing.assert_close(soft.fooling(logits), soft.real(logits))
    # Of heads on maps of different sizes each has one voice.
    for side in (soft.fake, soft.real, soft.fooling, hinge.fake, hinge.real, hinge.fooling):
        torch.testing.assert_close(side((logits, logits[:, :1])), (side(logits) + side(logits[:, :1])) / 2)


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_swapping_real_and_fake_flips_the_discriminators_gradient(kind: str) -> None:
    """At D = 0, where both sides have the same slope, and with the same times and noise for both."""
    method, b = exact(0.0, gan={"kind": kind}), batch()
    same = method.adversary.generator("any", torch.device("cpu")).get_state()
    method.adversary.generator = lambda purpose, device: torch.Generator().set_state(same)  # type: ignore[method-assign]
    x = method.student(b.x_t, b.t, b.c).x0.detach()
    head: Any = method.head
    there, back = (torch.autograd.grad(method.adversary.following(a, b._replace(real=r)), head.w)[0] for a, r in ((x, b.real), (b.real, x)))
    torch.testing.assert_close(there, -back)
    assert float(there.abs()) > 0.05


def test_the_students_gradient_goes_through_the_teachers_features_and_not_into_the_teacher() -> None:
    """-D(k (alpha x + sigma eps)) with D linear: the gradient in x is -w k alpha_tau / numel."""
    method, b = exact(0.5), batch()
    x = method.student(b.x_t, b.t, b.c).x0.detach().requires_grad_()
    with method.adversary.still():
        loss: Any = method.adversary.realism(x, b)
        loss.mean().backward()
    _, tau, _ = method.adversary.diffuse(x.detach(), "realism", times=method.adversary.times)
    expected = -0.5 * 3.0 * SD.alphas[tau][:, None] / len(x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)
    assert method.head is not None and all(p.grad is None and p.requires_grad for p in method.head.parameters())
    assert method.backbone.network().k.grad is None and len(set(tau.tolist())) > 32


def test_r1_is_the_squared_slope_and_nothing_for_a_constant() -> None:
    (f,) = leaves([torch.randn(5, 2)])
    torch.testing.assert_close(slope(Linear(0.3, -0.4)(f), [f]), torch.full((5,), 0.25))
    torch.testing.assert_close(slope(Linear(0.0, 0.0)(f), [f]), torch.zeros(5))

    class Square(nn.Module):
        def forward(self, a: Tensor, told: Tensor) -> Tensor:
            return a.square().sum(1) / 2 + (told * a).sum(1)

    told = torch.randn(5, 2)
    torch.testing.assert_close(slope(Square()(f, told), [f]), (f + told).square().sum(1))


def test_the_weight_of_r1_and_its_approximation_by_noise() -> None:
    b, x = batch(4096), noise(4096, seed=9)
    with torch.no_grad():
        plain = exact(0.5).adversary.telling(x, b)
    for given, expected in (({"r1": 2.0}, 2 * 0.25), ({"r1": 2.0, "r1_noise": 0.1}, 2 * (0.5 * 3 * 0.1) ** 2)):
        told = exact(0.5, gan=given).adversary.telling(x, b)
        assert told is not None and plain is not None
        assert float((told - plain).mean()) == pytest.approx(expected, rel=0.05)
    flat = exact(0.0, gan={"r1": 2.0, "r1_noise": 0.1}).adversary.telling(x, b)
    assert flat is not None and float((flat - 2).abs().max()) == 0  # hinge: 1 + 1 at D = 0, and no slope


def test_the_times_are_logit_normal() -> None:
    t = LogitNormal(1.0, 0.5)(100_000, 1000, torch.Generator().manual_seed(0)).double()
    logit = ((t + 0.5) / 1000).logit()
    assert float(logit.mean()) == pytest.approx(1.0, abs=0.01) and float(logit.std()) == pytest.approx(0.5, abs=0.01)
    assert LogitNormal(50.0)(8, 1000, torch.Generator()).tolist() == [999] * 8


def test_a_discriminator_that_follows_and_a_student_that_fools_it_meet_at_the_teachers_mean() -> None:
    """A generator a + b z of the wrong mean is moved towards the data's."""
    method = LADD(pipeline=Known(Seen(), student=Affine(-0.5, 0.7), head=Linear(0.0)), guidance=1.0)
    student, heads = (torch.optim.SGD(part.parameters(), lr=lr) for part, lr in ((method.student, 0.05), (method.head, 0.05)))  # type: ignore[union-attr]
    path = []
    for k in range(150):
        method.adversary.updates = k
        b = latents(noise(256, seed=2 * k + 10), 999, 0.5 + 0.7 * noise(256, seed=2 * k + 11))
        x = method.student(b.x_t, b.t, b.c).x0
        with method.adversary.still():
            loss: Any = method.adversary.realism(x, b)
            student.zero_grad()
            loss.mean().backward()
            student.step()
        heads.zero_grad()
        (method.adversary.following(x.detach(), b) + method.head.w.square().sum()).backward()  # type: ignore[union-attr]
        heads.step()
        path.append(float(method.student.network.a))
    assert path[0] < path[20] < path[60] and path[-1] > 0.2


# What is real ---------------------------------------------------------------------------------------------------------------------------


def test_with_synthetic_data_only_the_ends_of_the_teachers_trajectories_are_real() -> None:
    method = exact(real="teacher", steps=4)
    assert method.wants.ends and method.wants.pure_noise
    source = torch.tensor([TEACHER, STUDENT, TEACHER, STUDENT] * 2)
    b = batch(8, source=source, end=noise(8, seed=6), noise=noise(8))
    found = method.adversary.real(b)
    assert found is not None and found[0] is b.end and found[1] is b.c
    assert found[2].tolist() == [2.0, 0.0] * 4
    poisoned = b._replace(end=torch.where((source == STUDENT)[:, None], 1e3, b.end), real=None, real_c=None)
    with torch.no_grad():
        a, z = (method.adversary.following(b.x_t, given) for given in (b._replace(real=None), poisoned))
    assert float(a) == float(z)
    none = b._replace(source=source * 0 + STUDENT)
    assert float(method.adversary.real(none)[2].sum()) == 0  # type: ignore[index]
    loss = method.adversary.following(b.x_t, none)  # of fakes alone nothing is learned
    gradients = torch.autograd.grad(loss, method.adversary.weights())
    assert float(loss) == 0 and all(float(g.abs().max()) == 0 for g in gradients)


def test_a_run_on_the_teachers_samples_needs_no_images(tiny: Path) -> None:
    run = train(ENTRY, tiny, prior=SamplingPrior(0, 0, 1), updates=2, real="teacher", teacher_steps=4)
    start = build(ENTRY, tiny)
    assert run.method.student_updates == 2 and run.rows[0]["critic_loss"] > 0 and run.rows[0]["gan"] > 0
    assert not any(torch.equal(a, b) for a, b in zip(run.method.head.parameters(), start.head.parameters(), strict=True) if a.ndim > 1)
    assert len(run.method.head) == len(start.student.network.layers)


def test_heads_are_told_the_pooled_text_and_tau(tiny: Path) -> None:
    """Of the same features another caption or another tau has another verdict, and the slope of R1 is in the features alone."""
    method = build(ENTRY, tiny, gan={"r1": 1.0})
    adversary, n = method.adversary, 2
    c = method.backbone.encode_text(["a red circle", "a handwritten one"])
    x, t = torch.randn(n, *method.backbone.latent_shape), torch.tensor([700, 100])
    *features, told = adversary._features(x, t, c)
    network = method.teacher.network
    assert tuple(f.shape[1] for f in features) == network.widths(network.layers) and adversary.conditions == 1
    torch.testing.assert_close(told, torch.cat([embedding(c), s_embedding(t)], 1))
    verdict = method.head(*features, told)
    for other in (torch.cat([embedding(c).flip(0), s_embedding(t)], 1), torch.cat([embedding(c), s_embedding(t.flip(0))], 1)):
        assert all(float((a - b).abs().max()) > 1e-4 for a, b in zip(method.head(*features, other), verdict, strict=True))
    b = captions_of(method, x, c)
    loss: Any = adversary.telling(x, b)
    loss.mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for head in method.head for p in (head.v.weight, head.psi.weight))
    # Samples that are no images have no such heads: the toy's members have one each.
    assert not isinstance(exact().head, ToldHeads) and exact().adversary.conditions == 0


@pytest.mark.parametrize(
    ("prior", "says"),
    [
        (SamplingPrior(0.5, 0.5, 0.0), "the prior gives it no share: give data.prior.teacher one, or set model.real to data"),
        (SamplingPrior(0.5, 0.25, 0.25), "in mixed trajectories the student acts too: set data.prior.mix to trajectory"),
    ],
)
def test_a_prior_without_ends_of_the_teacher_is_refused(prior: SamplingPrior, says: str) -> None:
    method = exact(real="teacher")
    with pytest.raises(ValueError, match=says):
        method.check_prior(prior)
    method.check_prior(SamplingPrior(0.5, 0.25, 0.25, "trajectory"))
    exact().check_prior(prior)


def test_data_visit_the_nodes_by_their_shares() -> None:
    grid = exact(shares=(0.7, 0.1, 0.1, 0.1)).grid
    drawn = torch.bincount(grid.draw(20_000, torch.Generator().manual_seed(0)), minlength=4) / 20_000
    torch.testing.assert_close(drawn, torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.01, rtol=0)
    a, b = (Grid.named("trailing", 4).draw(9, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"gan": {"weight": 0.0, "critic_weight": 0.0}}, "LADD is its discriminator, and gan.weight is 0"),
        ({"gan": {"features": "critic"}}, "LADD has no critic whose features a head could read: set gan.features to teacher"),
        ({"steps": 7}, "steps = 7 does not divide the schedule's 1000 times"),
        ({"teacher_steps": 6}, "teacher_steps = 6 is no multiple of steps = 4"),
        ({"shares": (1.0, 2.0)}, "shares of 4 nodes are as many numbers"),
        ({"guidance": [1.0, 2.0]}, "student is not told the guidance"),
    ],
)
def test_bad_options_are_refused_in_a_line(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        exact(**kwargs)
    assert "\n" not in str(refused.value)


def test_a_network_that_says_no_widths_is_refused_in_a_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backbone(tiny).network()), "widths", Network.widths)
    says = "^UNet says no widths of its features, for which LADD makes heads: write widths"
    with pytest.raises(NotImplementedError, match=says) as refused:
        build(ENTRY, tiny)
    assert "\n" not in str(refused.value)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^gan\.kind is 'wgan': give softplus or hinge"):
        Gan(1, 1, kind="wgan")  # type: ignore[arg-type]


@pytest.mark.parametrize("critic", [False, True], ids=["frozen features", "a critic's"])
def test_a_slope_is_the_same_whether_the_head_answers_once_or_twice(critic: bool) -> None:
    """Of a frozen network's features one answer serves loss and slope; a critic learns by the loss alone, and the head answers anew."""
    b, x = batch(16), noise(16, seed=9)
    adversary = exact(0.5, gan={"r1": 2.0}).adversary
    read = adversary.view
    k = torch.ones((), requires_grad=True)
    asked: list[Any] = []
    assert adversary.head is not None
    adversary.head.register_forward_hook(lambda *_: asked.append(1))
    if critic:
        adversary.view = lambda *args, **kwargs: tuple(k * f for f in read(*args, **kwargs))  # type: ignore[method-assign]
    told = adversary.telling(x, b)
    assert told is not None and len(asked) == (3 if critic else 2)
    told.mean().backward()
    gradients = [p.grad.clone() for p in adversary.head.parameters() if p.grad is not None]
    by_loss = exact(0.5, gan={}).adversary
    plain = by_loss.telling(x, b)
    assert plain is not None
    torch.testing.assert_close(told - plain, torch.full_like(plain, 2 * 0.25))
    plain.mean().backward()
    by_slope = [2 * 2 * p.detach() for p in adversary.head.parameters()]
    for mine, loss, slope_ in zip(gradients, [p.grad for p in by_loss.head.parameters()], by_slope, strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(mine, loss + slope_)
    if critic:
        assert k.grad is not None and float(k.grad.abs()) > 0
