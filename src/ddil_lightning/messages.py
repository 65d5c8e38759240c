"""What a user is told: jsonargparse's messages on one line, with the nearest key that exists; no tips that say nothing."""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

LEAVES = (  # what went wrong, in the order in which a message is searched for it
    r"(?:Option|option) '(?P<option>[^']+)'(?: is not accepted)?$",
    r"unrecognized arguments: (?P<word>.*)",
    r"Unable to load config ['\"](?P<table>.*)['\"]$",
    r"Expected an instantiatable class, but (?P<abstract>.*)is abstract",
    r"Expected a dot import path string: (?P<unknown>.+)",
    r"Import path (?P<unknown>\S+) does not correspond to a subclass",
    r"(?P<missing>No module named .*|.*has no attribute .*|.*not an? (?:sub)?class of.*)",
    r"the following arguments are required: (?P<required>.*)",
    r"Expected a (?P<type>.*?)\. Got value: (?P<value>.*)",
    r"Subtypes: \[(?P<types>.*)\]$",
)


def explain(message: str, keys: Sequence[str], bases: Sequence[type] = (), moved: Mapping[str, str] = MappingProxyType({})) -> str:
    """One line for a message of an ArgumentError.

    `keys`: all dotted keys that exist; `bases`: classes whose subclasses a config may name; both for the did-you-mean. `moved`: dotted keys
    that there were once, and what they are now.
    """
    said = _explain(message, keys, bases)
    key = re.match(r"unknown key (\S+?)[:;]", said)
    return f"unknown key {key[1]}: it is {moved[key[1]]} now" if key and key[1] in moved else said


def _explain(message: str, keys: Sequence[str], bases: Sequence[type]) -> str:
    lines = [line for line in message.splitlines() if line.strip(" -")]
    for pattern in LEAVES:
        for i, line in enumerate(lines):
            found = re.search(pattern, line)
            if found:
                return _say(found.groupdict(), lines, i, keys, bases)
    return shorten(" ".join(line.strip(" -") for line in lines))


def plain(message: str) -> str:
    """What a constructor said, without the attempts of all types that jsonargparse reports around it."""
    words = [line.strip().removeprefix("- ") for line in message.splitlines()]
    around = ("Does not validate", "Subtypes:", "Errors:", "Expected a", "Given value")
    own = [line for line in words if line and not line.startswith(around)]
    return own[0] if own and words[0].startswith("Does not validate") else message


def shorten(text: str, limit: int = 300) -> str:
    """`text` with its middle left out where it is too long."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def each_text(value: Any, change: Callable[[str, str], str], name: str = "") -> Any:
    """A nested config of tables, lists and namespaces with `change(key, text)` in the place of every text."""
    if isinstance(value, str):
        return change(name, value)
    if isinstance(value, list | tuple):
        return [each_text(inner, change, name) for inner in value]
    if isinstance(value, dict):
        return {key: each_text(inner, change, str(key)) for key, inner in value.items()}
    if isinstance(value, argparse.Namespace):
        return type(value)(**{key: each_text(inner, change, key) for key, inner in vars(value).items()})
    return value


class Lasting:
    """A stream whose reader may go away, as a terminal does, or `head`: what can be written no more is dropped, and the run goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write to the stream and answer how many letters; those that it cannot encode are escaped, and a reader that left gets none."""
        try:
            return int(self._stream.write(text))
        except UnicodeEncodeError as error:  # it is there, and knows fewer letters
            return int(self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding)))
        except (OSError, ValueError):
            return self._lost(len(text))

    def flush(self) -> None:
        """Flush the stream, unless its reader has left."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lost(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lost(self, length: int) -> int:
        # What is still in its buffer would fail again, at the latest when Python ends, with a code of its own.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return length


