"""EM distillation against METHODS 5.1 in closed form: reverse and forward KL gradients of Gaussians, noise cancellations, the chain."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from test_lcm import Batches
from torch import Tensor

from affine import SD, Exact, noise
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.methods import EMD, emd
from ddil_lightning.methods.emd import Chain
from ddil_lightning.records import Context, LatentBatch
from ddil_lightning.runs import export
from known import whitened
from options import options
from suite import LORA, Entry, backbone, build, captions, fit

MU, S = 0.5, 0.7
POINTS = [(0.2, 0.8), (-1.0, 1.5)]
FAR = (-0.5, 0.4)
ENTRY = Entry("emd", EMD, {"guidance": 2.0})


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


def exact(a: float, b: float, **chain: Any) -> EMD:
    return EMD(pipeline=Exact(MU, S, a, b), **options(EMD, {"guidance": 1.0, "chain": chain}))


def variances(b: float, t: int) -> tuple[float, float, float, float]:
    """alpha^2, sigma^2 and the variances at `t` of the student's law and of the teacher's."""
    alpha2, sigma2 = float(SD.alphas[t]) ** 2, float(SD.sigmas[t]) ** 2
    return alpha2, sigma2, alpha2 * b**2 + sigma2, alpha2 * S**2 + sigma2


def reverse(a: float, b: float, t: int) -> tuple[float, float]:
    """-dKL(p || q) / d(a, b), Diff-Instruct's descent."""
    alpha2, _, v, vq = variances(b, t)
    return alpha2 * (MU - a) / vq, alpha2 * b * (1 / v - 1 / vq)


def forward(a: float, b: float, t: int) -> tuple[float, float]:
    """-dKL(q || p) / d(a, b), that of maximum likelihood."""
    alpha2, _, v, vq = variances(b, t)
    return alpha2 * (MU - a) / v, alpha2 * b * ((vq + alpha2 * (MU - a) ** 2) / v**2 - 1 / v)


def descent(method: EMD, t: int, z: Tensor, e: Tensor) -> tuple[float, float]:
    """-dL / d(a, b) in units of the KL divergence, weight alpha^2 / sigma^2, from latents z and first noises e."""
    b = noise(len(z))._replace(x_t=z)
    method.start = lambda b: (torch.full((len(z),), t), e)  # type: ignore[method-assign]
    net, (alpha2, sigma2, *_) = method.student.network, variances(1.0, t)
    loss = method.maximisation(method.posterior(b), b).mean()
    return tuple(-alpha2 / sigma2 * float(g) for g in torch.autograd.grad(loss, (net.a, net.b)))  # type: ignore[return-value]


