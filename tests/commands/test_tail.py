"""The end of a run: tried before its first update, made part by part, told by its clock, and gone on with by one command."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from commandline import fit, refused
from ddil_lightning.callbacks.checkpoints import Mapped
from ddil_lightning.commands import main
from ddil_lightning.commands.sample import sample
from ddil_lightning.methods import LCM
from ddil_lightning.runs import export, finish


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def once(call: Any, error: BaseException, at: int) -> Any:
    """`call`, which raises `error` at its `at`-th time."""
    calls = iter(range(1, 1000))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return call(*args, **kwargs)

    return counted


PARTS = {  # what is called at the end, and before the first update
    "export": (export, "export"),
    "reload": (export, "load_pipeline"),
    "comparison": (export, "compare"),
    "test": (finish, "_rows"),
    "report": ("ddil_lightning.runs.report", "write_report"),
}


@pytest.mark.parametrize("part", [pytest.param(part, marks=() if part in ("export", "test") else pytest.mark.slow) for part in PARTS])
def test_what_will_fail_at_the_end_fails_before_the_first_update(part: str, tiny_config: Path, capsys: Any, monkeypatch: Any) -> None:
    where, name = PARTS[part]
    target = f"{where}.{name}" if isinstance(where, str) else f"{where.__name__}.{name}"
    monkeypatch.setattr(target, lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("it cannot be done")))
    monkeypatch.setattr(LCM, "training_step", lambda *args: pytest.fail("it has begun"))
    words = ["--config", str(tiny_config), "--run_dir", "r", "test.n=16", "test.teacher_steps=[1]", "test.student_steps=[1]"]
    assert refused(capsys, *words) == "the end of the run was tried on the untrained student, and fails: it cannot be done"


def go_on(said: str) -> list[str]:
    """The words of the command that a message names."""
    return shlex.split(said.split("go on with: ddil-fit ")[1].splitlines()[0])


@pytest.mark.parametrize("part", ["export", pytest.param("test", marks=pytest.mark.slow)])
def test_what_fails_in_the_tail_keeps_the_student_and_names_the_command(
    part: str, tiny_config: Path, here: Path, capsys: Any, monkeypatch: Any
) -> None:
    where, name = PARTS[part]
    words = [
        "--config",
        str(tiny_config),
        "--run_dir",
        "a run",
        "--updates",
        "1",
        "previews.every=0",
        "test.n=16",
        "test.teacher_steps=[1]",
        "test.student_steps=[1]",
    ]
    with monkeypatch.context() as patch:
        error = OSError(28, "No space left on device", "x") if part == "export" else RuntimeError("a judge was ill")
        patch.setattr(where, name, once(getattr(where, name), error, 2))  # the first time is the rehearsal
        code, _, err = fit(capsys, *words)
    assert code == 2 and err.count("\n") == 1
    what = "pipeline: No space left on device: x" if part == "export" else "test: a judge was ill"
    assert f"ddil-fit: {what}; the student is safe, go on with: " in err
    made = {p.name for p in Path("a run").iterdir()}
    assert made >= {"summary.json", "report.html", "checkpoints"} and ("pipeline" in made) == (part == "test")  # the other part is there
    assert json.loads(Path("a run/summary.json").read_text())["failed"]
    monkeypatch.setattr(LCM, "training_step", None)  # nothing is left to train
    assert fit(capsys, *go_on(err))[0] == 0
    summary = json.loads(Path("a run/summary.json").read_text())
    assert "failed" not in summary and len(summary["rows"]) == 2 and Path("a run/pipeline/unet").is_dir()


@pytest.mark.slow
def test_a_report_that_cannot_be_drawn_fails_nothing(tiny_config: Path, capsys: Any, monkeypatch: Any) -> None:
    from ddil_lightning.runs import report

    monkeypatch.setattr(report, "write_report", once(report.write_report, ValueError("math domain error"), 2))
    code, out, _ = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "--updates", "1", "previews.every=0")
    assert code == 0 and "; no report, math domain error\n" in out and Path("r/summary.json").is_file()


@pytest.mark.slow
def test_a_pipeline_that_samples_otherwise_is_kept_and_told(tiny_config: Path, capsys: Any, monkeypatch: Any) -> None:
    error = export.NotAsTrained("latents differ")
    monkeypatch.setattr(export, "compare", once(export.compare, error, 2))
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "--updates", "1", "previews.every=0")
    assert code == 2 and "pipeline: latents differ; it is kept as r/pipeline-unverified; the student is safe, go on with: " in err
    assert Path("r/pipeline-unverified/unet").is_dir() and not Path("r/pipeline").exists()


@pytest.mark.slow
def test_results_are_those_of_the_clock(tiny_config: Path, capsys: Any, monkeypatch: Any) -> None:
    """Run to update 2, extended to 4, killed while the results were made: they were those of update 2, and the run called complete."""
    words = ["--config", str(tiny_config), "--run_dir", "r", "previews.every=0"]
    assert fit(capsys, *words, "--updates", "2")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(export, "deliver", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        code, _, err = fit(capsys, "--config", "r/config.yaml", "--ckpt_path", "r", "--updates", "4")
    assert code == 143 and "stopped after the last of 4 student updates, while its results were made; go on with: " in err
    assert json.loads(Path("r/summary.json").read_text())["student_updates"] == 2
    assert fit(capsys, *go_on(err))[0] == 0
    assert json.loads(Path("r/summary.json").read_text())["student_updates"] == 4
    assert json.loads(Path("r/pipeline/ddil.json").read_text())["student_updates"] == 4
    assert "is complete, with all its 4 updates" in refused(capsys, "--config", "r/config.yaml", "--ckpt_path", "r")


@pytest.mark.slow
def test_a_save_that_fails_after_a_resume_names_the_checkpoint_that_was_resumed(tiny_config: Path, capsys: Any, monkeypatch: Any) -> None:
    """It said that the last good one is none."""
    words = ["--config", str(tiny_config), "--run_dir", "r", "previews.every=0"]
    assert fit(capsys, *words, "--updates", "2")[0] == 0

    def full(state: Any, file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddil_lightning.callbacks.checkpoints.torch.save", full)
    code, _, err = fit(capsys, "--config", "r/config.yaml", "--ckpt_path", "r", "--updates", "4")
    assert code == 2 and err.rstrip().endswith("the last good one is " + str(Path("r/checkpoints/updates=2.ckpt").resolve()))


@pytest.mark.slow
def test_a_stage_is_in_a_checkpoint_before_it_is_exported(tiny: Path, here: Path, capsys: Any, monkeypatch: Any) -> None:
    """Its export dies, and a run that goes on makes it good: the same student, and the stages after it."""
    plan = "{steps: 4, updates: 2}, {steps: 2, updates: 2}"
    text = f"""
