"""ddil-fit: train, or go on, and leave behind a pipeline, a table and a report; every expected failure is one line."""

from __future__ import annotations

import errno
import signal
import time

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .callbacks import Checkpoints
from .cli import FitCLI
from .finish import finish
from .main import Refusal
from .messages import quiet

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fit(words: list[str]) -> int:
    """Train, export, check, test, report. Returns 0; after Ctrl-C raises KeyboardInterrupt that says how to go on."""
    quiet()
    begun = time.time()
    cli = FitCLI(words)
    checkpoints = next(c for c in cli.trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
    try:
        if cli.clock < cli.model.updates:
            train(cli, checkpoints)
        else:
            reload(cli, checkpoints)
        if cli.trainer.is_global_zero:
            conclude(cli, checkpoints, begun)
    finally:
        cli.close()
    return 0


def train(cli: FitCLI, checkpoints: Checkpoints) -> None:
    """Trainer.fit, with every expected failure in one line that names the last good checkpoint."""
    trainer, listener = cli.trainer, signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resumed, weights_only=True if cli.resumed else None)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {last_good(cli, checkpoints)}: go on from it with a lower model.lr") from error
    except OSError as error:
        if error.errno in FULL and "last good" not in str(error):
            raise OSError(error.errno, f"{error.strerror} ({error.filename or cli.folder}); {last_good(cli, checkpoints)}") from error
        raise
    except MisconfigurationException as error:
        raise Refusal(str(error)) from error
    except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt, ignoring all later ones
        signal.signal(signal.SIGINT, listener)
        raise KeyboardInterrupt(how_to_go_on(cli, checkpoints)) from stop
    if checkpoints.interrupted:
        raise KeyboardInterrupt(how_to_go_on(cli, checkpoints)) if trainer.is_global_zero else SystemExit(130)


def last_good(cli: FitCLI, checkpoints: Checkpoints) -> str:
    """Where the run can go on."""
    last = checkpoints.last or cli.resumed
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def how_to_go_on(cli: FitCLI, checkpoints: Checkpoints) -> str:
    """What Ctrl-C answers."""
    where = f"stopped at {cli.model.student_updates} of {cli.model.updates} student updates"
    last = checkpoints.last or cli.resumed
    if not last:
        return f"{where}, nothing was saved"
    return f"{where}; go on with: ddil-fit --config {cli.folder / 'config.yaml'} --ckpt_path {last}"


def reload(cli: FitCLI, checkpoints: Checkpoints) -> None:
    """A run whose updates were all done when it was stopped: only its results are missing. Raises Refusal where they are not."""
    if (cli.folder / "summary.json").is_file():
        raise Refusal(f"the run {cli.folder} is complete, with all its {cli.clock} updates: raise --updates to go on, or try ddil-test")
    cli.model.load_state_dict(cli.state["state_dict"])
    cli.model.on_load_checkpoint(cli.state)
    checkpoints.load_state_dict(cli.state["callbacks"].get(checkpoints.state_key, {}))
    if cli.trainer.is_global_zero:
        cli.start()


def conclude(cli: FitCLI, checkpoints: Checkpoints, begun: float) -> None:
    """What a complete run leaves behind: pipeline/, summary.json, report.html, and the table on the terminal."""
    from .evaluate import write_rows
    from .report import write_report

    # Lightning has moved the method to the CPU by now.
    method = cli.model.to(cli.trainer.strategy.root_device).eval()
    facts = {"config": cli.name, "seed": cli.config.seed_everything}
    summary = finish(method, cli.folder, cli.config_init.test, cli.config.export_steps, cli.datamodule.examples(4), facts)
    # A resumed run has also taken the time that its checkpoint knows of.
    before = cli.state["callbacks"].get(checkpoints.state_key, {}).get("seconds", 0.0) if cli.state else 0.0
    summary |= {"seconds": round(time.time() - begun + before, 1), "seconds_training": round(checkpoints.seconds, 1)}
    write_rows(cli.folder / "summary.json", summary)  # type: ignore[arg-type]
    print(f"{method.student_updates} updates, {summary['seconds']:.0f} s; report {write_report(cli.folder)}")
