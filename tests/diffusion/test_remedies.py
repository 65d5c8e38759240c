"""Shifted times and scaled eps against closed forms: what they are right for, they make right exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.samplers import grid_of, named, policy_of
from ddil_lightning.commands.entries import is_sampler, parsed
from ddil_lightning.commands.rack import ready
from ddil_lightning.diffusion.analytic import PointMass
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.remedies import Remedy, Scaled
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim, renoise
from ddil_lightning.errors import Refusal
from ddil_lightning.records import Context
from samplers import C, Curved, noise
from suite import backbone

SD, ZERO = NoiseSchedule.scaled_linear(), NoiseSchedule.scaled_linear(zero_terminal_snr=True)
PROMPTS = ["a small red circle", "a handwritten one"]


class Loud(nn.Module):
    """The exact eps of data of one point, too large by a factor."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.exact, self.by = PointMass(0.7, SD), by

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        return self.by * SD.from_x0(x_t, t, self.exact(x_t, t, c)).eps


@pytest.mark.parametrize("transition", [ddim, renoise], ids=str)
def test_eps_that_is_too_large_by_lambda_is_made_right(transition: object) -> None:
    policy, grid = Policy(Denoiser(Loud(1.05), SD, "eps"), transition), Grid.named("trailing", 4)  # type: ignore[arg-type]
    made = [p.sample(noise(), grid, C, torch.Generator().manual_seed(0)) for p in (policy, Remedy(scale=1.05).on(policy))]
    assert float((made[0] - 0.7).abs().max()) > 0.05
    assert torch.allclose(made[1], torch.full_like(made[1], 0.7), atol=1e-9)


@pytest.mark.parametrize("schedule", [SD, ZERO], ids=["sd", "zero-snr"])
def test_scaled_predictions_stay_consistent(schedule: NoiseSchedule) -> None:
    """Also at zero terminal SNR, where eps says nothing of x0, and x0 is left alone."""
    denoiser, t = Denoiser(Curved(), schedule, "v"), torch.full((3,), 999)
    for time in (t, t - 400):
        p, q = denoiser(noise(), time, C), Scaled(denoiser, 1.1)(noise(), time, C)
        alpha, sigma = schedule.at(time, noise())
        torch.testing.assert_close(alpha * q.x0 + sigma * q.eps, noise())
        torch.testing.assert_close(q.v, alpha * q.eps - sigma * q.x0)
        torch.testing.assert_close(q.eps if float(alpha.min()) else q.x0, p.eps / 1.1 if float(alpha.min()) else p.x0)


@pytest.mark.parametrize("variance", [0.0, 0.3])
@pytest.mark.parametrize("late", [-6, 0, 6])
def test_a_latent_of_another_time_is_asked_at_its_own(variance: float, late: int) -> None:
    """Latents of a law with so much variance of its own, whose time is not the node they are taken for."""
    g, t = torch.Generator().manual_seed(0), 400
    x0, eps = (torch.randn(2, 500_000, dtype=torch.float64, generator=g) for _ in range(2))
    x = SD.add_noise(variance**0.5 * x0, eps, t + late)
    found = Remedy(20, variance=variance).shifted(SD, x, t, 300)
    assert bool((found - (t + late)).abs().max() <= 2)
    if variance:  # without it they look noisier than they are, and are shifted as far as the window goes
        assert Remedy(20).shifted(SD, x, t, 300).tolist() == [410, 410]


def test_the_window_keeps_to_the_step_the_cutoff_and_the_beginning() -> None:
    x = torch.zeros(2, 8)  # of no variance: the lowest time of the window
    assert Remedy(20).shifted(SD, x, 400, 300).tolist() == [390, 390]
    assert Remedy(20).shifted(SD, x, 400, 395).tolist() == [396, 396]
    assert Remedy(20).shifted(SD, x, 5, -1).tolist() == [0, 0]
    assert Remedy(20, cutoff=400).shifted(SD, x, 400, 300).tolist() == [400, 400]
    assert Remedy(20).shifted(SD, x, 999, 749).tolist() == [999, 999]


def test_a_shifted_policy_asks_and_steps_from_the_shifted_time() -> None:
    policy = Remedy(40).on(Policy(Denoiser(Curved(), SD, "eps"), ddim))
    x, t = 0.5 * noise(), torch.full((3,), 499)
    times = policy.asked(x, 499, 249)
    assert bool((times < t).all())
    inner = Denoiser(nn.Module(), SD, "eps")
    inner.network.forward = lambda x, t, c: torch.tanh(x + t.view(-1, 1, 1, 1) / 1000)  # type: ignore[method-assign]
    policy.denoiser = inner
    want = ddim(SD, x, inner(x, times, C), times, torch.full((3,), 249))
    torch.testing.assert_close(policy(x, 499, 249, C), want)


