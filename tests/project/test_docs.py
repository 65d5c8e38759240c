"""What README.md and docs/ name is looked up: languages of blocks, links, files, settings, numbers, and what the site makes of them."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from pages import COMMANDS, FILES, GUIDES, INLINE, PAGES, ROOT, TEXT, Page, anchors, call, recipe, words

import ddil_lightning
from ddil_lightning.backbones.repositories import BUILTIN
from ddil_lightning.evaluation.registry import columns
from ddil_lightning.evaluation.table import results_table
from ddil_lightning.packaged import config_names, find_config

EVERY = pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, which makes the pages of the site."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


# Nothing escapes the tests -----------------------------------------------------------------------------------------------------------


def test_every_text_is_on_the_site_and_thereby_in_these_tests() -> None:
    assert {page.path for page in PAGES.values()} == {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}


@EVERY
def test_every_block_is_of_a_kind_that_is_carried_out(page: Page) -> None:
    """Untagged blocks are formulas, or the usage that test_options_of_the_contract reads; there is no other way to write code."""
    assert {language for language, _ in page.blocks} <= {"bash", "console", "python", "yaml", ""}
    assert not page.of("") or page.path.name in ("METHODS.md", "contract.md")
    fences = re.findall(r"^\s*(?:```|~~~).*$", page.text, re.M)
    assert len(fences) == 2 * len(page.blocks) and not re.search(r"<pre|<code", page.text)
    assert len(page.sessions) == sum(line.startswith("$ ") for code in page.of("console") for line in code.splitlines())
    assert page.path.name != "METHODS.md" or not set(dict(page.blocks)) - {""}


def test_every_line_is_a_known_command() -> None:
    lines = [words(line) for page in GUIDES.values() for line in page.lines]
    ours = {f"ddil-{name}" for name in ("fit", "test", "probe", "invert", "sample", "export", "pretrain", "cache")}
    assert {line[0] for line in lines} == {"make", "python", *ours}
    assert {line[1].split("/")[0] for line in lines if line[0] == "python"} == {"benchmarks"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for page in GUIDES.values() for code in (*page.lines, *page.inline) for word in re.findall(r"^make ([\w-]+)", code)}
    assert {"fit", "test", "docs"} <= named <= targets
    assert recipe("test").startswith("python -m pytest")


def test_every_file_that_a_reader_saves_is_used() -> None:
    for name in FILES:
        assert any(
            word == name or word.partition("=")[2].startswith(f"{Path(name).stem}.") for _, line in COMMANDS for word in words(line)
        ), name
    saved = sum(1 for page in GUIDES.values() for _ in page.of("yaml"))
    assert saved == sum(name.endswith(".yaml") for name in FILES)  # a config that no command takes would be read by nobody


def test_the_readme_is_short() -> None:
    assert GUIDES["README.md"].text.count("\n") <= 130


# Links and names -----------------------------------------------------------------------------------------------------------------------


@EVERY
def test_links(page: Page) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.prose)
    assert page.path.name != "README.md" or {"docs/result.png", "docs/results.md", "CONTRIBUTING.md#a-method"} <= set(links)
    for link in links:
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            file = page.path.parent / path if path else page.path
            assert file.is_file(), link
            assert not anchor or anchor in anchors(file), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", GUIDES["README.md"].prose)}
    assert {f"docs/{name}" for name in PAGES if name != "README.md"} <= linked


def test_files_and_configs_in_the_text_exist() -> None:
    text = re.sub(r"^```console\n.*?^```$", "", TEXT, flags=re.M | re.S)  # there they are wrong on purpose
    configs = set(re.findall(r"(?<![\w/.-])(?:configs/)?([\w/]+\.yaml)", text)) - {"config.yaml", *FILES}
    assert len(configs) >= 10 and configs <= set(config_names())
    paths = {p for code in INLINE for p in re.findall(r"^(?:python )?((?:benchmarks|configs|docs|notebooks|src|tests)/[\w./]*)", code)}
    assert "benchmarks/memory.py" in paths and all((ROOT / path).exists() for path in paths)
    classes = {code for code in INLINE if re.fullmatch(r"[A-Z]\w+[a-z]", code)}
    assert "AnnealPrior" in classes and classes <= set(ddil_lightning.__all__)


def printed(*said: str) -> dict[str, Any]:
    """What ddil-fit --print_config says."""
    code, out, err = call(["ddil-fit", *said, "--print_config"])
    assert code == 0, err
    return yaml.safe_load(out)


def test_options_of_the_contract() -> None:
    (usage,) = GUIDES["contract.md"].of("")
    options = dict(re.findall(r"\[(--\w+) ([^\]]+)\]", usage))
    typed = [word for name, value in options.items() for word in (name, "7" if value == "N" else value)]
    said = printed("--config", "lcm_ddil", *typed, "model.optimizer.lr=0.5", "--model.ema=0.5")
    model = said["model"]["init_args"]
    assert (model["updates"], said["seed_everything"], said["checkpoints"]["every"], model["optimizer"]["lr"], model["ema"]) == (
        7,
        7,
        7,
        0.5,
        0.5,
    )
    assert (said["run_dir"], said["ckpt_path"], len(options)) == ("DIR", "PATH|last", 6)
    assert said["profile"]["updates"] == 7


def has(said: Any, key: str) -> bool:
    """Whether a printed config has a dotted key."""
    for part in key.split("."):
        if not isinstance(said, dict) or part not in (said := said.get("init_args", said)):
            return False
        said = said[part]
    return True


def test_settings_in_the_text_exist() -> None:
    configs = [
        printed("--config", name) for name in ("lcm_ddil_sd15", "lcm_lora_sdxl", "add_ddil", "ladd_ddil", "ufogen_ddil", "dmd2_ddil")
    ]
    named = {word.partition("=")[::2] for code in INLINE for word in code.split() if re.match(r"(model|data|trainer)\.[\w.]+(=|$)", word)}
    assert {"data.captions.path", "data.cache", "data.prior.mix", "model.optimizer.accumulate", "trainer.devices"} <= {
        key for key, _ in named
    }
    for key, value in named:
        assert any(has(said, key) for said in configs), key
        assert key != "data.captions" or value in ddil_lightning.__all__


def test_a_caption_file_of_ones_own(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BUILTIN, "builtin", str(tiny))
    (options,) = [code.split() for code in INLINE if code.startswith("--data ")]
    code, _, err = call(["ddil-test", "--pipeline", "builtin", *options])
    assert code == 2 and "captions.json" in err and "unrecognized" not in err


# Numbers -------------------------------------------------------------------------------------------------------------------------------


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
    lines = [line for page in GUIDES.values() for line in page.lines]
    given = [shlex.split(code)[1:] for code in (*lines, *INLINE) if code.startswith("python benchmarks/")]
    given += [["benchmarks/builtin.py", *code.split()] for code in INLINE if code.startswith(("--method", "--variants"))]
    given += [["benchmarks/toy2d.py", *code.split()] for code in INLINE if code.startswith(("--seed", "--jobs"))]
    parsed = {" ".join(said): scripts[Path(said[0]).stem].main(said[1:]) for said in given}
    toy = parsed["benchmarks/toy2d.py"]
    assert len(parsed) >= 8 and (toy.seed, toy.seeds) == (1000, 12)


def sections(page: Page) -> Iterator[str]:
    """The parts of a page, from a heading of the second order to the next."""
    yield from re.findall(r"^## .*?(?=^## |\Z)", page.text, re.M | re.S)


def test_every_measured_table_has_its_command_and_its_day() -> None:
    measured = [part for part in sections(GUIDES["results.md"]) if re.search(r"^\|", part, re.M)]
    assert len(measured) >= 4
    for part in measured:
        assert re.search(r"^```bash\n(make (fit|reproduce)|python benchmarks/|ddil-pretrain )", part, re.M), part[:60]
        assert re.search(r"20\d\d-\d\d-\d\d", part), part[:60]
        assert "seed" in part.lower() and re.search(r"CPU\s+core|H100", part)


def reproduced(title: str) -> dict[str, dict[str, str]]:
    """The cells of a table of the reproduction's page by row and heading: means and their standard errors."""
    (part,) = [part for part in sections(GUIDES["reproduction.md"]) if part.startswith(f"## {title}")]
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|"))
    return {line[0]: {name: cell.partition(" [")[0] for name, cell in zip(head, line, strict=True)} for line in lines}


