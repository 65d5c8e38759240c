"""The light front end of the commands: answers what needs no torch at once, and turns every expected error into one line.

`--version`, an unknown config name or an unreadable file must not wait for half a minute of imports.
"""

from __future__ import annotations

import difflib
import os
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
    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        if key in ("-c", "--config"):
            if not equals:
                if not words:
                    raise Refusal("--config needs a name or a file, such as --config lcm_ddil.yaml")
                value = words.pop(0)
            out += ["--config", value if value.lstrip().startswith("{") else str(find_config(value))]
        elif key in short:
            out.append(short[key] + equals + value)
        elif equals and not word.startswith("-") and key.replace(".", "").replace("_", "").replace("+", "").isalnum():
            out.append(f"--{word}")
        else:
            out.append(word)
    return out


def run(command: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, 2 with one line for bad input, 130 for Ctrl-C. `DDIL_DEBUG=1` shows the traceback as well."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--version" in words:
        print(f"ddil-lightning {metadata.version('ddil-lightning')}")
        raise SystemExit(0)
    try:
        code = command(words) or 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    except (Refusal, ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("DDIL_DEBUG"):
            raise
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    raise SystemExit(code)


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    text = (
        str(error)
        if not isinstance(error, OSError) or error.strerror is None
        else f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    )
    return " ".join(text.split()) or type(error).__name__


def fit() -> None:
    """ddil-fit."""
    run(_fit)


def test() -> None:
    """ddil-test."""
    run(_test)


def sample() -> None:
    """ddil-sample."""
    run(_sample)


def export() -> None:
    """ddil-export."""
    run(_export)


def pretrain() -> None:
    """ddil-pretrain."""
    run(_pretrain)


def _fit(argv: list[str]) -> int | None:
    words = expand(argv, FIT_SHORT)
    if "--config" not in words and "--help" not in words and "-h" not in words:
        raise Refusal(f"ddil-fit needs --config NAME; packaged are {', '.join(config_names())}")
    from . import cli

    return cli.fit(words)


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
    from .miniature import pretrain

    return pretrain.main(words)


FIT_SHORT = {
    "--updates": "--model.init_args.updates",
    "--seed": "--seed_everything",
    "--checkpoint_every": "--checkpoints.every",
}
