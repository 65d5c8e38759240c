"""The site shows the repository's own texts: README.md is its front page, and the links that hold on GitHub hold there too.

mkdocs calls the functions `on_*`. The others need no mkdocs, and nothing here imports the package.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Texts outside docs/ and the names of their pages."""

LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
ITEM = re.compile(r"([*-]|\d+\.) ")
FENCE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)
PACKAGE = "ddil_lightning"


def place_of(path: str) -> str:
    """Where a file of the repository lies on the site."""
    return PAGES.get(path) or path.removeprefix("docs/")


def linked(text: str, path: str) -> Iterator[tuple[str, str]]:
    """(link, file of the repository) of every relative link in the text of the file `path` that leads to a file."""
    for part in FENCE.split(text)[::2]:
        for link in LINK.findall(part):
            file = (ROOT / path).parent / link
            if "://" not in link and file.is_file():
                yield link, file.resolve().relative_to(ROOT).as_posix()


def translated(text: str, path: str) -> str:
    """The text of the file `path` with its links as the site needs them; code is left as it is."""
    here = os.path.dirname(place_of(path))
    new = {link: os.path.relpath(place_of(file), here or ".") for link, file in linked(text, path)}
    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(lambda found: new.get(found[1], found[1]), part) for part in parts[::2]]
    return "".join(parts)


def spaced(text: str) -> str:
    """The text with an empty line before every list: GitHub lets one begin right below a line of text, mkdocs does not."""
    lines: list[str] = []
    code = False
    for line in text.split("\n"):
        before = lines[-1] if lines else ""
        if ITEM.match(line) and not code and before and not before.startswith(" ") and not ITEM.match(before):
            lines.append("")
        code ^= line.startswith("```")
        lines.append(line)
    return "\n".join(lines)


def home(module: str, name: str) -> str:
    """The module that defines what `module` offers as `name`: imports are followed, nothing is run."""
    base = ROOT / "src" / module.replace(".", "/")
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return home(str(node.module), next(alias.name for alias in node.names if name == (alias.asname or alias.name)))
    return module


def public() -> dict[str, str]:
    """The public names and the modules that define them, in the order of `__init__.pyi`."""
    stub = ast.parse((ROOT / "src" / PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: home(str(node.module), alias.name) for node in imports for alias in node.names}


def about(package: str) -> str:
    """What a package, or a module beside the packages, says of itself."""
    folder = ROOT / "src" / PACKAGE / package
    source = (folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def reference() -> str:
    """The part of reference.md that lists every public name under its package."""
    packages: dict[str, list[str]] = {}
    for name, module in public().items():
        packages.setdefault(module.split(".")[1], []).append(f"::: {module}.{name}\n")
    return "\n".join(f"## {package}\n\n{about(package)}\n\n" + "\n".join(paths) for package, paths in packages.items())


def on_files(files: Any, config: Any) -> Any:
    """The pages outside docs/, and every other file that a page links to."""
    from mkdocs.structure.files import File

    texts = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    wanted = [*PAGES, *(file for text in texts for _, file in linked((ROOT / text).read_text(encoding="utf-8"), text))]
    for path in dict.fromkeys(wanted):
        if not path.startswith("docs/"):
            files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page as the site needs it."""
    source = next((path for path, name in PAGES.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")
    text = spaced(translated(markdown, source))
    return f"{text}\n\n{reference()}" if page.file.src_uri == "reference.md" else text
