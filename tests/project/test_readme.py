"""The README is carried out: its commands and snippets on a random pipeline, and what it names is looked up."""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image

import ddil_lightning
from ddil_lightning.backbones.loading import BUILTIN
from ddil_lightning.commands import main
from ddil_lightning.commands.configs import config_names, find_config
from ddil_lightning.evaluation.registry import columns
from ddil_lightning.evaluation.table import results_table

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
INLINE = [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", PROSE)]
LINES = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith("ddil-")]
PICTURE, LIBRARY = (block for language, block in BLOCKS if language == "python")
ROWS = [f"{who}@{n}" for who, steps in (("teacher", (32, 4, 2, 1)), ("student", (4, 2, 1))) for n in steps]

FIT = "trainer.accelerator=cpu data.batch_size=8 previews.count=1 previews.teacher_steps=[4] checkpoints.every=2"
PRETRAIN = "--images=16 --batch_size=8 --devices=1 --autoencoder_steps=1 --decoder_steps=1 --prompts=4 --guidance=[2.0] --progress=false"
SMALL = {
    "ddil-fit": FIT,
    "ddil-test": "--n 16",
    "ddil-pretrain": f"{PRETRAIN} --interim=null --dataset=digits",
    "lcm_ddil_sd15.yaml": "model.pipeline=builtin model.teacher_dtype=float32 data.captions.size=16 data.workers=0 previews.every=0 "
    "trainer.devices=1 trainer.strategy=auto trainer.precision=32-true",
}
"""What is added to a line, by the command or the config that it names: the same, in seconds."""


class Ran(NamedTuple):
    """A line of the README after it has run."""

    code: int
    out: str
    err: str
    folder: Path  # the newest run of lcm_ddil.yaml by then
    left: set[str]  # what lies in it
    summary: dict[str, Any]
    config: str


def smaller(line: str) -> list[str]:
    """The words of a line, with those that make it small."""
    words = shlex.split(line, comments=True)
    more = [word for name, small in SMALL.items() if name in words for word in small.split()]
    if words[0] != "ddil-fit" or "--print_config" in words:
        return words if words[0] == "ddil-fit" else words + more
    if "--wandb" in words:
        return [*words, "--print_config"]  # W&B itself takes as long as all others together; tests/test_cli.py has it
    first = words[1:] == ["--config", "lcm_ddil.yaml"]
    return [*words, *more, "--updates", "5" if "--ckpt_path" in words else "3", f"test.n={16 if first else 0}"]


def call(words: list[str]) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        main.run(main.command(words[0].removeprefix("ddil-")), words[0], words[1:])
    return stop.value.code, out.getvalue(), err.getvalue()


def printed(*words: str) -> dict[str, Any]:
    """What ddil-fit --print_config says."""
    code, out, err = call(["ddil-fit", *words, "--print_config"])
    assert code == 0, err
    return yaml.safe_load(out)


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load(find_config(name).read_text())


def images(folder: Path) -> None:
    """A stand-in for images of the reader's own."""
    folder.mkdir()
    for i in range(64):
        Image.new("RGB", (24, 16), (4 * i, 0, 0)).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a red square"}) for i in range(64)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder to work in, where `builtin` is the random pipeline."""
    folder = tmp_path_factory.mktemp("reader")
    images(folder / "my_images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(BUILTIN, "builtin", str(tiny))
        yield folder


@pytest.fixture(scope="module")
def ran(place: Path) -> dict[str, Ran]:
    """All commands of the README, one after the other, as a reader would type them."""
    done = {}
    for line in COMMANDS:
        code, out, err = call(smaller(line))
        folder = (place / "runs" / "lcm_ddil" / "latest").resolve()
        left = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        summary = json.loads((folder / "summary.json").read_text()) if "summary.json" in left else {}
        config = (folder / "config.yaml").read_text() if "config.yaml" in left else ""
        done[line] = Ran(code, out, err, folder, left, summary, config)
    return done


@pytest.fixture
def first(ran: dict[str, Ran]) -> Ran:
    """The plain run of the default config."""
    return ran[COMMANDS[0]]


def the(ran: dict[str, Ran], part: str) -> Ran:
    """The one line with `part` in it."""
    (found,) = [line for line in ran if part in line]
    return ran[found]


# Commands ----------------------------------------------------------------------------------------------------------------------------


def test_every_line_is_a_known_command() -> None:
    assert {line.split()[0] for line in LINES} == {"make", "ddil-fit", "ddil-test", "ddil-sample", "ddil-export", "ddil-pretrain"}
    assert shlex.split(COMMANDS[0], comments=True) == ["ddil-fit", "--config", "lcm_ddil.yaml"]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for code in (*LINES, *INLINE) for word in re.findall(r"^make (\w+)", code)}
    assert {"fit", "test"} <= named <= targets


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str, ran: dict[str, Ran]) -> None:
    assert ran[line].code == 0, ran[line].err


