"""What a user installs: the wheel holds the configs and the weights, and its commands exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
import yaml

import oldest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_configs_weights_and_page_style(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    configs = {f"ddil_lightning/configs/{p.relative_to(ROOT / 'configs')}" for p in (ROOT / "configs").rglob("*.yaml")}
    package = ROOT / "src"
    data = {str(p.relative_to(package)) for p in (package / "ddil_lightning" / "miniature" / "weights").rglob("*") if p.is_file()}
    assert "ddil_lightning/configs/lcm_ddil.yaml" in configs and configs <= names
    assert data <= names
    assert {"ddil_lightning/runs/report.css", "ddil_lightning/py.typed", "ddil_lightning/__init__.pyi"} <= names
    assert not [n for n in names if n.startswith(("tests/", "runs/", "configs/"))]
    assert sum(i.compress_size for i in wheel.infolist()) < 15e6


def test_it_is_cited_in_the_version_that_it_has() -> None:
    cited, own = ((ROOT / name).read_text() for name in ("CITATION.cff", "pyproject.toml"))
    assert yaml.safe_load(cited)["version"] == re.search(r'^version = "(.+)"', own, re.M)[1]  # type: ignore[index]


def test_commands_of_the_wheel_exist(wheel: zipfile.ZipFile) -> None:
    info = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    commands = dict(line.split(" = ") for line in wheel.read(info).decode().splitlines() if " = " in line)
    names = ("fit", "test", "probe", "invert", "sample", "export", "pretrain", "cache", "dashboard")
    assert set(commands) == {f"ddil-{name}" for name in names}
    tree = ast.parse((ROOT / "src" / "ddil_lightning" / "commands" / "main.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for target in commands.values():
        module, function = target.split(":")
        assert module == "ddil_lightning.commands.main" and function in functions


def test_every_library_that_is_needed_has_a_floor_that_make_test_floor_installs() -> None:
    """All but torchvision, whose version torch decides."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[><=]", line)[0] for line in needed}
    constraints = dict(line.split("==") for line in oldest.oldest())
    assert names - constraints.keys() == {"torchvision"} and constraints["diffusers"] == "0.40.*"
    assert "tests/support/oldest.py > .venv-floor/floors.txt" in (ROOT / "Makefile").read_text()


def test_the_floor_of_wandb_appends() -> None:
    """`wandb sync A B`, which `boards.sync_line` says of a run in two parts, had B replace A up to 0.28 (wandb/wandb#3841)."""
    (floor,) = re.findall(r'"wandb>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, floor.split("."))) >= (0, 29)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a copy without its history, which cannot tell what belongs to it")
def test_nothing_that_a_run_wrote_belongs_to_the_repository() -> None:
    """Stored pairs of a config once did: its path was relative, and the next `git add` took them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {line.split("/")[0] for line in listed if line}
    folders = {"src", "configs", "tests", "notebooks", "benchmarks", "docs", ".ci"}
    files = {"pyproject.toml", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "mkdocs.yml"}
    assert top == folders | files | {".gitignore"}
