"""`--help` tells what every option means: all of ddil-fit's, and those of every class that a config can name."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import ddil_lightning
from commandline import fit
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands import assembly
from ddil_lightning.commands.checks import OWN
from ddil_lightning.messages import parameters, subclasses
from ddil_lightning.miniature import pretrain
from ddil_lightning.training.plan import Part, Stage

OPTION = re.compile(r"^  (-.*?)(?=^  -|^\S|\Z)", re.M | re.S)
NAMED = sorted(
    {
        *(
            cls
            for cls in subclasses((assembly.Distillation, assembly.Captions, assembly.Schedule))
            if cls.__module__.startswith("ddil_lightning.")
            and cls.__name__ not in ("CacheFolder", "Encoded", "Points", "_Moves", "_Ramp")  # these are made by others, not named
        ),
        *(getattr(ddil_lightning, name) for name in ("AnnealPrior", "Cadence", "FlushBuffer", "ShiftProbe")),
        *(*OWN, assembly.DDILDataModule, assembly.Test, assembly.Toy, Pipeline, Stage, Part),
    },
    key=lambda cls: cls.__name__,
)


def meanings(page: str) -> dict[str, str]:
    """What a page of help says of every option, without its type and its default."""
    found: dict[str, str] = {}
    for entry in OPTION.findall(page[page.index("\n\n") :]):
        first, _, rest = entry.partition("\n")
        option, _, said = first.partition("  ")
        text = " ".join(f"{said} {rest}".split())
        found[option.split()[0].rstrip(",")] = re.sub(r"\(?(type|required, type|default): .*", "", text).strip()
    return found


def unexplained(page: str) -> list[str]:
    return [option for option, said in meanings(page).items() if not said]


def page_of(cls: type) -> str:
    """The help of a class, as jsonargparse makes it wherever a config names one."""
    parser = ArgumentParser(prog="x")
    parser.add_class_arguments(cls, "it")
    return parser.format_help()


def test_every_option_of_ddil_fit_has_its_meaning(capsys: Any) -> None:
    code, page, _ = fit(capsys, "--help")
    said = meanings(page)
    assert code == 0 and unexplained(page) == [] and "Train a few-step student" in page
    groups = {"data": assembly.DDILDataModule, "test": assembly.Test, **{cls.__name__.lower(): cls for cls in OWN}}
    wanted = {f"--{group}.{name}" for group, cls in groups.items() for name in names(cls)} - {"--data.seed"}
    assert wanted <= set(said) and {"--name", "--run_dir", "--ckpt_path", "--wandb", "--export_steps", "--trainer.devices"} <= set(said)
    assert said["--data.buffer.capacity"].startswith("states kept per process; 0 keeps none")


@pytest.mark.parametrize("name", ["LCM", "PD", "DMD2"])
def test_every_option_of_a_method_has_its_meaning(name: str, capsys: Any) -> None:
    code, page, _ = fit(capsys, "--model.help", name)
    assert code == 0 and unexplained(page) == []
    others = {"--model.pipeline.help", "--model.stages.help"}
    assert {f"--model.{option}" for option in names(getattr(ddil_lightning, name))} == set(meanings(page)) - others


def test_the_groups_of_data_and_trainer_are_in_the_whole_help(capsys: Any) -> None:
    pages = [fit(capsys, option)[1] for option in ("--help", "--data.help", "--trainer.help")]
    assert pages[0] == pages[1] == pages[2]


@pytest.mark.parametrize("cls", NAMED, ids=lambda cls: cls.__name__)
def test_every_argument_of_what_a_config_names_has_its_meaning(cls: type) -> None:
    page = page_of(cls)
    heads = {option.split(".")[1] for option in meanings(page) if option.startswith("--it.")}
    assert unexplained(page) == [] and {name for name in inspect.signature(cls).parameters if name != "kwargs"} <= heads


@dataclass(frozen=True)
class Half:
    """Half of it.

    Args:
        told: what it is.
    """

    told: int = 1
    untold: int = 2


class Whole:
    """Nothing of it."""

    def __init__(self, half: Half = Half(), other: str = "x", more: float | None = None) -> None:
        """Nothing."""


def test_a_missing_meaning_is_found() -> None:
    assert unexplained(page_of(Half)) == ["--it.untold"] and meanings(page_of(Half))["--it.told"] == "what it is."
    assert {"--it.other", "--it.more", "--it.half.untold"} <= set(unexplained(page_of(Whole)))


@pytest.mark.parametrize("option", ["--help", "--unet.lr"])
def test_every_option_of_ddil_pretrain_has_its_meaning(option: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    page = capsys.readouterr().out
    assert unexplained(page) == [] and option in page


def names(cls: type) -> set[str]:
    """The options of a class: its constructor's arguments, and the fields of a record in the record's place."""
    if is_dataclass(cls):
        return {field.name for field in fields(cls)}
    known = parameters(cls)
    records = {name.partition(".")[0] for name in known if "." in name}
    return {name for name in known if name not in records}
