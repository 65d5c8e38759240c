"""The parts of a run's page: previews under a slider, bands of stages and priors, the shift by node, the cost, the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from ddil_lightning.runs.account import cost, use
from ddil_lightning.runs.bands import Bands, Span, bands
from ddil_lightning.runs.charts import Axis, Series, line_chart
from ddil_lightning.runs.curves import read_curves
from ddil_lightning.runs.report import write_report
from ddil_lightning.runs.sheets import gallery, labelled

NASTY = '<script>document.title = "taken"</script><img src=x onerror="document.title=1">&amp;"é\''


def sheet(path: Path, width: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 20), "red").save(path, pnginfo=labelled(["teacher@4", "student@4"], [NASTY, "a red cross"]))


def test_sheets_say_their_prompts_and_whatever_these_hold_is_text(tmp_path: Path) -> None:
    for update in (0, 100, 50):
        sheet(tmp_path / f"{update:06d}.png")
    page = gallery(tmp_path)
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;document" in page and "&amp;amp;" in page and "é" in page
    assert re.findall(r'data-said="([^"]+)"', page) == ["update 0", "update 50", "update 100"] and 'max="2" value="2"' in page
    assert "Rows: teacher@4, student@4." in page and "<li>a red cross</li>" in page


def test_a_wide_sheet_is_embedded_smaller(tmp_path: Path) -> None:
    sheet(tmp_path / "000000.png", width=3300)
    assert "data:image/jpeg;base64," in gallery(tmp_path) and 'class="player single"' in gallery(tmp_path)
    data = (tmp_path / "000000.png").read_bytes()
    (tmp_path / "000000.png").write_bytes(data[: len(data) // 2])  # no picture any more, but a PNG's size
    assert "data:image/png;base64," in gallery(tmp_path)


def test_the_prior_is_stacked_below_the_axis_and_stages_stand_behind_the_lines() -> None:
    """From 0 to 100 on pixels 0 to 100; the strip is 8 high, from 198 on; a share holds up to its update."""
    found = Bands([Span("to 4 steps", 0, 60), Span("to 2 steps", 60, 100)], [(60, (0.5, 0.5, 0.0)), (100, (0.25, 0.0, 0.75))])
    behind, below = found(Axis(0, 100, 0, 100))
    assert re.findall(r'class="(stage[ \w]*)" x="([\d.]+)" y="14" width="([\d.]+)"', behind) == [
        ("stage even", "0.0", "60.0"),
        ("stage", "60.0", "40.0"),
    ]
    paths = dict(re.findall(r'd="([^"]+)"><title>prior, (\w+)', below)[i][::-1] for i in range(3))
    assert paths["forward"] == "M0.0 198.0L60.0 198.0L60.0 198.0L100.0 198.0L100.0 200.0L60.0 200.0L60.0 202.0L0.0 202.0Z"
    assert paths["teacher"] == "M0.0 206.0L60.0 206.0L60.0 200.0L100.0 200.0L100.0 206.0L60.0 206.0L60.0 206.0L0.0 206.0Z"
    assert "prior, student: 0.5 at first, 0 at last, 0 to 0.5" in below and found.legend().count("<i ") == 3
    chart = line_chart([Series("a", [0, 100], [0, 1])], title="t", x_label="u", ground=found)
    assert 'viewBox="0 0 460 248"' in chart and chart.index('class="stage') < chart.index('class="line"')
    assert Bands()(Axis(0, 100, 0, 100)) == ("", "") and Bands().legend() == ""


def test_bands_are_those_of_the_config_and_the_curves() -> None:
    """Two parts make a stage; the run ends within the second stage; priors that do not change are one."""
    plan = [{"steps": 4, "parts": [{"updates": 20}, {"updates": 20}]}, {"steps": 2, "updates": 100}, {"steps": 1, "updates": 9}]
    x = list(range(10, 110, 10))
    curves = {
        f"prior/{name}": Series(name, x, [0.5] * 4 + [share] * 6) for name, share in (("forward", 0.5), ("student", 0.3), ("teacher", 0.2))
    }
    found = bands({"model": {"init_args": {"stages": plan}}}, curves)
    assert found.stages == [Span("to 4 steps", 0, 40), Span("to 2 steps", 40, 100)]
    assert found.priors == [(40, (0.5, 0.5, 0.5)), (100, (0.5, 0.3, 0.2))]
    kinds = bands({"model": {"init_args": {"stages": [{"kind": "guidance", "updates": 5}, {"steps": 2, "updates": 5}]}}}, curves).stages
    assert kinds == [Span("guidance", 0, 5), Span("to 2 steps", 5, 100)]  # the last one of the plan goes on
    for strange in ({}, {"model": "LCM"}, {"model": {"init_args": {"stages": "x"}}}, {"model": {"init_args": {"stages": [3, None]}}}):
        assert bands(strange, {}) == Bands([], [])


def test_the_shift_is_drawn_by_node(tmp_path: Path) -> None:
    lines = ["student_updates,shift/teacher@749,shift/teacher@249,shift/teacher"]
    lines += [f"{u},{0.5 - u / 100},{0.25 - u / 100},{u}" for u in (10, 20, 30)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    page = write_report(tmp_path).read_text()
    assert "t = 749: 0.4 at 10 student updates" in page and "t = 249: -0.05 at 30 student updates" in page
    assert "update 10: 0.15 at 249 time t of the node" in page and "update 30: 0.2 at 749 time t of the node" in page
    assert "Not measured" not in page
    assert "<b>shift/teacher</b>" in page and list(read_curves(tmp_path / "metrics.csv")) == [*lines[0].split(",")[1:]]


def test_a_run_without_a_probe_says_how_the_shift_is_measured(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("student_updates,loss\n10,0.5\n")
    page = write_report(tmp_path).read_text()
    assert "<h2>Covariate shift</h2>" in page and "{callbacks: [{class_path: ShiftProbe}]}" in page and "ddil-probe" in page


def test_what_a_run_cost() -> None:
    summary = {"student_updates": 100, "network_evaluations": {"student": 300, "teacher": 100}, "seconds": 90.0, "seconds_training": 60.0}
    config = {"data": {"batch_size": 32}, "model": {"init_args": {"optimizer": {"accumulate": 2}}}}
    text = re.sub(r"<[^>]+>", "|", cost(summary | {"peak_memory_gib": 1.5}, config))
    for said in ("6,400", "100 updates of 32 a device, 2 times before an update", "400", "4 an update", "1 min 0 s"):
        assert f"|{said}|" in text
    assert "|600 ms an update, 1 min 30 s with all else|" in text and "|1.50 GiB|" in text and "width:33.3%" in cost(summary, config)
    assert cost({}, {}) == "" and cost({"student_updates": 3}, {}) == ""


@pytest.mark.parametrize("place", ["runs/x", "/somewhere/x"])
def test_the_code_of_the_card_loads_the_runs_pipeline(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "x" if place.startswith("/") else Path(place)
    (folder / "pipeline").mkdir(parents=True)
    code = 'pipe = X.from_pretrained(".", torch_dtype=d)\nimage = pipe("<b>")'
    card = f"# A\n\n```python\n{code}\n```\n\nThe `scheduler` holds\nthem.\n\n## In ComfyUI\n"
    (folder / "pipeline" / "README.md").write_text(card)
    page = use(folder)
    where = "pipeline" if place.startswith("/") else "runs/x/pipeline"
    assert f"from_pretrained(&quot;{where}&quot;, torch_dtype=d)" in page and "&lt;b&gt;" in page
    assert page.endswith('<p class="note">The scheduler holds them.</p>')
    (folder / "pipeline" / "README.md").write_text("nothing")
    assert use(folder) == ""


def test_a_sheet_of_another_program_has_no_prompts(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20)).save(tmp_path / "000000.png")
    assert "<ol>" not in gallery(tmp_path)
    for words in ('"x"', '{"rows": 1}', "{"):
        info = labelled([], [])
        info.chunks[0] = (b"iTXt", b"ddil\0\0\0\0\0" + words.encode(), False)
        Image.new("RGB", (40, 20)).save(tmp_path / "000000.png", pnginfo=info)
        assert "update 0" in gallery(tmp_path) and "<ol>" not in gallery(tmp_path), json.dumps(words)
