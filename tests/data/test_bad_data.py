"""Data as people have them, in a whole run: one broken picture, and what becomes of it."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commandline import fit

ROWS = 12


@pytest.fixture
def words(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run on a folder of pictures of which the eighth is broken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set [1]").mkdir()
    for i in range(ROWS):
        Image.new("RGB", (20, 16), (20 * i, 0, 0)).save(tmp_path / "set [1]" / f"{i:02d}.png")
    rows = [json.dumps({"file_name": f"{i:02d}.png", "text": "a small red circle"}) for i in range(ROWS)]
    (tmp_path / "set [1]" / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "set [1]" / "07.png").write_text("<html>not found</html>")
    own = {"class_path": "Images", "init_args": {"path": "set [1]", "size": 16}}
    return ["--config", str(tiny_config), f"data.captions={json.dumps(own)}", "--run_dir", "r", "data.batch_size=4", "previews.every=0"]


@pytest.mark.parametrize(
    ("workers", "cache"),
    [
        (0, "true"),
        *(pytest.param(w, c, marks=pytest.mark.slow) for w in (0, 1) for c in ("false", "true", "c.safetensors") if (w, c) != (0, "true")),
    ],
)
def test_one_broken_picture_is_named_in_one_line(workers: int, cache: str, words: list[str], tmp_path: Path, capsys: Any) -> None:
    """From a loader's worker it came as its whole traceback folded into a line of 1500 characters, without the file's name."""
    settings = ["model.reflect=off", "model.updates=6", f"data.workers={workers}", f"data.cache={cache}"]
    code, _, err = fit(capsys, *words, *settings)
    said = [line for line in err.splitlines() if line.startswith("ddil-fit: ")]
    assert code == 2 and len(said) == 1 and "Traceback" not in err
    assert "set [1], row 7" in said[0] and "07.png" in said[0] and "not a readable image" in said[0] and len(said[0]) < 400
    assert not (tmp_path / "c.safetensors").exists()
    if cache == "false":  # found in the midst of the run: what was reached is saved, and goes on once the picture is mended
        reached = int(said[0].split("stopped at ")[1].split()[0])
        assert 0 < reached < 6 and said[0].endswith(f"--ckpt_path r/checkpoints/updates={reached}.ckpt")
        Image.new("RGB", (20, 16), (140, 0, 0)).save(Path("set [1]") / "07.png")
        assert fit(capsys, *shlex.split(said[0].split("go on with: ddil-fit ")[1]))[0] == 0
        assert fit(capsys, *words[:-4], "--run_dir", "whole", "data.batch_size=4", "previews.every=0", *settings)[0] == 0
        for name in ("metrics.csv", "pipeline/unet/diffusion_pytorch_model.safetensors"):
            assert Path("r", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.parametrize(
    ("workers", "cache"), [(1, "false"), *(pytest.param(0, cache, marks=pytest.mark.slow) for cache in ("true", "c.safetensors"))]
)
def test_a_broken_picture_is_skipped_where_that_was_asked_for(
    workers: int, cache: str, words: list[str], caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    """Batches keep their size, the run goes on, and the count is told at the end and in the curves."""
    code, _, err = fit(capsys, *words, f"data.workers={workers}", f"data.cache={cache}", "data.on_error=skip", "model.updates=6")
    assert code == 0, err
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("row 7" in line and "it is skipped, the next row takes its place" in line for line in told)
    assert "1 rows of the data could not be read and were skipped" in told
    with Path("r/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["data/skipped"]) == 1 and len(rows) == 6


@pytest.mark.slow
def test_pictures_that_must_be_enlarged_are_counted(words: list[str], caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    for i in (1, 2, 7):
        Image.new("RGB", (9, 9)).save(Path("set [1]") / f"{i:02d}.png")
    assert fit(capsys, *words, "--updates", "1")[0] == 0
    assert f"3 of {ROWS} pictures were smaller than data.captions.size and were enlarged" in [r.getMessage() for r in caplog.records]
