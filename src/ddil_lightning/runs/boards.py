"""Where a run is looked at while it goes on: Weights & Biases and TensorBoard, under the same names, over student updates."""

from __future__ import annotations

import logging
import re
import secrets
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakSet

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ddil_lightning.errors import one_line
from ddil_lightning.evaluation.table import CLOCK, Row, results_table, values_of
from ddil_lightning.files import write_text

log = logging.getLogger(__name__)
PROJECT = "ddil-lightning"
"""The W&B project of all runs."""
_AWAY: WeakSet[Any] = WeakSet()  # the boards of which `reaching` has said that they are away


class Wandb(WandbLogger):
    """A W&B run whose one axis are student updates, in groups by the first part of a name.

    Lightning's own counts batches, and its offline mode stays in the environment. A run that goes on under its id goes on along the axis:
    W&B's steps follow the clock too, so that files which were written offline join on to each other when they are synced. Updates that a
    resumed run makes again are rows of their own. Once a run has begun, no fault of W&B's ends it (`reaching`).

    `clock`: student updates, asked for what is logged without them. `known`: the file that keeps the run's id. `settings`: of
    `wandb.init`.
    """

    def __init__(self, clock: Callable[[], int], known: Path | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._clock, self._known = clock, known

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B, which begins when it is first asked for."""
        if self._experiment is None:
            import wandb

            self._experiment = run = wandb.init(**self._wandb_init)
            if self._known is not None and run.id != self._id:  # an agent of a sweep has the last word on it
                write_text(self._known, run.id)
            run.define_metric(CLOCK, hidden=True)
            run.define_metric("*", step_metric=CLOCK)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log named numbers, pictures or tables at their update; `step` is Lightning's and is not asked."""
        clock = int(metrics.get(CLOCK, self._clock()))
        with reaching(self):
            values, row = {CLOCK: clock, **grouped(metrics)}, self.experiment.step
            # A lesser step than W&B's own would be dropped, which a resumed run repeats and somebody else's log may have raised.
            of_its_own = clock < row
            self.experiment.log(values, step=row + 1 if of_its_own else clock, commit=of_its_own)

    @rank_zero_only
    def close(self) -> None:
        """Write what is left and end the run."""
        if self._experiment is not None:
            with reaching(self):
                self._experiment.finish()
            self._experiment = None


class TensorBoard(TensorBoardLogger):
    """Event files in `tensorboard/` below the run folder, over student updates.

    `resumed`: the clock that a run goes on from. What a broken-off run had written of later updates is hidden, for it is made again.
    """

    def __init__(self, folder: Path, clock: Callable[[], int], resumed: int = 0) -> None:
        super().__init__(str(folder), name="tensorboard", version="", default_hp_metric=False, purge_step=resumed + 1)
        self._clock = clock

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log named numbers at their update; `step` is Lightning's and is not asked."""
        super().log_metrics(grouped(metrics), int(metrics.get(CLOCK, self._clock())))

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing, because config.yaml holds all options."""


def grouped(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Named values as boards show them, without the clock: a name that has no group (`loss`, `lr`) is in `train/`."""
    return {name if "/" in name else f"train/{name}": value for name, value in metrics.items() if name != CLOCK}


def boards(folder: Path, name: str, clock: Callable[[], int], config: Mapping[str, Any], resumed: int = 0) -> list[Any]:
    """The boards that the options `wandb` and `tensorboard` of `config`, in which secrets are masked, ask for."""
    asked: list[Any] = []
    if config["wandb"] != "off":
        asked.append(wandb_board(folder, name, clock, config))
    if config["tensorboard"]:
        asked.append(TensorBoard(folder, clock, resumed))
    return asked


def wandb_board(folder: Path, name: str, clock: Callable[[], int], config: Mapping[str, Any]) -> Wandb:
    """A W&B run that writes below the run folder and never asks for a key. A run that goes on in its folder goes on in W&B as well."""
    known = folder / "wandb" / "id"
    if not known.is_file():
        write_text(known, secrets.token_hex(4))
    # The whole path: W&B's service, which writes, may have been started in another directory.
    own = {"name": f"{name}/{folder.name}", "id": known.read_text(encoding="utf-8").strip(), "save_dir": str(folder.resolve())}
    offline = {"offline": True, "mode": "offline"} if config["wandb"] == "offline" else {}
    return Wandb(clock, known, project=PROJECT, resume="allow", config=dict(config), **own, **offline)


def check_tensorboard(option: str = "--tensorboard") -> None:
    """Raises ValueError where TensorBoard, which `option` asks for, is not installed."""
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise ValueError(f"{option} needs TensorBoard, which is not installed: pip install 'ddil-lightning[tensorboard]'")


# What every kind of board is told, Lightning's own loggers of a config included ----------------------------------------------------


@contextmanager
def reaching(board: Any) -> Iterator[None]:
    """Inside, whatever W&B raises is a line of the log, once a board, and ends no run: its service dies on the SIGTERM that a scheduler
    sends to every process, and does not answer in time under load."""
    try:
        yield
    except Exception as error:
        if board not in _AWAY:
            _AWAY.add(board)
            log.warning("W&B could not be told, and may lack what comes from here on; the run goes on: %s", one_line(error))


def show(loggers: Iterable[Any], name: str, pictures: Sequence[Any], captions: Sequence[str], clock: int) -> None:
    """Pictures (PIL) to every logger that takes any, with their captions to those that are known to show them."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
                _captioned(logger.experiment, name if len(pictures) == 1 else f"{name}/{i}", picture, caption, clock)
        elif isinstance(logger, WandbLogger):
            with reaching(logger):
                _pictured(logger, name, pictures, captions, clock)
        elif hasattr(logger, "log_image"):
            logger.log_image(name, list(pictures), step=clock)


def _pictured(logger: WandbLogger, name: str, pictures: Sequence[Any], captions: Sequence[str], clock: int) -> None:
    """Pictures of the update `clock`, which may be past: by ours under their own clock, by another W&B logger as Lightning has it."""
    import wandb

    if isinstance(logger, Wandb):
        shown = [wandb.Image(picture, caption=caption) for picture, caption in zip(pictures, captions, strict=True)]
        logger.log_metrics({CLOCK: clock, name: shown})
    else:
        logger.log_image(name, list(pictures), step=clock, caption=list(captions))


def _captioned(writer: Any, name: str, picture: Any, caption: str, clock: int) -> None:
    """One picture for TensorBoard, which shows the caption as the picture's description, in Markdown."""
    import numpy
    from torch.utils.tensorboard.summary import image

    summary = image(name, numpy.asarray(picture.convert("RGB")), dataformats="HWC")
    summary.value[0].metadata.summary_description = re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", caption)
    writer._get_file_writer().add_summary(summary, clock)


def alert(loggers: Iterable[Any], title: str, text: str, clock: int) -> None:
    """A warning to those who follow a run elsewhere: W&B sends it by e-mail or chat, TensorBoard shows it as a text."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            try:
                logger.experiment.alert(title=title, text=text, level="WARN", wait_duration=0)
            except Exception as error:  # whatever a service that is away raises: no reason to end the run
                log.warning("W&B could not send the alert %r: %s", title, one_line(error))
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("alerts", f"**{title}**: {text}", clock)


def conclude(loggers: Iterable[Any], rows: Sequence[Row], clock: int) -> None:
    """The end of a run: its rows of results as a table and its measures as numbers `eval/frechet_student_4`; boards of ours are closed."""
    values = {name: value for row in rows for name, value in _measured(row).items()}
    for logger in loggers:
        if isinstance(logger, WandbLogger) and rows:
            head = list(dict.fromkeys(key for row in rows for key in _flat(row)))
            lines = [[_flat(row).get(key) for key in head] for row in rows]
            with reaching(logger):
                logger.log_table("eval/rows", head, lines, step=clock)
                logger.log_metrics({CLOCK: clock, **values}, step=clock)
        elif isinstance(logger, TensorBoardLogger) and rows:
            logger.experiment.add_text("eval/rows", results_table(rows), clock)
            logger.log_metrics({CLOCK: clock, **values}, step=clock)
        if isinstance(logger, Wandb):
            logger.close()
        elif isinstance(logger, TensorBoard):
            logger.finalize("success")


def _flat(row: Row) -> dict[str, Any]:
    """A row of results as one line of a table: its own values, then its measures; the protocol is in summary.json."""
    own = {key: value for key, value in row.items() if isinstance(value, (str, int, float))}
    return own | {key: float(value) for key, value in values_of(row).items() if isinstance(value, (int, float))}


def _measured(row: Row) -> dict[str, float]:
    name = re.sub(r"\W+", "_", str(row.get("name", ""))).strip("_")
    return {f"eval/{key}_{name}": float(value) for key, value in values_of(row).items() if isinstance(value, (int, float))}


def sync_line(folder: Path) -> str:
    """How the runs that were written offline below a run folder get to W&B later, as a shell reads it; empty where there are none.

    The parts of a run that went on are one line: W&B sends those of one id one after the other, each behind the one before.
    """
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    return f"wandb sync {' '.join(shlex.quote(str(run)) for run in runs)}" if runs else ""