def test_fit_and_its_second_run(first: Ran, ran: dict[str, Ran]) -> None:
    again = the(ran, "--seed 1")
    assert first.summary["student_updates"] == again.summary["student_updates"] == 3 and first.folder != again.folder
    assert (first.summary["seed"], again.summary["seed"]) == (0, 1)
    assert yaml.safe_load(again.config)["model"]["init_args"]["lr"] == 1e-4


def test_last_goes_on_where_the_newest_run_stopped(ran: dict[str, Ran]) -> None:
    before, after = the(ran, "--seed 1"), the(ran, "--ckpt_path last")
    assert after.folder == before.folder and (before.summary["student_updates"], after.summary["student_updates"]) == (3, 5)
    assert after.config == before.config.replace("updates: 3\n", "updates: 5\n")  # its own settings, whatever the named config says


def test_print_config_and_wandb(ran: dict[str, Ran]) -> None:
    every = yaml.safe_load(the(ran, "--print_config").out)
    assert every["model"]["init_args"]["clip"] == 1.0 and every["data"]["capacity"] == 2048 and every["wandb"] == "off"  # defaults, too
    offline = yaml.safe_load(the(ran, "--wandb offline").out)
    assert offline == {**every, "wandb": "offline"}


def test_own_images(ran: dict[str, Ran], place: Path) -> None:
    assert the(ran, "my_images").code == 0
    config = yaml.safe_load((place / "runs" / "sd15" / "config.yaml").read_text())
    assert config["data"]["captions"]["class_path"].endswith("Images") and config["data"]["captions"]["init_args"]["path"] == "my_images"
    assert json.loads((place / "runs" / "sd15" / "summary.json").read_text())["student_updates"] == 3


def test_tests_samples_and_exports(ran: dict[str, Ran], place: Path) -> None:
    last = the(ran, "ddil-export").folder
    rows = json.loads((last / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ROWS[-3:]
    assert "written to runs/lcm_ddil/latest/metrics.json" in the(ran, "ddil-test runs").out
    (teacher,) = json.loads((place / "metrics.json").read_text())["rows"]
    assert (teacher["name"], teacher["guidance"], teacher["nfe"]) == ("teacher@32", 3.0, 64)
    assert Image.open(place / "x.png").height >= 256 and "1 image(s), 4 steps" in the(ran, "ddil-sample").out
    weights = (place / "my-student" / "unet" / "diffusion_pytorch_model.safetensors", last / "pipeline" / "unet")
    half, whole = weights[0].stat().st_size, sum(p.stat().st_size for p in weights[1].glob("*.safetensors"))
    assert 0.45 < half / whole < 0.6  # float16
    assert (place / the(ran, "ddil-pretrain").out.strip().splitlines()[-1] / "model_index.json").is_file()


def test_snippets(ran: dict[str, Ran], place: Path) -> None:
    space: dict[str, Any] = {}
    exec(PICTURE, space)
    assert space["image"].size == (16, 16)
    code = LIBRARY.replace("updates=720", "updates=3").replace("max_epochs=-1", "max_epochs=-1, accelerator='cpu'")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        exec(code, space)
    assert space["method"].student_updates == 3 and space["method"].backbone.path == "builtin"


def keywords(code: str, name: str) -> dict[str, Any]:
    """The keyword arguments of the one call of `name`."""
    (found,) = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]
    return {k.arg or "": ast.literal_eval(k.value) for k in found.keywords if not isinstance(k.value, ast.Call)}


def notebook(kind: str) -> str:
    """The text of all cells of the quickstart notebook that are of one kind."""
    cells = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == kind)


