"""What two processes send each other of their gradients, and that it changes nothing: gloo, on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from ddil_lightning.training.reducing import Reduction
from pair import WORLD, Pair
from suite import BY_NAME, build, captions, equal, fit, state

UPDATES = 2


class Look(Callback):
    """Gradients of a step that lie in the buckets of DDP, and those that do not, in bytes."""

    def __init__(self) -> None:
        self.inside, self.beside = 0, 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for grad in grads:
            size = grad.numel() * grad.element_size()
            shared = grad.untyped_storage().nbytes() > size or len(grads) == 1
            self.inside, self.beside = self.inside + shared * size, self.beside + (not shared) * size


def trained(rank: int, name: str, tiny: Path, **told: Any) -> tuple[dict[str, Any], int, int]:
    """What a run of both leaves, and how much of its gradients lay where."""
    strategy, look = DDPStrategy(process_group_backend="gloo", **told), Look()
    given = {"strategy": strategy, "devices": WORLD, "num_nodes": 1}
    run = fit(build(BY_NAME[name], tiny, updates=UPDATES), captions(tiny), look, **given)
    return state(run), look.inside, look.beside


def sent(name: str, tiny: Path, cap: float = 25.0, **told: Any) -> tuple[dict[str, Any], list[int]]:
    """The trained weights that a run leaves, and the numbers of gradients that were averaged, in the order of the buckets."""
    strategy = DDPStrategy(process_group_backend="gloo", bucket_cap_mb=cap)
    method = build(BY_NAME[name], tiny, updates=UPDATES, optimizer={"kind": "SGD", "lr": 1e-3, **told})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        run = fit(method, captions(tiny), strategy=strategy, devices=WORLD, num_nodes=1)
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [event.shapes()[0][0] for event in events if event.name() == "gloo:all_reduce" and event.shapes()[0]]
    return run.method.state_dict(), [size for size in sizes if size > 1]


def with_and_without_views(rank: int, tiny: Path) -> tuple[Any, Any]:
    return trained(rank, "dmd2", tiny), trained(rank, "dmd2", tiny, gradient_as_bucket_view=False)


def test_gradients_lie_in_the_buckets_alone(pair: Pair, tiny: Path) -> None:
    """And not beside them, unless a config says so; weights and states are the same to the bit."""
    for (ours, inside, beside), (plain, none, all_of_them) in pair.run(with_and_without_views, tiny):
        assert beside == 0 and none == 0 and inside == all_of_them > 0
        assert equal(ours, plain)


def in_two(rank: int, name: str, tiny: Path) -> tuple[Any, Any]:
    ours = sent(name, tiny, accumulate=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDPStrategy, "block_backward_sync", lambda self: nullcontext())
        return ours, sent(name, tiny, accumulate=2)


@pytest.mark.parametrize("name", ["dmd2", pytest.param("lcm", marks=pytest.mark.slow)])
def test_an_update_of_several_micro_batches_sends_its_gradients_once(name: str, pair: Pair, tiny: Path) -> None:
    """At the last of them, of each of the optimisers."""
    for (ours, once), (plain, every) in pair.run(in_two, name, tiny):
        assert 2 * sum(once) == sum(every) > 0
        for key, value in ours.items():
            torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-5)


def test_a_static_graph_is_sent_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first one is what DDP knows the graph by."""
    strategy, weights, silent = DDPStrategy(), SimpleNamespace(param_groups=[]), []
    monkeypatch.setattr(DDPStrategy, "block_backward_sync", lambda self: silent.append(True) or nullcontext())
    for static in (False, True):
        strategy.model = SimpleNamespace(static_graph=static)  # type: ignore[assignment]
        for last in (False, True):
            with Reduction().of(weights, strategy, last):
                pass
    assert silent == [True]


def in_turns(rank: int, tiny: Path) -> tuple[Any, Any, list[int]]:
    """By us and by DDP alone, in small buckets, and how many weights student and critic have."""
    ours = sent("dmd2", tiny, cap=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reduction, "begin", lambda self, *given: None)
        method = build(BY_NAME["dmd2"], tiny)
        sizes = [sum(p.numel() for p in found) for found in (method.student.weights(), method.adversary.weights())]
        return ours, sent("dmd2", tiny, cap=0.1), sizes


def test_a_turn_sends_the_gradients_of_its_optimiser_alone(pair: Pair, tiny: Path) -> None:
    """Of two updates of the student, with two of the critic each, to the bit as DDP does it; but for buckets that hold some of both."""
    for (ours, few), (plain, many), (student, critic) in pair.run(in_turns, tiny):
        assert equal(ours, plain)
        maps = 6 * many[-1]  # DDP asks in every backward pass which weights were used
        assert sum(many) - maps == 6 * (student + critic)
        least = UPDATES * student + 2 * UPDATES * critic
        assert least <= sum(few) - maps < 1.2 * least