# One step: the reverse KL divergence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [100, 400, 800])
@pytest.mark.parametrize(("a", "b"), POINTS)
@pytest.mark.parametrize(("cancel", "factor"), [("linear", 0.16), ("sum", 0.16), ("raw", 0.16), ("stein", 1.0)])
def test_one_step_is_diff_instructs_gradient(
    t: int, a: float, b: float, cancel: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gamma_e times the gradient of KL(p || q); of `stein`, which reads the score after the step, the gradient itself for small steps."""
    z, e, n = whitened(4096, 3).split(1, 1)
    monkeypatch.setattr(emd, "normal", lambda like, generator: n)
    gamma = 1e-9 if cancel == "stein" else 0.16
    found = descent(exact(a, b, steps=1, gamma_e=gamma, gamma_z=0.0, cancel=cancel), t, z, e)
    assert found == pytest.approx([factor * g for g in reverse(a, b, t)], rel=1e-6)


def test_cancelling_takes_the_noise_out() -> None:
    """Per sample the standard deviation falls to a fraction of it, at the same mean."""

    def spread(cancel: str) -> float:
        method = exact(0.2, 0.8, steps=1, gamma_z=0.0, cancel=cancel)
        return float(method.posterior(noise(4096)).e_hat.std())

    assert spread("linear") < 0.15 * spread("raw")


# Long chains: the forward KL divergence ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long() -> Callable[[str], tuple[float, float]]:
    """-dL / d(a, b) of 120 steps in which z mixes, from 30,000 chains, by what cancels their noise."""
    z, e = whitened(30_000, 2).split(1, 1)

    def found(cancel: str) -> tuple[float, float]:
        return descent(exact(*FAR, steps=120, gamma_e=0.05, gamma_z=0.05, cancel=cancel), 400, z, e)

    return found


@pytest.mark.parametrize("cancel", [pytest.param("raw", marks=pytest.mark.slow), "stein"])
def test_long_chains_are_maximum_likelihood(cancel: str, long: Callable[[str], tuple[float, float]]) -> None:
    wanted, other = forward(*FAR, 400), reverse(*FAR, 400)
    found = long(cancel)
    assert found == pytest.approx(wanted, rel=0.06)  # Euler's steps of 0.05 and the chains' own noise
    assert abs(found[0] - other[0]) > 0.1 * wanted[0] and abs(found[1] - other[1]) > 0.6 * wanted[1]  # not Diff-Instruct's


@pytest.mark.slow
def test_linear_cancelling_is_biased_once_z_mixes(long: Callable[[str], tuple[float, float]]) -> None:
    """A_K correlates with z_K: the mean parameter's gradient is right, the spread's is smaller (METHODS 5.1)."""
    (da, db), wanted = long("linear"), forward(*FAR, 400)
    assert da == pytest.approx(wanted[0], rel=0.06) and db < 0.92 * wanted[1]


@pytest.mark.parametrize("cancel", ["linear", "stein"])
def test_a_frozen_z_ends_between_the_two(cancel: str) -> None:
    """(alpha^2 / Lambda) ((mu - a) / Vq, b (1 / V - 1 / Vq)) with Lambda = 1 + sigma^2 / Vq - sigma^2 / V, however long the chain is."""
    a, b, t = 0.2, 0.8, 400
    z, e = whitened(20_000, 2).split(1, 1)
    _, sigma2, v, vq = variances(b, t)
    lam = 1 + sigma2 / vq - sigma2 / v
    found = descent(exact(a, b, steps=120, gamma_e=0.05, gamma_z=0.0, cancel=cancel), t, z, e)
    assert found == pytest.approx([g / lam for g in reverse(a, b, t)], rel=0.05)


# The chain --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_equal_scores_give_no_update(steps: int) -> None:
    """Without a difference of the scores everything in e_K is the chain's own noise: bit by bit, and z forgets nothing but by its prior."""
    method = exact(MU, S, steps=steps)
    end = method.posterior(noise(64))
    assert bool((end.e_hat == 0).all()) and not torch.equal(end.e, torch.zeros_like(end.e))
    assert float(method.maximisation(end, noise(64)).abs().max()) == 0


def test_the_noise_keeps_the_variance_of_eulers_steps() -> None:
    """1 / (1 - gamma / 2) for e at rest, 1.087 for 0.4^2; and the same for z by its own step."""
    end = exact(MU, S, steps=60, gamma_e=0.16, gamma_z=0.16, cancel="raw").posterior(noise(30_000))
    assert float(end.e.var()) == pytest.approx(1.087, abs=0.03) and float(end.z.var()) == pytest.approx(1.087, abs=0.03)


def test_zs_step_is_the_products_with_the_jacobian(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """z + gamma_z (alpha J^T d - z), J by finite differences of the student's samples; nodes after the first keep their latents."""
    own = Pipeline(str(tiny))  # of its own, for it goes to double precision
    method = build(ENTRY, tiny, chain={"steps": 1, "gamma_z": 0.25}, reflect="off", pipeline=own)
    method.double()
    for role in ("critic", "student"):
        with torch.no_grad():
            for p in method.roles[role].weights():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7), dtype=p.dtype))
    numbers = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 8, 8, generator=numbers, dtype=torch.float64)
    c = backbone(tiny).encode_text(["a red circle", "a small zero"])
    c, t = Context(c.text.double()).guided(1.0), torch.tensor([999, 749])
    b = LatentBatch(z, t, t, torch.tensor([0, 1]), c, None, t, torch.ones(2), t)
    drift = torch.randn(z.shape, generator=numbers, dtype=torch.float64)
    monkeypatch.setattr(method, "drift", lambda *args: drift)
    monkeypatch.setattr(emd, "normal", lambda like, generator: torch.zeros_like(like))
    end = method.posterior(b)
    alpha, sigma = method.critic.schedule.at(method.start(b)[0], z)
    pull, h = torch.zeros(6, dtype=torch.float64), 1e-4
    directions = torch.randn(6, *z.shape, generator=numbers, dtype=torch.float64)
    with torch.no_grad():
        for i, u in enumerate(directions):
            change = (method.samples(z + h * u, t, c) - method.samples(z - h * u, t, c)) / (2 * h)
            pull[i] = (change * alpha / sigma * drift)[0].sum()
    found = (end.z - z)[0] / 0.25 + z[0]
    torch.testing.assert_close((directions[:, 0] * found).flatten(1).sum(1), pull, rtol=1e-5, atol=1e-6)
    assert torch.equal(end.z[1], z[1])


