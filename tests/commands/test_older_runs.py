"""A run whose config.yaml was written when every option was at one level goes on, and is tested and exported, as if it were of today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from commandline import fit
from ddil_lightning.commands import main
from ddil_lightning.commands.configs import MOVED, read_config
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.messages import parameters
from ddil_lightning.methods import DMD2, LCM, PD
from suite import equal

SHARED = """pipeline: PIPELINE, guidance: 2.0, lr: 0.002, final_lr: 0.5, warmup: 3, betas: [0.8, 0.99], weight_decay: 0.01, clip: 0.5,
    accumulate: 2, ema: 0.9, reflect: static, box: null, gradient_checkpointing: true, teacher_dtype: float32,
    vae_dtype: float32, log_every: 1"""
OLD = {
    "LCM": f"""{{w_conditioned: false, solver_steps: 20, rollouts: [2, 4], target_decay: 0.8, loss: mse, huber: 0.2, scaling: 9.0,
    sigma_data: 0.4, updates: 3, {SHARED}}}""",
    "PD": f"""{{stages: [{{kind: halve, steps: 4, updates: 2, parts: [], lr: 0.001, warmup: null}},
    {{kind: halve, steps: 2, updates: 1, parts: [], lr: null, warmup: 1}}], teacher_steps: 8, w_conditioned: false, weight: truncated-snr,
    loss: huber, huber: 0.2, rule: trailing, updates: null, {SHARED}}}""",
    "DMD2": f"""{{steps: 4, rollouts: [4], teacher_steps: 8, critic_steps: 2, critic_lr: 0.003, real_guidance: 1.5, gan_weight: 0.25,
    critic_gan_weight: 0.5, gan_features: teacher, normaliser: batch, tau: [0.1, 0.9], reflect_real: false, reflect_critic: true,
    reflect_student: false, updates: 3, {SHARED}}}""",
}
DATA = """{captions: {class_path: Digits}, prior: {forward: 0.5, student: 0.5, teacher: 0.0, mix: interval},
    batch_size: 4, collect_every: 2, trajectories: 3, capacity: 128, max_age: 40, priority: 0.6, granularity: step, pure_noise: true,
    cache: true, truncate: false, workers: 0, control: false, on_error: stop}"""
SAME = """seed_everything: 3
previews: {every: 0}
test: {n: 0}
checkpoints: {every: 2, keep: 9}"""


def old(method: str, pipeline: Path) -> str:
    """The config.yaml of an older version's run."""
    return f"""{SAME}
name: old
run_dir: null
ckpt_path: null
model:
  class_path: ddil_lightning.{method}
  init_args: {OLD[method].replace("PIPELINE", str(pipeline))}
data: {DATA}
"""


NEW = {
    *("scores.divergence", "scores.share", "critic.pull", "rollouts.reuse", "buffer.answers", "buffer.saved"),
    *(f"gan.{name}" for name in ("layers", "kind", "r1", "r1_noise")),
    *(f"adapter.{name}" for name in ("rank", "alpha", "dropout", "targets", "full", "whole")),
    *("memory.compile", "memory.offload", "memory.quantize", "memory.tf32", "optimizer.kind", "optimizer.options"),
}
"""Options that no older version had."""


def flat(options: dict[str, Any], moved: dict[str, str]) -> dict[str, Any]:
    """A config's options as they were once called."""
    former = {new: name for name, new in moved.items()}
    records = {new.partition(".")[0] for new in moved.values()} | {"adapter"}
    named = [(f"{k}.{field}", x) for k, v in options.items() if k in records for field, x in v.items()]
    return {**{k: v for k, v in options.items() if k not in records}, **{former[name]: value for name, value in named if name not in NEW}}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=() if name == "LCM" else pytest.mark.slow) for name in sorted(OLD)])
def run(request: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A method's name, and its complete run with a checkpoint of update 2."""
    from ddil_lightning.commands.fitting import fit as train

    folder = tmp_path_factory.mktemp("older")
    (folder / "old.yaml").write_text(old(request.param, tiny))
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)  # where the link to the newest run goes
        assert train(["--config", "old.yaml", "--run_dir", str(folder / "run")]) == 0
    return request.param, folder / "run"


def test_every_setting_is_carried_over(run: tuple[str, Path], tiny: Path) -> None:
    method, folder = run
    written, given = yaml.safe_load((folder / "config.yaml").read_text()), yaml.safe_load(old(method, tiny))
    model = flat(written["model"]["init_args"], MOVED["model"])
    assert {name: model[name] for name in given["model"]["init_args"]} == given["model"]["init_args"]
    # As the options went by one level each, none of them is left out.
    data = flat(written["data"], MOVED["data"])
    assert {name: data[name] for name in given["data"] if name != "captions"} == {k: v for k, v in given["data"].items() if k != "captions"}
    assert read_config(folder / "config.yaml") == written  # of today: as it is


