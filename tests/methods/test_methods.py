"""The behaviour suite: what holds for every method of suite.METHODS (resuming and processes have files of their own)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from ddil_lightning import assemble
from ddil_lightning.testing import follows_its_seed, is_itself_without_rollouts
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
    digest,
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


class Watch(Gradients):
    """Also looks for gradients where none belong."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        assert all(p.grad is None for p in pl_module.parameters() if not p.requires_grad)
        assert all(p.grad is None and not p.requires_grad for part in frozen(pl_module) for p in part.parameters())
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        assert mine and all(p.grad is not None and bool(p.grad.isfinite().all()) for p in mine)
        assert sum(float(p.grad.abs().sum()) for p in mine) > 0


@pytest.fixture(scope="module", **{"params": ALL["argvalues"], "ids": ALL["ids"]})
def long(request: pytest.FixtureRequest, tiny: Path) -> tuple[Entry, Run, str]:
    """A run on roll-outs and forward latents, and the hash of the frozen networks before it."""
    before = digest(*frozen(build(request.param, tiny)))
    return (
        request.param,
        fit(build(request.param, tiny, updates=LONG, optimizer={"lr": 2e-3}), captions(tiny, rollouts={"every": 10}), Watch()),
        before,
    )


# A run ----------------------------------------------------------------------------------------------------------------------------


def test_fit_runs_and_the_clock_counts(long: tuple[Entry, Run, str]) -> None:
    _, run, _ = long
    assert run.method.student_updates == LONG and run.method.progress == 1.0
    assert [row["student_updates"] for row in run.rows] == list(range(1, LONG + 1))
    assert run.data.done >= LONG and run.trainer.current_epoch >= LONG // EPOCH
    assert run.method.evaluations["student"] >= LONG * 4 and run.method.evaluations["teacher"] > 0
    last = run.rows[-1]
    assert last["prior/student"] == 0.25 and last["buffer/share_mixed"] > 0 and last["lr"] == pytest.approx(2e-3 * 0.05)
    assert all(math.isfinite(loss) and loss for row in run.rows if (loss := row.get("loss/forward")) is not None)


def test_the_loss_falls(long: tuple[Entry, Run, str]) -> None:
    entry, run, _ = long
    losses = torch.tensor([row[entry.falls] for row in run.rows])
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()  # 0.40 to 0.55 of it; without learning 0.90 to 1.00


def test_the_pipeline_stays_frozen_and_out_of_the_way(long: tuple[Entry, Run, str]) -> None:
    _, run, before = long
    assert digest(*frozen(run.method)) == before
    assert not any(m.training for part in frozen(run.method) for m in part.modules())
    theirs = {p.data_ptr() for part in frozen(run.method) for p in part.parameters()}
    shared = {id(p) for role in run.method.roles.values() for p in role.shared}  # what lies below adapters is the pipeline's, and frozen
    kept = [*(p for p in run.method.parameters() if id(p) not in shared), *run.method.state_dict().values()]
    assert theirs and not theirs & {x.data_ptr() for x in kept}


def test_only_the_student_side_is_trained(long: tuple[Entry, Run, str], tiny: Path) -> None:
    entry, run, _ = long
    start = build(entry, tiny).state_dict()
    moved = {name for name, x in run.method.state_dict().items() if not torch.equal(x, start[name])}
    students = {name for name, p in run.method.named_parameters() if name.startswith("student.") and p.requires_grad}
    assert students and students <= moved
    assert all(m.training for m in run.method.student.network.modules())


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
def test_a_source_without_a_target_is_refused(entry: Entry, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry.method, "sources", ("forward", "student"))
    words = rf"gives 0\.25 to teacher latents, on which {entry.method.__name__} has no target: .* forward, student"
    with pytest.raises(ValueError, match=words):
        train(entry, tiny, prior=MIXED)


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
