"""ddil-fit: train, or go on, and leave behind a pipeline, a table and a report; every expected failure is one line."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ddil_lightning import plugins
from ddil_lightning.backbones.resting import apart
from ddil_lightning.callbacks import Checkpoints, Stages
from ddil_lightning.commands.fit_cli import FitCLI, launched_by
from ddil_lightning.commands.launched import by_srun
from ddil_lightning.commands.watch import Watch, is_lost
from ddil_lightning.errors import EXPECTED, Refusal, one_line
from ddil_lightning.runs.checkpoint import reinstate
from ddil_lightning.runs.finish import finish, trying
from ddil_lightning.runs.folder import is_complete
from ddil_lightning.runs.memory import Meter, gib
from ddil_lightning.signals import Stopped

PLANNED_AFTER = 600.0
"""Seconds of training from which on the plan, which takes some itself, is made for comparison."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fit(words: list[str]) -> int:
    """Train, export, check, test, report. Returns 0; after a signal raises Stopped, which says how to go on."""
    begun, parent, meter = time.time(), os.getppid(), Meter()
    plugins.load()  # before the config is read, which may name their classes in short
    cli = FitCLI(words, meter)
    checkpoints = next(c for c in cli.trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
    try:
        if cli.clock < cli.model.updates:
            train(cli, checkpoints, parent)
        else:
            reload(cli, checkpoints)
        if cli.trainer.is_global_zero:
            conclude(cli, checkpoints, begun)
    finally:
        cli.close()
    return 0


def train(cli: FitCLI, checkpoints: Checkpoints, parent: int) -> None:
    """Trainer.fit, with every expected failure in one line that names the last good checkpoint.

    `parent`: the process that had started this one when the command began.
    """
    trainer, listener = cli.trainer, signal.getsignal(signal.SIGINT)
    cli.forget_weights()
    try:
        with watched(cli, checkpoints, parent):
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resumed, weights_only=True if cli.resumed else None)
        cli.meter.end(trainer.strategy.root_device, (cli.model, *cli.model.backbone.parts()))
    except FloatingPointError as error:
        again = "go on from it" if newest(cli, checkpoints) else "begin again"
        raise FloatingPointError(f"{error}; {last_good(cli, checkpoints)}: {again} with a lower model.optimizer.lr") from error
    except OSError as error:
        if error.errno in FULL and "last good" not in str(error):
            raise OSError(error.errno, f"{error.strerror} ({error.filename or cli.folder}); {last_good(cli, checkpoints)}") from error
        raise
    except MisconfigurationException as error:
        raise Refusal(str(error)) from error
    except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt, ignoring all later ones
        signal.signal(signal.SIGINT, listener)
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        number = getattr(stop.__context__, "number", signal.SIGINT)
        raise Stopped(number, how_to_go_on(cli, checkpoints)) from stop
    except Exception as error:  # in the midst of a run: data that cannot be read, a device without memory
        # Only the first process of a run starts its folder; the others end in a line where they have lost another.
        begun = cli.started or (trainer.world_size > 1 and is_lost(error))
        if not begun or os.environ.get("DDIL_DEBUG"):
            raise
        raise Refusal(f"{told(error, trainer.world_size)}; {how_to_go_on(cli, checkpoints)}") from error
    if cli.model.student_updates == cli.clock and checkpoints.signal is None:
        raise Refusal("the run ended before its first update: look at the trainer's options")
    if checkpoints.signal is not None:
        stopped = Stopped(checkpoints.signal, how_to_go_on(cli, checkpoints))
        raise stopped if trainer.is_global_zero else SystemExit(stopped.code)


