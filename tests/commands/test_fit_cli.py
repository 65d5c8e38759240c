"""ddil-fit as its users and other tools call it: the contract, resuming, Ctrl-C, full disks, NaN."""

from __future__ import annotations

import errno
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from commandline import fit, refused
from ddil_lightning.commands import fit_cli
from ddil_lightning.commands.assembly import Assembly
from ddil_lightning.commands.configs import FIT_SHORT, expand
from ddil_lightning.errors import Refusal
from ddil_lightning.methods import LCM
from ddil_lightning.runs import loggers
from ddil_lightning.runs.checkpoint import sorted_checkpoints
from suite import equal


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*words: str) -> Assembly:
    return Assembly(expand(words, FIT_SHORT))


def checkpoint(folder: Path, clock: int) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"updates={clock}.ckpt", weights_only=True)


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two checkpoints of the same moment: only the clock on the wall may differ."""
    for key in ("state_dict", "optimizer_states", "DDILDataModule", "ddil"):
        assert equal(a[key], b[key]), key


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


def test_checkpoints_hold_no_teacher(finished: Path, tiny: Path) -> None:
    state = checkpoint(finished, 12)
    assert {name.split(".")[0] for name in state["state_dict"]} == {"student", "target", "average", "reflection"}
    teacher, student = (folder / "unet" / "diffusion_pytorch_model.safetensors" for folder in (tiny, finished / "pipeline"))
    # Student, target, average, and two moments of Adam; the rest is the buffer and the file's own directory.
    rest = (finished / "checkpoints" / "updates=12.ckpt").stat().st_size - 5 * student.stat().st_size
    assert 0 < rest < teacher.stat().st_size / 2


def test_options_overrides_and_several_configs(tiny_config: Path, here: Path) -> None:
    (here / "more.yaml").write_text("data: {batch_size: 5}\nmodel: {init_args: {optimizer: {lr: 0.5}}}\n")
    words = ["--updates", "7", "--seed", "3", "--checkpoint_every", "2", "data.buffer.capacity=90", "--model.ema=0.5"]
    made = parse("--config", str(tiny_config), "--config", "more.yaml", "--config", "{previews: {count: 1}}", *words)
    assert (made.model.updates, made.model.lr, made.model.averaging.decay, made.model.descent.clip) == (7, 0.5, 0.5, 1.0)
    assert (made.datamodule.batch_size, made.datamodule.seed, made.datamodule.buffer.capacity) == (5, 3, 90)
    assert made.datamodule.prior.student == 0.25 and made.config_init.previews.count == 1 and made.config_init.checkpoints.every == 2
    assert made.config.seed_everything == 3


def test_config_yaml_of_a_run_can_be_given_again(finished: Path, tiny_config: Path) -> None:
    first, again = parse("--config", str(tiny_config)).config, parse("--config", str(finished / "config.yaml")).config
    assert again.name == "tiny" and again.run_dir is None and again.ckpt_path is None
    for config in (first, again):
        config.name = config.config = None
    assert first.as_dict() == again.as_dict()


@pytest.mark.parametrize("word", ["model.scores.guidance=null", "model.init_args.scores.guidance=null"])
def test_an_option_of_a_record_can_be_null(word: str, capsys: Any) -> None:
    """jsonargparse refuses it by a dotted key, in words that say nothing of it."""
    code, out, err = fit(capsys, "--config", "dmd2", word, "model.scores.tau=[0.1, 0.9]", "--print_config")
    scores = yaml.safe_load(out)["model"]["init_args"]["scores"]
    assert (code, err) == (0, "") and scores.pop("guidance", 0) is None and scores.pop("tau") == [0.1, 0.9]
    assert scores == {"normaliser": "sample", "divergence": "reverse_kl", "share": False}


def test_print_config(tiny_config: Path, capsys: Any) -> None:
    code, out, err = fit(capsys, "--config", str(tiny_config), "--print_config", "model.optimizer.lr=0.25")
    assert code == 0 and yaml.safe_load(out)["model"]["init_args"]["optimizer"]["lr"] == 0.25 and err == ""


def test_names_of_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "toy2d").mkdir()
    monkeypatch.setattr(fit_cli, "configs_folder", lambda: here)
    assert fit_cli.config_name([str(here / "toy2d" / "pd.yaml"), "x.yaml"]) == "toy2d/pd"
    assert fit_cli.config_name(["/elsewhere/mine.yaml"]) == "mine" and fit_cli.config_name([]) == "custom"


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


def test_a_run_goes_on_whose_checkpoints_are_elsewhere(tiny_config: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config", str(tiny_config), "--updates", "3", "checkpoints.folder=fast", "previews.every=0"]
    with monkeypatch.context() as patch:
        press(patch, 1)
        code, _, err = fit(capsys, *words)
    folder = Path("runs/tiny/latest").resolve()
    assert code == 130 and "stopped at 2 of 3 student updates" in err and not (folder / "checkpoints").exists()
    printed = err.split("ddil-fit ")[1].split()
    monkeypatch.setattr(fit_cli.FitCLI, "check_parts", lambda self: (_ for _ in ()).throw(Refusal(f"{self.resumed} of {self._source}")))
    asked = [["--ckpt_path", "last"], ["--run_dir", str(folder), "--ckpt_path", "last"], ["--ckpt_path", "fast"]]
    for again in (printed, *([*words, *more] for more in asked)):
        assert f"fast/updates=2.ckpt of {folder}" in fit(capsys, *again)[2]


def test_a_job_that_is_put_back_has_one_command(tiny_config: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first submission and after an end before the first checkpoint; after one it goes on, as everywhere."""
    words = ["--config", str(tiny_config), "--updates", "2", "--run_dir", "r", "--ckpt_path", "last", "previews.every=0"]
    with monkeypatch.context() as patch:
        patch.setattr(LCM, "training_step", lambda self, b, i: (_ for _ in ()).throw(RuntimeError("out of memory")))
        code, out, err = fit(capsys, *words)
    assert code == 2 and "out of memory; stopped at 0 of 2 student updates, nothing was saved" in err
    assert out.startswith("r holds no checkpoint yet: the run begins there\n") and Path("r/config.yaml").is_file()
    Path("r/metrics.csv").write_text("student_updates,loss\n1,0.5\n")  # that it has shown
    assert "r already holds a run: choose another --run_dir, or" in refused(capsys, *words[:6], "previews.every=0")
    press(monkeypatch, 0)
    code, out, err = fit(capsys, *words)
    assert code == 130 and out.startswith("r holds no checkpoint yet") and "stopped at 1 of 2 student updates; go on with" in err
    rows = [line.split(",")[:1] for line in Path("r/metrics.csv").read_text().splitlines()]
    assert rows == [["student_updates"], ["1"]] and not [*Path("r").glob("config.before*")]
    monkeypatch.setattr(fit_cli.FitCLI, "check_parts", lambda self: (_ for _ in ()).throw(Refusal(f"from {self.resumed}")))
    assert f"from {here / 'r/checkpoints/updates=1.ckpt'}" in fit(capsys, *words)[2]


