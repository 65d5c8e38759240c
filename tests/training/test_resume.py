"""Exact resuming of every method of suite.METHODS: a run in one piece against the same run cut in two, every tensor equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.testing.checks import CUT, TOTAL, check_same
from ddil_lightning.testing.fitting import Inside
from ddil_lightning.training.contest import Contest
from suite import ALL_AND_LORA, BY_NAME, EPOCH, METHODS, Entry, LateRestoring, Run, StopAt, build, captions, equal, fit, frozen, one_of

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "buffer": ({}, {}),
    "priority": ({}, {"buffer": {"priority": 0.6, "capacity": 40}}),  # small: old roll-outs are evicted
    "accumulate": ({"optimizer": {"accumulate": 2}}, {"rollouts": {"every": 1}}),
}


def objects(entry: Entry, tiny: Path, variant: str, **kwargs: Any) -> tuple[Any, Any]:
    """A new method and a new DataModule."""
    method, data = VARIANTS[variant]
    return build(entry, tiny, updates=TOTAL, **method, **kwargs), captions(tiny, **data)


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


@pytest.fixture(scope="module")
def straight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Entry, str], tuple[Run, Path]]:
    """(entry, variant) -> the run in one piece and the checkpoint that it wrote in its middle, in the middle of an epoch."""
    made: dict[tuple[str, str], tuple[Run, Path]] = {}

    def get(entry: Entry, variant: str = "buffer") -> tuple[Run, Path]:
        key = (entry.name, variant)
        if key not in made:
            folder = tmp_path_factory.mktemp("straight")
            run = fit(*objects(entry, tiny, variant), Checkpoints(every=CUT, keep=9, folder=str(folder)))
            assert run.method.student_updates == TOTAL and run.data.done > EPOCH > CUT and run.data.done % EPOCH
            made[key] = run, folder / f"updates={CUT}.ckpt"
        return made[key]

    return get


@pytest.mark.parametrize("entry", **ALL_AND_LORA)
def test_resuming_is_exact(entry: Entry, tiny: Path, straight: Any) -> None:
    """From a checkpoint that was written while the run went on."""
    run, ckpt = straight(entry)
    check_same(run, fit(*objects(entry, tiny, "buffer"), ckpt=ckpt))


@pytest.mark.parametrize("variant", ["accumulate", pytest.param("priority", marks=pytest.mark.slow)])
@pytest.mark.parametrize("entry", **one_of("dmd2"))
def test_resuming_is_exact_in_every_variant(entry: Entry, variant: str, tiny: Path, straight: Any) -> None:
    run, ckpt = straight(entry, variant)
    check_same(run, fit(*objects(entry, tiny, variant), ckpt=ckpt))


class Left(Callback):
    """The seed of torch's own random numbers as every batch finds it."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.seeds.append(torch.initial_seed())


@pytest.mark.parametrize("entry", **one_of("pd"))
def test_resuming_is_exact_with_dropout(entry: Entry, tiny: Path, tmp_path: Path, straight: Any) -> None:
    def dropping() -> tuple[Any, Any]:
        method, data = objects(entry, tiny, "buffer")
        for part in method.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.3
        return method, data

    left = Left()
    run = fit(*dropping(), Checkpoints(every=CUT, keep=9, folder=str(tmp_path)), left)
    check_same(run, fit(*dropping(), ckpt=tmp_path / f"updates={CUT}.ckpt"))
    assert len(left.seeds) >= TOTAL and len(set(left.seeds)) == 1  # nobody has reseeded them
    assert run.rows != straight(entry)[0].rows  # it was on


@pytest.mark.parametrize("entry", **one_of("dmd2"))
def test_a_run_that_was_stopped_goes_on(entry: Entry, tiny: Path, tmp_path: Path, straight: Any) -> None:
    """Stopped after update 5, and resumed from a checkpoint that was written once fit had returned."""
    stopped = fit(*objects(entry, tiny, "buffer"), StopAt(CUT))
    assert stopped.method.student_updates == CUT
    stopped.trainer.save_checkpoint(tmp_path / "after.ckpt")
    check_same(straight(entry)[0], fit(*objects(entry, tiny, "buffer"), ckpt=tmp_path / "after.ckpt"))