@contextmanager
def lasting() -> Iterator[None]:
    """Inside, stdout and stderr are `Lasting`: a reader that leaves does not end the command."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def nearest(name: str, known: Sequence[str]) -> str:
    """The known dotted name that `name` was probably meant to be, or nothing: by the whole name, else by its last part."""
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if whole:
        return whole[0]
    by_last = {key.split(".")[-1]: key for key in reversed(known)}
    last = difflib.get_close_matches(name.split(".")[-1], list(by_last), n=1, cutoff=0.6)
    return by_last[last[0]] if last else ""


def parameters(cls: type) -> list[str]:
    """The names that the constructor of a class accepts, with those of its bases that it hands **kwargs on to, and the dotted ones of
    fields, where a record is the default."""
    signatures = []
    for c in cls.__mro__[:-1]:
        signatures.append(inspect.signature(c).parameters.values())
        if not any(p.kind is p.VAR_KEYWORD for p in signatures[-1]):
            break
    return _dotted(p for found in reversed(signatures) for p in found)


def accepts(function: Callable[..., Any]) -> list[str]:
    """The names that a function accepts, and the dotted ones of fields, where a record is the default or what an option may be."""
    either = ((name, kind) for name, hint in get_type_hints(function).items() for kind in get_args(hint) if is_dataclass(kind))
    optional = [f"{name}.{field.name}" for name, kind in either for field in fields(kind)]
    return [*_dotted(inspect.signature(function).parameters.values()), *optional]


def _dotted(found: Iterable[inspect.Parameter]) -> list[str]:
    known = {p.name: p.default for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    records = {name: record for name, record in known.items() if is_dataclass(record)}
    return [*known, *(f"{name}.{field.name}" for name, record in records.items() for field in fields(record))]


def subclasses(bases: Sequence[type]) -> Iterator[type]:
    """The classes below `bases`, and these themselves."""
    for base in bases:
        yield base
        yield from subclasses(base.__subclasses__())


def _say(found: dict[str, str | None], lines: list[str], i: int, keys: Sequence[str], bases: Sequence[type]) -> str:
    table = found.get("table")
    where, cls = _place(lines, i if table is None else i - 1, bases)  # such a line is no deeper than its key, which is above it
    if found.get("word"):
        word = (found["word"] or "").split()[0]
        if not word.startswith("-"):
            return f"{word} is neither an option nor an override: write key=value"
        key = word.lstrip("-").partition("=")[0]
        return _unknown_key(key, keys) if cls is None else _unknown_key(f"{where}.{key}", [f"{where}.{name}" for name in parameters(cls)])
    if table is not None:
        return f"{where} is a table of options, such as {{key: value}}, not {shorten(table, 80)}"
    if found.get("option"):
        group = re.search(r"Group '([^']+)'", lines[i])
        option = found["option"] or ""
        if cls is not None:
            option = f"{group[1]}.{option}" if group else option
            return _unknown_key(f"{where}.{option}", [f"{where}.{name}" for name in parameters(cls)])
        return _unknown_key(f"{group[1]}.{option}" if group else option, keys)
    if found.get("unknown"):
        return _unknown_class(where, found["unknown"] or "", lines, bases)
    if found.get("abstract") is not None:
        return f"{where}: {_abstract((found['abstract'] or '').strip() or _given(lines, i), bases)}"
    if found.get("required"):
        return f"{where or 'the command'} needs {found['required']}"
    if found.get("type"):
        return f"{where} takes {_types(found['type'] or '')}, not {'null' if found['value'] == 'None' else found['value']}"
    if found.get("types"):
        return f"{where} takes {_types(found['types'] or '')}, not {shorten(_given(lines, i), 80)}"
    return shorten(f"{where}: {_missing((found.get('missing') or '').strip())}")


def _place(lines: list[str], i: int, bases: Sequence[type]) -> tuple[str, type | None]:
    """The dotted key that line `i` is about, and the class whose argument it is: read from the less indented lines above."""
    keys: list[str] = []
    cls, depth = None, _indent(lines[i]) + 1
    for line in reversed(lines[: i + 1]):
        if _indent(line) >= depth:
            continue
        depth = _indent(line)
        key, path = re.search(r'Parser key "([^"]+)"', line), re.search(r"class_path '([^']+)'", line)
        if key:
            keys.insert(0, key[1])
        elif path and cls is None and not keys:
            cls = next((c for c in subclasses(bases) if c.__name__ == path[1].split(".")[-1]), None)
    return ".".join(keys), cls


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _unknown_key(key: str, known: Sequence[str]) -> str:
    near = nearest(key, known)
    return f"unknown key {key}" + (f": did you mean {near}?" if near else "; --help lists the keys")


def _unknown_class(where: str, name: str, lines: list[str], bases: Sequence[type]) -> str:
    wanted = re.search(r"Subtypes: \[.*?<class '[\w.]*?(\w+)'>", "\n".join(lines))
    base = [b for b in bases if wanted and b.__name__ == wanted[1]]
    # Of two names as near as each other, this library's own was meant, not one of Lightning's many.
    own, others = [
        sorted({c.__name__ for c in subclasses(bases) if c.__module__.startswith("lightning.") is lightning} - {b.__name__ for b in bases})
        for lightning in (False, True)
    ]
    near = [n for known in (own, others) for n in difflib.get_close_matches(name.split(".")[-1], known, n=1, cutoff=0.6)]
    known = [n for n in own if n in {c.__name__ for c in subclasses(base)}]
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}" if known else "give its import path"
    return f"{where}: no class is called {shorten(name, 80)}; {hint}"


def _missing(text: str) -> str:
    """What Python said of a module or of a name in one, and what to do about it."""
    if re.match(r"No module named ", text):
        return f"{text}: install it or, where it is a file of yours, name its folder, PYTHONPATH=FOLDER"
    module = re.match(r"module '([\w.]+)' has no attribute '(\w+)'", text)
    if module is None:
        return text
    known = [name for name, value in vars(sys.modules.get(module[1], sys)).items() if isinstance(value, type)]
    near = difflib.get_close_matches(module[2], known, 1, 0.6)
    return f"{text}: did you mean {module[1]}.{near[0]}?" if near else text


def _given(lines: list[str], i: int) -> str:
    return next((line.partition("Given value:")[2].strip() for line in lines[i:] if "Given value:" in line), "")


def _abstract(path: str, bases: Sequence[type]) -> str:
    """What is wrong with an abstract class by its import path, which jsonargparse has imported, or by its short name."""
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None) or next((c for c in subclasses(bases) if c.__name__ == name), None)
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    return f"{name} is there to be derived from: give a class that defines {', '.join(missing) or 'what it leaves open'}"


def _types(text: str) -> str:
    """Types as a user writes them: <class 'int'> is int, typing.Literal['a', 'b'] is a or b, NoneType is null."""
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", lambda m: m[1].replace("'", "").replace(", ", " or "), text)
    return shorten(" or ".join(re.split(r", (?![^\[]*\])", text)), 160)


def quiet() -> None:
    """Silence warnings and tips of libraries that say nothing to a user of this one, one by one; no whole category."""
    for message in (
        "isinstance.treespec",
        "does not have many workers",
        "module.s. in eval mode",
        "your dataloader is not resumable",
        "exists and is not empty",
        "You are using the plain ModelCheckpoint",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    tips = ["Tip:", "available:", "LOCAL_RANK", "Trainer.fit` stopped", "Restor", "`weights_only` was not set", "KeyboardInterrupt"]
    tips += ["is now natively supported by torch.compile", "Unable to import `torchao` Tensor objects"]
    names = ["lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.fabric.utilities.seed"]
    names += ["torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"]
    for name in [*names, "lightning.pytorch.trainer.connectors.checkpoint_connector"]:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _Tips) for f in logger.filters):
            logger.addFilter(_Tips(tips))
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)


class _Tips(logging.Filter):
    def __init__(self, tips: Sequence[str]) -> None:
        super().__init__()
        self.tips = tips

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is none of the tips."""
        return not any(tip in record.getMessage() for tip in self.tips)