@pytest.mark.slow
def test_a_run_goes_on_with_the_settings_it_began_with(tiny_config: Path, here: Path, capsys: Any) -> None:
    words = ["--config", str(tiny_config), "previews.every=0"]
    assert fit(capsys, *words, "--updates", "2", "--seed", "5", "model.optimizer.lr=2e-3", "data.batch_size=4")[0] == 0
    began = (Path("runs/tiny/latest") / "config.yaml").read_text()
    code, out, _ = fit(capsys, *words, "--ckpt_path", "last", "--updates", "3")
    assert code == 0
    assert (
        "going on as the run began: " in out
        and "model.init_args.optimizer.lr 0.002 (not 0.001)" in out
        and "data.batch_size 4 (not 8)" in out
    )
    assert "updates 2" not in out and "seed_everything 5 (not 0)" in out
    assert (Path("runs/tiny/latest") / "config.yaml").read_text() == began.replace("updates: 2\n", "updates: 3\n")
    assert (
        "going on as"
        not in fit(capsys, *words, "--ckpt_path", "last", "--updates", "4", "--seed", "5", "model.optimizer.lr=2e-3", "data.batch_size=4")[
            1
        ]
    )
    branched = fit(capsys, *words, "--ckpt_path", "runs/tiny/latest", "--run_dir", "branch", "--updates", "5")
    assert branched[0] == 0 and "lr: 0.001" in Path("branch/config.yaml").read_text()


