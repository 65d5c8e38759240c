"""A deployment: what is told, what is baked, and what a table names."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.diffusion.denoiser import Consistency
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.transitions import renoise
from ddil_lightning.training.deployment import Deployment
from suite import METHODS, build

GRID = partial(Grid.named, "trailing", total=1000)


@pytest.mark.parametrize(
    ("told", "stands_for", "scale", "quoted"), [(True, None, 3.0, 3.0), (False, None, 1.0, 3.0), (False, 5.0, 1.0, 5.0)]
)
def test_guidance_is_told_baked_or_stood_for(told: bool, stands_for: float | None, scale: float, quoted: float, tiny: Path) -> None:
    student = Pipeline(str(tiny)).role("student", w_conditioned=told)
    made = Deployment(Policy(Consistency(student), renoise), GRID, (4, 2), 3.0, None, stands_for)
    assert (made.told, made.guidance_scale, made.quoted) == (told, scale, quoted)
    assert made.denoiser is student and made.network is student.network  # below what is wrapped around it


@pytest.mark.parametrize(("name", "told"), [("lcm", True), ("lcm-fixed-guidance", False), ("pd", True), ("dmd2", False)])
def test_deployments_of_methods(name: str, told: bool, tiny: Path) -> None:
    method = build(next(entry for entry in METHODS if entry.name == name), tiny)
    made = method.deployment
    assert (made.told, made.guidance_scale, made.quoted) == (told, 2.0 if told else 1.0, 2.0)
    assert made.network is method.average and made.scheduler is not None
    for n in made.steps:
        policy, grid = made.sampler(n)
        assert policy is made.policy and len(grid) == n
    with pytest.raises(ValueError, match="1001"):
        made.sampler(1001)


def test_what_dmd2_stands_for_is_the_guidance_of_its_real_score(tiny: Path) -> None:
    entry = next(entry for entry in METHODS if entry.name == "dmd2")
    made = build(entry, tiny, scores={"guidance": 5.0}).deployment
    assert (made.told, made.guidance, made.guidance_scale, made.quoted) == (False, 2.0, 1.0, 5.0)


def test_a_teacher_has_its_own_scheduler(tiny: Path) -> None:
    method = build(METHODS[0], tiny)
    made = method.baseline
    assert made.scheduler is None and made.network is method.backbone.network() and not made.told and made.quoted == 2.0
    before = method.teacher.evaluations
    made.denoiser(torch.zeros(3, *method.backbone.latent_shape), torch.zeros(3).long(), method.backbone.encode_text(["a"] * 3))
    assert (made.denoiser.evaluations, method.teacher.evaluations) == (3, before)


def test_a_grid_of_another_step_count_is_refused(tiny: Path) -> None:
    """Nodes of one's own, cut to so many as there are: tables would have been of other step counts than they say."""
    made = Deployment(
        Policy(Pipeline(str(tiny)).role("student"), renoise), lambda n: Grid([999, 700, 400, -1][4 - min(n, 3) - 1 :]), (3,), 2.0
    )
    assert len(made.sampler(2)[1]) == 2
    with pytest.raises(ValueError, match=r"for 4 steps, which has 3"):
        made.sampler(4)
