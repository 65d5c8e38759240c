"""A method from a checkpoint, rebuilt from the config of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.source import Source
from ddil_lightning.commands.configs import read_config
from ddil_lightning.errors import Refusal
from ddil_lightning.messages import explain, plain, quiet
from ddil_lightning.runs.checkpoint import check_clocks, check_fits, config_of, find_checkpoint, load_checkpoint, reinstate
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.options import Memory


def rebuild(config: Path) -> Distillation:
    """The method that a run's config.yaml describes, for inference: networks of a diffusers pipeline are without weights, but for adapters.

    Data, callbacks and trainer are not made. Raises Refusal, naming the file, for a config that is none or that describes no method.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Distillation, "model", required=True)
    try:
        parsed = parser.parse_object({"model": read_config(config).get("model")})
        args = parsed.model.init_args
        args.memory.quantize = None  # for training alone; the teacher is tested as it is
        named = isinstance(args.pipeline, str) or not hasattr(args.pipeline, "class_path")
        if named and args.adapter.rank is None:  # adapters need the network below them
            args.pipeline = Pipeline(Source.of(args.pipeline), **Memory(**vars(args.memory)).stored, bare=True)
        return parser.instantiate_classes(parsed).model
    except ArgumentError as error:
        raise Refusal(f"{config}: {explain(str(error), [], [Distillation])}") from error
    except ValueError as error:
        raise ValueError(f"{config}: {plain(str(error))}") from error


def restore(ckpt_path: str | Path) -> Any:
    """The method of a checkpoint, rebuilt from the config.yaml of its run, for inference: only the deployed network is read.

    Raises ValueError where either is missing, lacks something, or they do not fit.
    """
    path = find_checkpoint(str(ckpt_path), None, "")
    config = config_of(path)
    state = load_checkpoint(path)
    quiet()
    method = rebuild(config)
    check_fits(path, state, method)
    check_clocks(path, state, method)
    reinstate(method, state)
    return method.eval()
