"""Callbacks on small runs: DAgger scheduling on the right batch, checkpoints that stay good, previews, progress."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from ddil_lightning.callbacks import AnnealPrior, Cadence, Checkpoints, FlushBuffer, Previews, Progress, ShiftProbe, annealing
from ddil_lightning.callbacks.checkpoints import finite
from ddil_lightning.commands.fit_cli import FitCLI
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.feed import Feed
from ddil_lightning.imitation.prior import Constant, Gated, GatedBy, Linear, Piecewise, SamplingPrior
from ddil_lightning.imitation.shift import shift_report
from ddil_lightning.records import FORWARD, STUDENT
from ddil_lightning.runs.checkpoint import clock_of, sorted_checkpoints
from ddil_lightning.training.measures import Measures
from ddil_lightning.training.method import Distillation
from suite import BY_NAME, EPOCH, METHODS, StopAt, build, captions, fit, pictures

PLAIN, ROLLED = SamplingPrior(), SamplingPrior(0.0, 1.0)
LCM = METHODS[0]


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


class Sources(Callback):
    """The sources of every batch, by the update it was drawn for."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, set[int]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((pl_module.student_updates, set(batch.source.tolist())))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# DAgger ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [pytest.param(0, marks=pytest.mark.slow), 64])
def test_an_annealed_prior_is_not_one_batch_late(capacity: int, tiny: Path, tmp_path: Path) -> None:
    def run(sources: Sources, *more: Callback, **kwargs: Any) -> None:
        annealed = AnnealPrior(Piecewise([PLAIN, ROLLED], [0, 3]))
        fit(build(LCM, tiny, updates=5), captions(tiny, PLAIN, buffer={"capacity": capacity}), annealed, sources, *more, **kwargs)

    whole = Sources()
    run(whole, StopAt(4, tmp_path / "4.ckpt"))
    assert whole.seen == [(0, {FORWARD}), (1, {FORWARD}), (2, {FORWARD}), (3, {STUDENT})]
    resumed = Sources()
    run(resumed, ckpt=tmp_path / "4.ckpt")  # the DataModule starts with its first prior again: the clock decides
    assert resumed.seen == [(4, {STUDENT})]


def test_a_schedule_is_checked_before_the_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LCM.method, "sources", ("forward",))
    for schedule in (Linear(PLAIN, ROLLED, end=6, start=5), Piecewise([PLAIN, ROLLED], [0, 6]), Gated(SamplingPrior(0.5, 0.5), PLAIN)):
        sources = Sources()
        with pytest.raises(ValueError, match="student latents, on which LCM has no target"):
            fit(build(LCM, tiny, updates=6), captions(tiny, PLAIN), AnnealPrior(schedule), sources)
        assert sources.seen == []


def test_a_later_forward_share_needs_images(tiny: Path) -> None:
    """Found before the run, and not by the batch that would need them."""
    data, sources = captions(tiny, ROLLED), Sources()
    data.captions = Encoded(None, pictures(tiny).c)
    for schedule in (Linear(ROLLED, PLAIN, end=900), Piecewise([ROLLED, PLAIN], [0, 5]), GatedBy(ROLLED, PLAIN, "x", 1.0)):
        with pytest.raises(ValueError, match="the schedule of AnnealPrior has a forward share but the data set has no images"):
            fit(build(LCM, tiny), data, AnnealPrior(schedule), sources)
    assert sources.seen == []
    fit(build(LCM, tiny, updates=1), data, AnnealPrior(Linear(ROLLED, SamplingPrior(0.0, 0.3, 0.7), end=7)), sources)
    assert len(sources.seen) == 1


