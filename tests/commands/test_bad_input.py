"""Whatever is wrong with a command line, a config, the data or a checkpoint: one line, code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from commandline import refused
from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.callbacks import Previews
from ddil_lightning.commands import checks, fit_cli, fitting
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.errors import Refusal
from ddil_lightning.methods import LCM


class ForwardOnly(LCM):
    """A method whose targets need x0."""

    sources = ("forward",)


class Unfinished(LCM, ABC):
    """A method that leaves something to be written."""

    @abstractmethod
    def more(self) -> None: ...


class Half(Backbone):
    """A backbone of which some is written."""

    def __init__(self) -> None: ...

    def network(self) -> Any: ...


class Unread(Captions):
    """Captions that nobody may read."""

    def __len__(self) -> int:
        return 64

    def prompts(self, index: Any) -> list[str]:
        raise AssertionError("the data are read")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


FAULTS = {
    "key": (["--run_dri=3"], "unknown key run_dri: did you mean run_dir?"),
    "key of the contract": (["--update=3"], "unknown key update: did you mean updates?"),
    "key of the method": (["model.lrr=3"], "unknown key model.lrr: did you mean model.optimizer.lr?"),
    "key without its group": (["--lr=3"], "unknown key lr: did you mean model.optimizer.lr?"),
    "key of the data": (["data.batchsize=3"], "unknown key data.batchsize: did you mean data.batch_size?"),
    "key of the prior": (["data.prior.studnt=0.3"], "unknown key data.prior.studnt: did you mean data.prior.student?"),
    "key of the trainer": (["trainer.max_stepz=3"], "unknown key trainer.max_stepz: did you mean trainer.max_steps?"),
    "key in a config": (["--config", "{data: {batchsize: 3}}"], "unknown key data.batchsize: did you mean data.batch_size?"),
    "group in a config": (["--config", "{modl: 3}"], "unknown key modl: did you mean model?"),
    "key of a data set": (
        ["--config", "{data: {captions: {class_path: Shapes, init_args: {sed: 3}}}}"],
        "unknown key data.captions.sed: did you mean data.captions.seed?",
    ),
    "key of a base alone": (["data.captions=Digits", "data.captions.n=8"], "unknown key data.captions.n; --help lists the keys"),
    "base of all methods": (["--model=Distillation"], "the config names no method: give model: {class_path: LCM, ...}"),
    "unfinished method": (
        [f"--model={__name__}.Unfinished"],
        "model: Unfinished is there to be derived from: give a class that defines more",
    ),
    "base of all pipelines": (
        ["model.pipeline.class_path=Backbone"],
        "model.pipeline: Backbone is there to be derived from: give a class that defines check_length, decode, device, encode_images, "
        "encode_text, encoders, network, parts, to, trainable",
    ),
    "unfinished pipeline": (
        ["--config", f"{{model: {{class_path: LCM, init_args: {{pipeline: {{class_path: {__name__}.Half}}}}}}}}"],
        "model.pipeline: Half is there to be derived from: give a class that defines check_length, decode, device, encode_images, "
        "encode_text, encoders, parts, to, trainable",
    ),
    "key of a pipeline": (
        ["--config", "{model: {class_path: LCM, init_args: {pipeline: {class_path: Toy, init_args: {widht: 3}}}}}"],
        "unknown key model.pipeline.widht: did you mean model.pipeline.width?",
    ),
    "nothing like it": (["model.quux=3"], "unknown key model.quux; --help lists the keys"),
    "method": (["--config", "{model: {class_path: LCMM}}"], "model: no class is called LCMM; did you mean LCM?"),
    "method by path": (
        ["--config", "{model: {class_path: nowhere.LCM}}"],
        "model: No module named 'nowhere': install it or, where it is a file of yours,",
    ),
    "method of a file": (
        ["--config", f"{{model: {{class_path: {__name__}.Hafl}}}}"],
        f"model: module '{__name__}' has no attribute 'Hafl': did you mean {__name__}.Half?",
    ),
    "method like no other": (["model=Quux"], "model: no class is called Quux; known are "),
    "data set": (["data.captions=Shape"], "data.captions: no class is called Shape; did you mean Shapes?"),
    "callback": (["trainer.callbacks+=AnealPrior"], "trainer.callbacks: no class is called AnealPrior; did you mean AnnealPrior?"),
    "schedule": (
        ["--config", "{trainer: {callbacks: [{class_path: AnnealPrior, init_args: {schedule: {class_path: Liner}}}]}}"],
        "trainer.callbacks.schedule: no class is called Liner; did you mean Linear?",
    ),
    "schedule without an end": (["trainer.callbacks+=AnnealPrior", "trainer.callbacks.schedule=Linear"], "callbacks.schedule needs end"),
    "null for a record": (["data.buffer=null"], "data.buffer is a table of options, such as {key: value}, not null"),
    "number for a record": (["model.optimizer=3"], "model.optimizer is a table of options, such as {key: value}, not 3"),
    "null in a record's table": (["model.distance={width: null}"], "model.distance.width takes float, not null"),
    "null in a record of the data": (["data.rollouts.every=null"], "data.rollouts.every takes int, not null"),
    "null in a record": (["model.optimizer.lr=null"], "model.optimizer.lr takes float, not null"),
    "number": (["model.optimizer.lr=abc"], "model.optimizer.lr takes float, not abc"),
    "whole number": (["data.batch_size=2.5"], "data.batch_size takes int, not 2.5"),
    "updates": (["--updates", "many"], "model.updates takes int, not many"),
    "seed": (["--seed", "x"], "seed_everything takes bool or int, not x"),
    "choice": (["data.rollouts.granularity=foo"], "data.rollouts.granularity takes sample or step, not foo"),
    "choice of the method": (["model.distance.kind=l7"], "model.distance.kind takes huber or mse, not l7"),
    "list": (["model.guidance=[1.0,a]"], "model.guidance takes float, not a"),
    "wandb": (["--wandb=yes"], "wandb takes off or offline or online, not yes"),
    "word": (["extra"], "extra is neither an option nor an override: write key=value"),
    "no value": (["--run_dir"], "argument --run_dir: expected one argument"),
    "yaml": (["--config", "{data: [1, 2"], "--config {...}: while parsing a flow sequence"),
    "seed of the data": (["--config", "{data: {seed: 3}}"], "data.seed follows the seed of the run"),
    "seed of the data as a word": (["data.seed=3"], 'Linked "data.seed" must be given via "seed_everything"'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_word_is_answered_in_one_line(fault: str, tiny_config: Path, capsys: Any) -> None:
    words, said = FAULTS[fault]
    assert said in refused(capsys, "--config", str(tiny_config), *words)


VALUES = {
    "prior": (["data.prior.student=0.5"], "the prior's shares sum to 1.25, not 1: forward 0.75 + student 0.5 + teacher 0"),
    "min steps": (["trainer.min_steps=0"], "trainer.min_steps is 0: leave it out, --updates says how long a run is"),
    "min epochs": (["trainer.min_epochs=1"], "trainer.min_epochs is 1: leave it out, --updates says how long a run is"),
    "share": (["data.prior.student=-1"], "share student = -1.0 is not between 0 and 1"),
    "grid": (["model.solver_steps=30"], "solver_steps = 30 does not divide the schedule's 1000 times: take 25 or 40"),
    "rollouts": (["model.rollouts=[60]"], "an LCM grid of 60 steps does not fit on the 50 nodes of its solver"),
    "no grid": (["model.solver_steps=0"], "solver_steps = 0 does not divide the schedule's 1000 times: take 1"),
    "range of guidance": (
        ["model.w_conditioned=false"],
        "LCM's student is not told the guidance: give one number, not 1.0 to 3.0, or set model.w_conditioned to true",
    ),
    "pipeline": (["model.pipeline=/nowhere/sd"], "no pipeline at /nowhere/sd"),
    "pipeline without U-Net": (["model.pipeline=no-unet"], "has no U-Net (folder unet/)"),
    "pipeline without a data set": (["model.pipeline=bare"], "the pipeline bare names no data set of its own: give data.captions=Images"),
    "prompts": (
        ["--config", "{data: {captions: {class_path: Prompts, init_args: {path: long.txt}}, batch_size: 1}}"],
        "tokens and the text encoder reads 16",
    ),
    "no images": (
        ["--config", "{data: {captions: {class_path: Prompts, init_args: {path: short.txt}}, batch_size: 1}}"],
        "the prior has a forward share but the data set has no images",
    ),
    "few captions": (
        ["--config", "{data: {captions: {class_path: Prompts, init_args: {path: short.txt}}}}", "data.prior={forward: 0.0, student: 1.0}"],
        "fewer than one batch of 8",
    ),
    "source": (
        [f"--model={__name__}.ForwardOnly"],
        "the prior gives 0.25 to student latents, on which ForwardOnly has no target: its sources are forward",
    ),
    "source of a later prior": (
        [
            f"--model={__name__}.ForwardOnly", "data.prior={forward: 1.0, student: 0.0}", "trainer.callbacks+=AnnealPrior",
            "trainer.callbacks.schedule=Piecewise", "trainer.callbacks.schedule.starts=[0, 9]",
            "trainer.callbacks.schedule.priors=[{forward: 1.0}, {forward: 0.0, student: 1.0}]",
        ],
        "the prior gives 1 to student latents, on which ForwardOnly has no target",
    ),
    "steps of the export": (["--export_steps=60"], "export_steps 60: an LCM grid of 60 steps does not fit on the 50 nodes"),
    "no steps of the export": (["--export_steps=0"], "export_steps 0: "),
    "steps of the test": (["test.student_steps=[4, 60]"], "test.student_steps 60: an LCM grid of 60 steps does not fit"),
    "steps of the teacher": (["test.n=16", "test.teacher_steps=[2000]"], "test.teacher_steps 2000: "),
    "no steps of the test": (["test.student_steps=[0]"], "test.student_steps is [0]: give numbers of at least 1"),
    "prompts of the test": (["test.n=8"], "test.n 8: at least 16 prompts"),
    "prompts of the previews": (["previews.every=6", f"previews.prompts=[{'a ' * 30}]"], "previews.prompts: the prompt 'a a a a"),
    "checkpoints": (["checkpoints.every=-1"], "checkpoints.every is -1: give a number of at least 0"),
    "devices": (["trainer.accelerator=tpu"], "trainer: "),
    "precision": (["trainer.precision=bf16-true"], "bf16-true would round most updates of the student to nothing: take bf16-mixed"),
    "clipping": (["trainer.gradient_clip_val=1.0"], "gradient clipping is not supported for manual optimization"),
    "run_dir is a file": (["--run_dir", "long.txt"], "--run_dir long.txt is a file: give a folder"),
    "no checkpoint": (["--ckpt_path", "last"], "runs/tiny/latest does not exist; give a file, a run folder, or `last`"),
    "no such checkpoint": (["--ckpt_path", "updates=12.ckpt"], "updates=12.ckpt does not exist"),
    "wandb without a key": (["--wandb=online"], "--wandb online needs a key"),
}  # fmt: skip


SECOND = ("min epochs", "no grid", "source of a later prior", "no steps of the export", "no steps of the test", "prompts of the previews")
"""Another value is answered by the same check."""


@pytest.mark.parametrize("fault", [pytest.param(name, marks=pytest.mark.slow if name in SECOND else ()) for name in VALUES])
def test_a_wrong_value_is_answered_in_one_line_and_leaves_no_folder(
    fault: str, tiny_config: Path, tiny: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, said = VALUES[fault]
    (here / "long.txt").write_text("a handwritten " + 30 * "small " + "seven\n")
    (here / "short.txt").write_text("a handwritten seven\n")
    shutil.copytree(tiny, here / "bare", ignore=shutil.ignore_patterns("ddil.json"))
    (here / "no-unet").mkdir()
    index = json.loads((tiny / "model_index.json").read_text())
    (here / "no-unet" / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "unet"}))
    monkeypatch.setenv("NETRC", str(here / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert said in refused(capsys, "--config", str(tiny_config), "previews.every=0", *words)


@pytest.mark.parametrize("plan", [False, True], ids=["fit", "plan"])
@pytest.mark.parametrize("name", ["tcd", pytest.param("moments", marks=pytest.mark.slow)])
def test_a_student_that_no_pipeline_steps_as_is_refused_before_the_data_are_read(name: str, plan: bool, sd3: Path, capsys: Any) -> None:
    """No scheduler of a flow steps by TCD or a posterior; the run had encoded all before its end was tried, a plan was made."""
    own = {"tcd": ["model.w_conditioned=false"], "moments": []}[name]
    words = [f"model.pipeline={sd3}", "model.guidance=3", f"data.captions={__name__}.Unread", "previews.every=0", "test.n=0", *own]
    said = refused(capsys, "--config", f"{name}_ddil.yaml", *words, *(["--plan"] if plan else []))
    assert "could not be exported for 4 steps: no scheduler of diffusers steps by" in said and "on a flow" in said


def test_a_run_dir_that_holds_a_run_is_refused(finished: Path, tiny_config: Path, capsys: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    said = refused(capsys, "--config", str(tiny_config), "--run_dir", str(finished))
    assert said == f"{finished} already holds a run: choose another --run_dir, or go on with it by --ckpt_path last"
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_checkpoints_that_cannot_be_gone_on_from(finished: Path, tiny_config: Path, here: Path, capsys: Any) -> None:
    folder, config = here / "r" / "checkpoints", str(tiny_config)
    folder.mkdir(parents=True)
    (folder.parent / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    whole = (finished / "checkpoints" / "updates=12.ckpt").read_bytes()
    (folder / "updates=8.ckpt").write_bytes(whole)
    (folder / "updates=12.ckpt").write_bytes(whole[: len(whole) // 2])
    half = refused(capsys, "--config", config, "--ckpt_path", "last", "--run_dir", "r")
    assert "updates=12.ckpt cannot be read" in half and half.endswith("take another: updates=8.ckpt")
    assert "updates=8.ckpt is not the newest" in refused(capsys, "--config", config, "--ckpt_path", "r/checkpoints/updates=8.ckpt")
    (folder / "updates=12.ckpt").unlink()
    other = refused(capsys, "--config", config, "--ckpt_path", "r", "model.w_conditioned=false", "model.guidance=2.0")
    assert "does not fit this config: it has " in other and other.endswith("resume with the config.yaml of its run")


def test_the_seed_of_the_data_is_found_in_every_text_that_a_config_can_be(here: Path) -> None:
    (here / "c.yaml").write_bytes(b"\xef\xbb\xbfdata: {seed: 3}\n")  # with the mark that some editors write
    for config in ("c.yaml", "{data: {seed: 3}}"):
        with pytest.raises(Refusal, match=r"data\.seed follows the seed of the run"):
            checks.refuse_data_seed(["--config", config])
    checks.refuse_data_seed(["--config", "{data: 3}", "--data.x", "1"])


def test_long_prompts_of_previews_are_cut_only_where_captions_are(tiny: Path) -> None:
    previews, pipeline = Previews(prompts=["a zero", "a " * 30], count=2), Pipeline(str(tiny))
    with pytest.raises(ValueError, match=r"previews\.prompts: .* reads 16: shorten it, or set data\.truncate to true"):
        previews.setup(None, SimpleNamespace(backbone=pipeline, feed=DDILDataModule()), "fit")
    previews.check_prompts(pipeline, DDILDataModule(truncate=True))
    Previews(prompts=previews.prompts, count=1).check_prompts(pipeline, DDILDataModule())


def test_what_a_run_that_stops_says_of_its_checkpoints(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that goes on, the checkpoint that it goes on from; and of one without any there is none to go on from."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise FloatingPointError("the loss is nan")

    trainer, model = SimpleNamespace(fit=stop, world_size=1), SimpleNamespace(student_updates=4, updates=9)
    parts = {"trainer": trainer, "model": model, "datamodule": None, "folder": Path("r"), "forget_weights": lambda: None}
    for resumed, last, go_on, nan in (
        (None, None, "nothing was saved", "there is no checkpoint yet: begin again with"),
        ("a", None, "with nothing new to save: a is as it was, give the same command again", "the last good checkpoint is a: go on from"),
        ("a", "b", "go on with: ddil-fit --config r/config.yaml --ckpt_path b", "the last good checkpoint is b: go on from it with"),
    ):
        run: Any = SimpleNamespace(resumed=resumed, **parts)
        kept: Any = SimpleNamespace(last=last, signal=None)
        said = fitting.how_to_go_on(run, kept)
        assert said.startswith("stopped at 4 of 9 student updates") and said.endswith(go_on)
        with pytest.raises(FloatingPointError, match=f"the loss is nan; {nan}"):
            fitting.train(run, kept, 0)
    monkeypatch.setattr(fit_cli, "rehearse", stop)
    for clock, who in ((0, "the untrained student"), (4, "the student of update 4")):
        found: Any = SimpleNamespace(clock=clock, model=None, folder=None, config_init=SimpleNamespace(test=None))
        found.config, found.datamodule = SimpleNamespace(export_steps=None), SimpleNamespace(examples=lambda n: [])
        assert fit_cli.FitCLI.rehearse(found) == f"the end of the run was tried on {who}, and fails: the loss is nan"


@pytest.mark.slow
def test_help_and_config_errors_load_no_library_that_they_do_not_need(tiny_config: Path) -> None:
    code = (
        "import sys\nfrom ddil_lightning.commands.main import command, run\n"
        "for words in (['--help'], ['--config', sys.argv[1], 'model.lrr=3'], ['--config', sys.argv[1], 'data.prior.studnt=0']):\n"
        "    try:\n        run(command('fit'), 'ddil-fit', words)\n    except SystemExit as stop:\n        print('code', stop.code)\n"
        "print('loaded', sorted({'diffusers', 'wandb', 'datasets', 'open_clip', 'peft', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_config)], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 0", "code 2", "code 2"]
    assert done.stdout.endswith("loaded []\n") and "--run_dir" in done.stdout
    assert len(done.stderr.splitlines()) == 2, done.stderr
