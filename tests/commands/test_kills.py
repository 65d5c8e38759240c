"""Runs that are killed at random moments, their export included, and that end bit-equal to one that was not, with complete results."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from suite import equal

MOMENTS, LONGEST = 20, 120.0
MODEL = {
    "lcm": "{class_path: LCM, init_args: {pipeline: TINY, guidance: [1.0, 3.0], updates: 8, ema: 0.9, reflect: static, log_every: 1}}",
    "pd": "{class_path: PD, init_args: {pipeline: TINY, guidance: 2.0, w_conditioned: false, teacher_steps: 8, ema: 0.9, log_every: 1, "
    "stages: [{steps: 4, updates: 4}, {steps: 2, updates: 4}]}}",
    "dmd2": "{class_path: DMD2, init_args: {pipeline: TINY, guidance: 2.0, updates: 4, critic: {steps: 2}, ema: 0.9, log_every: 1}}",
}
REST = """
data: {batch_size: 4, captions: {class_path: Digits}, prior: {forward: 0.5, student: 0.5}, rollouts: {every: 2}, buffer: {capacity: 128}}
test: {n: 16, teacher_steps: [1]}
previews: {every: 2, count: 2, teacher_steps: [2]}
checkpoints: {every: 1}
"""


FIT = """
import sys
from ddil_lightning.commands.fitting import fit
from diffusers import StableDiffusionPipeline
from pathlib import Path

Path("imported").touch()
sys.exit(fit(sys.argv[1:]))
"""


def child(words: list[str], patience: float) -> int | None:
    """ddil-fit in an interpreter of its own, killed `patience` seconds after its imports: its exit code, None where it was killed."""
    ready = Path("imported")
    ready.unlink(missing_ok=True)
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        process = subprocess.Popen([sys.executable, "-c", FIT, *words], stdout=out, stderr=err)
        while process.poll() is None and not ready.exists():
            time.sleep(0.005)
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


def results(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves behind, without the time on the clock."""
    last = max((folder / "checkpoints").glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    state = torch.load(last, weights_only=True)
    summary = json.loads((folder / "summary.json").read_text())
    rows = [{k: v for k, v in row.items() if k != "seconds_per_image"} for row in summary["rows"]]
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".safetensors", ".png", ".csv")}
    kept = {key: state[key] for key in ("state_dict", "optimizer_states", "DDILDataModule", "ddil")}
    names = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    return {"last": last.name, **kept, "rows": rows, "files": files, "names": names, "counts": summary["network_evaluations"]}


def resumed(words: list[str], run: str) -> list[str]:
    """How somebody goes on with a run that was killed: from its folder, or anew where it had not saved anything."""
    if list(Path(run, "checkpoints").glob("*.ckpt")):
        return ["--config", f"{run}/config.yaml", "--ckpt_path", run]
    return [*words, "--run_dir", run if not Path(run, "config.yaml").exists() else f"{run}-again"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", MODEL)
def test_a_run_that_is_killed_ends_as_one_that_is_not(name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(f"model: {MODEL[name].replace('TINY', str(tiny))}\n{REST}")
    words, rng = ["--config", "c.yaml"], random.Random(name)
    assert child([*words, "--run_dir", "whole"], LONGEST) == 0, Path("err.txt").read_text()
    seconds, whole = time.time() - Path("imported").stat().st_mtime, results(Path("whole"))
    where: list[str] = []
    for k in range(MOMENTS):
        run, patience = f"run{k}", rng.uniform(0.1, 0.95) * seconds
        code, now = child([*words, "--run_dir", run], patience), run
        made = [p.name for p in Path(run).iterdir()] if Path(run).exists() else []
        where.append(f"{patience / seconds:.2f} {sorted(made)}")
        while code is None:  # a second kill half of the time
            command = resumed(words, now)
            now = f"{run}-again" if f"{run}-again" in command else now
            code = child(command, rng.uniform(0.3, 1.0) * seconds if rng.random() < 0.5 else LONGEST)
        assert code == 0, (where[-1], Path("err.txt").read_text())
        again = results(Path(now))
        for part, value in whole.items():
            assert equal(again[part], value) if part != "files" else again[part] == value, (part, where[-1])
    print("\n".join(where))
