"""The command line of ddil-fit: an assembly with a run folder, loggers, checkpoints to go on from, and a rehearsal of its end."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from ddil_lightning.commands.assembly import Assembly, of_the_trainer
from ddil_lightning.commands.checks import check_exports, check_loggers
from ddil_lightning.commands.launched import by_srun
from ddil_lightning.commands.watch import beside
from ddil_lightning.errors import Refusal, one_line
from ddil_lightning.files import unused, write_text
from ddil_lightning.packaged import configs_folder
from ddil_lightning.processes import Processes
from ddil_lightning.runs.boards import boards
from ddil_lightning.runs.checkpoint import (
    check_fits,
    check_newest,
    check_whole,
    checkpoints_of,
    find_checkpoint,
    folder_of,
    load_checkpoint,
)
from ddil_lightning.runs.finish import rehearse
from ddil_lightning.runs.folder import Claim, check_free, check_latest, point_latest, reserve, take_up
from ddil_lightning.runs.loggers import MetricsFile, check_wandb, masked
from ddil_lightning.runs.memory import Meter

RUN_DIR = "DDIL_RUN_DIR"  # tells the processes that Lightning launches where the run is


class FitCLI(Assembly):
    """Parses, builds method and data, takes a run folder, builds the trainer. `fitting.fit` runs them.

    Nothing is written before training starts, so that no error of the config, the data or a checkpoint leaves half a run behind.
    """

    acting = ("alerts", "checkpoints", "progress", "previews", "profile", "stages")

    def __init__(self, words: Sequence[str], meter: Meter | None = None) -> None:
        self.folder, self.started = Path(), False
        self.meter = meter or Meter()
        self.beside: list[int] = []  # the numbers of the run's other processes on this machine, under srun
        self.resumed: Path | None = None
        self.state: dict[str, Any] = {}
        self._source: Path | None = None  # the run that is resumed
        self._anew = False  # whether `last` has found nothing to go on from, so that the run begins in its folder
        self._claim: Claim | None = None
        super().__init__(words)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse. Raises Refusal with one line for every fault of the command line or the config."""
        super().parse_arguments(parser, args)
        self.name = self.config.name or config_name([str(c) for c in self.config.get("config") or [] if c])
        if Path(self.name).is_absolute() or ".." in Path(self.name).parts or not self.name.isprintable():
            raise Refusal(f"--name {self.name}: a run's folder is runs/NAME/<time>, so give a name without .., or --run_dir")
        asked, folder = self.config.ckpt_path, self.config.run_dir
        self._anew = asked == "last" and bool(folder) and not checkpoints_of(Path(folder))
        if self._anew:
            if self._first():
                print(f"{folder} holds no checkpoint yet: the run begins there", flush=True)
        elif asked:
            self.resumed = find_checkpoint(asked, folder, self.name)
            self._source = folder_of(self.resumed)
            if self._goes_on():
                self._as_it_began(parser, args)

    def _as_it_began(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        """A run goes on with its own settings, whatever was on its command line, and with those of this command line on top."""
        own = (self._source or Path()) / "config.yaml"
        began = self.parsed(parser, ["--config", str(own), *overrides(args)])
        if began.model.class_path != self.config.model.class_path:
            return  # another method: the checkpoint will not fit, and says so
        for key in ("config", "name", "run_dir", "ckpt_path"):
            began[key] = self.config.get(key)
        mine, theirs = masked(self.config), masked(began)
        other = [f"{key} {theirs.get(key)} (not {value})" for key, value in mine.items() if began.get(key) != self.config.get(key)]
        if other and self._first():
            more = f" and {len(other) - 8} more" if len(other) > 8 else ""
            print(f"going on as the run began: {', '.join(other[:8])}{more}; what is to change belongs on the command line", flush=True)
        self.config = self.checked(began)

    def before_instantiate_classes(self) -> None:
        """The checkpoint is read, and W&B can be reached, before anything heavy is loaded."""
        check_latest(self.name)
        if self.resumed is not None:
            self.state = load_checkpoint(self.resumed)
            if self._goes_on():
                check_newest(self.resumed)
        elif self.config.run_dir and self._first():
            check_free(Path(self.config.run_dir), self._anew)
        if self.config.wandb == "online" and self._first():
            check_wandb()
        check_loggers(self.config)
        # Lightning's own launcher sets WORLD_SIZE too, and tells its processes the folder; torchrun's know of none.
        # Several machines and tasks of srun that go on with a run know its folder.
        apart = int(self.config.trainer.num_nodes or 1) > 1 or by_srun() > 1
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 or (apart and not self._goes_on())
        if several and not self.config.run_dir and inherited() is None:
            raise Refusal("launched on several processes: give --run_dir, so that all of them write to the same folder")

    @staticmethod
    def _first() -> bool:
        """Whether this is the one process that takes a folder."""
        # A rank that nobody has told yet is 0 on every machine.
        return rank_zero_only.rank == 0 and int(os.environ.get("NODE_RANK", "0")) == 0 and inherited() is None  # type: ignore[attr-defined]

    def _goes_on(self) -> bool:
        """Whether a resumed run goes on in its own folder; else it branches off into a new one."""
        given = self.config.run_dir
        return self._source is not None and (given is None or Path(given).resolve() == self._source.resolve())

    def check_parts(self) -> None:
        """Also whether the student can be exported, and whether a checkpoint fits. Raises Refusal or ValueError."""
        super().check_parts()
        check_exports(self.model, self.config_init.export_steps)
        if self.resumed is not None:
            check_fits(self.resumed, self.state, self.model)
            check_whole(self.resumed, self.state, self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check what the parts ask of each other, take the run folder, and make the trainer that writes to it."""
        self.check_parts()
        self._take_folder()
        try:
            with of_the_trainer():
                loggers = self._loggers()
            return self.checked_trainer([Start(self), *self.callbacks()], default_root_dir=str(self.folder), logger=loggers, **kwargs)
        except BaseException:
            self.close()
            raise

    def _take_folder(self) -> None:
        if not self._first():
            self.folder = inherited() or Path(self.config.run_dir or self._source or "")
            return
        if self._goes_on():
            self._claim = take_up(self._source or Path())
        else:
            self._claim = reserve(self.config.run_dir, self.name, self._anew)
        self.folder = self._claim.folder
        os.environ[RUN_DIR] = f"{os.getpid()}:{self.folder.resolve()}"

    def _loggers(self) -> list[Any]:
        given = self.config_init.trainer.logger
        loggers = given if isinstance(given, list) else [given] if given not in (None, True, False) else []
        clock = lambda: self.model.student_updates  # noqa: E731
        metrics = MetricsFile(self.folder, self._source or self.folder, self.clock, clock)
        own = boards(self.folder, self.name, clock, masked(self.config.as_dict()), self.clock) if self._first() else []
        return [metrics, *loggers, *own]

    def forget_weights(self) -> None:
        """Training reads the checkpoint by itself; of the mapped one only the clocks are still asked for."""
        self.state = {key: self.state[key] for key in ("ddil", "callbacks") if key in self.state}

    @property
    def clock(self) -> int:
        """The student updates of the checkpoint that is resumed, 0 for a fresh run."""
        return self.state["ddil"]["student_updates"] if self.state else 0

    def start(self) -> None:
        """Training begins: config.yaml, which can be given to --config again, and the link to the newest run."""
        config = self.config.clone()
        config.name, config.run_dir, config.ckpt_path = self.name, None, None
        path, text = self.folder / "config.yaml", self.parser.dump(masked(config), skip_none=False, skip_validation=True)
        before = path.read_text(encoding="utf-8") if path.is_file() else text
        if before != text:
            write_text(unused(self.folder / f"config.before-{self.clock}.yaml"), before)
        write_text(path, text)
        point_latest(self.folder, self.name)
        self.started = True
        print(f"run folder {self.folder}", flush=True)

    def rehearse(self) -> str | None:
        """Try the end of the run before its first update -> what would go wrong, in one line, or None."""
        begun, student = time.perf_counter(), f"the student of update {self.clock}" if self.clock else "the untrained student"
        try:
            rehearse(self.model, self.folder, self.config_init.test, self.config.export_steps, self.datamodule.examples(4))
        except Exception as error:
            if os.environ.get("DDIL_DEBUG"):
                raise
            return f"the end of the run was tried on {student}, and fails: {one_line(error)}"
        print(f"export, test and report were tried on {student}: {time.perf_counter() - begun:.1f} s", flush=True)
        return None

    def close(self) -> None:
        """After the run, however it ended: a folder in which nothing started is removed."""
        os.environ.pop(RUN_DIR, None)
        if self._claim is not None:
            if not self.started and not self._goes_on() and not self._anew:
                shutil.rmtree(self.folder / "wandb", ignore_errors=True)  # W&B makes its own before anything begins
            self._claim.release(self.started)


class Start(Callback):
    """Tells the CLI that training begins, before any other callback writes."""

    def __init__(self, cli: FitCLI) -> None:
        self.cli = cli

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Rank 0 rehearses the end and writes; all processes stop together where it cannot work."""
        found = None
        with pl_module.gathered():
            if trainer.is_global_zero:
                found = self.cli.rehearse()
        found = trainer.strategy.broadcast(found)
        if found:
            raise Refusal(found) if trainer.is_global_zero else SystemExit(2)
        if by_srun() > 1:
            self.cli.beside = beside(Processes(trainer))
        self.cli.meter.begin()
        if trainer.is_global_zero:
            self.cli.start()


def launched_by() -> int | None:
    """The process that has launched this one for a run, if it did."""
    launcher = os.environ.get(RUN_DIR, "").partition(":")[0]
    return int(launcher) if launcher.isdigit() and int(launcher) != os.getpid() else None


def inherited() -> Path | None:
    """The run folder that the process which has launched this one took for both; a stranger's setting of that name is nobody's folder."""
    folder = os.environ.get(RUN_DIR, "").partition(":")[2]
    return Path(folder) if folder and launched_by() == os.getppid() else None


def config_name(files: Sequence[str]) -> str:
    """The name of a run: the first config's, with its folder below configs/ (toy2d/pd); `custom` without a file."""
    if not files:
        return "custom"
    path, packaged = Path(files[0]).resolve(), configs_folder().resolve()
    return str(path.relative_to(packaged).with_suffix("")) if path.is_relative_to(packaged) else path.stem


def overrides(words: Sequence[str]) -> list[str]:
    """A command line without its --config words."""
    rest, words = [], list(words)
    while words:
        word = words.pop(0)
        if word == "--config":
            words.pop(0)
        else:
            rest.append(word)
    return rest
