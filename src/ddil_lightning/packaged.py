"""The packaged configs: where they are, one by its name, and texts that are no YAML. Needs no torch."""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path
from typing import Any

from ddil_lightning.errors import Refusal

NODES = 100_000
"""Values in a config; the largest one of ours has some hundred."""


def configs_folder() -> Path:
    """Where the packaged configs are: inside an installed wheel, or at the top of a checkout."""
    package = Path(str(resources.files("ddil_lightning")))
    inside = package / "configs"
    return inside if any(inside.glob("*.yaml")) else package.parents[1] / "configs"


def config_names() -> list[str]:
    """The names of all packaged configs, relative to their folder, in order."""
    folder = configs_folder()
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """A config by path, or by its bare name (`lcm_ddil` or `lcm_ddil.yaml`) among the packaged ones, from any directory.

    A file wins over a packaged name, a directory of that name does not. Raises Refusal with the nearest names.
    """
    given = Path(os.path.expanduser(name))
    if given.is_file():
        return given
    wanted = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    packaged = configs_folder() / wanted
    if packaged.is_file():
        return packaged
    names = config_names()
    near = difflib.get_close_matches(wanted, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
    raise Refusal(f"no config {name}: it is neither a file nor a packaged config; {hint}")


def table_of(given: Path | str) -> dict[str, Any]:
    """The table of a YAML file, or of the text `{...}` itself. Raises Refusal, naming it, for anything else."""
    import yaml

    check_table(str(given))
    found: dict[str, Any] = yaml.safe_load(text_of(str(given)))
    return found


def check_table(given: str) -> None:
    """Raises Refusal, naming it, for a file or a text that `table_of` reads no table from."""
    check_text(text_of(given), "--config {...}" if inline(given) else given, top=True)


def inline(config: str) -> bool:
    """Whether this is the text of a config and not the name of a file."""
    return config.lstrip().startswith("{")


def text_of(config: str) -> str:
    """The text of a config: of the file, or itself. Raises Refusal for a file that is no text, OSError for one that cannot be read."""
    try:
        return config if inline(config) else Path(config).read_bytes().decode("utf-8-sig")
    except ValueError as error:
        raise Refusal(f"{config} is no text in UTF-8: save it as such") from error


def check_text(text: str, name: str, top: bool = False) -> None:
    """Raises Refusal for a text whose aliases stand for too much and, of a whole config (`top`), for one that is no table."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        size = _size(root, {}) if root is not None else 0
    except yaml.YAMLError as error:
        if top:
            raise Refusal(f"{name}: {' '.join(str(error).split())}") from error
        return  # a word that is no YAML is for the parser to judge
    except RecursionError as error:
        raise Refusal(f"{name} is nested too deeply") from error
    if size > NODES:
        raise Refusal(f"{name}: its aliases (&, *) stand for {'endless' if size == float('inf') else f'{size:.0e}'} values: write them out")
    if top and (root is None or not isinstance(root, yaml.MappingNode)):
        what = "empty" if root is None else f"a {root.id}"
        raise Refusal(f"{name} is {what}: a config is a table of keys, such as `model: {{class_path: LCM}}`")


def _size(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node stands for when its aliases are written out; infinite for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # while it is being counted
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