def test_the_numbers_of_the_readme_are_those_of_fresh_seeds() -> None:
    """Its table has a row for a measure and a subject, the page of the reproduction a table for a method and step count."""
    headings = {
        "Fréchet distance ↓": "Fréchet distance ↓",
        "everything in the prompt right ↑": "All right ↑",
        "modes that a prompt leaves open ↑": "Mode coverage ↑",
    }
    lines = re.findall(r"^\| (.+?) \|(.*)\|$", GUIDES["README.md"].text, re.M)
    begins = [i for i, (label, _) in enumerate(lines) if label.endswith(": teacher")]
    assert [lines[i][0].partition(":")[0] for i in begins] == list(headings) and len(lines) == 1 + 9
    teacher, students = reproduced("The teacher"), [reproduced(f"LCM, {k}") for k in ("4 steps", "2 steps", "1 step")]
    for at, heading in zip(begins, headings.values(), strict=True):
        rows = [[cell.strip(" *") for cell in cells.split("|") if cell.strip()] for _, cells in lines[at : at + 3]]
        wanted = [[teacher[f"teacher@{k}"][heading] for k in (32, 4, 2, 1)]]
        wanted += [[table[variant][heading] for table in students] for variant in ("base", "+ both")]
        for shown, full in zip(rows, wanted, strict=True):
            assert len(shown) == len(full)
            for said, told in zip(shown, full, strict=True):
                for a, b in zip(said.replace("**", "").split(" ± "), told.split(" ± "), strict=True):  # the README rounds
                    assert abs(float(a) - float(b)) <= 0.5001 * 10 ** -len(a.partition(".")[2]), heading


