"""Text files as people save them: byte order marks, line ends, encodings, and what no tokenizer and no file system takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ddil_lightning.texts import caption_texts, check_prompts, file_text, json_digest, parse_json, place, read_lines, read_text, shown

SEPARATORS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r"]  # str.splitlines and open() end lines at these too


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_a_byte_order_mark_is_no_text(mark: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(mark + "größer\n".encode())
    assert read_text(file) == "größer\n" and read_lines(str(file)) == ["größer", ""]


@pytest.mark.parametrize("separator", SEPARATORS, ids=[f"U+{ord(c):04x}" for c in SEPARATORS])
def test_a_line_ends_at_a_line_feed_alone(separator: str, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(f"a{separator}b\n  c \r\n\nd".encode())
    assert read_lines(file) == [f"a{separator}b", "c", "", "d"]


def test_files_that_were_joined_have_marks_inside(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"1\n" + b"\xef\xbb\xbf" + b"2\n")
    assert [parse_json(line, "x") for line in read_lines(file) if line] == [1, 2]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_refused_with_its_line(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes("one\ntwo\ngröße\n".encode(encoding))
    line, byte = (3, "f6") if encoding == "latin-1" else (1, "ff")
    with pytest.raises(ValueError, match=re.escape(f"{file}, line {line}: byte 0x{byte} is not UTF-8: save the file as UTF-8")):
        read_text(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "gone.txt", "No such file or directory"),
        (tmp_path, "Is a directory"),
        ("a\0.txt", "embedded null byte"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{shown(path)} cannot be read: {why}")):
            read_text(path)


def test_broken_json_is_named() -> None:
    for text, why in (('{"a"', "Expecting ':' delimiter"), ("[" * 200_000, "it is nested too deeply")):
        with pytest.raises(ValueError, match=f"^set.json, line 7: no JSON: {why}") as error:
            parse_json(text, "set.json, line 7")
        assert len(str(error.value)) < 400


def test_a_digest_of_what_is_said_is_the_same_in_any_order_and_for_good() -> None:
    """Rows of a teacher, caches and references are kept under such: another digest would have them all made again."""
    assert json_digest({"b": [1, "ö"], "a": Path("x")}) == json_digest({"a": "x", "b": [1, "ö"]}) != json_digest({"a": "x", "b": ["ö", 1]})
    assert json_digest({"a": "x", "b": [1, "ö"]})[:12] == "74f692a12690"


def test_captions() -> None:
    assert caption_texts(" a cat\n") == caption_texts(("a cat",)) == ["a cat"] and caption_texts("") == [""]
    assert caption_texts(["a cat ", "two"]) == ["a cat", "two"] and caption_texts(json.loads(r'"\ud83d\ude00"')) == ["😀"]  # a whole pair
    for value in (None, 5, [], {}, [None], float("nan")):
        with pytest.raises(ValueError, match=" and no caption"):
            caption_texts(value)
    with pytest.raises(ValueError, match=r"a text with \\udc00, half a character that no tokenizer takes"):
        caption_texts(json.loads(r'"a \udc00"'))
    with pytest.raises(ValueError, match="^cannot be read: why$"):
        caption_texts(ValueError("cannot be read: why"))


def test_prompts_with_half_a_character_are_named() -> None:
    check_prompts(["a cat", "😀"])
    with pytest.raises(ValueError, match=r"^the prompt 'b \\udc00' is a text with \\udc00, half a character that no tokenizer takes: "):
        check_prompts(["a", "b \udc00"])


def test_the_home_folder_is_meant_by_whoever_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was found in a folder called ~ stays there, and nobody's home is a path as any other."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for folder in ("home", "~"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    assert place("~/x.txt") == tmp_path / "home" / "x.txt" and place(str(place("~/x.txt"))) == place("~/x.txt")
    assert read_text("~/x.txt") == "home" and read_lines(Path(".") / "~" / "x.txt") == ["~"]
    with pytest.raises(ValueError, match="^~nosuchuser/x cannot be read: No such file or directory$"):
        read_text("~nosuchuser/x")


@pytest.mark.parametrize("value", [None, 5, "", ["a.png"], "a\0.png", "\ud800.png"], ids=repr)
def test_names_that_no_file_has(value: Any) -> None:
    with pytest.raises(ValueError, match="and no file name|which no file can be called") as error:
        file_text(value)
    assert str(error.value).isprintable()


def test_names_that_a_file_has() -> None:
    for name in ("a [1].png", "größe.png", "\udcf6.png"):  # the last: a byte that is no UTF-8, as Python reads it from a folder
        assert file_text(name) == name