@pytest.mark.slow
def test_it_goes_on_exactly_and_is_exported(run: tuple[str, Path], tiny: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """From update 2, by the command that a stopped run is answered with and with another config: bit for bit as without a stop."""
    method, folder = run
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(old(method, tiny))
        (tmp_path / name / "metrics.csv").write_bytes((folder / "metrics.csv").read_bytes())
        (tmp_path / name / "checkpoints" / "updates=2.ckpt").write_bytes((folder / "checkpoints" / "updates=2.ckpt").read_bytes())
    plan = "stages: [{steps: 4, updates: 2}, {steps: 2, updates: 1}], teacher_steps: 8, " if method == "PD" else ""
    arguments = f"{plan}pipeline: {tiny}, guidance: 2.0, optimizer: {{lr: 0.5}}"
    (tmp_path / "other.yaml").write_text(f"model: {{class_path: {method}, init_args: {{{arguments}}}}}\n")
    assert main.command("export")(["--ckpt_path", "a", "--out", "exported"]) == 0
    assert json.loads(Path("exported/pipeline/ddil.json").read_text())["student_updates"] == 2
    code, out, err = fit(capsys, "--config", "a/config.yaml", "--ckpt_path", "a/checkpoints/updates=2.ckpt")
    assert code == 0 and "going on as the run began" not in out, err
    code, out, err = fit(capsys, "--config", "other.yaml", "--ckpt_path", "b")
    assert code == 0 and "going on as the run began" in out, err
    whole = weights(folder)
    assert equal(weights(tmp_path / "a"), whole) and equal(weights(tmp_path / "b"), whole)
    assert yaml.safe_load(Path("a/config.before-2.yaml").read_text())["model"] == yaml.safe_load(old(method, tiny))["model"]
    first, second = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("a", "b"))
    assert first == {**second, "name": "old"} and first["model"]["init_args"]["optimizer"]["lr"] == 0.002


def weights(folder: Path) -> dict[str, Any]:
    """What the last checkpoint of a run has trained."""
    state = torch.load(folder / "checkpoints" / "updates=3.ckpt", weights_only=True)
    return {"state_dict": state["state_dict"], "optimizer_states": state["optimizer_states"]}


def test_a_config_of_ones_own_is_not_translated(tmp_path: Path) -> None:
    """An old name there is a mistake, and answered by the new one; so is a method's own option of an old one's name."""
    file = tmp_path / "mine.yaml"
    for text in (
        "model: {class_path: LCM, init_args: {lr: 1}}\n",
        old("LCM", tmp_path).replace("lr: 0.002", "optimizer: {lr: 1}, loss: 7"),
    ):
        file.write_text(text)
        assert read_config(file) == yaml.safe_load(text)


def test_the_table_has_every_record_whole() -> None:
    """What a record of a constructor has was there by one name, and the table forgets none; but for what came later."""
    for group, classes in {"model": (LCM, PD, DMD2), "data": (DDILDataModule,)}.items():
        now = {name for cls in classes for name in parameters(cls) if "." in name and not name.startswith("prior.")}
        assert set(MOVED[group].values()) == now - NEW


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.lr=1"], "unknown key model.lr: it is model.optimizer.lr now"),
        (["--config", "{model: {init_args: {huber: 1}}}"], "unknown key model.huber: it is model.distance.width now"),
        (["data.collect_every=3"], "unknown key data.collect_every: it is data.rollouts.every now"),
        (["--config", "{data: {capacity: 3}}"], "unknown key data.capacity: it is data.buffer.capacity now"),
    ],
)
def test_an_old_name_is_answered_by_the_new_one(words: list[str], said: str, tiny_config: Path, capsys: Any) -> None:
    code, _, err = fit(capsys, "--config", str(tiny_config), *words)
    assert (code, err) == (2, f"ddil-fit: {said}\n")


def test_one_field_on_the_command_line_leaves_the_others_of_the_config(tiny_config: Path, capsys: Any) -> None:
    more = "{model: {init_args: {optimizer: {clip: 0.5, betas: [0.5, 0.75]}}}, data: {buffer: {max_age: 7}}}"
    words = ["--config", more, "model.optimizer.warmup=5", "data.buffer.capacity=70", "--print_config"]
    code, out, err = fit(capsys, "--config", str(tiny_config), *words)
    said = yaml.safe_load(out)
    assert code == 0, err
    mine = {
        "kind": "AdamW",
        "options": {},
        "lr": 0.001,
        "final_lr": 0.05,
        "warmup": 5,
        "betas": [0.5, 0.75],
        "weight_decay": 0.0,
        "clip": 0.5,
        "accumulate": 1,
    }
    assert said["model"]["init_args"]["optimizer"] == mine
    assert said["data"]["buffer"] == {"capacity": 70, "max_age": 7, "priority": 0.0, "answers": "float32", "saved": True}
    assert said["data"]["rollouts"]["every"] == 4
