"""The report of a run, its tables and its charts."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from ddil_lightning.evaluation.table import cell, gap_closed, results_table
from ddil_lightning.runs.charts import HEIGHT, WIDTH, Series, binned, line_chart, log_ticks, smoothed, ticks
from ddil_lightning.runs.curves import families, read_curves, unit
from ddil_lightning.runs.report import write_report

PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (272).to_bytes(4, "big") + (204).to_bytes(4, "big") + b"rest"
VOID = {"meta", "link", "img", "line", "path", "input"}


def row(name: str, frechet: float, all_right: float, **more: object) -> dict:
    steps = int(name.split("@")[1])
    return {
        "name": name,
        "steps": steps,
        "guidance": 3.0,
        "n": 1000,
        "nfe": 2 * steps,
        "seconds_per_image": 0.0125,
        "metrics": {"frechet": frechet, "all_right": all_right, **more},
    }


ROWS = [row("teacher@32", 1.0, 0.9), row("teacher@2", 9.0, 0.5), row("student@2", 1.8, 0.86)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    summary = {"config": "lcm_<ddil>", "student_updates": 600, "seconds": 252.3, "seed": 7, "rows": ROWS}
    (folder / "summary.json").write_text(json.dumps(summary | {"network_evaluations": {"student": 1200}}))
    header = "epoch,step,student_updates,loss,lr,prior/forward,prior/student,buffer/size\n"
    lines = [f"0,{i},{i},{1 / (i + 1)},,,," if i % 2 else f"0,{i},{i},,0.001,{1 - i / 40},{i / 40},{64 * i}" for i in range(20)]
    (folder / "metrics.csv").write_text(header + "\n".join(lines))
    (folder / "config.yaml").write_text("model: <script>alert(1)</script>\n")
    for update in (0, 100, 600):
        (folder / "samples" / f"{update:06d}.png").write_bytes(PNG)
    return folder


class Page(HTMLParser):
    """Checks that tags are balanced, and collects every address and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_page_stands_alone_and_shows_everything(run: Path) -> None:
    html = write_report(run).read_text()
    page = Page(html)
    assert all(link.startswith("data:") for link in page.links) and len(page.links) == 4  # three sheets and the empty icon
    assert "url(" not in html and "@import" not in html and html.count("<script") == 1 and "default-src 'none'" in html
    assert "lcm_<ddil>" in page.text and "600 student updates in 4 min 12 s" in page.text and "1,200" in page.text
    assert "<script>alert(1)</script>" in page.text  # as text, in the configuration
    assert "closes 90% of the Fréchet gap, 90% of the all-right gap" in page.text
    assert html.count('<figure class="chart') == 6  # two by steps, loss, lr, prior, buffer/size
    assert re.findall(r"<figcaption>update ([\d,]+)<", html) == ["0", "100", "600"] and 'class="frame now" data-said="update 600"' in html
    assert 'class="pixels" width="272" height="204"' in html


def test_prior_is_one_chart_with_each_actors_colour(run: Path) -> None:
    html = write_report(run).read_text()
    chart = next(f for f in re.findall(r'<figure class="chart">.*?</figure>', html, re.S) if "<b>prior</b>" in f)
    assert re.findall(r"var\(--c(\d)\)\"></i>(\w+)", chart) == [("3", "forward"), ("1", "student")]
    shares = line_chart([Series(f"buffer/share_{k}", [0, 1], [0, 1]) for k in ("a", "teacher")], title="t", x_label="u")
    assert re.findall(r"var\(--c(\d)\)\"></i>(\w+)", shares) == [("1", "a"), ("2", "teacher")]
    assert "prior/student: 0.2 share at 8 student updates" in chart