def test_a_gated_schedule_hears_the_losses_and_remembers_its_level() -> None:
    def callback() -> AnnealPrior:
        return AnnealPrior(Gated(SamplingPrior(0.9, 0.1), SamplingPrior(0.1, 0.9), ratio=1.5, steps=4, patience=2))

    feed = Feed()
    method = SimpleNamespace(feed=feed, check_prior=lambda prior: None)

    def update(annealed: AnnealPrior, **losses: float) -> None:
        annealed.schedule.hear(1, losses)
        annealed.apply(None, method, 0)

    annealed = callback()
    for loss, level in ((1.0, 0), (1.0, 1), (1.0, 1), (2.0, 1), (1.0, 1), (1.0, 2), (1.0, 2)):
        update(annealed, forward=1.0, student=loss)
        assert annealed.schedule.level == level
        assert feed.prior.student == pytest.approx(0.1 + 0.2 * level)
    again = callback()
    again.load_state_dict(annealed.state_dict())
    assert again.state_dict() == annealed.state_dict() == {"level": 2, "steps": 4, "passed": 1}
    update(again, student=1.0)  # without a forward loss there is nothing to compare
    assert again.schedule.level == 2
    update(again, forward=1.0, student=1.0, mixed=1.9, teacher=9.0)  # all of its own together, and none of the teacher's
    assert again.schedule.level == 3 and AnnealPrior(Constant(PLAIN)).state_dict() == {}


@pytest.mark.parametrize(
    ("entry", "kwargs"), [(LCM, {"optimizer": {"accumulate": 3}}), (BY_NAME["dmd2"], {"critic": {"steps": 3}})], ids=["lcm", "dmd2"]
)
def test_a_gate_hears_every_update_once(entry: Any, kwargs: dict[str, int], tiny: Path) -> None:
    """Not once per micro-batch, nor on the turns of a critic; of micro-batches it hears the mean."""
    half, heard, seen = SamplingPrior(0.5, 0.5), [], []

    class Gate(Gated):
        def observe(self, on_policy: float, forward: float) -> None:
            heard.append((on_policy, forward))

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append((pl_module.student_updates, pl_module.measures.source_losses))

    fit(build(entry, tiny, updates=3, **kwargs), captions(tiny, half, buffer={"capacity": 0}), Losses(), AnnealPrior(Gate(half, half)))
    ends = [after for (n, _), (m, after) in zip([(0, {}), *seen], seen, strict=False) if n != m]
    assert len(seen) == 9 and heard == [(found["student"], found["forward"]) for found in ends] and len(heard) == 3


def test_a_gate_that_cannot_judge_is_told_so(tiny: Path, caplog: Any) -> None:
    """By a loss that is no distance, or because no update has both sources; a run that was begun so goes on."""
    half, dmd2, step = SamplingPrior(0.5, 0.5), BY_NAME["dmd2"], {"rollouts": {"granularity": "step"}}

    def said(entry: Any, more: dict[str, Any], **kwargs: Any) -> list[str]:
        caplog.clear()
        fit(build(entry, tiny, updates=1, **kwargs), captions(tiny, half, **more), AnnealPrior(Gated(half, half)))
        return [text for text in caplog.messages if text.startswith("the schedule Gated compares losses")]

    (line,) = said(dmd2, {})
    assert f"that of {dmd2.method.__name__} on a latent is no distance" in line and line.endswith("take GatedBy with a measure")
    (line,) = said(LCM, step)
    assert "granularity=step an update has one source, so that it never moves: take sample" in line
    assert said(LCM, step, optimizer={"accumulate": 2}) == [] == said(LCM, {})


def test_the_level_of_a_gate_travels_with_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    def gate() -> AnnealPrior:
        return AnnealPrior(Gated(SamplingPrior(0.5, 0.5), ROLLED, ratio=1e9, steps=20, patience=1))

    first, second, sources = gate(), gate(), Sources()
    fit(build(LCM, tiny), captions(tiny, SamplingPrior(0.5, 0.5), buffer={"capacity": 0}), first, StopAt(4, tmp_path / "4.ckpt"))
    assert first.schedule.level == 4
    fit(build(LCM, tiny), captions(tiny, PLAIN, buffer={"capacity": 0}), second, sources, ckpt=tmp_path / "4.ckpt")
    assert second.schedule.level == 6 and sources.seen[0] == (4, {FORWARD, STUDENT})


