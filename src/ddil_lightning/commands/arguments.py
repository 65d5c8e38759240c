"""What several commands share: their parser, the types of its arguments, and what a pipeline answers to them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddil_lightning.errors import Refusal


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses bad usage on one line and takes no abbreviated option."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Raises Refusal: bad usage is bad input like any other."""
        raise Refusal(f"{message}; {self.prog} --help shows the usage")


def place(text: str) -> str:
    """An argument that is a path or a hub id, with `~` for the home folder. Raises argparse's ArgumentTypeError for none."""
    if "\0" in text or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """An argument that is a path, as `place` reads it."""
    return Path(place(text))


def number(low: float, high: float, kind: type = int) -> Any:
    """A type for argparse that takes a number, of `kind`, from `low` to `high`."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = float("nan")
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")
        return value

    return read


STEPS, SEED, SCALE = number(1, 1000), number(0, 2**32 - 1), number(0, 1000, float)


@contextmanager
def advising(option: str) -> Iterator[None]:
    """Inside, a refusal of a prompt that is too long also names the command's `option` that cuts it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("or allow truncation", f"or cut it by {option}")) from error


def check_prompts(truncate: bool, suite: Any, backbone: Any) -> None:
    """Raises ValueError for a prompt that would be cut, before an hour of sampling and not in it, unless that is allowed."""
    if not truncate:
        with advising("--truncate"):
            backbone.check_length([*suite.prompts, *suite.probes.prompts])


def guidance_scale(backbone: Any, given: float | None) -> float:
    """The guidance_scale to call a pipeline with: as given, or as its card says (1 where guidance is baked in)."""
    if given is not None and backbone.baked:
        raise Refusal(baked(backbone.path, backbone.guidance))
    return float(backbone.about.get("guidance_scale", backbone.guidance)) if given is None else given


def baked(what: Any, g: float) -> str:
    """The refusal of another guidance by a student that has guidance `g` in its weights. `what`: its name."""
    return f"guidance {g:g} is part of the weights of {what}, and another would come on top of it: leave --guidance out"


def check_steps(backbone: Any, counts: Sequence[int], solvers: Sequence[bool] = (False,)) -> None:
    """Raises Refusal for a step count that the pipeline's scheduler cannot take, before an hour of sampling with another one."""
    for solved in (backbone.with_solver(dpm) for dpm in solvers):
        for n in counts:
            try:
                solved.check_steps(n)
            except ValueError as why:
                raise Refusal(f"--steps {n}: {backbone.path} cannot be sampled in so many steps ({why}): give another number") from why


def device() -> Any:
    """The device that a command samples on: the first GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pipeline_of(student: str, steps: int | None, purpose: str) -> str:
    """The pipeline of a run: that of the stage that was made for so many `steps`, else its last; what is no run is a pipeline itself.

    `purpose` ends a refusal's "there is none". Raises Refusal for a run that holds none.
    """
    from ddil_lightning.runs.folder import stage_pipelines

    run = Path(student)
    if not is_run(run):
        return student
    if (run / "student.safetensors").is_file():
        raise Refusal(f"no pipeline can hold the student of {run}, so there is none {purpose}")
    if not (run / "pipeline").is_dir():
        raise Refusal(f"{run} holds no exported pipeline (pipeline/): give a finished run, or make one of a checkpoint by ddil-export")
    return str(stage_pipelines(run).get(steps or 0, run / "pipeline"))


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, and no pipeline."""
    return not (folder / "model_index.json").is_file() and (folder / "config.yaml").is_file()