def test_the_snippet_and_the_notebook_have_the_settings_of_the_shipped_config() -> None:
    config = settings("lcm_ddil.yaml")
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
    table = re.search(r"^## What a run leaves behind\n(.*?)^## ", TEXT, re.M | re.S)
    names = {name for row in re.findall(r"^\| (`.*?) \|", table[1], re.M) for name in re.findall(r"`(.+?)`", row)}  # type: ignore[index]
    later = {"stages/", "metrics.json", "config.before-N.yaml"}  # of a method in stages, of ddil-test, of a run that went on
    assert {name.split("/")[0] for name in names - later} == first.left and later < names
    assert all(list(first.folder.glob(name)) for name in names - later)


def keys(pattern: str) -> list[str]:
    """The names in the braces or code that `pattern` finds in the text."""
    (found,) = re.findall(pattern, re.sub(r"\s+", " ", TEXT))
    return re.findall(r"[\w@]+", found)


def test_rows_of_the_contract(first: Ran, ran: dict[str, Ran]) -> None:
    named = keys(r"`summary.json` holds (.*?) \(a count by role\)")
    assert {"student_updates", "seconds", "network_evaluations", "rows"} == {*named, "rows"} - {"and"} <= set(first.summary)
    assert all(isinstance(n, int) and n > 0 for n in first.summary["network_evaluations"].values())
    assert [row["name"] for row in first.summary["rows"]] == ROWS and set(keys(r"; `name` is (.*?), …;")) <= set(ROWS)
    metrics = keys(r"`metrics` is `\{(.*?)\}`")
    assert metrics == [c.key for c in columns() if c.shown]
    tested = json.loads((the(ran, "ddil-export").folder / "metrics.json").read_text())["rows"]
    for row in (*first.summary["rows"], *tested):
        assert list(row) == keys(r"A row is `\{(.*?)\}`") and row["n"] == 16
        assert all(isinstance(row["metrics"][key], float) for key in metrics)


def test_options_of_the_contract() -> None:
    (usage,) = [block for language, block in BLOCKS if not language]
    options = dict(re.findall(r"\[(--\w+) ([^\]]+)\]", usage))
    words = [word for name, value in options.items() for word in (name, "7" if value == "N" else value)]
    said = printed("--config", "lcm_ddil", *words, "model.lr=0.5", "--model.ema=0.5")
    model = said["model"]["init_args"]
    assert (model["updates"], said["seed_everything"], said["checkpoints"]["every"], model["lr"], model["ema"]) == (7, 7, 7, 0.5, 0.5)
    assert (said["run_dir"], said["ckpt_path"], len(options)) == ("DIR", "PATH|last", 5)


def test_settings_in_the_text_exist() -> None:
    said = printed("--config", "lcm_ddil_sd15.yaml")
    named = {word.partition("=")[::2] for code in INLINE for word in code.split() if re.match(r"(model|data|trainer)\.[\w.]+=", word)}
    assert {"data.captions.path", "data.cache", "model.accumulate", "trainer.devices"} <= {key for key, _ in named}
    for key, value in named:
        at: Any = said
        for part in key.split("."):
            at = at.get("init_args", at)
            assert part in at, key
            at = at[part]
        assert key != "data.captions" or value in ddil_lightning.__all__


