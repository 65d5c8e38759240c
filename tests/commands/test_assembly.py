"""Parts from Python: as ddil-fit would make them of the same words, refused in the same line, and without a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint

from commandline import refused
from ddil_lightning import PD, AnnealPrior, DDILDataModule, Stages, assemble
from ddil_lightning.commands.assembly import elsewhere
from ddil_lightning.errors import EXPECTED, Refusal, one_line
from ddil_lightning.runs.checkpoint import load_checkpoint
from suite import equal


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Losses(Callback):
    """The loss of every update."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.seen.append(pl_module.descent.loss)


def test_it_trains_as_ddil_fit_does_and_leaves_nothing(finished: Path, tiny_config: Path, here: Path) -> None:
    losses = Losses()
    trainer, method, data = assemble(tiny_config, callbacks=[losses])
    trainer.fit(method, data)
    with (finished / "metrics.csv").open(newline="") as file:
        logged = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses.seen == pytest.approx(logged, rel=1e-5) and len(logged) == 12
    state = load_checkpoint(finished / "checkpoints" / "updates=12.ckpt")
    assert equal(dict(method.state_dict()), dict(state["state_dict"])) and method.evaluations == state["ddil"]["evaluations"]
    assert isinstance(data, DDILDataModule) and list(here.iterdir()) == [] and trainer.loggers == []


@pytest.mark.slow
def test_words_are_those_of_the_command_line(tiny_config: Path) -> None:
    words = ["--updates", "3", "--seed=7", "model.ema=0.5", "-c", "{data: {batch_size: 5}}", "--data.workers", "1"]
    _, method, data = assemble(tiny_config, *words)
    assert (method.updates, data.seed, method.averaging.decay, data.batch_size, data.workers) == (3, 7, 0.5, 5, 1)
    assert assemble(str(tiny_config)).method.updates == 12


@pytest.mark.slow
def test_the_config_of_a_run_can_be_assembled(finished: Path, tiny_config: Path) -> None:
    again, first = (assemble(config).method for config in (finished / "config.yaml", tiny_config))
    assert equal(dict(again.state_dict()), dict(first.state_dict()))


WRONG = {
    "a key": ["model.lrr=3"],
    "a masked value": ["--name", "(masked)"],
    "a key of before": ["model.lr=3"],
    "a value": ["data.batch_size=0"],
    "a prior": ["data.prior={forward: 0.5, student: 0.6}"],
    "null": ["model.optimizer.lr=null"],
    "a seed": ["--seed", "-1"],
    "a seed of the data": ["--config", "{data: {seed: 3}}"],
    "a config": ["--config", "lcm_ddill"],
    "steps": ["--export_steps", "3000"],
    "room": ["data.buffer.capacity=9"],
    "epochs": ["trainer.max_epochs=0"],
    "devices": ["trainer.devices=0"],
    "a callback that waits for a metric": [
        "trainer.callbacks={class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: loss}}"
    ],
}


SOME = [pytest.param(words, id=name, marks=pytest.mark.slow if k % 6 else ()) for k, (name, words) in enumerate(WRONG.items())]


@pytest.mark.parametrize("words", SOME)
def test_what_ddil_fit_refuses_is_refused_in_the_same_line(words: list[str], tiny_config: Path, here: Path, capsys: Any) -> None:
    with pytest.raises(EXPECTED) as raised:
        assemble(tiny_config, *words)
    assert one_line(raised.value) == refused(capsys, "--config", str(tiny_config), *words)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("words", [("--run_dir", "r"), ("--ckpt_path", "last")], ids=["run_dir", "ckpt_path"])
def test_only_ddil_fit_makes_a_run(words: tuple[str, str], tiny_config: Path) -> None:
    with pytest.raises(Refusal, match=rf"{words[0]} {words[1]}: only ddil-fit"):
        assemble(tiny_config, *words)


@pytest.mark.slow
def test_callbacks_of_the_config_and_of_the_caller(tiny_config: Path, here: Path) -> None:
    """What decides what is trained on stays; what writes and shows is the caller's own."""
    ramp = {"first": {"forward": 1.0}, "last": {"forward": 0.5, "student": 0.5}, "end": 5}
    own = {"class_path": "AnnealPrior", "init_args": {"schedule": {"class_path": "Linear", "init_args": ramp}}}
    losses, keeps = Losses(), ModelCheckpoint(dirpath="kept", every_n_train_steps=1)
    trainer, method, data = assemble(tiny_config, f"trainer.callbacks={[own]}", "--updates", "1", callbacks=[losses, keeps])
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds == [AnnealPrior, Stages, Losses, ModelCheckpoint]
    trainer.fit(method, data)
    assert len(losses.seen) == 1 and [p.name for p in here.iterdir()] == ["kept"]