class Fails(Callback):
    """What goes wrong after a step: a full disk under a preview, a logger that is away."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.student_updates == CUT:
            raise RuntimeError("no room")


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("entry", **one_of("pd"))
def test_a_run_whose_callback_fails_goes_on_from_there(entry: Entry, last: bool, tiny: Path, tmp_path: Path, straight: Any) -> None:
    """Before the clock has heard of the step, and after."""
    saved = Checkpoints(every=0, folder=str(tmp_path))
    if last:
        saved.on_train_batch_end = Fails().on_train_batch_end  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no room"):
        fit(*objects(entry, tiny, "buffer"), saved, *([] if last else [Fails()]))
    check_same(straight(entry)[0], fit(*objects(entry, tiny, "buffer"), ckpt=tmp_path / f"updates={CUT}.ckpt"))


def test_what_failed_first_is_what_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is out of memory for a preview is so for the look at the weights too, before they are saved."""

    def broken(method: Any) -> bool:
        if method.student_updates == CUT:
            raise RuntimeError("the device is lost")
        return True

    monkeypatch.setattr("ddil_lightning.callbacks.checkpoints.finite", broken)
    with pytest.raises(RuntimeError, match="no room"):
        fit(*objects(BY_NAME["pd"], tiny, "buffer"), Checkpoints(every=0, folder=str(tmp_path)), Fails())


# PCM and CTM have no discriminator but where one is asked for.
TURNS = [entry for entry in METHODS if issubclass(entry.method, Contest) and entry.name not in ("pcm", "ctm", "ctm-denoising")]


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name, marks=() if e.name == "dmd2" else pytest.mark.slow) for e in TURNS])
def test_resuming_in_the_middle_of_a_critics_cycle_is_exact(entry: Entry, tiny: Path, tmp_path: Path) -> None:
    """All other cuts here are after a student's update, which ends the cycle."""

    def parts() -> tuple[Any, Any]:
        return build(entry, tiny, updates=3, critic={"steps": 2}), captions(tiny)

    file = tmp_path / "inside.ckpt"
    run = fit(*parts(), Inside(1, file))
    kept = torch.load(file, weights_only=True)["ddil"]
    assert (kept["critic_updates"], kept["student_updates"]) == (3, 1) and run.method.adversary.every == 2
    resumed = fit(*parts(), ckpt=file)
    check_same(run, resumed, 1, within=True)
    assert resumed.method.adversary.updates == run.method.adversary.updates == 6
    rows = [[(row["student_updates"], row["loss"]) for row in one.rows] for one in (run, resumed)]
    assert len(rows[0]) == 3 and rows[1] == rows[0][1:]


@pytest.mark.parametrize("entry", **ALL_AND_LORA)
def test_checkpoints_are_plain_and_hold_no_frozen_network(entry: Entry, straight: Any) -> None:
    run, ckpt = straight(entry)
    kept = torch.load(ckpt.with_name(f"updates={TOTAL}.ckpt"), weights_only=True)  # nothing is unpickled
    assert equal(kept["state_dict"], dict(run.method.state_dict()))
    pipeline = {id(p) for part in frozen(run.method) for p in part.parameters()}
    assert pipeline and not pipeline & {id(p) for p in run.method.state_dict(keep_vars=True).values()}
    assert len(kept["optimizer_states"]) == len(run.trainer.optimizers)
    assert kept["ddil"]["student_updates"] == TOTAL and kept["DDILDataModule"]["done"] == run.data.done


@pytest.mark.parametrize("cut", [pytest.param(EPOCH - 1, marks=pytest.mark.slow), EPOCH, pytest.param(EPOCH + 1, marks=pytest.mark.slow)])
def test_resuming_is_exact_around_the_end_of_an_epoch(cut: int, tiny: Path, tmp_path: Path, straight: Any) -> None:
    entry = METHODS[0]
    fit(*objects(entry, tiny, "buffer"), StopAt(cut, tmp_path / "cut.ckpt"))
    check_same(straight(entry)[0], fit(*objects(entry, tiny, "buffer"), ckpt=tmp_path / "cut.ckpt"), cut)