# By name --------------------------------------------------------------------------------------------------------------------------


def test_a_remedy_that_changes_nothing_is_the_pipelines_own_sampler(tiny: Path) -> None:
    plain, same = (sampling.pipeline_latents(named(backbone(tiny), name), PROMPTS, 4, 2.0, 3) for name in ("ddim", "ddim-ts1"))
    assert float((plain - same).abs().max()) < 2e-5 * float(plain.abs().max())


def test_correction_is_of_ddims_first_step_alone() -> None:
    """Also beneath a shift and a scale, neither of which touches x_T."""
    policy = Policy(Denoiser(Curved(), SD, "eps"), ddim)
    for remedy in (Remedy(corrected=True), Remedy(20, scale=1.02, corrected=True)):
        made = remedy.on(policy)
        x0 = made.denoiser(noise(), torch.full((3,), 999), C).x0
        torch.testing.assert_close(made(noise(), 999, 749, C), SD.add_noise(x0, noise(), 749))
        assert Remedy.named(str(remedy).split("-")) == remedy
    with pytest.raises(ValueError, match="noise correction is of DDIM's first step, and the policy steps by Renoise"):
        Remedy(corrected=True).on(Policy(policy.denoiser, renoise))


def test_an_entry_of_a_comparison_names_it(tiny: Path) -> None:
    entry = parsed(f"{tiny}:ddim-ts30-es1.02")
    pipe = ready(entry, backbone(tiny))
    assert pipe.remedy == Remedy(30, scale=1.02) and str(pipe.remedy) == "ts30-es1.02" and backbone(tiny).remedy is None
    with pipe.counting() as calls:
        made = sampling.pipeline_latents(pipe, PROMPTS, 4, 2.0, 3)
    assert calls == [16]  # guidance takes two of each
    plain = sampling.pipeline_latents(named(backbone(tiny), "ddim"), PROMPTS, 4, 2.0, 3)
    assert made.isfinite().all() and float((made - plain).abs().max()) > 1e-3
    policy = policy_of(pipe, 1.0)
    assert policy.asked(torch.zeros(1, 4, 8, 8), 499, 249).tolist() == [484] and grid_of(pipe, 4).nodes.tolist() == [999, 749, 499, 249]


def test_the_name_says_the_variance_and_the_cutoff(tiny: Path) -> None:
    """Latents of data of variance 1 look like noise at every time: without `tv` all were asked as late as the window goes."""
    pipe, plain = (ready(parsed(f"{tiny}:ddim-{name}"), backbone(tiny)) for name in ("ts20-tv1.0-tc250-es1.01", "ts20"))
    assert pipe.remedy == Remedy(20, cutoff=250, variance=1.0, scale=1.01) and str(pipe.remedy) == "ts20-tv1-tc250-es1.01"
    assert Remedy.named(str(pipe.remedy).split("-")) == pipe.remedy and str(Remedy(0, 250, 1.0)) == ""
    x = torch.cat([torch.full((1, 1, 8), s) for s in (-1.0, 1.0)], 1).repeat(1, 1, 32)[:, None] * (511 / 512) ** 0.5  # variance 1
    assert policy_of(plain, 1.0).asked(x, 499, 249).tolist() == [509]
    assert policy_of(pipe, 1.0).asked(x, 249, -1).tolist() == [249]
    narrow = ready(parsed(f"{tiny}:ddim-ts20-tv0.5"), backbone(tiny))
    half = x * float((0.5 * SD.alphas[493].square() + SD.sigmas[493].square()).sqrt())
    assert policy_of(narrow, 1.0).asked(half, 499, 249).tolist() == [493]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("lcm-es0.98", True),
        ("ddim-ts20-tv1.0", True),
        ("ddim-ts20-tv1-tc100-es1.01", True),
        ("ddim-nc", True),
        ("ddim-nc-ts20-es1.01", True),
        ("lcm-nc", False),  # it is DDIM's step that is corrected
        ("dpm-ts20", False),
        ("ddim-", False),
        ("ddim-ts0", False),
        ("ddim-tv1.0", False),  # of no window
        ("ddim-ts20-tc100-tv1.0", False),
        ("ddim-ts20-tv", False),
    ],
)
def test_names_of_samplers(name: str, is_one: bool) -> None:
    assert is_sampler(name) is is_one
    if not is_one:
        with pytest.raises(Refusal, match="no sampler"):
            parsed(f"base:{name}")


@pytest.mark.parametrize("kwargs", [{"window": -1}, {"scale": 3.0}, {"variance": float("nan")}])
def test_remedies_that_cannot_be_are_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(kwargs))} is "):
        Remedy(**kwargs)  # type: ignore[arg-type]
