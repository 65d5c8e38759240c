"""Text files of a user: the one way to read them, their lines, and the captions and file names that they hold.

A file is UTF-8, with or without a byte order mark. A line ends at a line feed and nowhere else: `str.splitlines` also cuts at form feeds
and at Unicode's separators, which stand inside captions that were copied from documents, and one caption would become two.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddil_lightning.messages import shorten

MARK = "\ufeff"  # the byte order mark


def place(path: str | Path) -> Path:
    """A path as it was meant. The one rule for `~`: in a str, which somebody wrote, it is the home folder; a Path is taken as it stands.

    The command line and configs are expanded before they come here, which changes nothing any more. Nothing is raised for a user that
    nobody knows: such a path does not exist. A file that was found inside a folder called `~` is a Path, and stays there.
    """
    return Path(os.path.expanduser(path)) if isinstance(path, str) else path


def read_text(path: str | Path) -> str:
    """A text file without its byte order mark. Raises ValueError for one that cannot be read, or is not UTF-8."""
    try:
        data = place(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"{shown(path)} cannot be read: {reason(error)}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{shown(path)}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8") from error


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file without white space at their ends; empty ones too, so that a line's number is its index and 1.

    Files that were joined bring a byte order mark into the middle, at the start of a line: it goes as the first one does.
    """
    return [line.removeprefix(MARK).strip() for line in read_text(path).split("\n")]


def from_json(text: str | bytes) -> Any:
    """`text` as JSON. Raises ValueError for what is none, and for what is nested so deeply that Python gives up."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_json(text: str, where: str) -> Any:
    """`text` as JSON. Raises ValueError that begins with `where`."""
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON: {reason(error)}") from error


def json_digest(said: Any) -> str:
    """The sha256 of what is said in lists and mappings, in whatever order a mapping says it; what JSON has no word for counts as text."""
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def caption_texts(value: Any) -> list[str]:
    """The captions in a cell: of a text one, of a list of texts each. Raises ValueError for what is none, without saying where."""
    if isinstance(value, ValueError):  # of reading its file
        raise value
    texts = value if isinstance(value, list | tuple) and value else [value]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{shorten(repr(text), 80)} and no caption")
        check_letters(text)
    return [text.strip() for text in texts]


def check_letters(text: str) -> None:
    """Raises ValueError for half a character (a lone surrogate), without saying where."""
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        raise ValueError(f"a text with \\u{ord(half):04x}, half a character that no tokenizer takes: write the whole one")


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises ValueError, naming the first prompt that no tokenizer takes."""
    for prompt in prompts:
        try:
            check_letters(prompt)
        except ValueError as error:
            raise ValueError(f"the prompt {shorten(repr(prompt), 80)} is {error}") from error


def file_text(value: Any) -> str:
    """The file name in a cell. Raises ValueError for what is none, without saying where."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{shorten(repr(value), 80)} and no file name")
    try:
        named = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise ValueError(f"{shorten(repr(value), 80)}, which no file can be called")
    return value


def shortened(prompt: str) -> str:
    """A prompt as a line quotes it."""
    return prompt if len(prompt) < 80 else prompt[:77] + "..."


def by(size: Sequence[int]) -> str:
    """Height and width as a message says them: 512 x 704."""
    return " x ".join(map(str, size))


def shown(name: str | os.PathLike[str]) -> str:
    """A file's name as a message can hold it: names with line feeds exist."""
    return str(name) if str(name).isprintable() else repr(str(name))


def reason(error: BaseException) -> str:
    """What an error says, on one line: of the system's refusals only what it refused, for the file is named elsewhere."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shorten(" ".join(said.split())) or type(error).__name__
