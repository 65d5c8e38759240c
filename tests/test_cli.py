"""ddil-fit as its users and other tools call it: the contract, bad input, resuming, Ctrl-C, full disks, NaN."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddil_lightning import cli, main, runs
from ddil_lightning.main import FIT_SHORT, expand
from ddil_lightning.methods import LCM
from suite import equal


class ForwardOnly(LCM):
    """A method whose targets need x0."""

    sources = ("forward",)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(capsys: Any, *words: str) -> tuple[int, str, str]:
    """ddil-fit in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.run(main._fit, "ddil-fit", list(words))
    return (stop.value.code, *capsys.readouterr())


def refused(capsys: Any, *words: str) -> str:
    """The one line of an error that left nothing behind."""
    before = sorted(Path().rglob("*"))
    code, out, err = fit(capsys, *words)
    assert code == 2 and out == "" and err.startswith("ddil-fit: ") and err.count("\n") == 1, (code, out, err)
    assert sorted(Path().rglob("*")) == before and cli.RUN_DIR not in os.environ
    return err.removeprefix("ddil-fit: ").rstrip()


def parse(*words: str) -> cli.FitCLI:
    return cli.FitCLI(expand(words, FIT_SHORT), rebuild=True)


def checkpoint(folder: Path, clock: int) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"updates={clock}.ckpt", weights_only=True)


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two checkpoints of the same moment: only the clock on the wall may differ."""
    for key in ("state_dict", "optimizer_states", "DDILDataModule", "ddil"):
        assert equal(a[key], b[key]), key


# Bad input ---------------------------------------------------------------------------------------------------------------------------

FAULTS = {
    "key": (["--run_dri=3"], "unknown key run_dri: did you mean run_dir?"),
    "key of the contract": (["--update=3"], "unknown key update: did you mean updates?"),
    "key of the method": (["model.lrr=3"], "unknown key model.lrr: did you mean model.lr?"),
    "key without its group": (["--lr=3"], "unknown key lr: did you mean model.lr?"),
    "key of the data": (["data.batchsize=3"], "unknown key data.batchsize: did you mean data.batch_size?"),
    "key of the prior": (["data.prior.studnt=0.3"], "unknown key data.prior.studnt: did you mean data.prior.student?"),
    "key of the trainer": (["trainer.max_stepz=3"], "unknown key trainer.max_stepz: did you mean trainer.max_steps?"),
    "key in a config": (["--config", "{data: {batchsize: 3}}"], "unknown key data.batchsize: did you mean data.batch_size?"),
    "group in a config": (["--config", "{modl: 3}"], "unknown key modl: did you mean model?"),
    "key of a data set": (
        ["--config", "{data: {captions: {class_path: Shapes, init_args: {sed: 3}}}}"],
        "unknown key data.captions.sed: did you mean data.captions.seed?",
    ),
    "nothing like it": (["model.quux=3"], "unknown key model.quux; --help lists the keys"),
    "method": (["--config", "{model: {class_path: LCMM}}"], "model: no class is called LCMM; did you mean LCM?"),
    "method by path": (["--config", "{model: {class_path: nowhere.LCM}}"], "model: No module named 'nowhere'"),
    "method like no other": (["model=Quux"], "model: no class is called Quux; known are "),
    "data set": (["data.captions=Shape"], "data.captions: no class is called Shape; did you mean Shapes?"),
    "callback": (["trainer.callbacks+=AnealPrior"], "trainer.callbacks: no class is called AnealPrior; did you mean AnnealPrior?"),
    "schedule": (
        ["--config", "{trainer: {callbacks: [{class_path: AnnealPrior, init_args: {schedule: {class_path: Liner}}}]}}"],
        "trainer.callbacks.schedule: no class is called Liner; did you mean Linear?",
    ),
    "schedule without an end": (["trainer.callbacks+=AnnealPrior", "trainer.callbacks.schedule=Linear"], "callbacks.schedule needs end"),
    "number": (["model.lr=abc"], "model.lr takes float, not abc"),
    "whole number": (["data.batch_size=2.5"], "data.batch_size takes int, not 2.5"),
    "updates": (["--updates", "many"], "model.updates takes int, not many"),
    "seed": (["--seed", "x"], "seed_everything takes bool or int, not x"),
    "choice": (["data.granularity=foo"], "data.granularity takes sample or step, not foo"),
    "choice of the method": (["model.loss=l7"], "model.loss takes huber or mse, not l7"),
    "list": (["model.guidance=[1.0,a]"], "model.guidance takes float, not a"),
    "wandb": (["--wandb=yes"], "wandb takes off or offline or online, not yes"),
    "word": (["extra"], "extra is neither an option nor an override: write key=value"),
    "no value": (["--run_dir"], "argument --run_dir: expected one argument"),
    "yaml": (["--config", "{data: [1, 2"], "did not find expected"),
    "seed of the data": (["--config", "{data: {seed: 3}}"], "data.seed follows the seed of the run"),
    "seed of the data as a word": (["data.seed=3"], 'Linked "data.seed" must be given via "seed_everything"'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_word_is_answered_in_one_line(fault: str, tiny_config: Path, capsys: Any) -> None:
    words, said = FAULTS[fault]
    assert said in refused(capsys, "--config", str(tiny_config), *words)


VALUES = {
    "prior": (["data.prior.student=0.5"], "the prior's shares sum to 1.25, not 1: forward 0.75 + student 0.5 + teacher 0"),
    "share": (["data.prior.student=-1"], "share student = -1.0 is not between 0 and 1"),
    "grid": (["model.solver_steps=30"], "solver_steps = 30 does not divide the schedule's 1000 times: take 25"),
    "rollouts": (["model.rollouts=[60]"], "an LCM grid of 60 steps does not fit on the 50 nodes of its solver"),
    "no grid": (["model.solver_steps=0"], "solver_steps = 0 does not divide the schedule's 1000 times: take 1"),
    "pipeline": (["model.pipeline=/nowhere/sd"], "no pipeline at /nowhere/sd"),
    "pipeline without U-Net": (["model.pipeline=no-unet"], "has no U-Net (folder unet/)"),
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
    "checkpoints": (["checkpoints.every=-1"], "checkpoints: every >= 0 and keep >= 1"),
    "devices": (["trainer.accelerator=tpu"], "trainer: "),
    "clipping": (["trainer.gradient_clip_val=1.0"], "gradient clipping is not supported for manual optimization"),
    "run_dir is a file": (["--run_dir", "long.txt"], "--run_dir long.txt is a file: give a folder"),
    "no checkpoint": (["--ckpt_path", "last"], "runs/tiny/latest does not exist; give a file, a run folder, or `last`"),
    "no such checkpoint": (["--ckpt_path", "updates=12.ckpt"], "updates=12.ckpt does not exist"),
    "wandb without a key": (["--wandb=online"], "--wandb online needs a key"),
}  # fmt: skip


@pytest.mark.parametrize("fault", VALUES)
def test_a_wrong_value_is_answered_in_one_line_and_leaves_no_folder(
    fault: str, tiny_config: Path, tiny: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, said = VALUES[fault]
    (here / "long.txt").write_text("a handwritten " + 30 * "small " + "seven\n")
    (here / "short.txt").write_text("a handwritten seven\n")
    (here / "no-unet").mkdir()
    index = json.loads((tiny / "model_index.json").read_text())
    (here / "no-unet" / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "unet"}))
    monkeypatch.setenv("NETRC", str(here / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert said in refused(capsys, "--config", str(tiny_config), "previews.every=0", *words)


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
    other = refused(capsys, "--config", config, "--ckpt_path", "r", "model.w_conditioned=false")
    assert "does not fit this config: it has " in other and other.endswith("resume with the config.yaml of its run")


def test_help_and_config_errors_load_no_library_that_they_do_not_need(tiny_config: Path) -> None:
    code = (
        "import sys\nfrom ddil_lightning import main\n"
        "for words in (['--help'], ['--config', sys.argv[1], 'model.lrr=3'], ['--config', sys.argv[1], 'data.prior.studnt=0']):\n"
        "    try:\n        main.run(main._fit, 'ddil-fit', words)\n    except SystemExit as stop:\n        print('code', stop.code)\n"
        "print('loaded', sorted({'diffusers', 'wandb', 'datasets', 'open_clip', 'peft', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_config)], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 0", "code 2", "code 2"]
    assert done.stdout.endswith("loaded []\n") and "--run_dir" in done.stdout
    assert len(done.stderr.splitlines()) == 2, done.stderr


# The contract ------------------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(finished: Path) -> None:
    found = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file() and "pipeline" not in p.parts}
    assert found == {
        "config.yaml", "metrics.csv", "summary.json", "report.html", "checkpoints/updates=8.ckpt", "checkpoints/updates=12.ckpt",
        "samples/000000.png", "samples/000006.png", "samples/000012.png",
    }  # fmt: skip
    assert (finished / "pipeline" / "model_index.json").is_file()
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["student_updates"] == 12 and summary["rows"] == [] and summary["seconds"] >= summary["seconds_training"] > 0
    assert set(summary["network_evaluations"]) == {"student", "teacher", "target"} and summary["export_difference"] < 1e-4
    assert summary["config"] == "tiny" and summary["seed"] == 0
    assert finished.parent.name == "tiny" and (finished.parent / "latest").resolve() == finished


def test_checkpoints_hold_no_teacher(finished: Path) -> None:
    state = checkpoint(finished, 12)
    assert {name.split(".")[0] for name in state["state_dict"]} == {"student", "target", "average", "reflection"}
    frozen = sum(p.stat().st_size for p in (finished / "pipeline").rglob("*.safetensors"))
    assert (finished / "checkpoints" / "updates=12.ckpt").stat().st_size > 0 and frozen > 0


def test_options_overrides_and_several_configs(tiny_config: Path, here: Path) -> None:
    (here / "more.yaml").write_text("data: {batch_size: 5}\nmodel: {init_args: {lr: 0.5}}\n")
    words = ["--updates", "7", "--seed", "3", "--checkpoint_every", "2", "data.capacity=9", "--model.ema=0.5"]
    made = parse("--config", str(tiny_config), "--config", "more.yaml", "--config", "{previews: {count: 1}}", *words)
    assert (made.model.updates, made.model.lr, made.model.ema, made.model.clip) == (7, 0.5, 0.5, 1.0)
    assert (made.datamodule.batch_size, made.datamodule.seed, made.datamodule.buffer.capacity) == (5, 3, 9)
    assert made.datamodule.prior.student == 0.25 and made.config_init.previews.count == 1 and made.config_init.checkpoints.every == 2
    assert made.name == "tiny" and made.config.seed_everything == 3


def test_config_yaml_of_a_run_can_be_given_again(finished: Path, tiny_config: Path) -> None:
    first, again = parse("--config", str(tiny_config)).config, parse("--config", str(finished / "config.yaml")).config
    assert again.name == "tiny" and again.run_dir is None and again.ckpt_path is None
    for config in (first, again):
        config.name = config.config = None
    assert first.as_dict() == again.as_dict()


def test_print_config(tiny_config: Path, capsys: Any) -> None:
    code, out, err = fit(capsys, "--config", str(tiny_config), "--print_config", "model.lr=0.25")
    assert code == 0 and yaml.safe_load(out)["model"]["init_args"]["lr"] == 0.25 and err == ""


def test_names_of_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "toy2d").mkdir()
    monkeypatch.setattr(cli, "configs_folder", lambda: here)
    assert cli.config_name([str(here / "toy2d" / "pd.yaml"), "x.yaml"]) == "toy2d/pd"
    assert cli.config_name(["/elsewhere/mine.yaml"]) == "mine" and cli.config_name([]) == "custom"


# Ctrl-C and resuming -----------------------------------------------------------------------------------------------------------------


def press(monkeypatch: pytest.MonkeyPatch, clock: int, times: int = 1) -> None:
    """Ctrl-C within the step after `clock` updates."""
    step = LCM.training_step

    def pressed(self: LCM, b: Any, i: int) -> None:
        if self.student_updates == clock:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        step(self, b, i)

    monkeypatch.setattr(LCM, "training_step", pressed)


def test_ctrl_c_saves_and_the_run_goes_on_exactly(finished: Path, tiny_config: Path, here: Path, capsys: Any, monkeypatch: Any) -> None:
    listener = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press(patch, 5)
        code, _, err = fit(capsys, "--config", str(tiny_config))
    folder = Path("runs/tiny/latest").resolve()
    last = f"runs/tiny/{folder.name}/checkpoints/updates=6.ckpt"
    said = f"stopped at 6 of 12 student updates; go on with: ddil-fit --config runs/tiny/{folder.name}/config.yaml --ckpt_path {last}"
    assert (code, err) == (130, f"\nddil-fit: {said}\n") and signal.getsignal(signal.SIGINT) is listener
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["updates=4.ckpt", "updates=6.ckpt"]
    assert not (folder / "summary.json").exists() and not (folder / "pipeline").exists()

    code, _, err = fit(capsys, *said.split("ddil-fit ")[1].split())  # as it said
    assert code == 0, err
    assert Path("runs/tiny/latest").resolve() == folder and len(list(folder.parent.iterdir())) == 2
    same(checkpoint(folder, 12), checkpoint(finished, 12))
    for name in ("metrics.csv", "config.yaml", "samples/000006.png", "samples/000012.png"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["student_updates"] == 12 and summary["seconds"] > summary["seconds_training"]
    assert summary["network_evaluations"] == json.loads((finished / "summary.json").read_text())["network_evaluations"]


def test_a_second_ctrl_c_stops_at_once(tiny_config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = signal.getsignal(signal.SIGINT)
    press(monkeypatch, 5, times=2)
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "previews.every=0")
    assert code == 130 and err.count("\n") == 2 and "stopped at 5 of 12" in err and "updates=4.ckpt" in err
    assert signal.getsignal(signal.SIGINT) is listener
    assert [p.name for p in runs.sorted_checkpoints(Path("r/checkpoints"))] == ["updates=4.ckpt"]


def test_a_branch_leaves_its_source_alone(finished: Path, tiny_config: Path, here: Path, capsys: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    source = finished / "checkpoints" / "updates=8.ckpt"
    words = ["--config", str(tiny_config), "--ckpt_path", str(source), "--run_dir", "branch", "--updates", "10", "previews.every=0"]
    assert fit(capsys, *words)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
    lines, old = ((folder / "metrics.csv").read_text().splitlines() for folder in (Path("branch"), finished))
    assert lines[:9] == old[:9] and len(lines) == 11  # the header and ten updates
    assert Path("runs/tiny/latest").resolve() == here / "branch"


def test_a_run_that_lacks_only_its_results_gets_them_and_a_complete_one_is_refused(
    finished: Path, tiny_config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("r/checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv", "checkpoints/updates=12.ckpt"):
        Path("r", name).write_bytes((finished / name).read_bytes())
    monkeypatch.setattr(LCM, "training_step", None)  # nothing is left to train
    words = ["--config", str(tiny_config), "--ckpt_path", "r"]
    assert fit(capsys, *words)[0] == 0
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (Path("r"), finished))
    assert mine["student_updates"] == 12 and mine["seconds_training"] == theirs["seconds_training"]
    assert mine["network_evaluations"] == theirs["network_evaluations"]
    assert "/r is complete, with all its 12 updates: raise --updates to go on" in refused(capsys, *words)


# Full disks and NaN ------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_older_checkpoints(tiny_config: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import Trainer

    save = Trainer.save_checkpoint

    def full(self: Trainer, path: Path, *args: Any) -> None:
        if self.lightning_module.student_updates < 8:
            return save(self, path, *args)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "previews.every=0")
    assert code == 2 and err == (
        "ddil-fit: the checkpoint r/checkpoints/updates=8.ckpt could not be written (No space left on device); "
        "the last good one is r/checkpoints/updates=4.ckpt\n"
    )
    assert [p.name for p in Path("r/checkpoints").iterdir()] == ["updates=4.ckpt"]
    assert checkpoint(Path("r"), 4)["ddil"]["student_updates"] == 4


def test_a_full_disk_elsewhere_names_the_last_good_checkpoint(tiny_config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log = runs.MetricsFile.log_metrics

    def full(self: Any, metrics: Any, step: int) -> None:
        if step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log(self, metrics, step)

    monkeypatch.setattr(runs.MetricsFile, "log_metrics", full)
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "previews.every=0")
    assert code == 2
    assert err == "ddil-fit: No space left on device (r); the last good checkpoint is r/checkpoints/updates=4.ckpt\n"


def test_nan_stops_with_the_step_the_network_and_the_last_good_checkpoint(
    tiny_config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LCM.training_step

    def poisoned(self: LCM, b: Any, i: int) -> None:
        if self.student_updates == 6:
            next(self.target.parameters()).data.fill_(float("nan"))
        step(self, b, i)

    monkeypatch.setattr(LCM, "training_step", poisoned)
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "previews.every=0")
    assert code == 2 and err == (
        "ddil-fit: the loss is nan at student update 6: not finite is the output of the target network; "
        "the last good checkpoint is r/checkpoints/updates=4.ckpt: go on from it with a lower model.lr\n"
    )


def test_a_learning_rate_out_of_all_bounds_stops_too(tiny_config: Path, capsys: Any) -> None:
    words = ["--config", str(tiny_config), "--run_dir", "r", "previews.every=0", "model.lr=1e30", "data.prior={forward: 1.0, student: 0.0}"]
    code, _, err = fit(capsys, *words)
    assert code == 2 and err.count("\n") == 1
    assert "at student update 1" in err and "student" in err and "there is no checkpoint yet" in err


# Weights & Biases --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wandb_offline_needs_no_key_and_no_network(tiny_config: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(here / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", None)  # nobody is there to answer
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "--updates", "2", "--wandb", "offline")
    assert code == 0, err
    assert list(Path("r/wandb").glob("offline-run-*/run-*.wandb")) and Path("r/metrics.csv").is_file()
