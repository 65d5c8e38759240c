"""ddil-fit: Lightning's CLI over methods, the DDIL DataModule and the run folder. The one place where everything meets."""

from __future__ import annotations

import difflib
import logging
import os
import re
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from . import runs
from .callbacks import AnnealPrior, Cadence, Checkpoints, FlushBuffer, Previews, Progress  # noqa: F401 (short names in configs)
from .captions import Digits, Images, Prompts, Shapes  # noqa: F401
from .datamodule import DDILDataModule
from .main import Refusal
from .methods import LCM, Distillation  # noqa: F401
from .prior import Constant, Cosine, Exponential, Gated, Linear, Piecewise  # noqa: F401

Wandb = Literal["off", "offline", "online"]


@dataclass
class Test:
    """What a run is measured by when it ends: `n` held-out prompts, the rows, the suite's seed. n = 0: no test."""

    n: int = 512
    teacher_steps: list[int] = field(default_factory=lambda: [32, 4, 2, 1])
    student_steps: list[int] = field(default_factory=lambda: [4, 2, 1])
    seed: int = 0


class FitCLI(LightningCLI):
    """Parses, makes the run folder, builds trainer, method and data. `fit` below runs them."""

    def __init__(self, args: list[str], rebuild: bool = False) -> None:
        self.rebuild = rebuild
        super().__init__(
            Distillation,
            DDILDataModule,
            run=False,
            args=args,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={"max_epochs": -1, "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1},
            parser_kwargs={
                "exit_on_error": False,
                "prog": "ddil-fit",
                "usage": "ddil-fit --config NAME [--updates N] [--seed N] [any.key=value ...]",
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, the checkpoint, W&B, and the callbacks that every run has."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="the run folder (default: runs/<config>/<time>)")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="go on from a checkpoint file, a run folder, or `last`")
        parser.add_argument("--wandb", type=Wandb, default="off", help="log to Weights & Biases too")
        parser.add_argument("--export_steps", type=int, default=4, help="the step count that the exported pipeline recommends")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(Previews, "previews")
        parser.add_lightning_class_args(Progress, "progress")
        parser.add_class_arguments(Test, "test")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """The run folder exists, with the exact config in it, before anything heavy is loaded."""
        self.name = config_name(self.config)
        if self.rebuild:
            return
        first = not os.environ.get("DDIL_RUN_DIR")
        self.resumed: Path | None = None
        if self.config.ckpt_path:
            self.resumed = runs.checkpoint(self.config.ckpt_path, self.config.run_dir, self.name)
            runs.load_checkpoint(self.resumed)
        self.folder = Path(os.environ.get("DDIL_RUN_DIR") or self._folder())
        os.environ["DDIL_RUN_DIR"] = str(self.folder.resolve())  # ranks that Lightning launches run this command again
        if first:
            self.parser.save(self.config, str(self.folder / "config.yaml"), overwrite=True, skip_none=False)
            runs.point_latest(self.folder, self.name)

    def _folder(self) -> Path:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not self.config.run_dir:
            raise Refusal("launched on several processes: give --run_dir, so that all of them write to the same folder")
        if self.resumed is not None and self.resumed.parent.name == "checkpoints" and not self.config.run_dir:
            return self.resumed.parent.parent
        if self.resumed is not None and self.config.run_dir and (Path(self.config.run_dir) / "checkpoints") == self.resumed.parent:
            return Path(self.config.run_dir)
        return runs.new_folder(self.config.run_dir, self.name)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, writing to the run folder."""
        if self.rebuild:
            return super().instantiate_trainer(logger=False, **kwargs)
        return super().instantiate_trainer(default_root_dir=str(self.folder), logger=self._loggers(), **kwargs)

    def _loggers(self) -> list[Any]:
        from lightning.pytorch.loggers import CSVLogger

        given = self.config_init.trainer.logger
        loggers = given if isinstance(given, list) else [given] if given not in (None, True, False) else []
        old = runs.old_metrics(self.folder, runs.load_checkpoint(self.resumed)["ddil"]["student_updates"]) if self.resumed else []
        csv = CSVLogger(str(self.folder), name="", version="", flush_logs_every_n_steps=1)
        for row in old:
            csv.log_metrics(row, step=int(row["student_updates"]))
        if self.config.wandb != "off":
            loggers.append(wandb_logger(self.folder, self.name, self.config.wandb, self.config.as_dict()))
        return [csv, *loggers]


def wandb_logger(folder: Path, name: str, mode: Wandb, config: dict[str, Any]) -> Any:
    """A W&B logger that never asks for a key: offline, or online with the key of the environment."""
    from lightning.pytorch.loggers import WandbLogger

    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()):
        raise Refusal(
            "--wandb online needs a key: run `wandb login` once or set WANDB_API_KEY, or use --wandb offline and `wandb sync` later"
        )
    return WandbLogger(
        project="ddil-lightning", name=f"{name}/{folder.name}", save_dir=str(folder), offline=mode == "offline", config=config
    )


def config_name(config: Namespace) -> str:
    """The name of a run's config: the last --config file's stem, with its folder below configs/ (toy2d/pd)."""
    files = [str(c) for c in config.get("config") or []]
    return Path(files[-1]).stem if files else "custom"


def parse(words: list[str]) -> FitCLI:
    """Parse and build. Raises Refusal with one line for every fault of the command line or the config."""
    try:
        return FitCLI(words)
    except ArgumentError as error:
        raise Refusal(explain(str(error), words)) from error


def explain(message: str, words: list[str]) -> str:
    """jsonargparse's message on one line: the key, what is wrong, the nearest key that exists."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    text = " ".join(lines)
    # The innermost reason stands last; what precedes it are the types that were tried.
    key = re.search(
        r'(?:Option|Key) [\'"]([\w.]+)[\'"] is not accepted|key "([\w.]+)"|Unrecognized arguments: --([\w.+]+)',
        text,
    )
    if "is not accepted" in text or "Unrecognized arguments" in text or "not expected" in text:
        wrong = next((g for g in (key.groups() if key else ()) if g), None)
        if wrong:
            last = wrong.split(".")[-1]
            near = difflib.get_close_matches(last, known_keys(), n=1, cutoff=0.6)
            return f"unknown key {wrong}" + (f": did you mean {near[0]}?" if near else "; `ddil-fit --help` lists the keys")
    text = re.sub(r"Does not validate against any of the Union subtypes.*?Errors:", "", text)
    return text if len(text) < 400 else text[:200] + " ... " + text[-200:]


def known_keys() -> list[str]:
    """Every parameter name of the classes that a config can hold."""
    import inspect

    classes: list[Any] = [Distillation, *Distillation.__subclasses__(), DDILDataModule, Trainer, Checkpoints, Previews, Test]
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")}
    return sorted(
        names
        | {
            "run_dir",
            "ckpt_path",
            "wandb",
            "updates",
            "seed",
            "checkpoint_every",
            "forward",
            "student",
            "teacher",
            "mix",
            "model",
            "data",
            "trainer",
        }
    )


def quiet() -> None:
    """Silence, by message, what says nothing to a user of this library; whole categories stay heard."""
    for message in (
        "isinstance.treespec",
        "does not have many workers",
        "module.s. in eval mode",
        "exists and is not empty",
        "Experiment logs directory",
        "You are using the plain ModelCheckpoint",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    tips = ("Tip:", "available:", "LOCAL_RANK", "Trainer.fit` stopped", "Restor", "`weights_only` was not set")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not any(tip in record.getMessage() for tip in tips))
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)


def fit(words: list[str]) -> int:
    """Train, export, check, test, report. Returns the exit code: 0, or 130 after Ctrl-C (with a checkpoint)."""
    quiet()
    start = time.time()
    cli = parse(words)
    trainer, method, data = cli.trainer, cli.model, cli.datamodule
    if trainer.is_global_zero:
        print(f"run folder {cli.folder}", flush=True)
    checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
    try:
        trainer.fit(method, datamodule=data, ckpt_path=cli.resumed, weights_only=True if cli.resumed else None)
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error}; the last good checkpoint is {checkpoints.last or cli.resumed or 'none'}; lower model.lr or look at model.reflect"
        ) from error
    except RuntimeError as error:
        if cli.resumed and "state_dict" in str(error):
            raise Refusal(f"the checkpoint {cli.resumed} does not fit this config: {str(error).splitlines()[0]}") from error
        raise
    if checkpoints.interrupted:
        if trainer.is_global_zero:
            print(f"stopped at {method.student_updates} updates; go on with: ddil-fit --config {cli.name} --ckpt_path {checkpoints.last}")
        return 130
    if trainer.is_global_zero:
        finish(cli, start)
    return 0


