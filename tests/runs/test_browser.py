"""The pages of a run and of a probe in a browser: on a phone, on a desk, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from browser import Browser, needs_chromium
from ddil_lightning.runs.report import write_report
from ddil_lightning.runs.sheets import labelled
from hostile import EVIL, probe_page

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose texts hold markup and words without an end."""
    run = tmp_path_factory.mktemp("run")
    (run / "samples").mkdir()
    for update in (0, 50, 100):
        picture = Image.new("RGB", (900, 300), (update * 2, 90, 120))
        picture.save(run / "samples" / f"{update:06d}.png", pnginfo=labelled([EVIL], [EVIL, "a cross"]))
    names = "loss loss/student prior/forward prior/student prior/teacher shift/teacher@749 shift/teacher@249".split()
    lines = [[u, 1 / u, 2 / u, 1 - u / 100, u / 100, 0, 0.1, 0.2] for u in range(10, 110, 10)]
    (run / "metrics.csv").write_text("\n".join(",".join(map(str, line)) for line in (["student_updates", *names], *lines)))
    (run / "config.yaml").write_text(
        "model: {init_args: {stages: [{steps: 4, updates: 60}, {steps: 2, updates: 40}]}}\ndata: {batch_size: 4}\n"
    )
    rows = [
        {"name": f"{who}@{n}", "steps": n, "guidance": 3.0, "n": 16, "nfe": n, "seconds_per_image": 0.1,
         "metrics": {"frechet": 1.0 / n, "all_right": 0.5, "clip": 0.8, "density": 1.0, "coverage": 1.0},
         "protocol": {"n": 16, "prompts": EVIL, "networks": {"features": "x." + "y" * 200}}}
        for who in ("teacher", "student") for n in (1, 4)
    ]  # fmt: skip
    (run / "pipeline").mkdir()
    (run / "pipeline" / "README.md").write_text(f'```python\npipe = X.from_pretrained(".")  # {EVIL}\n```\n\n{EVIL}\n')
    counts = {"student": 400, EVIL: 3}
    facts = {
        "config": EVIL,
        "student_updates": 100,
        "seconds": 90,
        "seconds_training": 60,
        "peak_memory_gib": 1.0,
        "network_evaluations": counts,
    }
    return write_report(run, facts | {"rows": rows, "machine": {"device": EVIL}})


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize("probed", [False, True], ids=["run", "probe"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_fits_and_complains_of_nothing(width: int, dark: bool, probed: bool, page: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(probe_page(tmp_path) if probed else page, width, dark)
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.ask("document.documentElement.scrollWidth") == browser.ask("window.innerWidth") == width
    assert browser.complaints == [] and "taken" not in browser.ask("document.title")[:5]
    picture = Image.open(browser.photograph(tmp_path / "page.png", whole=False)).convert("L")
    corner, ink = picture.getpixel((3, 3)), picture.getextrema()
    assert (corner < 40 and ink[1] > 200) if dark else (corner > 240 and ink[0] < 60)


def test_the_slider_shows_one_sheet_at_a_time(page: Path, browser: Browser) -> None:
    browser.open(page, 390)
    seen = "[...document.querySelectorAll('.frame')].map(f => f.offsetParent !== null)"
    assert browser.ask(seen) == [False, False, True] and browser.ask("document.querySelector('output').textContent") == "update 100"
    browser.ask("(r => { r.value = 1; r.dispatchEvent(new Event('input')) })(document.querySelector('.slide input'))")
    assert browser.ask(seen) == [False, True, False] and browser.ask("document.querySelector('output').textContent") == "update 50"


def test_a_script_that_got_in_would_not_run(page: Path, browser: Browser, tmp_path: Path) -> None:
    """The policy of the page alone: no text gets in as markup, and if one did, the browser would refuse to run it."""
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(page.read_text().replace("<footer>", "<script>document.title = 'taken'</script><footer>"))
    browser.open(spoilt, 390)
    assert browser.ask("document.title") != "taken" and any("Content Security Policy" in said for said in browser.complaints)
    browser.complaints.clear()


def test_without_scripts_the_sheets_are_a_strip(page: Path, browser: Browser) -> None:
    browser("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page, 390)
    assert browser.ask("[...document.querySelectorAll('.frame')].every(f => f.offsetParent !== null)")
    assert browser.ask("document.documentElement.scrollWidth") == 390
    browser("Emulation.setScriptExecutionDisabled", value=False)