model: {{class_path: PD, init_args: {{pipeline: {tiny}, guidance: 2.0, w_conditioned: false, teacher_steps: 8, stages: [{plan}]}}}}
data: {{batch_size: 4, captions: {{class_path: Digits}}}}
test: {{n: 0}}
previews: {{every: 0}}
"""
    Path("pd.yaml").write_text(text)
    assert fit(capsys, "--config", "pd.yaml", "--run_dir", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(export, "export", once(export.export, OSError(28, "No space left on device"), 2))  # the first time is the rehearsal
        code, _, err = fit(capsys, "--config", "pd.yaml", "--run_dir", "r")
    assert code == 2 and "No space left on device" in err and "the last good checkpoint is r/checkpoints/updates=2.ckpt" in err
    assert not Path("r/stages/01-4-steps").exists()
    assert fit(capsys, "--config", "r/config.yaml", "--ckpt_path", "r")[0] == 0
    for name in ("stages/01-4-steps", "stages/02-2-steps", "pipeline"):
        mine, theirs = (Path(run, name, "unet", "diffusion_pytorch_model.safetensors").read_bytes() for run in ("r", "whole"))
        assert mine == theirs, name


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
MORE = [pytest.param(number, code, marks=pytest.mark.slow) for number, code in ((signal.SIGHUP, 129), (signal.SIGUSR1, 138))]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), *MORE])
def test_every_signal_that_ends_a_process_saves(number: int, code: int, tiny_config: Path, capsys: Any, monkeypatch: Any) -> None:
    step = LCM.training_step

    def pressed(self: LCM, b: Any, i: int) -> None:
        if self.student_updates == 5:
            os.kill(os.getpid(), number)
        step(self, b, i)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    monkeypatch.setattr(LCM, "training_step", pressed)
    found, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "previews.every=0")
    assert found == code and "stopped at 6 of 12 student updates; go on with: ddil-fit --config r/config.yaml --ckpt_path " in err
    assert {n: signal.getsignal(n) for n in before} == before
    monkeypatch.setattr(LCM, "training_step", step)
    assert fit(capsys, *go_on(err))[0] == 0


def test_slurm_s_warning_saves_as_every_signal_does(tiny_config: Path, capsys: Any, monkeypatch: Any) -> None:
    """Lightning's own answer is a checkpoint in the midst of a step, which nobody finds, and another submission of the job."""
    step = LCM.training_step

    def warned(self: LCM, b: Any, i: int) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        step(self, b, i)

    monkeypatch.setattr(LCM, "training_step", warned)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda *args, **kwargs: pytest.fail("put back"))
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "previews.every=0")
    assert code == 138 and "stopped at 1 of 12 student updates; go on with: ddil-fit --config r/config.yaml --ckpt_path " in err
    assert not any(Path("r").glob("hpc_ckpt*")) and Path("r/checkpoints/updates=1.ckpt").is_file()