def told(error: Exception, processes: int) -> str:
    """What went wrong in the midst of a run, in words."""
    if processes > 1 and is_lost(error):
        return "another process of the run has ended, or cannot be reached"
    return one_line(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {one_line(error)[:500]}"


def watched(cli: FitCLI, checkpoints: Checkpoints, parent: int) -> Any:
    """Inside, the death of one of several processes ends the others; one alone has nothing to watch."""
    if cli.trainer.world_size == 1:
        return nullcontext()
    strategy, starter = cli.trainer.strategy, (launched_by() or parent) if "LOCAL_RANK" in os.environ else None
    # What starts srun's tasks outlives them, and leaves the others alone when one of them dies.
    meet = strategy.barrier if by_srun() > 1 else lambda: None
    says = lambda: how_to_go_on(cli, checkpoints)  # noqa: E731
    return Watch(strategy.launcher, starter, says, checkpoints.alive, cli.close, lambda: cli.beside, meet)


def newest(cli: FitCLI, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint that the run has written last, before the first of them the one that it goes on from."""
    return checkpoints.last or cli.resumed


def last_good(cli: FitCLI, checkpoints: Checkpoints) -> str:
    """Where the run can go on."""
    last = newest(cli, checkpoints)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def how_to_go_on(cli: FitCLI, checkpoints: Checkpoints) -> str:
    """What a signal is answered with."""
    where = f"stopped at {cli.model.student_updates} of {cli.model.updates} student updates"
    last = newest(cli, checkpoints)
    if last is None:
        return f"{where}, nothing was saved"
    if checkpoints.last is None:  # the folder has no config.yaml with the settings of this command line yet
        return f"{where}, with nothing new to save: {last} is as it was, give the same command again"
    return f"{where}; go on with: {command(cli, last)}"


def command(cli: FitCLI, checkpoint: Path) -> str:
    """The one command that goes on from `checkpoint`, as a shell reads it."""
    return shlex.join(["ddil-fit", "--config", str(cli.folder / "config.yaml"), "--ckpt_path", str(checkpoint)])


def reload(cli: FitCLI, checkpoints: Checkpoints) -> None:
    """A run whose updates were all done when it was stopped: only its results are missing. Raises Refusal where they are not."""
    if is_complete(cli.folder, cli.clock):
        raise Refusal(f"the run {cli.folder} is complete, with all its {cli.clock} updates: raise --updates to go on, or try ddil-test")
    reinstate(cli.model, cli.state)
    checkpoints.load_state_dict(cli.state["callbacks"].get(checkpoints.state_key, {}))
    checkpoints.last = cli.resumed
    if cli.trainer.is_global_zero:
        cli.start()
        stages = next(c for c in cli.trainer.callbacks if isinstance(c, Stages))  # type: ignore[attr-defined]
        if stages.owed(cli.model, cli.folder):
            stages.deliver(cli.model, cli.folder, cli.datamodule.examples(4))


def conclude(cli: FitCLI, checkpoints: Checkpoints, begun: float) -> None:
    """What a complete run leaves behind: pipeline/, summary.json, report.html, and the table on the terminal.

    Raises Refusal when a part of it failed, after all others were made: the student is in its checkpoint, and one command goes on there.
    """
    from ddil_lightning.evaluation.table import write_rows
    from ddil_lightning.runs.report import write_report

    device = cli.trainer.strategy.root_device
    if not cli.datamodule.encodes and apart(device):
        cli.model.backbone.rest(device)  # as in the training
    # Lightning has moved the method to the CPU by now.
    method = cli.model.to(device).eval()
    facts = {"config": cli.name, "seed": cli.config.seed_everything}
    try:
        summary = finish(method, cli.folder, cli.config_init.test, cli.config.export_steps, cli.datamodule.examples(4), facts)
        failed = summary["failed"]
        # A resumed run has also taken the time that its checkpoint knows of.
        before = cli.state["callbacks"].get(checkpoints.state_key, {}).get("seconds", 0.0) if cli.state else 0.0
        summary |= {"seconds": round(time.time() - begun + before, 1), "seconds_training": round(checkpoints.seconds, 1)}
        summary = {key: value for key, value in summary.items() if key != "failed" or value} | peak(cli, checkpoints.seconds)
        summary |= best(checkpoints)
        # A page that cannot be drawn is no reason to call a run failed.
        unmade: dict[str, str] = {}
        with trying("report", unmade):
            write_report(cli.folder, summary)
        # Last: a run with a summary of its clock is complete.
        with trying("summary.json", failed):
            write_rows(cli.folder / "summary.json", summary)  # type: ignore[arg-type]
        print(told_of_memory(summary), end="")
        print(told_of_best(summary), end="")
        print(told_to_boards(cli, summary), end="")
        page = f"no report, {unmade['report']}" if unmade else f"report {cli.folder / 'report.html'}"
        print(f"{method.student_updates} updates, {summary['seconds']:.0f} s; {page}")
    except KeyboardInterrupt as stop:
        where = f"stopped after the last of {method.updates} student updates, while its results were made"
        go_on = f"; go on with: {command(cli, last)}" if (last := newest(cli, checkpoints)) else ""
        raise Stopped(getattr(stop, "number", signal.SIGINT), where + go_on) from stop
    if failed:
        said = "; ".join(f"{what}: {why}" for what, why in failed.items())
        last = newest(cli, checkpoints)
        kept = f"the student is safe, go on with: {command(cli, last)}" if last else "nothing was saved"
        raise Refusal(f"{said}; {kept}")


def peak(cli: FitCLI, seconds: float) -> dict[str, float]:
    """The most memory that the training has held, in GiB, and of a run of some time what a plan says of it, for summary.json."""
    measured = cli.meter.peak
    if measured is None:
        return {}
    found = {"peak_memory_gib": round(gib(measured), 3)}
    if seconds >= PLANNED_AFTER:
        with trying("plan", {}):  # an estimate is no reason to call a run failed
            from ddil_lightning.commands.plan import expected  # and fake tensors with it, which few runs need

            found["planned_memory_gib"] = round(gib(expected(cli.model, cli.datamodule, cli.trainer)), 3)
    return found


def best(checkpoints: Checkpoints) -> dict[str, Any]:
    """The best student of the run by `checkpoints.best`, for summary.json; nothing where its checkpoint is not there."""
    found = checkpoints.of_best()
    if found is None or checkpoints.best is None:
        return {}
    return {"best": checkpoints.best.state() | {"checkpoint": str(found)}}


def told_of_best(summary: dict[str, Any]) -> str:
    """A line of what `best` has found, if anything."""
    if "best" not in summary:
        return ""
    best = summary["best"]
    again = shlex.join(["ddil-export", "--ckpt_path", best["checkpoint"], "--out"])
    return f"the best by {best['name']}, {best['value']:.4g}, is the student of update {best['clock']}: {again} FOLDER\n"


def told_to_boards(cli: FitCLI, summary: dict[str, Any]) -> str:
    """The results to W&B and TensorBoard -> a line that says how what was written offline is sent later, or what could not be told."""
    from ddil_lightning.runs.boards import conclude, sync_line

    untold: dict[str, str] = {}
    with trying("boards", untold):  # the results lie in the run folder
        conclude(cli.trainer.loggers, summary["rows"], cli.model.student_updates)
    if untold:
        return f"the results could not be logged: {untold['boards']}\n"
    line = sync_line(cli.folder) if cli.config.wandb == "offline" else ""
    return f"W&B has this run by: {line}\n" if line else ""


def told_of_memory(summary: dict[str, Any]) -> str:
    """A line of what `peak` has found, if anything."""
    if "peak_memory_gib" not in summary:
        return ""
    planned = f", planned {summary['planned_memory_gib']:.2f}" if "planned_memory_gib" in summary else ""
    return f"peak memory of the training {summary['peak_memory_gib']:.2f} GiB{planned}\n"
