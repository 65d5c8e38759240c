"""ddil-cache in this process: its command line, a run on what it has made, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commandline import fit
from ddil_lightning.commands import main
from ddil_lightning.commands.cache import in_full
from ddil_lightning.commands.launched import together
from ddil_lightning.data import numbering, writer

ROWS = 12
WORDS = "zero one two three four five six seven eight nine small large".split()


def cache(capsys: Any, *words: str) -> tuple[int, str, str]:
    """ddil-cache in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.run(main.command("cache"), "ddil-cache", list(words))
    return (stop.value.code, *capsys.readouterr())  # type: ignore[return-value]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Twelve pictures with a caption each in a folder, and the words of ddil-fit that name them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for i in range(ROWS):
        Image.new("RGB", (20, 16), (20 * i, 0, 0)).save(tmp_path / "set" / f"{i:02d}.png")
        (tmp_path / "set" / f"{i:02d}.txt").write_text(f"a digit {WORDS[i]}")
    own = {"class_path": "Images", "init_args": {"path": "set", "size": 16}}
    return [f"data.captions={json.dumps(own)}", "data.batch_size=4", "previews.every=0", "model.updates=6"]


def test_a_config_makes_a_folder_and_trains_on_it_alone(pictures: list[str], tiny_config: Path, capsys: Any) -> None:
    words = ["--config", str(tiny_config), *pictures]
    code, out, err = cache(capsys, *words, "--out", "kept", "--shard_rows", "5")
    assert code == 0, err
    assert out.splitlines()[-1].startswith("12 rows, 12 captions, 0.") and out.rstrip().endswith("kept; train on it by data.cache=kept")
    assert sorted(p.name for p in Path("kept").glob("rows*")) == [f"rows-0000{i}.safetensors" for i in range(3)]
    Path("set").rename("elsewhere")
    code, _, err = fit(capsys, "--config", str(tiny_config), *pictures[1:-1], "model.updates=2", "data.cache=kept", "--run_dir", "r")
    assert code == 0 and len(Path("r/metrics.csv").read_text().splitlines()) == 3, err


