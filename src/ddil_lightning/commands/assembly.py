"""Method, data and trainer of a config and the words of a command line. `assemble` makes them for Python, ddil-fit a run of them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import ArgumentError
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import ddil_lightning.methods  # noqa: F401
from ddil_lightning import plugins
from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.bounds import seeds
from ddil_lightning.callbacks import AnnealPrior, Cadence, FlushBuffer, ShiftProbe, Stages, Validation  # noqa: F401 (short names in configs)
from ddil_lightning.commands.checks import (
    OWN,
    cautions,
    check_callbacks,
    check_method,
    check_room,
    check_shape,
    check_steps,
    check_trainer,
    refuse_data_seed,
    refuse_null,
    say_data,
)
from ddil_lightning.commands.configs import FIT_SHORT, MOVED, expand, in_present_names
from ddil_lightning.data.captions import Captions, Digits, Images, Prompts, Shapes  # noqa: F401
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.errors import Refusal
from ddil_lightning.imitation.prior import Constant, Cosine, Exponential, Gated, GatedBy, Linear, Piecewise, Schedule  # noqa: F401
from ddil_lightning.messages import each_text, explain, parameters, plain, subclasses
from ddil_lightning.runs.finish import Test
from ddil_lightning.runs.loggers import refuse_masked
from ddil_lightning.toy import Toy  # noqa: F401
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.options import check_precision
from ddil_lightning.training.plan import Part, Stage
from ddil_lightning.training.sharding import be_patient
from ddil_lightning.training.vision import BuiltinVision, Dino, Vision  # noqa: F401

Wandb = Literal["off", "offline", "online"]
BASES = (Distillation, Backbone, Stage, Part, Captions, Schedule, Callback, Logger, Vision)


class Assembled(NamedTuple):
    """What a config describes, ready for `trainer.fit(method, data)`."""

    trainer: Trainer
    method: Distillation
    data: DDILDataModule


def assemble(config: str | Path, *words: str, callbacks: Sequence[Callback] = ()) -> Assembled:
    """Trainer, method and data of a packaged config or a YAML file, as `ddil-fit --config CONFIG WORDS` would make them.

    There is no run: no folder, no loggers, no checkpoints, previews or progress, and the pipelines of a plan's stages are written only
    where `stages.folder` or `trainer.default_root_dir` says where. Everything else is ddil-fit's, the seed and the checks included.

    Args:
        config: the name of a packaged config, or a file.
        words: what ddil-fit takes on its command line: `"--updates", "100"`, `"model.ema=0.9"`.
        callbacks: of the trainer, after those of the config.

    Raises:
        Refusal: for a fault of the words or the config, in the one line that ddil-fit says.
        ValueError: for a value that cannot be, in one line as well.
    """
    plugins.load()  # before the config is read, which may name their classes in short
    made = Assembly(expand(["--config", str(config), *words], FIT_SHORT), callbacks)
    return Assembled(made.trainer, made.model, made.datamodule)


class Assembly(LightningCLI):
    """Lightning's CLI over methods and the DDIL DataModule: parses `words`, checks them, and makes the parts."""

    acting: tuple[str, ...] = ("stages",)
    """Which of the groups of `OWN` are callbacks of the trainer, in their order: here those that decide what is trained."""

    command = "ddil-fit"
    usage = "--config NAME [--updates N] [--seed N] [--run_dir DIR] [--ckpt_path PATH|last] [--plan] [--profile N] [any.key=value]"
    purpose = "Train a few-step student as a config says; any key of it may be given after it."

    def __init__(self, words: Sequence[str], callbacks: Iterable[Callback] = ()) -> None:
        self._more = list(callbacks)
        super().__init__(
            Distillation,
            DDILDataModule,
            run=False,
            args=list(words),
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={"max_epochs": -1, "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1},
            parser_kwargs={
                "exit_on_error": False,
                "prog": self.command,
                "usage": f"{self.command} {self.usage}",
                "description": self.purpose,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """All options of ddil-fit: those of a run stand in its config.yaml, which can be assembled too."""
        parser.add_argument("--name", type=str | None, default=None, help="the run's name in runs/NAME/ (default: the first config's)")
        parser.add_argument("--run_dir", type=str | None, default=None, help="the run folder (default: runs/<config>/<time>)")
        goes_on = "go on from a checkpoint file, a run folder, or `last`; `last` with --run_dir begins where there is none yet"
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=goes_on)
        parser.add_argument("--wandb", type=Wandb, default="off", help="log to Weights & Biases too")
        parser.add_argument("--tensorboard", type=bool, default=False, help="log to TensorBoard too, in the run folder")
        parser.add_argument("--export_steps", type=int | None, default=None, help="the step count that the exported pipeline recommends")
        for cls in OWN:
            parser.add_class_arguments(cls, cls.__name__.lower(), fail_untyped=False, sub_configs=True)
        parser.add_class_arguments(Test, "test")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse. Raises Refusal with one line for every fault of the command line or the config."""
        self.config = self.parsed(parser, args)
        refuse_data_seed(args)
        seeds(**{"--seed": self.config.seed_everything})
        self.checked(self.config)

    @staticmethod
    def checked(config: Any) -> Any:
        """`config`, which describes a method and has no option that is null or masked and must not be. Raises Refusal or ValueError."""
        check_shape(config)
        refuse_null(config)
        refuse_masked(config.as_dict())
        return config

    def parsed(self, parser: LightningArgumentParser, words: Sequence[str]) -> Any:
        """The config of `words`, its old names translated. Raises Refusal, with the nearest key that there is, for one that is unknown."""
        try:
            return at_home(parser.parse_args(in_present_names(words)))
        except ArgumentError as error:
            methods = dict.fromkeys(f"model.{name}" for cls in subclasses([Distillation]) for name in parameters(cls))
            short = [name.lstrip("-") for name in FIT_SHORT]
            keys = [*short, *methods, *parser.get_defaults(skip_validation=True).keys()]
            moved = {f"{group}.{old}": f"{group}.{new}" for group, names in MOVED.items() for old, new in names.items()}
            raise Refusal(explain(str(error), keys, BASES, moved)) from error

    def before_instantiate_classes(self) -> None:
        """Raises Refusal for what only a run can do."""
        for name in ("run_dir", "ckpt_path"):
            if self.config[name]:
                raise Refusal(f"--{name} {self.config[name]}: only ddil-fit makes run folders and goes on from checkpoints: leave it out")

    def instantiate_classes(self) -> None:
        """Make method, data and trainer; what a constructor refuses, it says in its own words."""
        say_data(self.config.data)
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(plain(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check what the parts ask of each other, and make a trainer that writes and shows nothing by itself."""
        self.check_parts()
        stages, callbacks = self.config_init.stages, self.callbacks()
        if not (stages.folder or self.config.trainer.default_root_dir):
            stages.pipelines = False
        kept = {"enable_checkpointing": Checkpoint, "enable_progress_bar": ProgressBar}
        silent = {option: any(isinstance(c, kind) for c in callbacks) for option, kind in kept.items()}
        return self.checked_trainer(callbacks, logger=False, **silent, **kwargs)

    def check_parts(self) -> None:
        """Raises Refusal or ValueError for what method, data and options ask of each other in vain."""
        check_method(self.model)
        self.model.check_prior(self.datamodule.prior)
        check_steps(self.model, self.config_init)
        check_room(self.model, self.datamodule)
        check_trainer(self.config.trainer)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            for line in cautions(self.model, self.config_init):
                logging.getLogger(__name__).warning(line)

    def callbacks(self) -> list[Callback]:
        """The config's own callbacks, those of `acting`, and those that were given."""
        own = self.config_init.trainer.callbacks or []
        return [*(own if isinstance(own, list) else [own]), *(self.config_init[name] for name in self.acting), *self._more]

    def checked_trainer(self, callbacks: list[Callback], **settings: Any) -> Trainer:
        """The trainer of the config with these callbacks and settings. Raises Refusal or ValueError where they do not go together."""
        with of_the_trainer():
            trainer = super().instantiate_trainer(callbacks=callbacks, **settings, **elsewhere(self.config.trainer.accelerator))
            be_patient(trainer.strategy)
            check_precision(trainer.precision)
            check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
            for callback in callbacks:
                if isinstance(callback, (AnnealPrior, Stages)):
                    callback.setup(trainer, self.model, "fit")  # now, and not after the data have been encoded
        return trainer


def elsewhere(accelerator: Any) -> dict[str, Any]:
    """What a trainer is told besides, for a config that leaves its `accelerator` open: an Apple GPU, on which nobody has measured a run, is
    left alone."""
    from lightning.pytorch.accelerators import MPSAccelerator

    if accelerator != "auto" or not MPSAccelerator.is_available():
        return {}
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        logging.getLogger(__name__).warning("training on the CPU: nothing was measured on this GPU, which trainer.accelerator=mps takes")
    return {"accelerator": "cpu"}


@contextmanager
def of_the_trainer() -> Iterator[None]:
    """Inside, what Lightning finds fault with is a Refusal in one line."""
    try:
        yield
    except (MisconfigurationException, ImportError, RuntimeError, TypeError) as error:
        raise Refusal(f"trainer: {error}") from error


def at_home(config: Any) -> Any:
    """A config whose paths begin in no `~` any more: different libraries would expand it here and not there. Prompts are left alone."""

    def expand_user(name: str, text: str) -> str:
        return os.path.expanduser(text) if name != "prompts" and re.match(r"~[\w-]*(/|$)", text) else text

    return each_text(config, expand_user)
