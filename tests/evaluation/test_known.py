"""Rows of a teacher are measured once, and those that ship are of the teachers that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddil_lightning import assemble
from ddil_lightning.evaluation import known, rows, stamps
from ddil_lightning.evaluation.given import Given
from ddil_lightning.evaluation.networks import Networks
from ddil_lightning.evaluation.suite import Suite, make_row
from ddil_lightning.evaluation.table import results_table, table
from ddil_lightning.runs.finish import Test

SHIPPED = [("lcm.yaml", "builtin"), ("pd.yaml", "builtin"), ("lcm.yaml", "builtin/digits"), ("pd_flow.yaml", "builtin/flow")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


def row(value: float = 1.0) -> dict[str, Any]:
    return make_row("teacher@4", 4, 3.0, 8, 0.5, {"frechet": value}, {"n": 16, "stamp": "s"}, {"dtype": "float32"})


def never() -> Any:
    raise AssertionError("it was kept")


def test_a_row_is_measured_once_and_says_since_when(cache: Path) -> None:
    first = known.recalled("k", row)
    assert first == row() and "kept" not in first["generation"]
    again = known.recalled("k", never)
    assert again.pop("generation") == {"dtype": "float32", "kept": json.loads((cache / "k.json").read_text())["date"]}
    assert again == {name: value for name, value in first.items() if name != "generation"}
    assert known.recalled("k", lambda: row(2.0), fresh=True)["metrics"] == {"frechet": 2.0}
    assert known.recalled("k", never)["metrics"] == {"frechet": 2.0}


def test_seconds_are_of_the_machine_that_measured_them(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known.recalled("k", row)
    monkeypatch.setattr(known, "machine", lambda: "another")
    assert known.recalled("k", never)["seconds_per_image"] is None


def test_a_damaged_row_is_measured_again_and_a_full_disk_costs_nothing(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    known.recalled("k", row)
    for text in ("{half", '{"row": {"name": "teacher@4"}}', '{"row": 3}', "[]"):
        (cache / "k.json").write_text(text)
        assert known.recalled("k", lambda: row(2.0))["metrics"] == {"frechet": 2.0}
    (cache / "other").write_text("")
    assert known.recalled("j", row, folder=cache / "other") == row()
    assert "the teacher's row teacher@4 is not kept for the next run" in caplog.text


def test_which_rows_were_kept_is_told(cache: Path) -> None:
    assert stamps.notes([row()]) == []
    known.recalled("k", row)
    both = [{**row(2.0), "name": "student@4"}, known.recalled("k", never)]
    (said,) = stamps.notes(both)
    assert said.startswith("Measured 20") and "metrics: teacher@4 (test.fresh=true" in said
    assert said in table(both, width=400) and results_table(both).endswith(said)


def test_a_key_has_all_that_decides(tiny: Path) -> None:
    about, protocol = {"network": "w", "nodes": [999, -1]}, {"stamp": "s"}
    keys = {known.key_of(about, protocol), known.key_of({**about, "network": "v"}, protocol), known.key_of(about, {"stamp": "t"})}
    assert len(keys) == 3 and known.key_of(dict(reversed(about.items())), protocol) in keys
    some = {known.key_of(about, {**protocol, "metrics": asked}) for asked in (["clip"], ["clip", "kid"], ["kid", "clip"])}
    assert len(some) == 2 and not some & keys and known.key_of(about, {**protocol, "metrics": None}) in keys  # a row of all has no fewer


@pytest.mark.parametrize(
    ("config", "pipeline"), [SHIPPED[1], *(pytest.param(*x, marks=pytest.mark.slow) for x in (SHIPPED[0], *SHIPPED[2:]))]
)
def test_rows_that_ship_are_of_the_teachers_that_ship(config: str, pipeline: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python benchmarks/teacher_rows.py` makes them again."""
    monkeypatch.setattr(rows, "policy_row", lambda *_: never())
    _, method, _ = assemble(config, f"model.init_args.pipeline={pipeline}")
    suite = Suite.builtin(method.backbone.about["dataset"], n=Test().n, seed=Test().seed)
    found = [rows.teacher_row(suite, method, n) for n in Test().teacher_steps]
    assert [one["name"] for one in found] == [f"teacher@{n}" for n in Test().teacher_steps]
    assert all(one["metrics"]["all_right"] is not None and one["protocol"]["stamp"] == suite.protocol["stamp"] for one in found)


def test_a_row_by_a_network_known_by_name_alone_is_measured_each_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stamp is that of any other closure of that name, whose row would be taken for this one's."""
    made = iter((1.0, 2.0))
    monkeypatch.setattr(rows, "policy_row", lambda *_: row(next(made)))
    _, method, _ = assemble("pd.yaml")
    suite = Suite("s", ["a"] * 16, Given(Networks(hps=lambda images, prompts: images.mean((1, 2, 3)))))
    assert [rows.teacher_row(suite, method, 4)["metrics"]["frechet"] for _ in range(2)] == [1.0, 2.0] and not cache.exists()


@pytest.mark.slow
def test_rows_that_ship_are_what_is_measured(cache: Path) -> None:
    _, method, _ = assemble("lcm.yaml")
    suite = Suite.builtin("shapes", n=Test().n, seed=Test().seed)
    for n in (4, 1):
        kept, now = rows.teacher_row(suite, method.eval(), n), rows.teacher_row(suite, method.eval(), n, fresh=True)
        assert now["metrics"]["frechet"] == pytest.approx(kept["metrics"]["frechet"], rel=1e-2)
        assert now["metrics"]["attribute_accuracy"] == pytest.approx(kept["metrics"]["attribute_accuracy"], abs=5e-3)
