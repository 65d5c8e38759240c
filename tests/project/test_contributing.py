"""CONTRIBUTING's method is carried out: one file outside the package, one config, one entry of the behaviour suite."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_methods
import test_resume

import commandline
import suite

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
(SOURCE,), (CONFIG,) = (re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S) for language in ("python", "yaml"))


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The list entry, of a module that lies where Python finds it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "direct.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        named = {"Entry": suite.Entry, "Direct": importlib.import_module("direct").Direct}
        (found,) = re.findall(r"`(Entry\(.*?\))`", TEXT)
        yield eval(found, named)


def test_the_config_trains_tests_and_exports_it(entry: Any, tiny: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("direct.yaml").write_text(CONFIG)
    small = (
        f"model.pipeline={tiny}",
        "model.updates=4",
        "data.batch_size=8",
        "test.n=16",
        "previews.count=1",
        "previews.teacher_steps=[4]",
    )
    code, out, err = commandline.fit(capsys, "--config", "direct.yaml", *small)
    assert code == 0, err
    run = (Path("runs") / "direct" / "latest").resolve()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["export_difference"] < 1e-4 and "student@4" in out and (run / "report.html").is_file()
    about = json.loads((run / "pipeline" / "ddil.json").read_text())
    assert (about["method"], about["timesteps"], about["guidance_scale"]) == ("Direct", [999, 749, 499, 249], 1.0)


def test_it_behaves_as_every_method(entry: Any, tiny: Path) -> None:
    test_methods.test_a_seed_is_a_run(entry, tiny)
    test_methods.test_prior_1_0_0_is_the_method_without_ddil(entry, tiny)


def test_it_resumes_exactly(entry: Any, tiny: Path, tmp_path: Path) -> None:
    run = suite.fit(*test_resume.objects(entry, tiny, "buffer"))
    suite.fit(*test_resume.objects(entry, tiny, "buffer"), suite.StopAt(test_resume.CUT, tmp_path / "cut.ckpt"))
    resumed = suite.fit(*test_resume.objects(entry, tiny, "buffer"), ckpt=tmp_path / "cut.ckpt")
    test_resume.same(run, resumed)


@pytest.mark.parametrize(("k", "exact"), [(1, True), (2, False)])
def test_the_loss_of_an_exact_student_is_zero(k: int, exact: bool, entry: Any, tiny: Path) -> None:
    """A fresh student is its teacher: one step of it is one unguided step of the teacher, and not two."""
    run = suite.train(entry, tiny, prior=suite.FORWARD, updates=1, guidance=1.0, reflect="off", teacher_steps=4 * k)
    assert (run.rows[0]["loss"] < 1e-10) is exact


def test_a_plan_that_does_not_nest_is_refused(entry: Any, tiny: Path) -> None:
    with pytest.raises(ValueError, match="teacher_steps = 10 is no multiple of steps = 4"):
        suite.build(entry, tiny, teacher_steps=10)
