"""Imports go strictly downwards, and heavy libraries are loaded only where they are used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "ddil_lightning"
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]

# A module imports only modules that stand before it; a package counts as one module. `main` is the light front end: it stands first
# because it imports nothing when it is loaded, and reaches the commands from inside functions.
ORDER = (
    "signals bounds main messages files processes texts types streams schedule reflect prior denoiser analytic solver buffer rollout shift "
    "pipelines backbones sampling "
    "miniature pictures folders tables captions encoded counter datamodule "
    "methods metrics charts results evaluate report export callbacks scoring runs resuming loggers toy finish checks watch "
    "cli fitting commands "
).split()
# Which x_t is trained on is not a method's business.
FEEDBACK_NEVER_SEES = {"prior", "buffer", "rollout", "captions", "encoded", "datamodule"}
MAY_BUILD_PIPELINES = {"pipelines", "backbones", "export", "miniature"}
HEAVY = {"diffusers", "transformers", "wandb", "datasets", "open_clip", "lpips", "peft", "sklearn", "scipy", "matplotlib", "pandas"}


def noun(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path, nodes: Iterator[ast.AST] | None = None) -> Iterator[str]:
    """Dotted names that a file imports, the package's own as `ddil_lightning.x`."""
    for node in nodes or ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ("ddil_lightning", *path.relative_to(ROOT).parts)[: -node.level] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not functions, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from at_import_time(child)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path: Path) -> None:
    me = noun(path)
    assert me in ORDER, f"say in ORDER where {me} stands"
    nodes = at_import_time(ast.parse(path.read_text())) if me == "main" else None
    own = {name.split(".")[1] for name in imported(path, nodes) if name.startswith("ddil_lightning.")} - {me, "__version__"}
    upwards = sorted(name for name in own if name not in ORDER[: ORDER.index(me)])
    assert not upwards, f"{me} stands below {upwards}"
    if me == "methods":
        assert not own & FEEDBACK_NEVER_SEES, f"a method imports {own & FEEDBACK_NEVER_SEES}"
    if me not in MAY_BUILD_PIPELINES:  # a method may name the scheduler that its student is deployed with
        models = [name for name in imported(path) if name.split(".")[0] == "diffusers" and not name.endswith("Scheduler")]
        assert not models, f"only {sorted(MAY_BUILD_PIPELINES)} import {models}"


@pytest.mark.parametrize("path", [*FILES, ROOT / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    found = {name.split(".")[0] for name in imported(path, at_import_time(ast.parse(path.read_text())))}
    assert not found & HEAVY


def test_the_reader_of_imports_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "methods" / "x.py"
    path.parent.mkdir()
    text = "import wandb.sdk\nfrom . import base\nfrom ..prior import A\nfrom .. import rollout\nif TYPE_CHECKING:\n  import peft\n"
    path.write_text(text + "class C:\n  import lpips\ndef f():\n  import diffusers\n")
    package = {"ddil_lightning.methods.base", "ddil_lightning.prior.A", "ddil_lightning.rollout"}
    assert set(imported(path)) == package | {"wandb.sdk", "peft", "lpips", "diffusers"}
    assert set(imported(path, at_import_time(ast.parse(path.read_text())))) == package | {"wandb.sdk", "lpips"}