def test_the_scores_are_reflected_before_their_difference(tiny: Path) -> None:
    box = [[-0.3, -0.2, -0.25, -0.1], [0.2, 0.3, 0.15, 0.2]]
    method = build(ENTRY, tiny, reflect="static", box=box, reflects={"critic": True})
    c, t = backbone(tiny).encode_text(["a red circle"]).guided(1.0), torch.tensor([500])
    x = 3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    b = LatentBatch(x, t, t, t, c, None, t, torch.ones(1), t)
    lo, hi = (torch.tensor(side).view(1, -1, 1, 1) for side in box)
    with torch.no_grad():
        fake = method.critic(x, t, c).x0
        assert bool((fake > hi).any())
        expected = (
            (method.teacher(x, t, c).x0 - fake.clamp(lo, hi)) * method.critic.schedule.at(t, x)[0] / method.critic.schedule.at(t, x)[1]
        )
    torch.testing.assert_close(method.drift(x, t, b), expected)


@pytest.mark.slow
def test_what_a_step_costs_is_what_its_chain_asks_for(tiny: Path) -> None:
    """K evaluations of guided teacher (2) and critic, one of the critic for its own; one of the student and, of the rows whose z moves, one
    for each further step and one for the M-step."""
    for gamma_z, students in ((1e-3, 4), (0.0, 0)):
        method, seen = build(ENTRY, tiny, updates=3, chain={"steps": 4, "gamma_z": gamma_z}, log_every=100), Batches()
        run = fit(method, captions(tiny, SamplingPrior(1, 0, 0)), seen)
        n, first = 3 * run.data.batch_size, sum(int((b.node == 0).sum()) for b in seen.seen)
        assert len(seen.seen) == 3 and 0 < first < n
        assert method.evaluations == {"student": n + students * first, "critic": (4 + 1) * n, "teacher": 2 * 4 * n}