def test_who_is_through_while_another_completes_the_folder_leaves_it_to_that(
    pictures: list[str], tiny_config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", str(tiny_config), *pictures, "--out", "kept"]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "holding", lambda lock: nullcontext(False))
        code, out, err = cache(capsys, *words)
    said = "nothing is missing any more; another process, which was here first, looks all files over and completes kept"
    assert code == 0 and out.rstrip().endswith(said), err
    assert cache(capsys, *words)[1].rstrip().endswith("kept; train on it by data.cache=kept")


def test_short_options_stand_for_those_of_a_config() -> None:
    words = ["--captions.path=x", "--size=64", "--workers", "2", "--out", "d", "--model.init_args.pipeline=p", "--dtype=float32"]
    full = ["--data.captions.path=x", "--data.captions.init_args.size=64", "--data.workers", "2", *words[4:]]
    assert in_full(words) == ["--model=LCM", "--data.captions=Images", *full]
    assert in_full(["--config", "c", *words]) == ["--config", "c", *full]
    assert in_full(["--captions=Prompts", "--captions.path=x"]) == ["--model=LCM", "--data.captions=Prompts", "--data.captions.path=x"]


def test_without_a_config_and_a_look_at_the_result(pictures: list[str], tiny: Path, capsys: Any) -> None:
    words = ["--pipeline", str(tiny), "--captions.path", "set", "--size", "16", "--out", "kept", "--dtype", "float32", "--text", "false"]
    code, out, err = cache(capsys, *words)
    assert code == 0 and "12 rows, 12 captions" in out, err
    about = json.loads(Path("kept/manifest.json").read_text())
    assert (about["dtype"], about["text"], about["sizes"], about["rows"]) == ("float32", False, [[16, 16]], 12)
    code, out, _ = cache(capsys, "--out", "kept", "--verify")
    assert code == 0 and out.startswith("3 files with 12 rows, 0.") and out.rstrip().endswith("as they were written: kept")
    data = bytearray(Path("kept/rows-00000.safetensors").read_bytes())
    data[-1] ^= 1
    Path("kept/rows-00000.safetensors").write_bytes(data)
    code, _, err = cache(capsys, "--verify", "--out", "kept")
    assert code == 2 and err.startswith("ddil-cache: the cache kept is damaged: rows-00000.safetensors is not as it was written")


def test_a_cache_that_goes_on_says_all_that_was_skipped(
    pictures: list[str], tiny: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It said what this process had skipped since it began."""
    Path("set/07.png").write_text("<html>not found</html>")
    words = ["--pipeline", str(tiny), "--captions.path", "set", "--size", "16", "--out", "kept", "--shard_rows", "5", "on_error=skip"]
    for go in range(2):
        assert cache(capsys, *words)[0] == 0
        told = [record.getMessage() for record in caplog.records]
        assert told.count("1 rows of the data could not be read and were skipped") == go + 1
        Path("kept/rows-00000.safetensors").unlink()  # of rows that can be read


def test_a_pipeline_of_a_size_and_a_config_with_a_class(pictures: list[str], tiny: Path, capsys: Any) -> None:
    own = json.dumps({"class_path": "Pipeline", "init_args": {"path": {"path": str(tiny), "size": [16, 24]}}})
    words = ["--model=LCM", f"model.pipeline={own}", "--captions.path", "set", "--captions.size=[16,24]", "--out", "kept"]
    code, _, err = cache(capsys, *words)
    assert code == 0 and json.loads(Path("kept/manifest.json").read_text())["sizes"] == [[16, 24]], err


def test_a_signal_leaves_what_is_whole_and_says_how_to_go_on(pictures: list[str], tiny: Path, capsys: Any, monkeypatch: Any) -> None:
    words = ["--pipeline", str(tiny), "--captions.path", "set", "--size", "16", "--out", "kept", "--shard_rows", "4"]
    write, written = writer.write_shard, []

    def slow(path: Path, *args: Any) -> None:
        write(path, *args)
        written.append(path.name)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    for module in (writer, numbering):
        monkeypatch.setattr(module, "write_shard", slow)
    code, _, err = cache(capsys, *words)
    assert code == 128 + signal.SIGTERM
    assert err.strip() == "ddil-cache: stopped; what is whole in kept stays, and the same command goes on"
    assert sorted(p.name for p in Path("kept").iterdir()) == ["manifest.json", "rows-00000.safetensors", "rows-00001.safetensors"]
    assert cache(capsys, *words)[0] == 0 and written[2:] == [
        "rows-00002.safetensors", *(f"captions-0000{i}.safetensors" for i in range(3)), "index.safetensors",
        *(f"text-0000{i}.safetensors" for i in range(3)),
    ]  # fmt: skip


def test_tasks_of_srun_do_not_each_do_all_of_it(pictures: list[str], tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    code, _, err = cache(capsys, "--pipeline", str(tiny), *pictures[:1], "--out", "kept")
    assert code == 2 and "ddil-cache: srun has started this command 4 times, and each would do all of it: share it out" in err
    assert err.count("\n") == 1 and not Path("kept").exists()
    for name, value in (("WORLD_SIZE", "1"), ("SLURM_JOB_NAME", "bash")):  # tasks with work of their own; the shell of srun --pty
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert together()[0].world == 1


def test_what_cannot_be_is_one_line(pictures: list[str], tiny: Path, tiny_config: Path, capsys: Any) -> None:
    Path("full").mkdir()
    Path("full/x").write_text("mine")
    data = ["--captions.path", "set", "--size", "16", "--pipeline", str(tiny)]
    for words, said in (
        ([*data], "ddil-cache needs --out DIR, the folder to write"),
        ([*data, "--out", "full"], "full holds something else than a cache: give another --out, or an empty folder"),
        ([*data, "--out", "full/x"], "--out full/x is a file: give a folder"),
        ([*data, "--out", "k", "--dtype", "int8"], "dtype takes float16 or bfloat16 or float32, not int8"),
        ([*data, "--out", "k", "--shard_rows", "0"], "--shard_rows is 0: give a number from 1 to 1e+07"),
        ([*data[:-2], "--out", "k", "--pipeline", "set"], "set is no pipeline folder: it has no model_index.json"),
        (["--captions.path", "nowhere/at/all", *data[2:], "--out", "k"], "the data set nowhere/at/all could not be read: "),
        (["--captions.size", "17", *data[:2], *data[4:], "--out", "k"], "data.captions.size: "),
        ([*data, "--out", "k", "--captions.sise", "3"], "unknown key data.captions.sise: did you mean data.captions.size?"),
        (["--out", "k", "--verify"], "k is no cache: it has no manifest.json"),
        (["--config", str(tiny_config), "--out", "k", "--run_dir", "r"], "--run_dir r: only ddil-fit makes run folders"),
    ):
        code, _, err = cache(capsys, *words)
        assert code == 2 and err.count("\n") == 1 and err.startswith(f"ddil-cache: {said}"), (words, err)
        assert not Path("k").exists()
    assert cache(capsys, *data, "--out", "kept")[0] == 0
    Image.new("RGB", (16, 16), (1, 2, 3)).save("set/00.png")
    code, _, err = fit(capsys, "--config", str(tiny_config), *pictures, "data.cache=kept")
    assert code == 2 and "the cache kept was made from other captions or pictures: make it anew by ddil-cache" in err
    code, _, err = fit(capsys, "--config", str(tiny_config), *pictures[1:], "data.cache=set")
    assert code == 2 and "set is no cache: it has no manifest.json; make one by ddil-cache, or name a file for data.cache to write" in err