def test_missing_files_are_said(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path).read_text()).text
    for name in ("summary.json", "samples/", "metrics.csv", "config.yaml"):
        assert name in text
    with pytest.raises(FileNotFoundError, match=r"no run folder at .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_a_summary_that_is_nested_too_deeply_is_said(run: Path) -> None:
    (run / "summary.json").write_text('{"rows": ' + "[" * 200_000)
    text = Page(write_report(run).read_text()).text
    assert "summary.json could not be read (it is nested too deeply)" in text


def test_broken_files_are_said_and_the_rest_is_shown(run: Path) -> None:
    (run / "summary.json").write_text('{"rows": [{"name": "teac')
    (run / "samples" / "000600.png").write_bytes(b"")
    (run / "metrics.csv").write_text("student_updates,loss\n1,0.5\n2,nan\n3,0.25\n4")
    text = Page(write_report(run).read_text()).text
    assert "was not written completely" in text and "1 of 3 files in samples/ are no readable PNG" in text
    assert "loss has 1 values that are not finite" in text
    assert "update 100" in text
    (run / "metrics.csv").write_text("step,loss\n1,0.5\n")
    assert "metrics.csv holds no curves over student_updates." in Page(write_report(run).read_text()).text


def test_what_cannot_be_read_as_a_file_or_as_a_time(run: Path) -> None:
    (run / "samples" / "000700.png").symlink_to("nowhere")
    (run / "samples" / "000800.png").mkdir()
    assert "2 of 5 files in samples/ are no readable PNG" in Page(write_report(run).read_text()).text
    for seconds in (math.nan, math.inf, True, "1"):
        (run / "summary.json").write_text(json.dumps({"student_updates": 600, "seconds": seconds, "rows": ROWS}))
        assert "\n600 student updates\n" in Page(write_report(run).read_text()).text


def test_rows_without_metrics_or_with_unknown_shape(run: Path) -> None:
    rows = ["x", {"steps": 4}, {"name": "student@4"}, {"name": "<i>", "steps": "4", "metrics": {"frechet": float("nan")}}]
    (run / "summary.json").write_text(json.dumps({"rows": rows}))
    text = Page(write_report(run).read_text()).text
    assert "student@4" in text and "<i>" in text and "not finite" in text


def test_many_sheets_are_thinned_evenly(run: Path) -> None:
    for update in range(0, 9100, 100):
        (run / "samples" / f"{update:06d}.png").write_bytes(PNG)
    html = write_report(run).read_text()
    shown = [int(u.replace(",", "")) for u in re.findall(r"<figcaption>update ([\d,]+)<", html)]
    assert (shown[0], shown[-1], len(shown)) == (0, 9000, 24) and {b - a for a, b in pairwise(shown)} == {300, 400}
    assert "24 of the 91 sheets are shown" in html and 'max="23" value="23"' in html


def test_full_disk_leaves_the_older_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run).read_text()

    def full(self: Path, *args: object, **kwargs: object) -> int:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_text() == before and not list(run.glob("*.part"))


def test_what_the_rows_were_measured_by(run: Path) -> None:
    """Rows of older runs have no protocol, and are shown as ever; rows of two protocols are not to be compared."""
    assert "How it was measured" not in write_report(run).read_text()
    mine = {"n": 1000, "prompts": "held-out <b>", "reference": {"images": 900}, "resize": None, "seeds": {"first": 0}}
    summary = {"rows": [row | {"protocol": mine} for row in ROWS]}
    page = write_report(run, summary).read_text()
    assert "<b>prompts</b>held-out &lt;b&gt;" in page and "<b>reference images</b>900" in page and "resize" not in page
    assert "compare only rows of the same" not in page
    summary["rows"][0] = ROWS[0] | {"protocol": mine | {"n": 16}}
    assert "The rows were measured by 2 protocols: compare only rows of the same." in write_report(run, summary).read_text()


def test_all_measures_stand_in_a_table_of_their_own_with_their_intervals(run: Path) -> None:
    rows = [{**r, "metrics": {**r["metrics"], "kid": 0.5, "intervals": {"frechet": [0.25, 1.25]}}} for r in ROWS]
    page = Page(write_report(run, {"rows": rows}).read_text())
    table, every = page.text.split("All measures, with 95 % intervals")
    assert "KID ↓" in every and "KID" not in table.partition("What the columns mean")[0] and "[0.250, 1.250]" in every


