"""The light front end: what is answered without torch, how a command line is completed, and how errors end."""

from __future__ import annotations

import errno
import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddil_lightning.commands import main
from ddil_lightning.commands.configs import FIT_SHORT, expand
from ddil_lightning.errors import Refusal
from ddil_lightning.messages import lasting
from ddil_lightning.packaged import config_names, find_config

LIGHT = """
import sys
from ddil_lightning.commands import main
for words in (["--version"], ["--config", "lcm_dill.yaml"], ["--config"], []):
    try:
        main.run(main.command("fit"), "ddil-fit", words)
    except SystemExit as stop:
        print("code", stop.code)
heavy = {"torch", "lightning", "jsonargparse", "yaml", "numpy", "diffusers"} & set(sys.modules)
print("loaded", sorted(heavy))
"""


def outcome(command: Any, *words: str) -> Any:
    with pytest.raises(SystemExit) as stop:
        main.run(command, "ddil-x", list(words))
    return stop.value.code


def test_version_and_a_wrong_config_name_are_answered_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ddil-lightning ") and "loaded []" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 0", "code 2", "code 2", "code 2"]
    unknown, bare, none = done.stderr.splitlines()
    assert unknown.startswith("ddil-fit: no config lcm_dill.yaml: it is neither") and "did you mean lcm_ddil.yaml" in unknown
    assert "--config needs a name" in bare
    assert "ddil-fit needs --config NAME" in none and "lcm_ddil.yaml" in none


def test_packaged_configs_are_found_by_bare_name_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"lcm.yaml", "lcm_ddil.yaml", "pretrain.yaml"} <= set(config_names())
    for name in config_names():
        assert find_config(name).is_file() and find_config(name.removesuffix(".yaml")) == find_config(name)


def test_a_file_wins_over_a_packaged_name_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lcm.yaml").mkdir()
    assert find_config("lcm.yaml").is_file()
    (tmp_path / "lcm.yaml").rmdir()
    (tmp_path / "lcm.yaml").write_text("model: LCM\n")
    assert find_config("lcm.yaml") == Path("lcm.yaml")


def test_configs_in_folders_keep_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "pd.yaml").touch()
    monkeypatch.setattr("ddil_lightning.packaged.configs_folder", lambda: tmp_path)
    assert config_names() == ["toy/pd.yaml"] and find_config("toy/pd") == tmp_path / "toy" / "pd.yaml"
    with pytest.raises(Refusal, match=r"did you mean toy/pd\.yaml"):
        find_config("pd")
    with pytest.raises(Refusal, match=r"known are toy/pd\.yaml"):
        find_config("quite-different")


@pytest.mark.parametrize(
    ("words", "full"),
    [
        (["model.optimizer.lr=1e-4"], ["--model.optimizer.lr=1e-4"]),
        (["--model.optimizer.lr", "1e-4", "data.batch_size=3"], ["--model.optimizer.lr", "1e-4", "--data.batch_size=3"]),
        (["--updates", "5"], ["--model.init_args.updates", "5"]),
        (["--updates=5", "seed=3"], ["--model.init_args.updates=5", "--seed_everything=3"]),
        (["updates=5", "--checkpoint_every", "7"], ["--model.init_args.updates=5", "--checkpoints.every", "7"]),
        (["--ckpt_path", "updates=12.ckpt"], ["--ckpt_path", "updates=12.ckpt"]),  # a value, although it looks like an override
        (["--ckpt_path=a/updates=12.ckpt"], ["--ckpt_path=a/updates=12.ckpt"]),
        (["--run_dir", "a=b", "model.optimizer.lr=1"], ["--run_dir", "a=b", "--model.optimizer.lr=1"]),
        (["--print_config", "model.optimizer.lr=1"], ["--print_config", "--model.optimizer.lr=1"]),
        (["trainer.callbacks+=Cadence"], ["--trainer.callbacks+=Cadence"]),
        (["--config", "{data: {batch_size: 3}}"], ["--config", "{data: {batch_size: 3}}"]),
        (["--model.help", "LCM", "--config", "{a: 1}"], ["--config", "{a: 1}", "--model.help", "LCM"]),
        (["--model.help", "--config", "{a: 1}", "seed=3"], ["--config", "{a: 1}", "--model.help", "--seed_everything=3"]),
        (["--model.help", "-c", "{a: 1}"], ["--config", "{a: 1}", "--model.help"]),
        (["--model.help", "model.optimizer.lr=1"], ["--model.help", "--model.optimizer.lr=1"]),
        (["--trainer.help", "--config", "{a: 1}"], ["--config", "{a: 1}", "--help"]),  # jsonargparse knows no help of a group alone
        (["--model.optimizer.lr", "-1"], ["--model.optimizer.lr", "-1"]),
        (["model.critic.lr=null", "model.ema=null"], ["--model.critic={lr: null}", "--model.ema=null"]),
        (["--model.init_args.critic.lr", "null", "seed=3"], ["--model.init_args.critic={lr: null}", "--seed_everything=3"]),
    ],
)
def test_expand(words: list[str], full: list[str]) -> None:
    assert expand(words, FIT_SHORT) == full


