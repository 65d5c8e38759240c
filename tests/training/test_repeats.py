"""Blocks that are alike are run once in a plan: the bytes are those of all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

import fluxes
import sd3
from ddil_lightning.backbones.adapters import Adapter, adapt
from ddil_lightning.backbones.flux import Flux
from ddil_lightning.backbones.sd3 import SD3
from ddil_lightning.records import Context
from ddil_lightning.training.ledger import Ledger, _empty
from ddil_lightning.training.repeats import Repeats


def network(kind: str, lora: bool) -> Any:
    """Rows of five and six blocks."""
    if kind == "sd3":
        made: Any = SD3(SD3Transformer2DModel(**{**sd3.NETWORK, "num_layers": 7, "dual_attention_layers": ()}))
    else:
        made = Flux(FluxTransformer2DModel(**{**fluxes.NETWORK, "num_layers": 5, "num_single_layers": 5}))
    if lora:
        made.requires_grad_(False)
        adapt(made.model, Adapter(4), type(made).adapts)
    return made


def counted(kind: str, repeated: bool, again: bool, lora: bool, dtype: Any, layers: Sequence[str] = ()) -> tuple[list[int], int]:
    """What a ledger counts of a pass without gradients and one forth and back, and how many operations it saw; `layers`: of features."""
    ledger = Ledger()
    ops, dispatch = [0], ledger.dispatch

    def seen(*args: Any, **kwargs: Any) -> Any:
        ops[0] += 1
        return dispatch(*args, **kwargs)

    ledger.dispatch = seen  # type: ignore[method-assign]
    model = network(kind, lora).train()
    with ledger:
        empty: dict[int, Any] = {id(p): _empty(p) for p in model.parameters()}
    made = copy.deepcopy(model, empty)
    made.recompute(again)
    with ledger:
        if repeated:
            Repeats(ledger, [made])
        for p in made.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(ledger.gradient)
        x, t = torch.zeros(2, 4, 8, 8), torch.full((2,), 500.0)
        c = Context(torch.zeros(2, 12, 32), pooled=torch.zeros(2, made.model.config.pooled_projection_dim))
        ledger.begin()
        found = []
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            with torch.no_grad():
                made(x, t, c)
            found += [ledger.peak, ledger.activations]
            ledger.begin()
            out = made.features(x, t, c, layers)[0] if layers else made(x, t, c)
            out.float().sum().backward()
            del out
            found += [ledger.peak, ledger.activations, ledger.live, ledger.gradients]
    return found, ops[0]


CASES = [(True, True, None), (False, True, torch.bfloat16), (False, False, None), (True, False, torch.bfloat16)]


@pytest.mark.parametrize(
    ("kind", "again", "lora", "dtype"),
    [
        pytest.param(kind, *case, marks=() if (kind, case) == ("sd3", CASES[0]) else pytest.mark.slow)
        for kind in ("flux", "sd3")
        for case in CASES
    ],
)
def test_the_bytes_are_those_of_a_step_that_runs_them_all(kind: str, again: bool, lora: bool, dtype: Any) -> None:
    (all_, many), (some, few) = (counted(kind, repeated, again, lora, dtype) for repeated in (False, True))
    if (
        dtype is not None
    ):  # copies that autocast made before hold the gradients of their weights back, as activations: no repeated block does
        some[3] = all_[3]
    assert some == all_ and few < 0.75 * many


@pytest.mark.slow
def test_features_that_end_before_the_row() -> None:
    """Then the last block is not there to measure what it needs."""
    (all_, _), (some, _) = (counted("flux", repeated, True, True, None, ["block3"]) for repeated in (False, True))
    assert some == all_