def test_resuming_is_exact_with_short_epochs(tiny: Path, tmp_path: Path, straight: Any) -> None:
    """limit_train_batches ends Lightning's epochs early; the position in the data is a counter of our own."""
    entry, limit = METHODS[0], {"limit_train_batches": 3}
    fit(*objects(entry, tiny, "buffer"), StopAt(CUT, tmp_path / "cut.ckpt"), **limit)
    check_same(straight(entry)[0], fit(*objects(entry, tiny, "buffer"), ckpt=tmp_path / "cut.ckpt", **limit))


def test_a_finished_run_has_nothing_left_to_do(tiny: Path, straight: Any) -> None:
    run, ckpt = straight(METHODS[0])
    again = fit(*objects(METHODS[0], tiny, "buffer"), ckpt=ckpt.with_name(f"updates={TOTAL}.ckpt"))
    assert again.method.student_updates == TOTAL and again.rows == []
    check_same(run, again, TOTAL)


def test_a_finished_run_can_be_made_longer(tiny: Path, straight: Any) -> None:
    _, ckpt = straight(METHODS[0])
    more = fit(build(METHODS[0], tiny, updates=TOTAL + 2), captions(tiny), ckpt=ckpt.with_name(f"updates={TOTAL}.ckpt"))
    assert more.method.student_updates == TOTAL + 2 and [row["student_updates"] for row in more.rows] == [TOTAL + 1, TOTAL + 2]


def test_the_optimiser_is_that_of_the_config_which_goes_on(tiny: Path, tmp_path: Path) -> None:
    """A lower learning rate after a loss that was not finite was logged, and the old one was used."""
    lcm, told = BY_NAME["lcm"], {"lr": 1e-6, "weight_decay": 0.5, "betas": (0.5, 0.6)}
    fit(build(lcm, tiny, updates=2), captions(tiny), Checkpoints(every=2, folder=str(tmp_path)))
    run = fit(build(lcm, tiny, updates=3, optimizer=told), captions(tiny), ckpt=tmp_path / "updates=2.ckpt")
    (group,) = run.method.trainer.optimizers[0].param_groups
    assert (group["base_lr"], group["weight_decay"], group["betas"]) == (1e-6, 0.5, (0.5, 0.6)) and group["lr"] < 1e-6 + 1e-12
    assert run.method.trainer.optimizers[0].state  # the moments are the checkpoint's


class Learning(torch.optim.SGD):
    """An optimiser that keeps what it has learnt in its groups, as Prodigy does and those without a schedule."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["learnt"] = group.get("learnt", 0) + 1
        return super().step(closure)


def test_what_an_optimiser_has_learnt_goes_on(tiny: Path, tmp_path: Path) -> None:
    lcm, own = BY_NAME["lcm"], {"kind": f"{__name__}.Learning", "options": {"momentum": 0.5}}
    fit(build(lcm, tiny, updates=2, optimizer=own), captions(tiny), Checkpoints(every=2, folder=str(tmp_path)))
    own["options"] = {"momentum": 0.25}
    run = fit(build(lcm, tiny, updates=3, optimizer=own), captions(tiny), ckpt=tmp_path / "updates=2.ckpt")
    (group,) = run.method.trainer.optimizers[0].param_groups
    assert (group["learnt"], group["momentum"]) == (3, 0.25)


def test_the_box_is_that_of_the_config_which_goes_on(tiny: Path, tmp_path: Path) -> None:
    lcm, box = BY_NAME["lcm"], [[-1.0] * 4, [2.0] * 4]
    first = fit(build(lcm, tiny, updates=1, reflect="off"), captions(tiny), Checkpoints(every=1, folder=str(tmp_path)))
    assert set(first.method.reflection.lo.tolist()) == {-4.5}
    found, given = (
        fit(build(lcm, tiny, updates=2, reflect="static", box=b), captions(tiny), ckpt=tmp_path / "updates=1.ckpt").method.reflection
        for b in (None, box)
    )
    assert len(set(found.lo.tolist())) == 4 and [given.lo.tolist(), given.hi.tolist()] == box
    method, late = build(lcm, tiny, updates=2, reflect="static", box=box), LateRestoring("cpu")  # as fsdp2
    given = fit(method, captions(tiny), ckpt=tmp_path / "updates=1.ckpt", strategy=late).method.reflection
    assert [given.lo.tolist(), given.hi.tolist()] == box
