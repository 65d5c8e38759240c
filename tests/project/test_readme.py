"""README.md and docs/ are carried out, on a random pipeline: every command, every snippet, and what they say of files and rows.

The ordinary tests type what README.md and one page more say, the slow ones all pages.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from pages import COMMANDS, FILES, GUIDES, ROOT, SNIPPETS, TEXT, call, smaller, words
from PIL import Image

from ddil_lightning.backbones.repositories import BUILTIN
from ddil_lightning.evaluation.registry import columns
from ddil_lightning.packaged import find_config

pytestmark = pytest.mark.timeout(900)  # a page is carried out as a whole, before the first test of one of its lines
ORDINARY = ("README.md", "methods-and-priors.md")
ROWS = [f"{who}@{n}" for who, steps in (("teacher", (32, 4, 2, 1)), ("student", (4, 2, 1))) for n in steps]
SESSIONS = [(name, *session) for name, page in GUIDES.items() for session in page.sessions]


class Ran(NamedTuple):
    """A command after it has run."""

    code: int
    out: str
    err: str
    folder: Path  # the newest run of lcm_ddil.yaml by then
    left: set[str]  # what lies in it
    summary: dict[str, Any]
    config: str


class Reader:
    """Carries out a page, README.md before it, when one of its commands is asked for; nobody trains, or tests a teacher, twice."""

    def __init__(self, place: Path) -> None:
        self.place, self.done = place, dict[tuple[str, str], Ran]()
        self.trained: dict[tuple[str, ...], Ran] = {}

    def __getitem__(self, key: tuple[str, str]) -> Ran:
        self.read(key[0])
        return self.done[key]

    def read(self, page: str) -> None:
        """All commands of a page, one after the other, as a reader types them who has come from the first page."""
        for name in dict.fromkeys(("README.md", page)):
            for key in COMMANDS:
                if key[0] == name and key not in self.done:
                    self.done[key] = self.typed(key[1])

    def typed(self, line: str) -> Ran:
        said = tuple(words(line))
        if said in self.trained:
            return self.trained[said]
        code, out, err = call(smaller([*said]))
        folder = (self.place / "runs" / "lcm_ddil" / "latest").resolve()
        left = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        summary = json.loads((folder / "summary.json").read_text()) if "summary.json" in left else {}
        config = (folder / "config.yaml").read_text() if "config.yaml" in left else ""
        ran = Ran(code, out, err, folder, left, summary, config)
        if said[0] == "ddil-fit" or "builtin" in said:
            self.trained[said] = ran
        return ran


def images(folder: Path) -> None:
    """A stand-in for images of the reader's own."""
    folder.mkdir()
    for i in range(64):
        Image.new("RGB", (24, 16), (4 * i, 0, 0)).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a red square"}) for i in range(64)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def place(tiny: Path, sd3: Path, flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, where `builtin` is the random pipeline, flows have their own, and the files of the pages are saved."""
    folder = tmp_path_factory.mktemp("reader")
    images(folder / "my_images")
    for name, code in FILES.items():
        (folder / name).write_text(code.replace("class_path: ShiftProbe", "class_path: ShiftProbe\n    init_args: {every: 3, count: 8}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for name, pipeline in (("builtin", tiny), ("sd3", sd3), ("flux", flux)):
            patch.setitem(BUILTIN, name, str(pipeline))
        yield folder


@pytest.fixture(scope="module")
def ran(place: Path) -> Reader:
    """What has been carried out, and what is when a test asks for it."""
    return Reader(place)


@pytest.fixture
def first(ran: Reader) -> Ran:
    """The plain run of the default config, by `make fit`."""
    return ran[COMMANDS[0]]


def the(ran: Reader, part: str, page: str = "commands.md") -> Ran:
    """The one line of a page with `part` in it."""
    (found,) = [key for key in COMMANDS if key[0] == page and part in key[1]]
    return ran[found]


# Commands ----------------------------------------------------------------------------------------------------------------------------


def test_the_first_command_is_the_default_run() -> None:
    assert COMMANDS[0][0] == "README.md" and COMMANDS[0][1].startswith("make fit")
    plain = words(dict(COMMANDS[::-1])["commands.md"])
    assert plain == ["ddil-fit", "--config", "lcm_ddil.yaml"]
    # The README says how many of its updates the first run has.
    few = words(COMMANDS[0][1])[len(plain) :]
    assert few[0] == "--updates" and f"{few[1]} of them" in GUIDES["README.md"].prose and few[2:] == ["model.ema=0.985"]


@pytest.mark.parametrize(("page", "line"), [pytest.param(*key, marks=() if key[0] in ORDINARY else pytest.mark.slow) for key in COMMANDS])
def test_command(page: str, line: str, ran: Reader) -> None:
    assert ran[page, line].code == 0, ran[page, line].err


@pytest.mark.parametrize(("page", "line", "said"), SESSIONS)
def test_refusal(page: str, line: str, said: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    code, out, err = call(words(line))
    assert (code, out, err) == (2, "", said.rstrip("\n") + "\n") and sorted(place.rglob("*")) == before


@pytest.mark.slow
def test_fit_and_its_second_run(first: Ran, ran: Reader) -> None:
    again = the(ran, "--seed 1")
    assert first.summary["student_updates"] == again.summary["student_updates"] == 3 and first.folder != again.folder
    assert (first.summary["seed"], again.summary["seed"]) == (0, 1)
    assert yaml.safe_load(again.config)["model"]["init_args"]["optimizer"]["lr"] == 1e-4


@pytest.mark.slow
def test_last_goes_on_where_the_newest_run_stopped(ran: Reader) -> None:
    before, after = the(ran, "--seed 1"), the(ran, "--ckpt_path last")
    assert after.folder == before.folder and (before.summary["student_updates"], after.summary["student_updates"]) == (3, 5)
    assert after.config == before.config.replace("updates: 3\n", "updates: 5\n")  # its own settings, whatever the named config says


@pytest.mark.slow
def test_print_config_and_wandb(ran: Reader) -> None:
    every = yaml.safe_load(the(ran, "--print_config").out)
    assert (
        every["model"]["init_args"]["optimizer"]["clip"] == 1.0 and every["data"]["buffer"]["capacity"] == 2048 and every["wandb"] == "off"
    )  # defaults, too
    offline = yaml.safe_load(the(ran, "--wandb offline").out)
    assert offline == {**every, "wandb": "offline"}


def test_own_images(ran: Reader, place: Path) -> None:
    small = yaml.safe_load(the(ran, "data.captions.size=32", "README.md").config)
    large = yaml.safe_load((place / "runs" / "sd15" / "config.yaml").read_text())
    for config in (small, large):
        captions = config["data"]["captions"]
        assert captions["class_path"].endswith("Images") and captions["init_args"]["path"] == "my_images"
    assert json.loads((place / "runs" / "sd15" / "summary.json").read_text())["student_updates"] == 3


def test_own_method(ran: Reader) -> None:
    own = the(ran, "mine.Guided", "README.md")
    assert yaml.safe_load(own.config)["model"]["class_path"] == "mine.Guided" and own.summary["student_updates"] == 3
    assert "report.html" in own.left and json.loads((own.folder / "pipeline" / "ddil.json").read_text())["method"] == "Guided"


def test_a_prior_that_changes(ran: Reader) -> None:
    """Shares of 0.9 and 0.1 after three of 600 updates, not the config's 0.3 and 0.7; the probe has its columns."""
    annealed = the(ran, "annealed.yaml", "methods-and-priors.md")
    callbacks = [entry["class_path"] for entry in yaml.safe_load(annealed.config)["trainer"]["callbacks"]]
    assert [name.rpartition(".")[2] for name in callbacks] == ["AnnealPrior", "ShiftProbe"]
    rows = list(csv.DictReader((annealed.folder / "metrics.csv").read_text().splitlines()))
    assert any(name.startswith("shift/") for name in rows[0])
    assert [float(row["prior/student"]) for row in rows if row["prior/student"]][-1] == pytest.approx(0.1, abs=0.01)


def test_tests(ran: Reader, place: Path) -> None:
    tested = the(ran, "ddil-test runs", "README.md")
    assert "written to runs/lcm_ddil/latest/metrics.json" in tested.out
    assert [row["name"] for row in json.loads((tested.folder / "metrics.json").read_text())["rows"]] == ROWS[-3:]
    (teacher,) = json.loads((place / "metrics.json").read_text())["rows"]
    assert (teacher["name"], teacher["guidance"], teacher["nfe"]) == ("teacher@32", 3.0, 64)


@pytest.mark.slow
def test_tests_samples_and_exports(ran: Reader, place: Path) -> None:
    last = the(ran, "ddil-export").folder
    rows = json.loads((last / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ROWS[-3:]
    assert "written to runs/lcm_ddil/latest/metrics.json" in the(ran, "ddil-test runs").out
    assert Image.open(place / "x.png").height >= 256 and "1 image(s), 4 steps" in the(ran, "ddil-sample").out
    weights = (place / "my-student" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors", last / "pipeline" / "unet")
    half, whole = weights[0].stat().st_size, sum(p.stat().st_size for p in weights[1].glob("*.safetensors"))
    assert 0.45 < half / whole < 0.6  # float16
    assert (place / the(ran, "ddil-pretrain").out.strip().splitlines()[-1] / "model_index.json").is_file()


# Snippets ------------------------------------------------------------------------------------------------------------------------------

LIBRARY, _ = (code for name, code in SNIPPETS if name == "python.md")


@pytest.mark.parametrize(
    ("page", "code"),
    [pytest.param(*snippet, marks=pytest.mark.slow if snippet[0] == "commands.md" else ()) for snippet in SNIPPETS],
    ids=[name for name, _ in SNIPPETS],
)
def test_snippet(page: str, code: str, ran: Reader) -> None:
    ran.read(page)
    space: dict[str, Any] = {}
    small = code.replace("updates=720", "updates=3").replace("max_epochs=-1", "max_epochs=-1, accelerator='cpu'")
    small = small.replace('"--updates", "200"', '"--updates", "3", "trainer.accelerator=cpu"')
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        exec(small, space)
    if page == "python.md":
        assert space["method"].student_updates == 3 and space["method"].backbone.path == "builtin"
    else:
        assert space["image"].size == (16, 16)


def keywords(code: str, name: str) -> dict[str, Any]:
    """The keyword arguments of the one call of `name`."""
    (found,) = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]
    return {k.arg or "": table(k.value) for k in found.keywords if not isinstance(k.value, ast.Call) or k.arg in ("distance", "optimizer")}


def table(value: ast.expr) -> Any:
    """A literal, or the keywords of a record, as a config says them."""
    return {k.arg: table(k.value) for k in value.keywords} if isinstance(value, ast.Call) else ast.literal_eval(value)


def notebook(kind: str) -> str:
    """The text of all cells of the quickstart notebook that are of one kind."""
    cells = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == kind)


def test_the_snippet_and_the_notebook_have_the_settings_of_the_shipped_config() -> None:
    config = yaml.safe_load(find_config("lcm_ddil.yaml").read_text())
    updates, batch = config["model"]["init_args"].pop("updates"), config["data"]["batch_size"]
    small = notebook("code")
    mine, theirs = keywords(LIBRARY, "LCM"), keywords(small, "LCM")
    assert mine.pop("updates") == updates and mine == config["model"]["init_args"]
    assert theirs.pop("updates") < updates and theirs == config["model"]["init_args"]
    assert keywords(LIBRARY, "DDILDataModule") == {"batch_size": batch}
    assert f"raise `updates` to {updates} and the batch to {batch}" in notebook("markdown")
    for code in (LIBRARY, small):
        assert {"teacher": 0.0, **keywords(code, "SamplingPrior")} == config["data"]["prior"]


# What a run leaves, and the contract ---------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(first: Ran) -> None:
    rows = re.findall(r"^\| (`.*?) \|", GUIDES["runs.md"].text, re.M)
    names = {name for row in rows for name in re.findall(r"`(.+?)`", row)}
    # Of stages, of commands, of a run that went on, of those that are asked for.
    later = {"stages/", "metrics.json", "probe.json", "probe.html", "config.before-N.yaml", "wandb/", "tensorboard/", "profile/"}
    assert {name.split("/")[0] for name in names - later} == first.left and later < names
    assert all(list(first.folder.glob(name)) for name in names - later)


def keys(pattern: str) -> list[str]:
    """The names in the braces or code that `pattern` finds in the text."""
    (found,) = re.findall(pattern, re.sub(r"\s+", " ", TEXT))
    return re.findall(r"[\w@]+", found)


def test_rows_of_the_contract(first: Ran, ran: Reader) -> None:
    named = keys(r"`summary.json` holds (.*?) \(a count by role\)")
    assert {"student_updates", "seconds", "network_evaluations", "rows"} == {*named, "rows"} - {"and"} <= set(first.summary)
    assert all(isinstance(n, int) and n > 0 for n in first.summary["network_evaluations"].values())
    assert [row["name"] for row in first.summary["rows"]] == ROWS and set(keys(r"; `name` is (.*?), …;")) <= set(ROWS)
    metrics = keys(r"`metrics` is `\{(.*?)\}`")
    assert metrics == [c.key for c in columns() if c.shown]
    tested = json.loads((the(ran, "ddil-test runs", "README.md").folder / "metrics.json").read_text())["rows"]
    for row in (*first.summary["rows"], *tested):
        assert list(row) == keys(r"A row is `\{(.*?)\}`") and row["n"] == 16
        assert all(isinstance(row["metrics"][key], float) for key in metrics)