TOLD = "import sys; from ddil_lightning.commands import main; main.run(main.command('fit'), 'ddil-fit', sys.argv[1:])"


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["head", "terminal"])
def test_who_reads_may_leave(reader: str, tiny_config: Path) -> None:
    """`ddil-fit ... | head`, a `tee` that dies, a terminal that is closed: the run goes on, and a terminal's SIGHUP saves."""
    words = [sys.executable, "-c", TOLD, "--config", str(tiny_config), "--run_dir", "r", "test.n=0", "previews.every=0", "--updates", "40"]
    words += ["progress.lines=40"]
    if reader == "head":
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            while "/40 updates" not in process.stdout.readline():
                pass
            process.stdout.close()
            err = process.stderr.read()
        assert process.returncode == 0 and "Error" not in err
        assert Path("r/summary.json").is_file() and Path("r/checkpoints/updates=40.ckpt").is_file()
        return
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(words[0], words)
    while not any(Path().glob("r/metrics.csv")):
        os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert any(Path("r/checkpoints").glob("updates=*.ckpt"))


def test_a_resumed_run_that_does_not_start_keeps_what_it_has(finished: Path, capsys: Any) -> None:
    """Its own curves that no server has yet were deleted."""
    shutil.copytree(finished, "r")
    Path("r/wandb/offline-run-1").mkdir(parents=True)
    assert fit(capsys, "--config", "r/config.yaml", "--ckpt_path", "r")[0] == 2
    assert Path("r/wandb/offline-run-1").is_dir()


