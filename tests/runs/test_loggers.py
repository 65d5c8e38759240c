"""metrics.csv, and what is sent to Weights & Biases."""

from __future__ import annotations

import csv
import socket
import threading
import time
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch

from ddil_lightning.runs import loggers


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_file_takes_new_columns(here: Path) -> None:
    log = loggers.MetricsFile(here / "r")
    assert not (here / "r").exists() and log.save_dir == str(here / "r")
    log.log_metrics({"student_updates": 1, "loss": torch.tensor(0.5)}, 1)
    log.log_metrics({"student_updates": 2, "loss": 0.25, "a/b": 3.0}, 2)
    log.log_metrics({"student_updates": 3, "loss": 0.125}, 3)
    rows = table(log.path)
    assert list(rows[0]) == ["student_updates", "a/b", "loss"]
    assert [row["loss"] for row in rows] == ["0.5", "0.25", "0.125"] and [row["a/b"] for row in rows] == ["", "3.0", ""]
    assert [p.name for p in (here / "r").iterdir()] == ["metrics.csv"]


def test_a_metrics_file_has_one_clock(here: Path) -> None:
    """Lightning's own callbacks count batches, and a file of an older version has their column."""
    log = loggers.MetricsFile(here / "r")
    log.log_metrics({"student_updates": 3, "loss": 0.5}, 3)
    log.log_metrics({"lr-AdamW": 0.25}, 40)
    assert [(row["student_updates"], row["lr-AdamW"]) for row in table(log.path)] == [("3", ""), ("3", "0.25")]
    log.path.write_text("student_updates,step,loss\n3,3,0.5\n4,4,0.25\n")
    loggers.MetricsFile(here / "r", here / "r", upto=4).log_metrics({"lr-AdamW": 0.125}, 50)
    assert [list(row.items()) for row in table(log.path)][2] == [("student_updates", "4"), ("loss", ""), ("lr-AdamW", "0.125")]
    now = 7
    told = loggers.MetricsFile(here / "t", clock=lambda: now)
    told.log_metrics({"student_updates": 5, "loss": 0.5}, 5)
    told.log_metrics({"lr-AdamW": 0.25}, 60)
    assert [row["student_updates"] for row in table(told.path)] == ["5", "7"]
    again = loggers.MetricsFile(here / "t", here / "t", upto=6)
    again.log_metrics({"student_updates": 6, "loss": 0.25}, 6)
    assert [row["student_updates"] for row in table(told.path)] == ["5", "6"]  # update 7 is made again


def test_metrics_file_goes_on_where_the_checkpoint_was(here: Path) -> None:
    first = loggers.MetricsFile(here / "r")
    for clock in range(1, 7):
        first.log_metrics({"student_updates": clock, "loss": clock / 10}, clock)
    with first.path.open("a") as file:
        file.write("7,7,0.")  # the process died in the middle of a row
    for folder in (here / "branch", here / "r"):
        again = loggers.MetricsFile(folder, here / "r", upto=4)
        again.log_metrics({"student_updates": 5, "loss": 9.0, "new": 1.0}, 5)
        again.log_metrics({"student_updates": 6, "loss": 9.0, "new": 2.0}, 6)
        assert [(int(row["student_updates"]), float(row["loss"]), row["new"]) for row in table(again.path)] == [
            (1, 0.1, ""), (2, 0.2, ""), (3, 0.3, ""), (4, 0.4, ""), (5, 9.0, "1.0"), (6, 9.0, "2.0"),
        ]  # fmt: skip


def test_metrics_survive_a_full_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = loggers.MetricsFile(here)
    log.log_metrics({"student_updates": 1, "loss": 0.5}, 1)
    before = log.path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        log.log_metrics({"student_updates": 2, "other": 0.5}, 2)
    assert log.path.read_bytes() == before and list(here.iterdir()) == [log.path]