def test_numbers_that_configs_and_packages_say() -> None:
    own, base = (yaml.safe_load(find_config(name).read_text()) for name in ("lcm_ddil_sd15.yaml", "lcm_ddil.yaml"))
    assert {int(n) for n in re.findall(r"(\d+) student updates", TEXT)} == {base["model"]["init_args"]["updates"]}
    for said in {line.split("#")[1] for _, line in COMMANDS if "lcm_ddil_sd15.yaml" in line}:
        updates, batch, precision = re.fullmatch(r"\s*([\d ]+) updates, (\d+) images per GPU, (\w+)", said).groups()  # type: ignore[union-attr]
        assert int(updates.replace(" ", "")) == own["model"]["init_args"]["updates"] and int(batch) == own["data"]["batch_size"]
        assert own["trainer"]["precision"].startswith(precision)
    project = (ROOT / "pyproject.toml").read_text()
    for pattern, needed in (
        (r"Python (\d\.\d+) or newer", 'requires-python = ">={}"'),
        (r"torch (\d\.\d+) or newer", '"torch>={}"'),
        (r"Lightning (\d\.\d+),", '"lightning>={},<'),
        (r"transformers (\d\.\d+) or newer", '"transformers>={}"'),
    ):
        (version,) = set(re.findall(pattern, TEXT))
        assert needed.format(version) in project


def test_the_first_table_of_the_results_is_the_one_that_a_run_prints() -> None:
    rows = [{"name": "x", "nfe": 1, "seconds_per_image": 1.0, "metrics": {c.key: 1.0 for c in columns()}}]
    head, rule, *_ = results_table(rows).splitlines()
    assert f"{head}\n{rule}\n" in GUIDES["results.md"].text.partition("\n## ")[2].partition("\n## ")[0]


# The site ------------------------------------------------------------------------------------------------------------------------------


def test_a_warning_of_the_site_fails_the_check() -> None:
    (build,) = re.findall(r"mkdocs build(.*)", (ROOT / "Makefile").read_text())
    assert build.split() == ["--strict"]  # --quiet would hide warnings from --strict, too
    assert re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(), re.M) == ["lint", "test", "docs"]


def test_the_reference_has_every_public_name_where_it_is_defined(hooks: ModuleType) -> None:
    public = hooks.public()
    assert sorted(public) == ddil_lightning.__all__
    assert {name: getattr(ddil_lightning, name).__module__ for name in public} == public
    assert sorted(re.findall(r"^::: (.*)$", hooks.reference(), re.M)) == sorted(f"{module}.{name}" for name, module in public.items())


def test_what_a_public_class_is_made_of_is_public_too() -> None:
    """An adapter, buckets, a law of times are arguments: whoever calls from Python would have to look for them in the source."""
    classes = [made for made in (getattr(ddil_lightning, name) for name in ddil_lightning.__all__) if isinstance(made, type)]
    parts = {part for made in classes for hint in get_type_hints(made.__init__).values() for part in inside(hint)}
    own = {part for part in parts if part.__module__.startswith("ddil_lightning.")}
    assert len(own) > 20 and {part.__name__ for part in own} <= set(ddil_lightning.__all__)
    assert {"Adversary", "Feed", "LatentBatch", "Streams"} <= set(ddil_lightning.__all__)  # what CONTRIBUTING tells an author of


def inside(hint: Any) -> Iterator[type]:
    """The classes that a type is written with."""
    for part in get_args(hint) or [hint]:
        yield from inside(part) if get_args(hint) else [part] if isinstance(part, type) else []


CODE = "```\n[f](../README.md)\n```\n"
"""A link in code, which stays."""


@pytest.mark.parametrize(
    ("source", "text", "translated"),
    [
        ("README.md", "![p](docs/result.png)", "![p](result.png)"),
        ("README.md", "[a](docs/data.md#what-is-read) [b](docs/METHODS.md)", "[a](data.md#what-is-read) [b](METHODS.md)"),
        ("README.md", "[c](configs/lcm.yaml) `[d](docs/data.md)`", "[c](configs/lcm.yaml) `[d](docs/data.md)`"),
        ("README.md", "[e](https://x.org/docs/data.md) [f](docs/gone.md)", "[e](https://x.org/docs/data.md) [f](docs/gone.md)"),
        (
            "docs/data.md",
            "[a](../CONTRIBUTING.md#a-method) [b](../configs/lcm.yaml)",
            "[a](CONTRIBUTING.md#a-method) [b](configs/lcm.yaml)",
        ),
        ("docs/data.md", f"[c](../README.md) [d](runs.md) [e](#here)\n\n{CODE}", f"[c](index.md) [d](runs.md) [e](#here)\n\n{CODE}"),
    ],
)
def test_links_of_the_site(hooks: ModuleType, source: str, text: str, translated: str) -> None:
    assert hooks.translated(text, source) == translated


def test_a_list_may_stand_right_below_its_text(hooks: ModuleType) -> None:
    text = "Three:\n* a\n  more\n* b\n\nTwo:\n1. a\n2. b\n```\nx:\n* y\n```"
    assert hooks.spaced(text) == "Three:\n\n* a\n  more\n* b\n\nTwo:\n\n1. a\n2. b\n```\nx:\n* y\n```"