def finish(cli: FitCLI, start: float) -> None:
    """What a complete run leaves behind: pipeline/, summary.json, report.html, and the table on the terminal."""
    from . import evaluate, export, scoring
    from .report import write_report

    method, test, folder = cli.model.eval(), cli.config_init.test, cli.folder
    trained = time.time()
    export.export(method, folder / "pipeline", cli.config.export_steps)
    prompts = (cli.datamodule.examples(4) or ["", ""])[:4]
    difference = export.verify(method, folder / "pipeline", prompts, cli.config.export_steps)
    print(f"pipeline written and checked: {folder / 'pipeline'} (latents differ by {difference:.1e})", flush=True)
    summary: dict[str, Any] = {
        "config": cli.name,
        "seed": cli.config.seed_everything,
        "student_updates": method.student_updates,
        "network_evaluations": method.evaluations,
        "export_difference": difference,
        "machine": machine(),
        "rows": [],
    }
    dataset = method.backbone.about.get("dataset")
    if test.n and dataset:
        suite = evaluate.Suite.builtin(dataset, n=test.n, seed=test.seed)
        say = lambda name: print(f"testing {name} on {test.n} prompts", flush=True)  # noqa: E731
        summary["rows"] = scoring.method_rows(suite, method, test.teacher_steps, test.student_steps, say)
    summary |= {"seconds": round(time.time() - start, 1), "seconds_training": round(trained - start, 1)}
    evaluate.write_rows(folder / "summary.json", summary)  # type: ignore[arg-type]
    page = write_report(folder)
    if summary["rows"]:
        print(evaluate.table(summary["rows"]), end="")
    print(f"{method.student_updates} updates, {summary['seconds']:.0f} s; report {page}")


def machine() -> dict[str, Any]:
    """What figures must be quoted with."""
    import platform
    from importlib import metadata

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    packages = ("ddil-lightning", "torch", "lightning", "diffusers", "transformers")
    versions = {name: metadata.version(name) for name in packages}
    return {"device": device, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **versions}


def rebuild(config: Path) -> Distillation:
    """The method that a run's config.yaml describes, with fresh weights and no run folder."""
    try:
        return FitCLI(["--config", str(config)], rebuild=True).model
    except ArgumentError as error:
        raise Refusal(f"{config}: {explain(str(error), [])}") from error
