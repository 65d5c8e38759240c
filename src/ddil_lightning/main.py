"""The light front end of the commands: answers what needs no torch at once, and turns every expected error into one line.

`--version`, an unknown config name or an unreadable file must not wait for half a minute of imports.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata, resources
from pathlib import Path


class Refusal(Exception):
    """Bad input: one line that names the thing and the remedy; exit code 2."""


def configs_folder() -> Path:
    """Where the packaged configs are: inside an installed wheel, or at the top of a checkout."""
    package = Path(str(resources.files("ddil_lightning")))
    inside = package / "configs"
    return inside if any(inside.glob("*.yaml")) else package.parents[1] / "configs"


def config_names() -> list[str]:
    """All packaged configs, relative to their folder."""
    folder = configs_folder()
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """A config by path, or by its bare name (`lcm_ddil` or `lcm_ddil.yaml`) among the packaged ones, from any directory.

    A file wins over a packaged name, a directory of that name does not. Raises Refusal with the nearest names.
    """
    if Path(name).is_file():
        return Path(name)
    wanted = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    packaged = configs_folder() / wanted
    if packaged.is_file():
        return packaged
    names = config_names()
    near = difflib.get_close_matches(wanted, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
    raise Refusal(f"no config {name}: it is neither a file nor a packaged config; {hint}")


def expand(argv: Sequence[str], short: dict[str, str]) -> list[str]:
    """The command line in full: `a.b=1` becomes `--a.b=1`, `--updates 5` what `short` says it is, config names become paths."""
    out: list[str] = []
    words, value_follows = list(argv), False
    while words:
        word = words.pop(0)
        if value_follows:
            out.append(word)  # as it is: a value may well look like updates=12.ckpt
            value_follows = False
            continue
        if OVERRIDE.fullmatch(word):
            word = f"--{word}"
        key, equals, value = word.partition("=")
        if key in ("-c", "--config"):
            if not equals:
                if not words:
                    raise Refusal("--config needs a name or a file, such as --config lcm_ddil")
                value = words.pop(0)
            out += ["--config", value if value.lstrip().startswith("{") else str(find_config(value))]
            continue
        out.append(short.get(key, key) + equals + value)
        value_follows = word.startswith("--") and not equals and key not in FLAGS
    return out


def run(command: Callable[[list[str]], int | None], name: str, argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, 2 with one line for bad input, 130 for Ctrl-C. `DDIL_DEBUG=1` shows the traceback instead."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--version" in words:
        print(f"ddil-lightning {metadata.version('ddil-lightning')}")
        raise SystemExit(0)
    try:
        code = command(words) or 0
    except KeyboardInterrupt as stop:
        print(f"\n{name}: {one_line(stop) if stop.args else 'stopped'}", file=sys.stderr)
        code = 130
    except (Refusal, ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("DDIL_DEBUG"):
            raise
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    raise SystemExit(code)


def one_line(error: BaseException) -> str:
    """An error's message on one line; of an OSError what happened, then to which file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split()) or type(error).__name__


def fit() -> None:
    """ddil-fit."""
    run(_fit, "ddil-fit")


def test() -> None:
    """ddil-test."""
    run(_test, "ddil-test")


def sample() -> None:
    """ddil-sample."""
    run(_sample, "ddil-sample")


def export() -> None:
    """ddil-export."""
    run(_export, "ddil-export")


def pretrain() -> None:
    """ddil-pretrain."""
    run(_pretrain, "ddil-pretrain")


def _fit(argv: list[str]) -> int | None:
    words = expand(argv, FIT_SHORT)
    if "--config" not in words and not any(word == "-h" or word.partition("=")[0].endswith("help") for word in words):
        raise Refusal(f"ddil-fit needs --config NAME; packaged are {', '.join(config_names())}")
    from . import fitting

    return fitting.fit(words)


def _test(argv: list[str]) -> int | None:
    from . import commands

    return commands.test(argv)


def _sample(argv: list[str]) -> int | None:
    from . import commands

    return commands.sample(argv)


def _export(argv: list[str]) -> int | None:
    from . import commands

    return commands.export(argv)


def _pretrain(argv: list[str]) -> int | None:
    words = expand(argv, {})
    from jsonargparse import ArgumentError

    from .messages import explain
    from .miniature import pretrain

    try:
        pretrain.main(words)
    except ArgumentError as error:
        raise Refusal(explain(str(error), list(inspect.signature(pretrain.pretrain).parameters))) from error
    return 0


OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*\+?=.*", re.DOTALL)
FLAGS = ("--help", "--print_config")  # options without a value of their own
FIT_SHORT = {
    "--updates": "--model.init_args.updates",
    "--seed": "--seed_everything",
    "--checkpoint_every": "--checkpoints.every",
}
