"""The behaviour suite: what holds for every method of suite.METHODS (resuming and processes have files of their own)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from ddil_lightning import assemble
from ddil_lightning.testing import follows_its_seed, is_itself_without_rollouts, refuses_other_sources
from ddil_lightning.testing.witness import Witness
from suite import (
    ALL,
    EPOCH,
    FORWARD,
    MIXED,
    Entry,
    Gradients,
    Run,
    build,
    captions,
    fit,
    frozen,
    one_of,
    subject,
    train,
)

LONG = 30  # updates: enough for the loss to fall
ONE = one_of("dmd2")


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


@pytest.fixture(scope="module", **{"params": ALL["argvalues"], "ids": ALL["ids"]})
def long(request: pytest.FixtureRequest, tiny: Path) -> tuple[Entry, Run, Witness]:
    """A run on roll-outs and forward latents, and who has seen to its gradients in every step."""
    method = build(request.param, tiny, updates=LONG, optimizer={"lr": 2e-3})
    witness = Witness(method)
    return request.param, fit(method, captions(tiny, rollouts={"every": 10}), witness), witness


# A run ----------------------------------------------------------------------------------------------------------------------------


def test_fit_runs_and_the_clock_counts(long: tuple[Entry, Run, Witness]) -> None:
    _, run, _ = long
    assert run.method.student_updates == LONG and run.method.progress == 1.0
    assert [row["student_updates"] for row in run.rows] == list(range(1, LONG + 1))
    assert run.data.done >= LONG and run.trainer.current_epoch >= LONG // EPOCH
    assert run.method.evaluations["student"] >= LONG * 4 and run.method.evaluations["teacher"] > 0
    last = run.rows[-1]
    assert last["prior/student"] == 0.25 and last["buffer/share_mixed"] > 0 and last["lr"] == pytest.approx(2e-3 * 0.05)
    assert all(math.isfinite(loss) and loss for row in run.rows if (loss := row.get("loss/forward")) is not None)


def test_the_loss_falls(long: tuple[Entry, Run, Witness]) -> None:
    entry, run, _ = long
    losses = torch.tensor([row[entry.falls] for row in run.rows])
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()  # 0.40 to 0.55 of it; without learning 0.90 to 1.00


def test_what_is_trained_moves_and_nothing_else(long: tuple[Entry, Run, Witness]) -> None:
    _, run, witness = long
    assert list(witness.before) and any(list(part.parameters()) for part in frozen(run.method))
    witness.check(run.method)


# Seeds and the underlying method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", **ALL)
def test_a_seed_is_a_run(entry: Entry, tiny: Path) -> None:
    follows_its_seed(subject(entry, tiny))


@pytest.mark.parametrize("entry", **ALL)
def test_prior_1_0_0_is_the_method_without_ddil(entry: Entry, tiny: Path) -> None:
    is_itself_without_rollouts(subject(entry, tiny))


# Trouble --------------------------------------------------------------------------------------------------------------------------


class Poison(Callback):
    """Breaks the student after its second update."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.student_updates == 2:
            pl_module.student.weights()[0].data.fill_(float("nan"))


@pytest.mark.parametrize("entry", **ONE)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_update(entry: Entry, tiny: Path) -> None:
    with pytest.raises(FloatingPointError, match="loss is nan at student update 2"):
        train(entry, tiny, Poison(), prior=FORWARD)
    with pytest.raises(FloatingPointError, match=r"not finite at t = \d+, student update 2"):
        train(entry, tiny, Poison(), prior=MIXED)


@pytest.mark.parametrize("entry", **ALL)
def test_a_source_without_a_target_is_refused(entry: Entry, tiny: Path) -> None:
    refuses_other_sources(subject(entry, tiny))


# Precision and memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", **ONE)
def test_bf16_mixed_runs_networks_in_bf16_and_the_rest_in_float32(entry: Entry, tiny: Path) -> None:
    kinds: set[tuple[torch.dtype, bool]] = set()
    method = build(entry, tiny, updates=2)
    method.student.network.register_forward_hook(lambda net, args, out: kinds.add((out.dtype, torch.is_grad_enabled())))
    run = fit(method, captions(tiny), precision="bf16-mixed")
    assert kinds == {(torch.bfloat16, True), (torch.bfloat16, False)}  # in training and in roll-outs
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    exact = train(entry, tiny, updates=2)
    assert run.method.student_updates == 2
    for a, b in zip(run.rows, exact.rows, strict=True):
        assert a[entry.falls] != b[entry.falls] and a[entry.falls] == pytest.approx(b[entry.falls], rel=0.1)


@pytest.mark.parametrize("entry", **ONE)
def test_gradient_checkpointing_changes_memory_only(entry: Entry, tiny: Path) -> None:
    seen = [Gradients(), Gradients()]
    runs = [train(entry, tiny, g, updates=1, memory={"gradient_checkpointing": flag}) for g, flag in zip(seen, (False, True), strict=True)]
    assert [run.method.student.network.unet.is_gradient_checkpointing for run in runs] == [False, True]
    assert runs[0].rows[0][entry.falls] == runs[1].rows[0][entry.falls]
    for name, grad in seen[0].steps[-1].items():
        torch.testing.assert_close(seen[1].steps[-1][name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "name", [pytest.param("pcm", marks=pytest.mark.slow), "ctm", pytest.param("dmd2", marks=pytest.mark.slow), "ufogen", "ladd"]
)
def test_a_discriminator_reads_the_student_as_it_starts_where_the_teacher_has_no_features(name: str, tmp_path: Path) -> None:
    """The toy's teacher is exact and gives none; `initial` is an answer for every method that can have a discriminator."""
    small = [f"model.init_args.pipeline.init_args.{x}" for x in ("size=64", "width=8")]
    words = [*small, "model.updates=2", "model.gan.weight=0.5", "model.gan.critic_weight=1", f"trainer.default_root_dir={tmp_path}"]
    trainer, method, data = assemble(f"toy2d/{name}.yaml", *words, "model.gan.features=initial")
    before = [p.clone() for p in method.roles["initial"].parameters()]
    trainer.fit(method, datamodule=data)
    assert method.student_updates == 2 and len(list(method.head.parameters())) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, method.roles["initial"].parameters(), strict=True))
    with pytest.raises(ValueError, match="^Exact, the teacher's network, gives no features: set gan.features to initial$"):
        assemble(f"toy2d/{name}.yaml", *words, "model.gan.features=teacher")