def test_results_table() -> None:
    table = results_table([row("teacher@32", 1.0, 0.9), row("student@2", 21.345, 0.12345, clip=0.3)])
    assert table.splitlines() == [
        "|  | NFE | Fréchet distance ↓ | CLIP score ↑ | All right ↑ | s/image |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| teacher@32 | 64 | 1 | – | 0.900 | 0.013 |",
        "| student@2 | 4 | 21.34 | 0.300 | 0.123 | 0.013 |",
    ]
    values = (None, 1000, 0.0001234, float("inf"), "x", 123456.7)
    assert [cell(v) for v in values] == ["–", "1,000", "0.0001234", "not finite", "x", "123,457"]


def test_gap_closed() -> None:
    assert gap_closed(1.8, 9.0, 1.0) == pytest.approx(0.9)
    assert gap_closed(0.86, 0.5, 0.9) == pytest.approx(0.9)
    assert gap_closed(10.0, 9.0, 1.0) == pytest.approx(-0.125)
    assert gap_closed(1.0, 1.05, 1.0) is None and gap_closed(0.0, 0.0, 0.0) is None


def test_curves_are_sparse_ordered_and_follow_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    # the second row has no clock and takes 4; then a resumed run starts again at 2
    path.write_text("step,epoch,student_updates,loss,lr\n10,0,4,0.4,\n11,0,,,0.1\n12,0,2,0.2,x\n13,0,6,inf,0.3\n")
    curves = read_curves(path)
    assert (curves["loss"].x, curves["loss"].y) == ([2.0, 4.0, 6.0], [0.2, 0.4, math.inf])
    assert (curves["lr"].x, curves["lr"].y) == ([4.0, 6.0], [0.1, 0.3])
    for other in ("", "step,loss\n1,0.5\n"):
        path.write_text(other)
        assert read_curves(path) == {}


def test_families_share_a_chart_only_with_like_quantities() -> None:
    tops = {"loss": 1, "loss/a": 1, "loss/b": 0.1, "loss/c": 0.001, "buffer/size": 900, "buffer/age": 800, "prior/x": 1, "prior/y": 0.001}
    tops |= {"shift/node_999": 0.001, "shift/node_499": 5, "validation/clip_4": 0.8, "validation/kid_4": 0.7, "validation/clip_1": 0.2}
    groups = families({k: Series(k, [0, 1], [0.0, v]) for k, v in tops.items()})
    assert [[s.name for s in g] for g in groups] == [
        ["loss"],
        ["loss/a", "loss/b"],
        ["loss/c"],
        ["buffer/size"],
        ["buffer/age"],
        ["prior/x", "prior/y"],
        ["shift/node_999", "shift/node_499"],
        ["validation/clip_4", "validation/clip_1"],
        ["validation/kid_4"],
    ]


def test_a_unit_follows_from_whole_words_of_a_name() -> None:
    units = {"shift/coverage": "share", "drawn/share_student": "share", "reflect/saturated": "share", "prior/student": "share"}
    units |= {"buffer/age": "updates", "buffer/size": "states", "shift/loss_ratio@249": "times", "step_seconds": "s", "peak_mib": "MiB"}
    units |= dict.fromkeys(("loss/average", "image/loss", "storage", "estimate", "iteration_loss", "generation/loss", "shift/teacher"), "")
    assert {name: unit(name) for name in units} == units