@pytest.mark.parametrize("cancel", ["linear", "stein"])
@pytest.mark.parametrize("nodes", [[0, 1, 0, 3], [0, 0, 0, 0], [1, 2, 1, 3]], ids=["some", "all", "none"])
def test_where_z_keeps_still_the_student_is_asked_once_and_nothing_else_changes(
    cancel: str, nodes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chain, loss and gradient are those of a student that is asked for all rows at every step, as a sharded one is."""
    b = noise(4)._replace(node=torch.tensor(nodes))
    found = []
    for every in (False, True):
        method = exact(0.2, 0.8, steps=3, gamma_z=0.05, cancel=cancel)
        monkeypatch.setattr(type(method.shards), "split", property(lambda self, every=every: every))
        end = method.posterior(b)
        loss = method.maximisation(end, b)
        grads = torch.autograd.grad(loss.mean(), (method.student.network.a, method.student.network.b))
        found.append(([end.z, end.e, end.e_hat, end.x, loss, *grads], method.evaluations["student"]))
    (mine, calls), (theirs, all_calls) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    later = 3 if cancel == "linear" else 4
    assert calls == 4 + later * nodes.count(0) and all_calls == 4 + later * 4


@pytest.mark.slow
def test_how_far_z_goes_is_published(tiny: Path) -> None:
    run = fit(build(ENTRY, tiny, updates=2, chain={"gamma_z": 0.1}), captions(tiny, SamplingPrior(1, 0, 0)))
    moved = [row["chain/moved"] for row in run.rows if "chain/moved" in row]
    assert moved and 0.2 < moved[0] < 10


# Bad input --------------------------------------------------------------------------------------------------------------------------


def test_a_chain_that_diverges_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = build(ENTRY, tiny, updates=1, chain={"steps": 6, "gamma_e": 1.0})
    monkeypatch.setattr(method, "drift", lambda x_t, t, b: 10 * x_t)  # scores that push away what is away
    with pytest.raises(
        FloatingPointError, match=r"the Langevin chain of 6 steps diverged at student update 0: .*; lower model.chain.gamma_e"
    ):
        fit(method, captions(tiny, SamplingPrior(1, 0, 0)))


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ({"steps": 0}, "chain.steps is 0"),
        ({"gamma_e": 0.0}, "chain.gamma_e is 0"),
        ({"gamma_z": 2.0}, "gamma_z is 2"),
        ({"cancel": "all"}, "linear"),
    ],
)
def test_no_such_chain(chain: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Chain(**chain)


def test_a_student_that_starts_below_the_teacher(tiny: Path) -> None:
    """t* of EMD: pure noise is told the time 499; the teacher does not start there, and the scheduler holds that time."""
    method = build(ENTRY, tiny, steps=1, start=499, rollouts=(1,))
    assert method.grid.times.tolist() == [499, -1]
    method.feed.prior = SamplingPrior(0.5, 0.25, 0.25)
    with pytest.raises(ValueError, match="the teacher, which does not start from pure noise at t = 499"):
        method.check_prior(method.feed.prior)
    assert method.deployment.scheduler is not None
    scheduler = method.deployment.scheduler()
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [499]
    torch.testing.assert_close(scheduler.alphas_cumprod, backbone(tiny).pipe.scheduler.alphas_cumprod[:500])
    plain = build(ENTRY, tiny).deployment.scheduler  # a backbone of somebody else's may have a scheduler() that knows no `times`
    assert plain is not None and "times" not in plain.keywords  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="steps = 3 does not divide the schedule's 500 times"):
        build(ENTRY, tiny, steps=3, start=499, rollouts=(1,))


def test_the_card_of_such_a_student_calls_it_where_it_begins(tiny: Path) -> None:
    """ComfyUI begins at the teacher's last time, so nothing is said of nodes there; and nobody reads five hundred betas."""
    method = build(ENTRY, tiny, steps=1, start=499, rollouts=(1,), adapter=LORA)
    card = export.card(method, 1, files={"lora": "few.safetensors"})
    text = card.text()
    assert "The student begins at t = 499, and ComfyUI's samplers at the last of the teacher's 1000 times" in text
    assert "KSampler" not in text and len(text) < 6000
    (said,) = re.findall(r"LCMScheduler\(.*\)", text)
    again = eval(said, {"LCMScheduler": LCMScheduler, "pipe": backbone(tiny).pipe})
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {k: v for k, v in card.scheduler.config.items() if k[0] != "_"}
    assert "*KSampler* with steps 4" in export.card(build(ENTRY, tiny, adapter=LORA), 4, files={"lora": "few.safetensors"}).text()


def test_the_papers_single_step_trains_and_samples_as_its_scheduler_does(tiny: Path) -> None:
    """From noise and captions alone; a sample is x0 at t*, and diffusers' scheduler makes the same of the network's output."""
    method = build(ENTRY, tiny, steps=1, start=499, rollouts=(1,), updates=2, chain={"steps": 2}, ema=0.0)
    run = fit(method, captions(tiny, SamplingPrior(0, 1, 0)))
    assert run.method.student_updates == 2
    z, c = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), backbone(tiny).encode_text(["a red circle", "a small zero"])
    policy, grid = method.eval().deployment.sampler(1)
    x = policy.sample(z, grid, c)
    p = method.student(z, torch.full((2,), 499), c)
    torch.testing.assert_close(x, p.x0)
    assert method.deployment.scheduler is not None
    scheduler = method.deployment.scheduler()
    scheduler.set_timesteps(1)
    with torch.no_grad():
        made = scheduler.step(method.student.output(p), scheduler.timesteps[0], z).prev_sample
    torch.testing.assert_close(x, made, rtol=1e-4, atol=1e-5)