def test_expand_finds_every_config() -> None:
    found = str(find_config("lcm"))
    assert expand(["--config", "lcm", "-c", "lcm.yaml", "--config=lcm"], {}) == ["--config", found] * 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("first\n  second"), "first second"),
        (Refusal("no"), "no"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), "No space left on device: x.png"),
        (OSError(errno.ENOSPC, "the checkpoint x could not be written"), "the checkpoint x could not be written"),
        (ValueError(), "ValueError"),
    ],
)
def test_bad_input_is_one_line_and_code_2(error: Exception, said: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(argv: list[str]) -> None:
        raise error

    assert outcome(command) == 2
    assert capsys.readouterr() == ("", f"ddil-x: {said}\n")
    monkeypatch.setenv("DDIL_DEBUG", "1")
    with pytest.raises(type(error)):
        main.run(command, "ddil-x", [])


def test_ctrl_c_is_code_130(capsys: Any) -> None:
    def command(argv: list[str]) -> None:
        raise KeyboardInterrupt(*argv)

    assert outcome(command) == 130 and outcome(command, "stopped at 5; go on with: x") == 130
    assert capsys.readouterr().err.split("\n") == ["", "ddil-x: stopped", "", "ddil-x: stopped at 5; go on with: x", ""]


def test_a_command_that_ends_well_is_code_0_and_a_fault_of_ours_is_one_line_too(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(lambda argv: None) == 0 and outcome(lambda argv: 7) == 7
    assert outcome(lambda argv: 1 // 0) == 2
    said = "ddil-x: ZeroDivisionError: integer division or modulo by zero (this was not foreseen: DDIL_DEBUG=1 shows where it happened)\n"
    assert capsys.readouterr().err == said
    monkeypatch.setenv("DDIL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main.run(lambda argv: 1 // 0, "ddil-x", [])


def test_every_command_keeps_the_tips_of_libraries_from_its_user(caplog: Any) -> None:
    said = "Unable to import `torchao` Tensor objects. This may affect loading checkpoints serialized with `torchao`"

    def command(words: list[str]) -> None:
        logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").warning(said)
        logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").warning("another thing")

    assert outcome(command) == 0
    assert "another thing" in caplog.text and "torchao` Tensor" not in caplog.text


def test_wrong_options_of_every_command(capsys: Any) -> None:
    for command, words in (
        (main.command("test"), ["--stepz", "3"]),
        (main.command("test"), []),
        (main.command("test"), ["run", "--pipeline", "x"]),
        (main.command("test"), ["--pipeline", "builtin", "--steps", "0"]),
        (main.command("test"), ["--pipeline", "builtin", "--n", "3"]),
        (main.command("sample"), ["--pipeline", "builtin", "--prompt", "a"]),
        (main.command("sample"), ["--pipeline", "builtin", "--prompt", "a", "--out", "x.txt"]),
        (main.command("sample"), ["--pipeline", "builtin", "--prompt", "a", "--out", "x.png", "--n", "0"]),
        (main.command("export"), ["--ckpt_path", "x"]),
        (main.command("export"), ["--ckpt_path", "x", "--out", str(Path(__file__).parents[1])]),
        (main.command("pretrain"), ["--config", "pretrian"]),
        (main.command("pretrain"), ["--datasat", "shapes"]),
        (main.command("pretrain"), ["--images", "many"]),
    ):
        assert outcome(command, *words) == 2, words
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("ddil-x: ") and err.count("\n") == 1, (words, err)
    assert "images" in err and "many" in err


def test_a_stream_that_knows_fewer_letters_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of a run has arrows in its head."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, "ascii"))
    with lasting():
        print("Fréchet ↓")
        print("and on", flush=True)
    assert raw.getvalue() == b"Fr\\xe9chet \\u2193\nand on\n"