@pytest.mark.slow
def test_a_signal_that_was_to_be_ignored_is_ignored(tiny_config: Path, capsys: Any, monkeypatch: Any) -> None:
    """nohup."""
    step = LCM.training_step

    def pressed(self: LCM, b: Any, i: int) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        step(self, b, i)

    monkeypatch.setattr(LCM, "training_step", pressed)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "--updates", "1", "previews.every=0")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_training_leaves_nothing(tiny_config: Path, here: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("ddil_lightning.commands.fitting.train", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    code, out, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r")
    assert (code, out, err) == (143, "", "\nddil-fit: stopped\n") and list(here.iterdir()) == []


# Folders, names, what was typed ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_settings_of_a_run_that_went_on_twice_from_one_clock_are_all_kept(tiny_config: Path, capsys: Any, monkeypatch: Any) -> None:
    words = ["--config", str(tiny_config), "--run_dir", "r", "previews.every=0"]
    assert fit(capsys, *words, "--updates", "2")[0] == 0
    save = Mapped.save_checkpoint
    for lr in ("2e-3", "3e-3"):
        monkeypatch.setattr(Mapped, "save_checkpoint", once(save, OSError(28, "full"), 1))
        assert fit(capsys, "--config", "r/config.yaml", "--ckpt_path", "r", "--updates", "3", f"model.optimizer.lr={lr}")[0] == 2
    kept = {p.name: str(yaml.safe_load(p.read_text())["model"]["init_args"]["optimizer"]["lr"]) for p in Path("r").glob("config*.yaml")}
    assert kept == {"config.before-2.yaml": "0.001", "config.before-2-2.yaml": "0.002", "config.yaml": "0.003"}


@pytest.mark.slow
def test_home_is_home_in_every_option(tiny_config: Path, here: Path, capsys: Any, monkeypatch: Any) -> None:
    """`--run_dir=~/x` wrote its config to ./~/x and its checkpoints to the home folder."""
    home = here / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "mine.yaml").write_text(tiny_config.read_text())
    words = ["--config=~/mine.yaml", "--run_dir=~/x", "data.cache=~/cache", "--updates", "1", "previews.every=0", "stages.folder=~/s"]
    assert fit(capsys, *words)[0] == 0
    assert {p.name for p in home.iterdir()} == {"mine.yaml", "x", "cache"} and not (here / "~").exists()
    assert str(home / "cache") in (home / "x" / "config.yaml").read_text()
    for command, given in (
        (main.command("export"), ["--ckpt_path", "~/x", "--out", "~/out"]),
        (main.command("test"), ["--ckpt_path=~/x", "--out=~/rows.json", "--n=16", "--steps=1"]),
        (main.command("sample"), ["--pipeline=~/x/pipeline", "--prompt", "a digit", "--out=~/p.png"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main.run(command, "ddil-x", given)
        assert stop.value.code == 0, capsys.readouterr().err
    assert {"out", "rows.json", "p.png"} <= {p.name for p in home.iterdir()} and not (here / "~").exists()


@pytest.mark.slow
def test_a_working_directory_that_cannot_be_written_to_is_fine(tiny_config: Path, here: Path, capsys: Any, monkeypatch: Any) -> None:
    away = here / "away"
    mkdir = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if not self.is_absolute():
            raise OSError(30, "Read-only file system", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, out, err = fit(capsys, "--config", str(tiny_config), "--run_dir", str(away), "--updates", "1", "previews.every=0")
    assert code == 0, err
    assert "runs/tiny/latest could not be set (Read-only file system)" in out and [p.name for p in here.iterdir()] == ["away"]


TYPED: list[tuple[list[str], Any]] = [  # and the updates, learning rate and batch size that win
    (["--updates", "5", "--config", "CONFIG"], (5, 0.001, 8)),
    (["model.optimizer.lr=2e-3", "--seed", "7", "--config=CONFIG", "data.batch_size=3"], (12, 0.002, 3)),
    (
        [
            "--config",
            "CONFIG",
            "--model.optimizer.lr=0.125",
            "--config",
            "{model: {init_args: {optimizer: {lr: 0.5}}}, data: {batch_size: 9}}",
        ],
        (12, 0.125, 9),
    ),
    (["data.prior={forward: 0.25, student: 0.75}", "previews.prompts=['a: b', 'it''s', '~/x', '#', 'é']", "-c", "CONFIG"], None),
    (["trainer.callbacks+=ShiftProbe", "trainer.callbacks.steps=2", "--config", "CONFIG", "model.guidance=[1.5, 2.5]"], None),
    (
        [
            "model.optimizer.betas=[0.5, 0.75]",
            "--config",
            "CONFIG",
            "model.distance.width=1e-7",
            "model.reflect=dynamic",
            "test.student_steps=[2]",
        ],
        None,
    ),
]


@pytest.mark.parametrize(("words", "wins"), [TYPED[1], *(pytest.param(*typed, marks=pytest.mark.slow) for typed in (TYPED[0], *TYPED[2:]))])
def test_the_command_line_wins_and_config_yaml_repeats_what_was_typed(words: list[str], wins: Any, tiny_config: Path) -> None:
    from ddil_lightning.commands.assembly import Assembly
    from ddil_lightning.commands.configs import FIT_SHORT, expand
    from ddil_lightning.commands.fit_cli import FitCLI

    typed = [word.replace("CONFIG", str(tiny_config)) for word in words]
    first = FitCLI(expand([*typed, "--run_dir", "r"], FIT_SHORT))
    first.start()
    first.close()
    again = Assembly(expand(["--config", "r/config.yaml"], FIT_SHORT))
    mine, theirs = ({k: v for k, v in c.config.as_dict().items() if k not in ("config", "run_dir", "name")} for c in (first, again))
    assert mine == theirs
    if wins is not None:
        assert (first.config.model.init_args.updates, first.config.model.init_args.optimizer.lr, first.config.data.batch_size) == wins
    if words[0].startswith("data.prior"):
        assert first.config.previews.prompts == ["a: b", "it's", "~/x", "#", "é"]


def test_a_seed_that_is_none_is_refused(tiny_config: Path, capsys: Any) -> None:
    for seed in ("true", "false", "-1", "4294967296"):
        assert "--seed is" in refused(capsys, "--config", str(tiny_config), "--seed", seed)


def test_truncate_is_said_where_a_prompt_is_too_long(finished: Path, capsys: Any) -> None:
    long = "a small red circle " * 9
    words = ["--pipeline", str(finished / "pipeline"), "--prompt", long, "--out", "x.png"]
    with pytest.raises(ValueError, match="and the text encoder reads 16: shorten it, or cut it by --truncate"):
        sample(words)
    assert not Path("x.png").exists() and sample([*words, "--truncate"]) == 0 and Path("x.png").is_file()


def test_figures_are_quoted_with_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the checkout that the package is imported from; an installed package has none."""
    package = tmp_path / "checkout" / "src" / "ddil_lightning"
    package.joinpath("runs").mkdir(parents=True)
    file = package / "runs" / "finish.py"
    file.write_text("")
    monkeypatch.setattr(finish, "__file__", str(file))
    commit = finish.commit.__wrapped__  # which is asked once
    assert commit() is None
    git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    first = commit()
    assert first is not None and head.startswith(first) and len(first) == 12
    file.write_text("changed")
    assert commit() == first + "+"
    monkeypatch.setenv("PATH", "")
    assert commit() is None
