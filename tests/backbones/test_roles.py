"""Roles: who has weights of its own, and how one network becomes and follows another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.diffusion.reflection import Reflection
from ddil_lightning.records import Context

TIMES = torch.tensor([10, 990])


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Pipeline:
    return Pipeline(str(tiny))


@pytest.fixture(scope="module")
def given(backbone: Pipeline) -> tuple[torch.Tensor, torch.Tensor, Context]:
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, TIMES, backbone.encode_text(["a", "a red circle"])


def test_names_and_whose_the_weights_are(backbone: Pipeline) -> None:
    roles = {name: backbone.role(name) for name in ("teacher", "student", "critic")}
    assert all(role.name == name for name, role in roles.items())
    assert {name: role.own for name, role in roles.items()} == {"teacher": False, "student": True, "critic": True}
    assert roles["teacher"].network is backbone.network() and roles["teacher"].weights() == []
    assert roles["teacher"].null is not None and roles["student"].null is None
    assert len(roles["student"].weights()) == len(list(backbone.network().parameters())) > 0
    theirs = {p.data_ptr() for name in ("teacher", "critic") for p in roles[name].parameters()}
    assert not theirs & {p.data_ptr() for p in roles["student"].parameters()}


def test_a_copy_is_frozen_equal_and_stays_behind(backbone: Pipeline, given: tuple[torch.Tensor, torch.Tensor, Context]) -> None:
    student = backbone.role("student")
    target = student.copied("target")
    assert (target.name, target.own, target.weights()) == ("target", True, []) and not any(m.training for m in target.modules())
    assert student.weights() and all(m.training for m in student.network.modules())  # the source is as it was
    before = target(*given).x0
    assert torch.equal(before, student(*given).x0)
    with torch.no_grad():
        student.weights()[0].add_(1)
    assert torch.equal(target(*given).x0, before) and not torch.allclose(student(*given).x0, before)


def test_a_copy_may_have_a_reflection_of_its_own(backbone: Pipeline, given: tuple[torch.Tensor, torch.Tensor, Context]) -> None:
    student, box = backbone.role("student"), Reflection([-0.1] * 4, [0.1] * 4, "static")
    assert student(*given).x0.abs().max() > 0.1 >= student.copied("target", box)(*given).x0.abs().max()


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_following_is_a_weighted_mean_in_place(decay: float, backbone: Pipeline) -> None:
    student = backbone.role("student")
    average = student.copied("average")
    with torch.no_grad():
        for p in student.weights():
            p.add_(1)
    own = [p.clone() for p in average.parameters()]
    average.follow(student, decay)
    for now, was, theirs in zip(average.parameters(), own, student.parameters(), strict=True):
        torch.testing.assert_close(now, decay * was + (1 - decay) * theirs)
    assert average.weights() == []


def test_apart_counts_for_itself_and_is_not_reflected(backbone: Pipeline, given: tuple[torch.Tensor, torch.Tensor, Context]) -> None:
    student = backbone.role("student", reflection=Reflection([-0.1] * 4, [0.1] * 4, "static"))
    apart = student.apart()
    assert apart.network is student.network and apart(*given).x0.abs().max() > 0.1 >= student(*given).x0.abs().max()
    student(*given)
    assert (apart.evaluations, student.evaluations) == (2, 4)
    teacher = backbone.role("teacher")
    guided = teacher.apart()
    x, t, c = given
    assert torch.equal(guided(x, t, c.guided(2.0)).x0, teacher(x, t, c.guided(2.0)).x0) and guided.evaluations == teacher.evaluations == 4
    other = backbone.trainable()
    assert student.apart(other).network is other