def test_chart_maps_data_to_pixels() -> None:
    chart = line_chart([Series("a", [0, 5, 10], [0, math.nan, 4]), Series("b", [0, 5, 10], [0, 2, 4])], title="t", x_label="u")
    # x from 52 to 446, y from 196 up to 14; the gap at x = 5 breaks the first line
    assert re.findall(r'class="line"[^>]* d="([^"]+)"', chart) == ["M52.0 196.0M446.0 14.0", "M52.0 196.0L249.0 105.0L446.0 14.0"]
    logs = line_chart([Series("a", [1, 2, 4], [1, 10, 100])], title="t", x_label="u", log_x=True, log_y=True)
    (x0, y0), (x1, y1), (x2, y2) = [map(float, p.split()) for p in re.findall(r"[\d.]+ [\d.]+", re.search(r' d="([^"]+)"', logs)[1])]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert "a: 10 at 2 u" in logs and 'class="legend"' not in logs and 'class="legend"' in chart
    Page(chart), Page(logs)


@pytest.mark.parametrize("y", [[3.0, 3.0], [0.0, 0.0], [-5.0, -5.0], [1e-9, 2e-9], [-1e6, 1e6], [999.9, 1000.1]])
def test_chart_holds_any_range(y: list[float]) -> None:
    chart = line_chart([Series("a", [0, 1], y)], title="t", x_label="u", reference=("ref", y[0]))
    heights = [float(v) for v in re.findall(r'cy="([-\d.]+)"', chart)]
    assert all(0 <= h <= HEIGHT for h in heights) and len(re.findall('class="tick"', chart)) >= 4


def test_chart_holds_flat_and_wild_curves() -> None:
    """Nearly equal values, one point, NaN between, any magnitude: every coordinate in the picture is a number inside it."""
    rng = random.Random(0)
    special = [0.0, -0.0, 1.0, 1 + 1e-16, 1 - 1e-12, 0.1 + 0.2, 0.3, 5e-324, 1e-308, 1e308, -1e308, 1e-12, math.nan, math.inf, -math.inf]
    for _ in range(400):
        base, size = rng.choice(special), rng.choice([1, 2, 3, 130])
        near = lambda base=base: base * (1 + rng.choice([0, 1e-16, 1e-13, 1e-6, 0.1]) * rng.random())  # noqa: E731
        y = [near() if rng.random() < 0.7 else rng.choice(special) for _ in range(size)]
        x = sorted(rng.choice([float(i), 1e16 + i, 7.0, i * 1e-20]) for i in range(size))
        if not any(map(math.isfinite, y)):
            continue
        log = {"log_x": rng.random() < 0.3, "log_y": rng.random() < 0.3}
        svg = line_chart([Series("a", x, y), Series("b", x, y[::-1])], title="t", x_label="x", **log)
        numbers = [float(n) for n in re.findall(r'c[xy]="([^"]+)"', svg)]
        assert numbers and all(-1 <= n <= WIDTH + 1 for n in numbers), (x, y)


def test_chart_without_a_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="'t' has no finite value"):
        line_chart([Series("a", [0, 1], [math.nan, math.inf])], title="t", x_label="u")


def test_ticks() -> None:
    assert ticks(0, 1) == [0, 0.5, 1] and ticks(0, 600, 6) == [0, 100, 200, 300, 400, 500, 600]
    assert ticks(-0.3, 0.3) == [-0.2, 0, 0.2]
    assert log_ticks(1, 100) == [1, 2, 5, 10, 20, 50, 100] and log_ticks(0.001, 10) == [0.001, 0.01, 0.1, 1, 10]


def test_binning_keeps_the_mean_and_smoothing_takes_the_noise() -> None:
    noisy = Series("a", list(range(1000)), [float(i % 2) for i in range(1000)])
    means = binned(noisy, 100)
    assert len(means.x) == 100 and means.y == [0.5] * 100 and means.x[0] == 4.5
    assert binned(means) is means
    mean = smoothed(noisy)
    assert mean is not None and all(abs(v - 0.5) < 0.02 for v in mean.y)
    assert smoothed(Series("b", noisy.x, [i * 0.1 for i in noisy.x])) is None  # nothing to smooth
    assert smoothed(Series("c", [0, 1], [0, 1])) is None
