"""A function that is the identity in some rows is asked for the others alone, with the values of a whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.backbones.roles import Role
from ddil_lightning.methods import LCM, PCM
from ddil_lightning.records import Context, LatentBatch
from ddil_lightning.training.identity import identity_but
from suite import Entry, backbone, build


def batch(n: int) -> LatentBatch:
    """Latents of one number each, their own times."""
    t = torch.arange(n)
    return LatentBatch(t.float()[:, None], t, t, t, Context(torch.zeros(n, 1, 1)), None, t, torch.ones(n), t)


@pytest.mark.parametrize(
    ("rows", "split", "asked"), [([1, 3], False, [1, 3]), ([], False, None), ([], True, [0]), ([0, 1, 2, 3], True, [0, 1, 2, 3])]
)
def test_the_rows_that_are_asked_for(rows: list[int], split: bool, asked: list[int] | None) -> None:
    """None where there are none, unless the network is split over processes, which all have to call it."""
    seen: list[list[int]] = []

    def f(x: Tensor, b: LatentBatch) -> Tensor:
        assert torch.equal(x[:, 0].long(), b.t)
        seen.append(b.t.tolist())
        inside = torch.tensor([int(t) in rows for t in b.t])
        return torch.where(inside[:, None], x + 10, x)

    b = batch(4)
    found = identity_but(rows, b.x_t, b, f, split)
    assert torch.equal(found, f(b.x_t, b)) and seen[:-1] == ([] if asked is None else [asked])


@pytest.mark.parametrize(
    ("method", "kwargs", "last"), [(LCM, {"solver_steps": 4, "rollouts": (4,)}, {3}), (PCM, {"solver_steps": 8, "phases": 4}, {1, 3, 5, 7})]
)
def test_a_target_whose_answer_is_discarded_is_not_asked(method: Any, kwargs: dict[str, Any], last: set[int], tiny: Path) -> None:
    """At s = 0 the boundary conditions of LCM leave x_s, and a jump of PCM's from its phase's edge to it is none: bit by bit."""
    made = build(Entry("", method, kwargs), tiny)
    n = len(made.grid)
    node, x = torch.arange(n), torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    c, zero = backbone(tiny).encode_text(["a"] * n).guided(1.0), 0 * node
    b = LatentBatch(x, made.grid.at(node), made.grid.at(node + 1), node, c, None, zero, torch.ones(n), zero - 1)
    whole = made.f_target(x, b)
    target: Role = made.target
    before = target.evaluations
    found = identity_but(made.inside(b), x, b, made.f_target)
    assert made.inside(b) == [i for i in range(n) if i not in last] and target.evaluations - before == n - len(last)
    for i in last:
        assert torch.equal(found[i], x[i]) and torch.equal(whole[i], x[i])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)  # up to the rounding of kernels