def test_processes_wait_for_the_one_that_prepares_the_data(tiny_config: Path) -> None:
    """Of millions of pictures that takes longer than the half hour of Lightning's own strategies; who gave a time has it."""
    for given, days in (
        ("ddp", 7.0),
        ("ddp_find_unused_parameters_true", 7.0),
        ("fsdp2", 7.0),
        ("{class_path: DDPStrategy, init_args: {timeout: '12:00:00'}}", 0.5),
        ("{class_path: ddil_lightning.training.sharding.Sharded, init_args: {timeout: '12:00:00'}}", 0.5),
    ):
        strategy: Any = assemble(tiny_config, f"trainer.strategy={given}", "trainer.devices=2").trainer.strategy
        assert strategy._timeout.total_seconds() == days * 86400, given


def test_an_apple_gpu_is_used_by_whoever_asks_for_it(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has measured a run on one, and Lightning would take it before the CPU."""
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    with caplog.at_level("INFO", "ddil_lightning"):
        trainer = assemble(tiny_config).trainer
        assert type(trainer.accelerator).__name__ == "CPUAccelerator" and trainer.strategy.root_device.type == "cpu"
    assert sum("trainer.accelerator=mps takes" in r.getMessage() for r in caplog.records) == 1
    assert elsewhere("mps") == elsewhere("cpu") == elsewhere("gpu") == {}


@pytest.mark.slow
def test_pipelines_of_stages_are_written_where_the_words_say(tiny: Path, here: Path) -> None:
    plan = "model.stages=[{steps: 4, updates: 1}, {steps: 2, updates: 1}]"
    words = ["--config", f"{{model: {{init_args: {{pipeline: '{tiny}', guidance: 2.0}}}}}}", plan, "model.teacher_steps=8"]
    for more, left in (([], []), (["trainer.default_root_dir=made"], ["01-4-steps", "02-2-steps"])):
        trainer, method, data = assemble("pd", *words, "data.batch_size=4", "--updates=2", *more)
        assert isinstance(method, PD)
        trainer.fit(method, data)
        assert sorted(p.name for p in here.glob("*/stages/*")) == left and len(list(here.iterdir())) == len(left[:1])


def test_the_place_of_ones_own_data_is_filled_or_named(tiny: Path, tmp_path: Path) -> None:
    """A folder of ddil-cache is all the data that a run needs, also of a config that waits for the name of a data set."""
    words = [
        "lcm_ddil_sd15.yaml",
        f"model.pipeline={tiny}",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "data.captions.size=16",
    ]
    with pytest.raises(Refusal, match=r"data.captions.path is still YOUR_DATA: say data.captions.path=YOURS, .* or data.cache=DIR"):
        assemble(*words)
    assert assemble(*words, f"data.cache={tmp_path}").data.captions is None
    with pytest.raises(Refusal, match="still YOUR_DATA"):
        assemble(*words, f"data.cache={tmp_path / 'new.safetensors'}")


@pytest.mark.slow
def test_a_run_says_what_its_student_never_trains_on(tiny: Path, tiny_config: Path, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line where it takes several steps and no prior gives its own latents a share, and one for times in use that are not trained."""

    def said(*words: str, config: Path = tiny_config) -> list[str]:
        caplog.clear()
        assemble(config, *words)
        return [r.getMessage() for r in caplog.records if r.name == "ddil_lightning.commands.assembly"]

    alone = ("data.prior.forward=1.0", "data.prior.student=0.0")
    ramp = "{class_path: Linear, init_args: {first: {forward: 1.0}, last: {forward: 0.5, student: 0.5}, end: 6}}"
    Path("later.yaml").write_text(f"trainer: {{callbacks: [{{class_path: AnnealPrior, init_args: {{schedule: {ramp}}}}}]}}")
    plan = "[{steps: 8, parts: [{updates: 3}]}, {steps: 4, parts: [{updates: 3, forward: 0.5, student: 0.5}]}]"
    model = f"model: {{class_path: PD, init_args: {{pipeline: {tiny}, teacher_steps: 16, guidance: 2.0, stages: PLAN}}}}"
    rest = "\ndata: {batch_size: 8, prior: {forward: 1.0}}\ntest: {n: 0}\npreviews: {every: 0}\n"
    Path("both.yaml").write_text(model.replace("PLAN", plan) + rest)
    Path("first.yaml").write_text(model.replace("PLAN", plan.partition("}, {")[0] + "}]") + rest)
    assert said() == [] == said(*alone, "--config", "later.yaml") == said(config=Path("both.yaml"))
    (line,) = said(*alone)
    assert line.startswith("the student takes up to 4 steps and is never trained on latents of its own")
    (line,) = said(config=Path("first.yaml"))
    assert line.startswith("the student takes up to 8 steps")
    (line,) = said("test.student_steps=[3]", config=Path("both.yaml"))
    assert line == "at 3 steps the student is asked at t = 666, 332, where it is not trained"
    with pytest.raises(ValueError, match="export_steps 8: the student is made for 4 steps alone"):
        assemble("both.yaml", "--export_steps=8")
