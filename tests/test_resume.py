"""Exact resuming of every method of suite.METHODS: a run in one piece against the same run cut in two, every tensor equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning.callbacks import Checkpoints
from suite import ALL, EPOCH, METHODS, Entry, Run, StopAt, build, captions, equal, fit, frozen, state

TOTAL, CUT = 12, 5
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "buffer": ({}, {}),
    "priority": ({}, {"priority": 0.6, "capacity": 40}),  # small: old roll-outs are evicted
    "accumulate": ({"accumulate": 2}, {"collect_every": 1}),
}


def objects(entry: Entry, tiny: Path, variant: str, **kwargs: Any) -> tuple[Any, Any]:
    """A new method and a new DataModule."""
    method, data = VARIANTS[variant]
    return build(entry, tiny, updates=TOTAL, **method, **kwargs), captions(tiny, **data)


def same(a: Run, b: Run) -> None:
    mine, theirs = state(a), state(b)
    for part in mine:
        assert equal(mine[part], theirs[part]), part


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("entry", **ALL)
def test_resuming_is_exact(entry: Entry, variant: str, tiny: Path, tmp_path: Path) -> None:
    """From a checkpoint that was written in the middle of an epoch while the run went on."""
    straight = fit(*objects(entry, tiny, variant), Checkpoints(every=CUT, keep=9, folder=str(tmp_path)))
    assert straight.method.student_updates == TOTAL and straight.data.done % EPOCH and CUT % EPOCH
    resumed = fit(*objects(entry, tiny, variant), ckpt=tmp_path / f"updates={CUT}.ckpt")
    same(straight, resumed)
    assert resumed.rows == straight.rows[CUT:]  # not only where it ends: every loss on the way


@pytest.mark.parametrize("entry", **ALL)
def test_a_run_that_was_stopped_goes_on(entry: Entry, tiny: Path, tmp_path: Path) -> None:
    """Stopped after update 5; resumed from the step's checkpoint and from one that was written once fit had returned."""
    straight = fit(*objects(entry, tiny, "buffer"))
    stopped = fit(*objects(entry, tiny, "buffer"), StopAt(CUT, tmp_path / "step.ckpt"))
    assert stopped.method.student_updates == CUT
    stopped.trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("step", "after"):
        same(straight, fit(*objects(entry, tiny, "buffer"), ckpt=tmp_path / f"{name}.ckpt"))


@pytest.mark.parametrize("entry", **ALL)
def test_checkpoints_are_plain_and_hold_no_frozen_network(entry: Entry, tiny: Path, tmp_path: Path) -> None:
    run = fit(build(entry, tiny, updates=2), captions(tiny), Checkpoints(every=0, folder=str(tmp_path)))
    kept = torch.load(tmp_path / "updates=2.ckpt", weights_only=True)  # nothing is unpickled
    assert equal(kept["state_dict"], dict(run.method.state_dict()))
    pipeline = {id(p) for part in frozen(run.method) for p in part.parameters()}
    assert not pipeline & {id(p) for p in run.method.state_dict(keep_vars=True).values()}
    assert len(kept["optimizer_states"]) == len(run.trainer.optimizers)
    assert kept["ddil"]["student_updates"] == 2 and kept["DDILDataModule"]["done"] == run.data.done


@pytest.mark.parametrize("cut", [EPOCH - 1, EPOCH, EPOCH + 1])
def test_resuming_is_exact_around_the_end_of_an_epoch(cut: int, tiny: Path, tmp_path: Path) -> None:
    entry = METHODS[0]
    straight = fit(*objects(entry, tiny, "buffer"), Checkpoints(every=cut, keep=9, folder=str(tmp_path)))
    same(straight, fit(*objects(entry, tiny, "buffer"), ckpt=tmp_path / f"updates={cut}.ckpt"))


def test_resuming_is_exact_with_short_epochs(tiny: Path, tmp_path: Path) -> None:
    """limit_train_batches ends Lightning's epochs early; the position in the data is a counter of our own."""
    entry = METHODS[0]
    save = Checkpoints(every=CUT, keep=9, folder=str(tmp_path))
    straight = fit(*objects(entry, tiny, "buffer"), save, limit_train_batches=3)
    same(straight, fit(*objects(entry, tiny, "buffer"), ckpt=tmp_path / f"updates={CUT}.ckpt", limit_train_batches=3))
    unlimited = fit(*objects(entry, tiny, "buffer"))
    assert equal(state(straight)["weights"], state(unlimited)["weights"])


def test_a_finished_run_has_nothing_left_to_do(tiny: Path, tmp_path: Path) -> None:
    entry = METHODS[0]
    run = fit(*objects(entry, tiny, "buffer"), Checkpoints(every=0, folder=str(tmp_path)))
    again = fit(*objects(entry, tiny, "buffer"), ckpt=tmp_path / f"updates={TOTAL}.ckpt")
    assert again.method.student_updates == TOTAL and again.rows == []
    same(run, again)


def test_a_finished_run_can_be_made_longer(tiny: Path, tmp_path: Path) -> None:
    entry = METHODS[0]
    fit(build(entry, tiny, updates=2), captions(tiny), Checkpoints(every=0, folder=str(tmp_path)))
    more = fit(build(entry, tiny, updates=4), captions(tiny), ckpt=tmp_path / "updates=2.ckpt")
    assert more.method.student_updates == 4 and [row["student_updates"] for row in more.rows] == [3, 4]
