"""Alerts: what is warned of, once, and what is not."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddil_lightning.callbacks import Alerts
from ddil_lightning.callbacks.alerts import SATURATED
from ddil_lightning.imitation.prior import SamplingPrior, mean_of_own
from ddil_lightning.training.gan import Gan
from ddil_lightning.training.measures import Measures
from suite import METHODS, Entry, train


def heard(caplog: Any, published: list[dict[str, float]], distance: bool = True, **options: Any) -> list[tuple[int, str]]:
    """The warnings of a run that publishes these, one every 100 updates: (update, what follows it). `distance`: its loss is one."""
    caplog.clear()
    measures, alerts = Measures(), Alerts(**options)
    method: Any = SimpleNamespace(measures=measures, student_updates=0, loss_is_distance=distance)
    trainer: Any = SimpleNamespace(loggers=[object()], is_global_zero=True)
    alerts.on_train_start(trainer, method)
    with caplog.at_level(logging.WARNING):
        for i, values in enumerate(published, 1):
            measures.publish(100 * i, values)
        alerts.on_train_end(trainer, method)
        measures.publish(10**6, {"loss": math.nan})  # of another run
    words = [record.getMessage().removeprefix("at student update ").partition(": ") for record in caplog.records]
    return [(int(clock), said) for clock, _, said in words]


@pytest.mark.parametrize("name", ["shift/coverage", "validation/mode_coverage_4"])
def test_coverage_is_held_against_its_best(name: str, caplog: Any) -> None:
    values = [{name: v, "coverage_of_4_things": 1 / (1 + i)} for i, v in enumerate((0.7, 0.9, 0.75, 0.6, 0.5, 0.8, 0.65))]
    fell = f"{name} has fallen from 0.900 to {{}}: the student leaves modes out"
    assert heard(caplog, values) == [(400, fell.format("0.600")), (700, fell.format("0.650"))]  # again after it had recovered
    assert heard(caplog, values, coverage=None) == [] == heard(caplog, values, after=800)


@pytest.mark.parametrize("name", ["reflect/saturated", "shift/loss_ratio", "loss/student"])
def test_a_mean_of_three_is_held_against_the_bound(name: str, caplog: Any) -> None:
    """Alone a high value is noise; the mean over three intervals passes 1/2 at the fifth (0.1 + 0.9 + 0.6 = 1.6)."""
    seen = [0.1, 0.1, 0.1, 0.9, 0.6, 0.6, 0.1, 0.1]
    scale = 1.0 if name == "reflect/saturated" else 4.0
    published = [{name: scale * v, "loss/forward": 1.0} if name == "loss/student" else {name: scale * v} for v in seen]
    (warning,) = heard(caplog, published, saturation=0.5, gap=2.0)
    where = "the loss on the student's roll-outs over loss/forward" if name == "loss/student" else name
    assert warning[0] == 500 and warning[1].startswith(f"{where} is {scale * 1.6 / 3:.3g}, above {0.5 * scale:g}: ")
    assert heard(caplog, published, saturation=None, gap=None) == []


def test_a_saturation_that_was_there_from_the_start_is_no_alarm(caplog: Any) -> None:
    assert heard(caplog, [{"reflect/saturated": v} for v in (0.3, 0.3, 0.3, 0.4, 0.5, 0.6)]) == []
    rising = [{"reflect/saturated": v} for v in (0.3, 0.3, 0.3, 0.6, 0.7, 0.8)]
    assert [clock for clock, _ in heard(caplog, rising)] == [600]  # 0.7 on average, more than twice 0.3


def test_a_loss_gap_needs_a_loss_on_data(caplog: Any) -> None:
    assert heard(caplog, [{"loss/student": 9.0, "loss/forward": f} for f in (0.0, -1.0, 0.0, -1.0)]) == []


def test_a_loss_that_is_no_distance_has_no_gap(caplog: Any) -> None:
    """LADD's, as docs/healthy.md has it: it crosses 0, where the ratio of two of them is anything."""
    values = [{"loss/forward": 0.004 * i - 0.11, "loss/student": 0.0045 * i - 0.04} for i in range(40)]
    assert heard(caplog, values, distance=False) == [] != heard(caplog, values)
    probed = [{"shift/loss_ratio": 5.0}] * 3  # a distance whatever the method's loss is
    assert [clock for clock, _ in heard(caplog, probed, distance=False)] == [300]


def test_mixed_roll_outs_are_the_student_s_by_their_share(caplog: Any) -> None:
    alone = {"loss/forward": 1.0, "loss/student": 1.1, "loss/mixed": 9.0}
    assert heard(caplog, [alone | {"drawn/share_student": 0.3, "drawn/share_mixed": 0.1}] * 4) == []  # 1.23 / 0.4 = 3.1
    (warning,) = heard(caplog, [alone | {"drawn/share_student": 0.1, "drawn/share_mixed": 0.3}] * 4)
    assert warning[0] == 300 and "roll-outs over loss/forward is 7.02, above 4" in warning[1]
    assert heard(caplog, [{"loss/forward": 1.0, "loss/mixed": 9.0, "drawn/share_mixed": 0.4}] * 4)[0][0] == 300