class Hearing(Constant):
    def hear(self, clock: int, values: Any) -> None:
        """Follow the training."""


@pytest.mark.parametrize(
    ("kind", "hears", "said"),
    [
        (Hearing, None, "Own is told nothing, because it does not say hears: set hears = 'updates' or 'measures' beside its hear"),
        (Hearing, "losses", "Own.hears is 'losses': give 'updates', 'measures', or 'nothing' for"),
        (Constant, "updates", "Own hears updates and has no hear.clock, values. to do so: write it"),
    ],
)
def test_a_schedule_that_would_never_be_told_is_refused(kind: type[Constant], hears: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        AnnealPrior(type("Own", (kind,), {} if hears is None else {"hears": hears})(PLAIN))
    AnnealPrior(type("Own", (Hearing,), {"hears": "measures"})(PLAIN))


def test_a_schedule_that_says_what_it_hears_is_believed() -> None:
    """One around another hears what that one does; one of another family may have no hear at all."""

    class Around(Hearing):
        def __init__(self, inner: Any) -> None:
            super().__init__(PLAIN)
            self.hears = inner.hears

    class Other:
        hears, unheard, state = "nothing", "", {}

        def __call__(self, clock: int) -> SamplingPrior:
            return PLAIN

    for schedule in (Around(Constant(PLAIN)), type("Own", (Hearing,), {"hears": "nothing"})(PLAIN), Other()):
        AnnealPrior(schedule)
    with pytest.raises(ValueError, match=r"^Other hears updates and has no hear\(clock, values\) to do so: write it$"):
        AnnealPrior(type("Other", (Other,), {"hears": "updates"})())


@pytest.mark.parametrize("first", ["probe", "gate"])
def test_a_schedule_follows_a_measure_that_another_callback_publishes(first: str, tiny: Path) -> None:
    """After every other update the probe publishes; 0.5 passes and 2.0 does not. The next batch follows, whichever callback comes first."""
    given, heard = iter([0.5, 2.0, 0.5]), []

    class Probe(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if pl_module.student_updates % 2 == 0:
                pl_module.measures.publish(pl_module.student_updates, {"shift/loss_ratio": next(given), "other": 0.0})

    class Drawn(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            heard.append(pl_module.feed.prior.student)

    annealed, probe = AnnealPrior(GatedBy(PLAIN, SamplingPrior(0.2, 0.8), measure="shift/loss_ratio", below=1.0, steps=4)), Probe()
    method, callbacks = build(LCM, tiny, updates=6), [probe, annealed] if first == "probe" else [annealed, probe]
    fit(method, captions(tiny, PLAIN, buffer={"capacity": 0}), *callbacks, Drawn())
    assert heard == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.2, 0.2])
    assert annealed.state_dict() == {"level": 2, "steps": 4, "passed": 0, "heard": 1}
    method.measures.publish(7, {"shift/loss_ratio": 0.0})
    assert annealed.state_dict()["level"] == 2  # the run is over


@pytest.mark.parametrize("early", [False, True])
def test_a_measure_that_nobody_publishes_is_told_once(early: bool, tiny: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the run, and of a long one before it ends; not of a run that hears it, nor of one that heard it before it was resumed."""
    monkeypatch.setattr(annealing, "PATIENCE", 1 if early else 99)
    gate = AnnealPrior(GatedBy(PLAIN, ROLLED, measure="shift/los_ratio", below=1.0))
    trainer, measures = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(broadcast=lambda value: value)), Measures()
    method = SimpleNamespace(student_updates=0, stage_updates=0, feed=Feed(), check_prior=lambda prior: None, measures=measures)

    def run(*heard: str) -> list[str]:
        caplog.clear()
        gate.on_train_start(trainer, method)  # type: ignore[arg-type]
        for _ in range(3):
            method.student_updates += 1
            for name in heard:
                measures.publish(method.student_updates, {name: 2.0})
            gate.on_train_batch_end(trainer, method, None, None, 0)  # type: ignore[arg-type]
        gate.on_train_end(trainer, method)  # type: ignore[arg-type]
        return [record.getMessage() for record in caplog.records]

    (said,) = run("shift/loss_ratio")
    assert said.startswith("shift/los_ratio, which the schedule of AnnealPrior waits for, was not published up to student update")
    assert f"update {1 if early else 3}, so that the prior has stayed where it began: add" in said
    assert run("shift/los_ratio") == []
    state = gate.state_dict()
    gate = AnnealPrior(GatedBy(PLAIN, ROLLED, measure="shift/los_ratio", below=1.0))
    gate.load_state_dict(state)
    assert run() == []


def test_the_cadence_changes_with_the_clock() -> None:
    feed = Feed()
    cadence, seen = Cadence(every=[10, 5, 1], starts=[0, 3, 6]), []
    for clock in range(8):
        cadence.apply(None, SimpleNamespace(feed=feed), clock)
        seen.append(feed.collect_every)
    assert seen == [10, 10, 10, 5, 5, 5, 1, 1]
    for every, starts in (([1], [1]), ([1, 2], [0]), ([0], [0]), ([1, 2], [0, 0]), ([], [])):
        with pytest.raises(ValueError, match="a cadence needs as many starts"):
            Cadence(every, starts)


def test_the_buffer_is_flushed_once_when_the_clock_comes_by() -> None:
    flushed: list[int] = []
    method = SimpleNamespace(feed=SimpleNamespace(flush=lambda: flushed.append(clock)))
    callback = FlushBuffer(at=[5, 2])
    for clock in (0, 1, 2, 2, 4, 6, 7):  # 5 is jumped over
        callback.apply(None, method, clock)
    assert flushed == [2, 6]
    again = FlushBuffer(at=[5, 2])
    for clock in (5, 6):  # resumed at 5: that flush is in the checkpoint's buffer already
        again.apply(None, method, clock)
    assert flushed == [2, 6]


# Checkpoints -------------------------------------------------------------------------------------------------------------------------


MORE = [(2, 2, [4, 6]), (2, 1, [6]), (1, 3, [4, 5, 6])]


@pytest.mark.parametrize(
    ("every", "keep", "left"), [(0, 2, [6]), (4, 3, [4, 6]), *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE)]
)
def test_the_newest_checkpoints_are_kept(every: int, keep: int, left: list[int], tiny: Path, tmp_path: Path) -> None:
    fit(build(LCM, tiny), captions(tiny), Checkpoints(every, keep, str(tmp_path)))
    assert names(tmp_path) == [f"updates={clock}.ckpt" for clock in left]
    assert torch.load(tmp_path / "updates=6.ckpt", weights_only=True)["ddil"]["student_updates"] == 6


@pytest.mark.slow
def test_checkpoints_of_later_updates_are_not_touched(tiny: Path, tmp_path: Path) -> None:
    """Of a run that goes on from an earlier one; and where it does not, none are."""
    fit(build(LCM, tiny, updates=3), captions(tiny), Checkpoints(every=0, folder=str(tmp_path)))
    for clock in (90, 100, "x"):
        (tmp_path / f"updates={clock}.ckpt").touch()
    with pytest.raises(ValueError, match="checkpoints.folder .* holds checkpoints of another run, which would be replaced: give another"):
        fit(build(LCM, tiny, updates=4), captions(tiny), Checkpoints(folder=str(tmp_path)))
    last = Checkpoints(every=0, keep=1, folder=str(tmp_path))
    fit(build(LCM, tiny, updates=4), captions(tiny), last, ckpt=tmp_path / "updates=3.ckpt")
    assert [clock_of(p) for p in sorted_checkpoints(tmp_path)] == [4, 90, 100] and (tmp_path / "updates=x.ckpt").exists()


def test_a_run_that_ends_within_an_update_is_saved_as_the_last_whole_one_left_it(tiny: Path, tmp_path: Path) -> None:
    """max_epochs and the like know nothing of accumulated batches."""
    run = fit(build(LCM, tiny, optimizer={"accumulate": 4}), captions(tiny), Checkpoints(every=0, folder=str(tmp_path)), max_epochs=1)
    assert run.method.descent.halfway and run.method.student_updates == EPOCH // 4
    assert names(tmp_path) == [f"updates={EPOCH // 4}.ckpt"]
    done, method = run.data.done, build(LCM, tiny, updates=EPOCH // 4 + 1, optimizer={"accumulate": 4})
    again = fit(method, captions(tiny), ckpt=tmp_path / f"updates={EPOCH // 4}.ckpt")
    assert again.data.done == done + 4  # its gradients are in no checkpoint: the update began anew


def test_a_run_that_something_else_stops_is_saved(tiny: Path, tmp_path: Path) -> None:
    fit(build(LCM, tiny), captions(tiny), StopAt(3), Checkpoints(every=100, folder=str(tmp_path)))
    assert names(tmp_path) == ["updates=3.ckpt"]


def test_weights_that_are_not_finite_are_not_saved(tiny: Path, tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if pl_module.student_updates == 4:  # what an infinite gradient does
                next(pl_module.student.parameters()).data[0] = float("inf")

    method, saved = build(LCM, tiny), Checkpoints(every=2, folder=str(tmp_path))
    assert finite(method)
    with pytest.raises(FloatingPointError, match="weights of the student are not finite at student update 4, so they are not saved"):
        fit(method, captions(tiny), Poison(), saved)
    assert not finite(method) and names(tmp_path) == ["updates=2.ckpt"] and saved.last == tmp_path / "updates=2.ckpt"


class Press(Callback):
    """Ctrl-C within a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_update_in_progress(tiny: Path, tmp_path: Path) -> None:
    listener, saved = signal.getsignal(signal.SIGINT), Checkpoints(every=0, folder=str(tmp_path))
    run = fit(build(LCM, tiny, optimizer={"accumulate": 2}), captions(tiny), Press(2), saved)  # the first half of the second update
    assert saved.signal == signal.SIGINT and run.method.student_updates == 2 and names(tmp_path) == ["updates=2.ckpt"]
    state = torch.load(tmp_path / "updates=2.ckpt", weights_only=True)
    assert state["DDILDataModule"]["done"] == 4
    assert signal.getsignal(signal.SIGINT) is listener


def test_ctrl_c_is_given_back_after_an_error(tiny: Path, tmp_path: Path) -> None:
    class Fault(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise RuntimeError("no")

    listener = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="no"):
        fit(build(LCM, tiny), captions(tiny), Fault(), Checkpoints(folder=str(tmp_path)))
    assert signal.getsignal(signal.SIGINT) is listener


@pytest.mark.parametrize(("seconds", "looks"), [(0.1, [1, 11, 21]), (3.0, [*range(1, 22)])], ids=["fast", "slow"])
def test_several_processes_stop_after_the_same_batch(seconds: float, looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is interrupted in the batch 21, and this one is fast; of slow batches none is waited for."""
    asked: list[int] = []
    callback, clock = Checkpoints(every=0), iter(range(10**6))
    monkeypatch.setattr("ddil_lightning.callbacks.checkpoints.time.monotonic", lambda: callback._batches * 0.1 + 1e-9 * next(clock))

    def decide(mine: bool, all: bool) -> bool:
        asked.append(callback._batches)
        return callback._batches >= 21 if len(asked) % 2 else mine or seconds > 1  # first the signal, then whether batches are slow

    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=decide))
    method = SimpleNamespace(student_updates=0, updates=9, stage_is_over=False, descent=SimpleNamespace(halfway=True))
    callback._since = 0.0
    for i in range(25):
        callback.on_train_batch_end(trainer, method, None, None, i % 3)  # epochs of three batches
        assert callback._agreed(trainer) == (i + 1 >= 21)  # it stays so until the update is complete
    assert asked[::2] == asked[1::2] == looks and callback.signal == signal.SIGINT


def test_slow_batches_are_known_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 0.0, []
    monkeypatch.setattr("ddil_lightning.callbacks.checkpoints.time.monotonic", lambda: now)
    callback = Checkpoints(every=0)
    callback._since = 0.0
    decide = lambda mine, all: asked.append(callback._batches) or mine  # noqa: E731
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=decide))
    method = SimpleNamespace(student_updates=0, updates=9, stage_is_over=False, descent=SimpleNamespace(halfway=True))
    for seconds in (3.0, *11 * [0.2], *12 * [2.0]):  # the first compiles
        now += seconds
        callback.on_train_batch_end(trainer, method, None, None, 0)
    assert asked[::2] == [1, 2, 12, 22, 23, 24]


@pytest.mark.slow
def test_the_time_of_training_is_counted_over_resumes(tiny: Path, tmp_path: Path) -> None:
    first = Checkpoints(every=3, folder=str(tmp_path))
    fit(build(LCM, tiny, updates=3), captions(tiny), first)
    kept = torch.load(tmp_path / "updates=3.ckpt", weights_only=True)["callbacks"][first.state_key]["seconds"]
    assert 0 < kept <= first.seconds
    second = Checkpoints(every=3, folder=str(tmp_path))
    fit(build(LCM, tiny), captions(tiny), second, ckpt=tmp_path / "updates=3.ckpt")
    assert second.seconds > kept


@pytest.mark.parametrize("kwargs", [{"every": -1}, {"keep": 0}])
def test_settings_of_checkpoints(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"checkpoints\.(every is -1|keep is 0): give a number of at least"):
        Checkpoints(**kwargs)


# The shift probe ---------------------------------------------------------------------------------------------------------------------


def test_the_shift_probe_is_the_energy_distance_of_the_report(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the measures of a shift report the one that it writes, and no other is computed."""
    run, probe = fit(build(LCM, tiny, updates=1), captions(tiny)), ShiftProbe(count=12, steps=4, teacher_steps=8)
    for name in ("frechet_pooled", "mmd_rbf", "probe_auc"):
        monkeypatch.setattr(f"ddil_lightning.imitation.shift.{name}", lambda *args: pytest.fail("computed for nothing"))
    values = probe.measure(run.method, run.data)
    monkeypatch.undo()
    batch, (policy, grid) = run.data.reference(12), run.method.deployment.sampler(4)
    walk = probe._states(policy, grid, run.method, batch, probe.seed)
    mine = {t: walk[t] for t in grid.nodes.tolist()[1:]}
    for name, reference in probe._references.items():
        report = shift_report(mine, reference, paired=True)
        assert {f"@{t}": row["energy_distance"] for t, row in report.items()} == {
            key.removeprefix(f"shift/{name}") or "@mean": value for key, value in values.items() if key.startswith(f"shift/{name}")
        }
    assert set(probe._references) == {"teacher", "forward"} and len(values) == 9 and values["shift/coverage"] > 0.5
    probe.losses = 6
    more = probe.measure(run.method, run.data)
    assert {key: more[key] for key in values} == values and len(more) == 13
    assert all(ratio > 0 for key, ratio in more.items() if "loss_ratio" in key)


@pytest.mark.parametrize(("scores", "w"), [({}, 2.0), ({"guidance": 1.0}, None)])
def test_the_shift_is_that_to_the_teacher_whom_the_student_follows(scores: Any, w: float | None, tiny: Path) -> None:
    """Of DMD2 the real score, whatever guidance pictures are drawn with."""
    run = fit(build(BY_NAME["dmd2"], tiny, updates=1, guidance=3.0, scores=scores), captions(tiny))
    told: list[Any] = []
    apart = run.method.teacher.apart

    def asked(*given: Any) -> Any:
        role = apart(*given)
        role.register_forward_pre_hook(lambda _, args: told.append(args[2].w))
        return role

    run.method.teacher.apart = asked
    ShiftProbe(count=8, steps=4, teacher_steps=8).measure(run.method, run.data)
    assert {None if x is None else float(x.unique()) for x in told} == {w}


def test_probe_and_previews_ask_a_student_without_dropout(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates and alerts would hear of a student that nobody deploys."""
    monkeypatch.chdir(tmp_path)
    seen: list[bool] = []

    def asked(network: Any) -> None:
        seen.append(any(module.training for module in network.model.modules()))

    monkeypatch.setattr(ShiftProbe, "measure", lambda self, method, data: asked(method.student.network) or {})
    monkeypatch.setattr(Previews, "_row", lambda self, b, d, *_: asked(d.network) or torch.zeros(1, 3, 8, 8))
    run = fit(build(LCM, tiny, updates=1, ema=0.0), captions(tiny), ShiftProbe(every=1, count=8), Previews(every=1, teacher_steps=[2]))
    assert len(seen) > 3 and not any(seen) and run.method.student.network.training


@pytest.mark.slow
def test_a_resumed_run_does_not_measure_the_same_probe_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's batches leave the clock where the last probe was."""
    seen: list[int] = []
    monkeypatch.setattr(ShiftProbe, "measure", lambda self, method, data: seen.append(method.student_updates) or {})

    def run(*more: Callback, **kwargs: Any) -> None:
        fit(build(BY_NAME["dmd2"], tiny, updates=4), captions(tiny), ShiftProbe(every=2, count=8), *more, **kwargs)

    run(StopAt(2, tmp_path / "2.ckpt"))
    assert seen == [2]
    run(ckpt=tmp_path / "2.ckpt")
    assert seen == [2, 4]


@pytest.mark.parametrize("n", [3, 5, 6])
def test_the_shift_probe_on_a_few_captions(n: int, tiny: Path) -> None:
    """Fewer than 4 are refused before the run; a coverage by the fifth neighbour needs 6."""
    data, sources = captions(tiny), Sources()
    some = pictures(tiny)[list(range(n))]
    data.captions = Encoded(some.latent, some.c)
    data.batch_size = 2
    method, probe = build(LCM, tiny, updates=1), ShiftProbe(every=1, count=8, steps=2, teacher_steps=4)
    if n < 4:
        with pytest.raises(ValueError, match=r"^ShiftProbe compares at least 4 latents, and the data have 3 captions: leave"):
            fit(method, data, probe, sources)
        assert sources.seen == []
    else:
        (row,) = [row for row in fit(method, data, probe).rows if "shift/teacher" in row]
        assert ("shift/coverage" in row) == (n == 6)


# Previews and progress ---------------------------------------------------------------------------------------------------------------


def test_previews_show_the_same_prompts_and_noise_each_time(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original: Any = Distillation.baseline

    def draw(folder: str, lr: float) -> list[bytes]:
        method = build(LCM, tiny, optimizer={"lr": lr}, updates=3)
        baseline = original.fget(method)
        told = dataclasses.replace(baseline, grid=lambda steps: calls.append(steps) or baseline.grid(steps))
        monkeypatch.setattr(Distillation, "baseline", told)
        shown = Previews(every=2, prompts=["a handwritten one", "a handwritten two", "a"], count=2, teacher_steps=[4, 1], student_steps=[2])
        fit(method, captions(tiny), shown, default_root_dir=tmp_path / folder)
        assert names(tmp_path / folder / "samples") == ["000000.png", "000002.png", "000003.png"]
        return [p.read_bytes() for p in sorted((tmp_path / folder / "samples").iterdir())]

    frozen, moving = draw("frozen", 0.0), draw("moving", 0.05)
    assert frozen[0] == frozen[1] == frozen[2] == moving[0] and len({*moving}) == 3
    assert calls == [4, 1, 4, 1]  # once in each run
    width, height = Image.open(tmp_path / "frozen" / "samples" / "000000.png").size
    assert width == 92 + 2 * (16 * 6 + 4) and height == 3 * (16 * 6 + 4) + 3 * 14


def test_previews_are_off_at_0_and_go_to_loggers_that_take_pictures(tiny: Path, tmp_path: Path) -> None:
    fit(build(LCM, tiny, updates=1), captions(tiny), Previews(every=0), default_root_dir=tmp_path)
    assert not (tmp_path / "samples").exists()
    got: list[Any] = []
    logger = SimpleNamespace(log_image=lambda key, images, step: got.append((key, images[0].size, step)))
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, loggers=[object(), logger])
    run = fit(build(LCM, tiny, updates=1), captions(tiny))
    trainer.precision_plugin, run.method.feed = run.trainer.precision_plugin, SimpleNamespace(examples=lambda n: ["a"] * n)
    Previews(count=1, teacher_steps=[1], student_steps=[1]).draw(trainer, run.method)
    assert got == [("previews/sheet", (192, 228), 1), ("previews/student_1", (96, 96), 1)]


@pytest.mark.slow
def test_progress_without_a_terminal_is_a_few_lines(tiny: Path, capsys: Any) -> None:
    fit(build(LCM, tiny, updates=7, log_every=50), captions(tiny), Progress(lines=3), enable_progress_bar=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" updates, loss ")[0] for line in lines] == ["1/7", "3/7", "5/7", "7/7"]
    assert all(0 < float(line.split("loss ")[1].split(",")[0]) < 10 for line in lines)


def test_the_first_update_is_told_before_the_teacher_s_pictures_are_drawn(
    tiny: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first sheet of a trained student lies is printed; that of the untrained one has its rows of before the first update."""
    row: Any = Previews._row

    def told(self: Any, backbone: Any, deployment: Any, steps: int, prompts: list[str]) -> Any:
        print(f"{'teacher' if deployment.steps == (32,) else 'student'}@{steps}")
        return row(self, backbone, deployment, steps, prompts)

    monkeypatch.setattr(Previews, "_row", told)
    shown = Previews(every=100, first=2, prompts=["a"], teacher_steps=[2], student_steps=[1])
    fit(build(LCM, tiny, updates=3), captions(tiny), Progress(lines=1), shown, default_root_dir=tmp_path, enable_progress_bar=True)
    found = [re.sub(r",.*|: .*", "", line) for line in capsys.readouterr().out.splitlines()]
    drawn = ["student@1", "1/3 updates", "teacher@2", "student@1", "pictures of the student after 2 updates", "3/3 updates", "student@1"]
    assert found == drawn and names(tmp_path / "samples") == ["000000.png", "000002.png", "000003.png"]
    assert FitCLI.acting.index("progress") < FitCLI.acting.index("previews")


def test_progress_on_a_terminal_is_a_bar(tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    fit(build(LCM, tiny, updates=2), captions(tiny), Progress(), enable_progress_bar=True)
    shown = capsys.readouterr().out
    assert "2/2" in shown and "loss" in shown and "left" in shown and shown.rstrip("\x1b[?25h").endswith("\n")


def test_other_ranks_are_silent(tiny: Path, capsys: Any) -> None:
    silent = Progress()
    silent.disable()
    fit(build(LCM, tiny, updates=2), captions(tiny), silent, enable_progress_bar=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="lines is 0: give a number of at least 1"):
        Progress(lines=0)