def test_a_caption_file_of_ones_own(place: Path) -> None:
    (options,) = [code.split() for code in INLINE if code.startswith("--data")]
    code, _, err = call(["ddil-test", "--pipeline", "builtin", *options])
    assert code == 2 and "captions.json" in err and "unrecognized" not in err


# What is named -------------------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a file."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    assert {"docs/result.png", "#what-ddil-does", "CONTRIBUTING.md#a-method"} <= set(links)
    for link in links:
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            file = ROOT / (path or "README.md")
            assert file.is_file(), link
            assert not anchor or anchor in anchors(file), link


def test_files_and_configs_in_the_text_exist() -> None:
    configs = set(re.findall(r"(?<![\w/.-])(?:configs/)?([\w/]+\.yaml)", TEXT)) - {"config.yaml"}
    assert len(configs) >= 10 and configs <= set(config_names())
    paths = {p for code in INLINE for p in re.findall(r"^(?:python )?((?:benchmarks|configs|docs|notebooks|src|tests)/[\w./]*)", code)}
    assert "benchmarks/toy2d.py" in paths and all((ROOT / path).exists() for path in paths)
    classes = {code for code in INLINE if re.fullmatch(r"[A-Z]\w+[a-z]", code)}
    assert "AnnealPrior" in classes and classes <= set(ddil_lightning.__all__)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The benchmarks, which parse their command line and stop there."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(importlib.import_module("common"), "main", lambda measure, args: args)
    yield {p.stem: importlib.import_module(p.stem) for p in folder.glob("*.py") if '"__main__"' in p.read_text()}
    for name in [p.stem for p in folder.glob("*.py")]:
        sys.modules.pop(name, None)


def test_benchmarks_take_what_the_text_gives_them(scripts: dict[str, Any]) -> None:
    assert len(scripts) >= 4
    for script in scripts.values():
        quick = script.main(["--quick", "--json", "FILE"])
        assert quick.quick and str(quick.json) == "FILE"
    given = [code.split()[1:] for code in INLINE if code.startswith("python benchmarks/")]
    given += [["benchmarks/builtin.py", *code.split()] for code in INLINE if code.startswith(("--method", "--variants"))]
    parsed = [scripts[Path(path).stem].main(words) for path, *words in given]
    assert len(parsed) >= 4 and (parsed[0].seed, parsed[0].seeds) == (1000, 12)


def test_numbers_that_configs_and_packages_say() -> None:
    assert {int(n) for n in re.findall(r"(\d+) student updates", TEXT)} == {settings("lcm_ddil.yaml")["model"]["init_args"]["updates"]}
    own = settings("lcm_ddil_sd15.yaml")
    (said,) = [line.split("#")[1] for line in COMMANDS if "lcm_ddil_sd15.yaml" in line]
    updates, batch, precision = re.fullmatch(r"\s*([\d ]+) updates, (\d+) images per GPU, (\w+)", said).groups()  # type: ignore[union-attr]
    assert int(updates.replace(" ", "")) == own["model"]["init_args"]["updates"] and int(batch) == own["data"]["batch_size"]
    assert own["trainer"]["precision"].startswith(precision)
    project = (ROOT / "pyproject.toml").read_text()
    for pattern, needed in (
        (r"Python (\d\.\d+) or newer", 'requires-python = ">={}"'),
        (r"torch (\d\.\d+) or newer", '"torch>={}"'),
        (r"Lightning (\d\.\d+),", '"lightning>={},<'),
        (r"transformers (\d+)\.", '"transformers>={}"'),
    ):
        (version,) = set(re.findall(pattern, TEXT))
        assert needed.format(version) in project


def test_the_first_table_is_the_one_that_a_run_prints() -> None:
    rows = [{"name": "x", "nfe": 1, "seconds_per_image": 1.0, "metrics": {c.key: 1.0 for c in columns()}}]
    head, rule, *_ = results_table(rows).splitlines()
    assert f"{head}\n{rule}\n" in TEXT
