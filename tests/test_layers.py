"""Imports go strictly downwards, and heavy libraries are loaded only where they are used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "ddil_lightning"
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]

# A package imports only packages that stand before it, wherever in a file the import stands; the modules at the top are the ground.
ORDER = "ground diffusion miniature backbones imitation data training methods evaluation toy runs callbacks commands testing".split()
# Which x_t is trained on is not a method's business, and what is learned from it not the data's.
NEVER = {"training": {"imitation", "data"}, "methods": {"imitation", "data"}, "data": {"training", "methods"}}
MAY_BUILD_PIPELINES = {"backbones", "miniature", "runs/export.py"}
HEAVY = {"diffusers", "transformers", "wandb", "datasets", "open_clip", "lpips", "peft", "sklearn", "scipy", "matplotlib", "pandas"}
HEAVY |= {"tensorboard", "wandb_workspaces"}


def package(dotted: str) -> str:
    """The package that a dotted name below ours belongs to."""
    first = dotted.partition(".")[0]
    return first if (ROOT / first).is_dir() else "ground"


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


def own(path: Path) -> list[str]:
    """Dotted names within the package that a file imports."""
    return [name.split(".", 1)[1] for name in imported(path) if name.startswith("ddil_lightning.") and name != "ddil_lightning.__version__"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path: Path) -> None:
    file = str(path.relative_to(ROOT))
    me = package(file.replace("/", "."))
    assert me in ORDER, f"say in ORDER where {me} stands"
    theirs = {package(name) for name in own(path)}
    assert not [name for name in theirs if name not in ORDER[: ORDER.index(me) + 1]], f"{me} stands below {theirs}"
    assert not theirs & NEVER.get(me, set())
    if not {me, file} & MAY_BUILD_PIPELINES:  # a method may name the scheduler that its student is deployed with
        models = [name for name in imported(path) if name.split(".")[0] == "diffusers" and not name.endswith("Scheduler")]
        assert not models, f"only {sorted(MAY_BUILD_PIPELINES)} import {models}"


def test_no_file_imports_itself_through_others() -> None:
    """Imports inside functions count: a circle is a circle."""
    modules = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in own(path)}
        graph[module] = sorted(names & set(modules) - {module})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", [*FILES, ROOT / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    found = {name.split(".")[0] for name in imported(path, at_import_time(ast.parse(path.read_text())))}
    assert not found & HEAVY


def loaded(*modules: str) -> tuple[set[str], set[str]]:
    """What comes with `modules`, or with names of theirs, when they are imported: modules of ours, and packages of others."""
    ours: set[str] = set()
    others: set[str] = set()
    todo = [*modules]
    while todo:
        module = todo.pop()
        todo += [module.rpartition(".")[0]] if "." in module else []  # a package before what is in it
        place = ROOT.joinpath(*module.split("."))
        path = next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)
        if path is None or module in ours:  # None: a name in a module
            continue
        ours.add(module)
        for name in imported(path, at_import_time(ast.parse(path.read_text()))):
            first, _, rest = name.partition(".")
            if first == "ddil_lightning":
                todo.append(rest)
            else:
                others.add(first)
    return ours, others


def test_what_is_needed_later_or_never_is_not_loaded_before_the_first_update() -> None:
    """Metrics and the table's suite, a page, a memory plan on fake tensors. A class that a config may name is loaded with the command."""
    ours, _ = loaded("commands.fit", "commands.fitting")
    assert {"commands.fit_cli", "callbacks.shift_probe", "methods.lcm", "data.datamodule"} <= ours
    late = {"evaluation.suite", "evaluation.rows", "runs.report", "commands.plan", "training.ledger", "training.footprint", "toy.scores"}
    assert not {name for name in ours if name in late or name.startswith("evaluation.metrics.")}


def test_a_picture_needs_nothing_that_trains_or_measures() -> None:
    path = ROOT / "commands" / "sample.py"
    ours, others = loaded("commands.sample", *own(path))
    assert {"backbones.pipeline", "backbones.sampling"} <= ours and "torch" in others
    assert {package(name) for name in ours} <= {"ground", "commands", "backbones", "diffusion", "miniature"}
    assert not others & (HEAVY | {"lightning", "torchmetrics", "jsonargparse", "torchvision"})


def test_the_reader_of_imports_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "methods" / "x.py"
    path.parent.mkdir()
    text = "import wandb.sdk\nfrom . import base\nfrom ..prior import A\nfrom .. import rollout\nif TYPE_CHECKING:\n  import peft\n"
    path.write_text(text + "class C:\n  import lpips\ndef f():\n  import diffusers\n")
    mine = {"ddil_lightning.methods.base", "ddil_lightning.prior.A", "ddil_lightning.rollout"}
    assert set(imported(path)) == mine | {"wandb.sdk", "peft", "lpips", "diffusers"}
    assert set(imported(path, at_import_time(ast.parse(path.read_text())))) == mine | {"wandb.sdk", "lpips"}


ON_THE_HOST = {f"{name}.py" for name in ("diffusion/schedule", "diffusion/betas", "diffusion/analytic", "backbones/flows", "runs/replay")}
ON_THE_HOST |= {"imitation/buffer.py", "evaluation/intervals.py"}
"""Files whose float64 numbers are always on the CPU."""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_float64_is_made_on_the_cpu_or_where_the_device_has_it(path: Path) -> None:
    """Apple's GPUs have none: `records.wide` and `records.widest` know it."""
    file = str(path.relative_to(ROOT))
    if file in ON_THE_HOST | {"records.py"} or file.split("/")[0] in ("miniature", "toy"):
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [(call, call.func.attr) for call in calls if isinstance(call.func, ast.Attribute)]
    bare = [call.lineno for call, name in named if name == "double" and not _of_the_cpu(call.func)]
    bare += [call.lineno for call in calls for word in call.keywords if word.arg == "device" and _asks_for_float64(call)]
    assert not bare, f"{file}, lines {bare}: use records.wide, or records.widest(device)"


def _of_the_cpu(function: ast.expr) -> bool:
    """Whether `.double` is asked of something that is on the CPU by its own words: of what `.cpu()`, or a comparison of such, has made."""
    assert isinstance(function, ast.Attribute)
    inner = function.value
    while isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute):
        if inner.func.attr == "cpu":
            return True
        inner = inner.func.value
    return False


def _asks_for_float64(call: ast.Call) -> bool:
    return any(word.arg == "dtype" and isinstance(word.value, ast.Attribute) and word.value.attr == "float64" for word in call.keywords)