def test_machines_share_one_folder(tiny_config: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would make one of its own; those that go on with a run know it, and one that is not the first takes none."""
    words = ["--config", str(tiny_config), "previews.every=0", "--updates", "1"]
    assert "launched on several processes: give --run_dir" in refused(capsys, *words, "trainer.num_nodes=2")
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_STEP_NUM_TASKS", "4")
        assert "launched on several processes: give --run_dir" in refused(capsys, *words)
    assert fit(capsys, *words)[0] == 0
    monkeypatch.setattr(fit_cli.FitCLI, "check_parts", lambda self: (_ for _ in ()).throw(Refusal("it would begin")))
    assert "it would begin" in fit(capsys, *words, "trainer.num_nodes=2", "--ckpt_path", "last", "--updates", "2")[2]
    assert fit_cli.FitCLI._first()
    monkeypatch.setenv("NODE_RANK", "1")
    assert not fit_cli.FitCLI._first()


def test_processes_share_one_folder(tiny_config: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's processes must be told it; those of Lightning's launcher, which sets WORLD_SIZE too, have it from their parent."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--config", str(tiny_config), "previews.every=0", "--updates", "1"]
    assert "launched on several processes: give --run_dir" in refused(capsys, *words)
    (here / "theirs").mkdir()
    monkeypatch.setenv(fit_cli.RUN_DIR, str(here / "theirs"))  # without a launcher: left over from somewhere
    assert "launched on several processes: give --run_dir" in fit(capsys, *words)[2]
    monkeypatch.setenv(fit_cli.RUN_DIR, f"{os.getppid()}:{here / 'theirs'}")
    code, _, err = fit(capsys, *words)
    assert code == 0, err
    assert (here / "theirs" / "metrics.csv").is_file() and [p.name for p in Path("runs/tiny").iterdir()] == ["latest"]


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tiny_config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = signal.getsignal(signal.SIGINT)
    press(monkeypatch, 5, times=2)
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "previews.every=0")
    assert code == 130 and err.count("\n") == 2 and "stopped at 5 of 12" in err and "updates=4.ckpt" in err
    assert signal.getsignal(signal.SIGINT) is listener
    assert [p.name for p in sorted_checkpoints(Path("r/checkpoints"))] == ["updates=4.ckpt"]


@pytest.mark.slow
def test_a_branch_leaves_its_source_alone(finished: Path, tiny_config: Path, here: Path, capsys: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    source = finished / "checkpoints" / "updates=8.ckpt"
    words = ["--config", str(tiny_config), "--ckpt_path", str(source), "--run_dir", "branch", "--updates", "10", "previews.every=0"]
    assert fit(capsys, *words)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
    lines, old = ((folder / "metrics.csv").read_text().splitlines() for folder in (Path("branch"), finished))
    assert lines[:9] == old[:9] and len(lines) == 11  # the header and ten updates
    assert Path("runs/tiny/latest").resolve() == here / "branch"


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_checkpoints(tiny_config: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def full(state: Any, file: Any) -> None:
        if state["ddil"]["student_updates"] < 8:
            return save(state, file)
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ddil_lightning.callbacks.checkpoints.torch.save", full)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # a checkpoint is written beside its destination
    code, _, err = fit(capsys, "--config", str(tiny_config), "--run_dir", "r", "previews.every=0")
    assert code == 2 and err == (
        "ddil-fit: the checkpoint r/checkpoints/updates=8.ckpt could not be written (No space left on device); "
        "the last good one is r/checkpoints/updates=4.ckpt\n"
    )
    assert [p.name for p in Path("r/checkpoints").iterdir()] == ["updates=4.ckpt"]
    assert checkpoint(Path("r"), 4)["ddil"]["student_updates"] == 4


@pytest.mark.slow
def test_a_full_disk_elsewhere_names_the_last_good_checkpoint(tiny_config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log = loggers.MetricsFile.log_metrics

    def full(self: Any, metrics: Any, step: int) -> None:
        if step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log(self, metrics, step)

    monkeypatch.setattr(loggers.MetricsFile, "log_metrics", full)
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
        "the last good checkpoint is r/checkpoints/updates=4.ckpt: go on from it with a lower model.optimizer.lr\n"
    )


@pytest.mark.slow
def test_weights_that_grow_without_bounds_stop_the_run_too(tiny_config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = LCM.advance

    def blown(self: LCM) -> None:
        advance(self)
        self.student.network.unet.conv_in.weight.data.fill_(1e30)

    monkeypatch.setattr(LCM, "advance", blown)
    words = ["--config", str(tiny_config), "--run_dir", "r", "previews.every=0", "data.prior={forward: 1.0, student: 0.0}"]
    code, _, err = fit(capsys, *words)
    assert code == 2 and err.count("\n") == 1
    assert "at student update 1" in err and "student" in err and "there is no checkpoint yet" in err