@pytest.fixture
def known(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is there."""
    monkeypatch.setenv("NETRC", str(here / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)


def test_wandb_online_needs_a_key_that_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(here / "netrc"))
    key = lambda: loggers._check_key("https://api.wandb.ai")  # noqa: E731
    for text in (None, "machine example.org login a password b\n"):
        if text:
            (here / "netrc").write_text(text)
        with pytest.raises(ValueError, match="--wandb online needs a key"):
            key()
    (here / "netrc").write_text("machine api.wandb.ai login user password b\n")
    (here / "netrc").chmod(0o600)
    key()
    (here / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    key()


@pytest.mark.parametrize("answers", [True, False])
def test_wandb_online_is_asked_for_before_anything_is_loaded(answers: bool, known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that accepts and is silent, or that answers with an error, which is an answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")

        def answer() -> None:
            with server.accept()[0] as peer:
                peer.recv(1000)
                peer.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n")

        if answers:
            threading.Thread(target=answer, daemon=True).start()
            loggers.check_wandb()
        else:
            begun = time.monotonic()
            with pytest.raises(
                ValueError, match=r"--wandb online: http://127\.0\.0\.1:\d+ does not answer \(timed out\): use --wandb offline"
            ):
                loggers.check_wandb(limit=0.5)
            assert time.monotonic() - begun < 5
    if not answers:
        with pytest.raises(ValueError, match="does not answer .*refused"):
            loggers.check_wandb()


def test_secrets_are_masked_and_must_be_given_again() -> None:
    config = {
        "trainer": {"logger": [{"init_args": {"api_key": "s3cr3t", "apiKey": "s3cr3t", "project": "p"}}]}, "hf_token": "s3cr3t",
        "password": "s3cr3t", "uri": "https://me:s3cr3t@host/x", "tokenizer": "clip", "max_tokens": "7",
        "empty": {"token": None, "secret": ""},
    }  # fmt: skip
    seen = loggers.masked(config)
    assert (
        "s3cr3t" not in str(seen)
        and seen["tokenizer"] == "clip"
        and seen["max_tokens"] == "7"
        and seen["uri"] == "https://me:(masked)@host/x"
    )
    assert seen["trainer"]["logger"][0]["init_args"]["project"] == "p" and seen["empty"] == {"token": None, "secret": ""}
    loggers.refuse_masked(config)
    with pytest.raises(ValueError, match=r"trainer\.logger\[0\]\.init_args\.api_key is masked, .*: give it again"):
        loggers.refuse_masked(seen)


@pytest.mark.parametrize(
    "secret",
    [
        {"password": 1234}, {"pwd": "p"}, {"db_password": 0.5}, {"userPassphrase": "p"}, {"APIKey": "p"}, {"password2": "p"},
        {"headers": {"Authorization": "Bearer abc", "X-Api-Key": "p", "Set-Cookie": "p"}}, {"secrets": ["p", 7]},
        {"credentials": {"pin": "x", "more": [{"user": "u"}, 5]}}, {"uri": "redis://:p@ss@host/1"}, {"uri": "https://host/x?token=p"},
    ],
)  # fmt: skip
def test_whatever_stands_below_a_secret_key_is_masked(secret: Any) -> None:
    """Numbers, tables and lists too, and once masked it stays so and is refused."""
    seen = loggers.masked(secret)

    def leaves(value: Any) -> Any:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return [value] if inner is None else [leaf for part in inner for leaf in leaves(part)]

    masks = {"redis://:(masked)@host/1", "https://host/x?token=(masked)", "(masked)"}
    assert set(leaves(seen)) <= masks and loggers.masked(seen) == seen and loggers.masked(jsonargparse.Namespace(x=secret)).x == seen
    with pytest.raises(ValueError, match="is masked, as in every config"):
        loggers.refuse_masked(seen)


def test_ordinary_keys_are_not_masked() -> None:
    config = {
        "tokens": 3, "tokenizer": "clip", "max_tokens": 7, "key": "loss", "keys": ["a"], "monitor_key": "x", "pin_memory": 1,
        "author": "me", "passes": 2, "token": None, "use_auth_token": True, "url": "https://me@host/x?page=2",
        "prompts": ["a secret: to@me"],
    }  # fmt: skip
    assert loggers.masked(config) == config