OWN = ("add", "boot", "dmd2", "ladd", "moments", "reflow", "ufogen")  # the others share what records it with one of these, or have had it
EACH = [
    pytest.param(entry, marks=() if entry.name in OWN else pytest.mark.slow, id=entry.name)
    for i, entry in enumerate(METHODS)
    if entry.method not in [other.method for other in METHODS[:i]]
]


@pytest.mark.parametrize("entry", EACH)
def test_every_method_publishes_what_alerts_listen_to(entry: Entry, light: Path) -> None:
    """But for what a ShiftProbe measures, and the gap where no loss is a distance."""
    run = train(entry, light, updates=4, box=[[-0.01] * 4, [0.01] * 4], prior=SamplingPrior(0.5, 0.5, 0.0))
    held = [row[SATURATED] for row in run.rows if SATURATED in row]
    assert held and 0.2 < min(held) <= max(held) <= 1  # most of any estimate lies beyond such a box
    said = {name for row in run.rows for name in row}
    assert {"loss/forward", "loss/student"} <= said
    assert not run.method.loss_is_distance or any(mean_of_own(row, "loss/") is not None for row in run.rows)


def test_methods_say_whether_their_loss_is_a_distance(tiny: Path) -> None:
    from ddil_lightning import methods

    names = ("LCM", "TCD", "PD", "PCM", "ImagineFlash", "BOOT", "Reflow", "CTM", "SnapFusion", "DMD2", "SiD", "EMD", "ADD", "LADD")
    said = {name for name in names if getattr(methods, name).loss_is_distance}
    assert said == {"LCM", "TCD", "PD", "ImagineFlash", "BOOT", "Reflow"}
    pcm, judged = (methods.PCM(pipeline=str(tiny), gan=Gan(weight, weight, features="teacher")) for weight in (0.0, 0.1))
    assert pcm.loss_is_distance and not judged.loss_is_distance
    ctm, soft = (methods.CTM(pipeline=str(tiny), denoising=weight) for weight in (1.0, 0.0))
    assert soft.loss_is_distance and not ctm.loss_is_distance


def test_what_is_not_finite_is_told_at_once(caplog: Any) -> None:
    told = heard(caplog, [{"loss": 1.0, "lr": 1e-3}, {"loss": math.nan, "a": math.inf}, {"shift": 1.0}, {"loss": math.nan}], after=10**6)
    assert told == [(200, "a, loss are not finite")]  # and not again


def test_a_resumed_run_warns_as_the_whole_one(caplog: Any) -> None:
    """Of a slow fall, of a saturation that rose before the stop, and not a second time of what was told."""

    def run(clocks: range, state: dict[str, Any] | None) -> dict[str, Any]:
        measures, alerts = Measures(), Alerts()
        method = SimpleNamespace(measures=measures, loss_is_distance=True)
        trainer = SimpleNamespace(loggers=[], is_global_zero=True)
        alerts.setup(trainer, method, "fit")
        if state is not None:
            alerts.load_state_dict(state)
        alerts.on_train_start(trainer, method)
        for i in clocks:
            values = {"shift/coverage": 0.95 - 0.05 * i, "reflect/saturated": 0.001 * 2**i, "loss/forward": 1.0, "loss/student": 5.0}
            measures.publish(100 * i, values | ({"a": math.nan} if i in (4, 5) else {}))
        alerts.on_train_end(trainer, method)
        return alerts.state_dict()

    with caplog.at_level(logging.WARNING):
        whole, said = run(range(1, 9), None), [record.getMessage() for record in caplog.records]
        caplog.clear()
        for stop in (2, 4, 5, 6):
            assert run(range(stop + 1, 9), run(range(1, stop + 1), None)) == whole
            assert [record.getMessage() for record in caplog.records] == said and len(said) == 4
            caplog.clear()


def test_only_the_process_that_writes_listens(caplog: Any) -> None:
    method: Any = SimpleNamespace(measures=Measures(), loss_is_distance=True)
    Alerts().on_train_start(SimpleNamespace(loggers=[], is_global_zero=False), method)  # type: ignore[arg-type]
    method.measures.publish(100, {"loss": math.nan})
    assert caplog.records == []


@pytest.mark.parametrize("bad", [{"saturation": 1.5}, {"gap": 0.5}, {"coverage": math.nan}, {"after": -1}])
def test_bounds_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^alerts\.{next(iter(bad))} is"):
        Alerts(**bad)


def test_a_service_that_is_away_ends_no_run(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddil_lightning.runs import boards

    class Away:
        """A board whose service cannot be reached."""

        def alert(self, **kwargs: Any) -> None:
            raise ConnectionError("no route to host\nmore of it")

    monkeypatch.setattr(boards, "WandbLogger", SimpleNamespace)
    with caplog.at_level(logging.WARNING):
        boards.alert([SimpleNamespace(experiment=Away())], "coverage", "has fallen", 100)
    assert caplog.messages == ["W&B could not send the alert 'coverage': no route to host more of it"]
