"""ddil-cache: the data of a config through the frozen encoders of its pipeline, into a folder that training maps."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from ddil_lightning import plugins
from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands.assembly import Assembly
from ddil_lightning.commands.checks import say_data
from ddil_lightning.commands.launched import together
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.data.notices import say_notices
from ddil_lightning.data.preparation import check_sizes, own_captions
from ddil_lightning.data.writer import Keeping, Writer
from ddil_lightning.errors import Refusal
from ddil_lightning.files import check_writable
from ddil_lightning.messages import plain
from ddil_lightning.signals import Stopped
from ddil_lightning.training.options import Memory


class CacheCLI(Assembly):
    """The parser of ddil-fit with the options of a cache: of the parts of a config it makes the data and the pipeline, and no method."""

    command, usage = "ddil-cache", "[--config NAME] [--pipeline PATH] [--captions.path PATH] --out DIR [any.key=value ...]"
    purpose = "Encode the images and captions of a config once, into a folder that training maps (data.cache)."

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Also the folder and how it keeps what is encoded."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--out", type=str, required=True, help="the folder to write, or to go on with; `data.cache` names it in training"
        )
        parser.add_class_arguments(Keeping)
        parser.add_argument("--verify", type=bool, default=False, help="alone with --out: compare every file of a cache with its checksum")

    def instantiate_classes(self) -> None:
        """Make the data and the pipeline; what a constructor refuses, it says in its own words."""
        say_data(self.config.data)
        try:
            self.datamodule = self.parser.instantiate_classes(Namespace(data=self.config.data)).data
            self.backbone = backbone_of(self.config.model.init_args)
        except ValueError as error:
            raise ValueError(plain(str(error))) from error


def backbone_of(method: Any) -> Backbone:
    """The pipeline of a method's options. A diffusers pipeline's network has no weights: nothing but the encoders is used."""
    if not hasattr(method.pipeline, "class_path"):
        return Pipeline(method.pipeline, **Memory(**vars(method.memory)).stored, bare=True)
    given = method.pipeline.clone()
    if "bare" in given.get("init_args", {}):
        given.init_args.bare = True
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "pipeline", required=True)
    return parser.instantiate_classes(parser.parse_object({"pipeline": given.as_dict()})).pipeline


def cache(words: Sequence[str]) -> int:
    """Encode everything that is not there yet, and say what is there now."""
    begun = time.monotonic()
    plugins.load()  # before the config is read, which may name their classes in short
    cli = CacheCLI(words)
    data, folder = cli.datamodule, Path(cli.config.out)
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"--out {folder} is a file: give a folder")
    check_writable(folder / "manifest.json")
    processes, where = together()
    for part in cli.backbone.parts():
        if not any(weight.is_meta for weight in part.parameters()):  # the network has none
            part.to(where)
    captions = cli.backbone.captions if data.captions is None else data.captions
    captions = own_captions(cli.backbone) if captions is None else captions
    if isinstance(captions, Encoded):
        raise Refusal("data.captions are encoded already")
    captions.on_error = data.on_error
    check_sizes(captions, cli.backbone)
    keeping = Keeping(cli.config.dtype, cli.config.text, cli.config.shard_rows)
    writer = Writer(folder, captions, cli.backbone, keeping, data.truncate, data.workers, processes)
    try:
        about = writer.write()
    except KeyboardInterrupt as stop:
        said = f"stopped; what is whole in {folder} stays, and the same command goes on"
        raise Stopped(getattr(stop, "number", signal.SIGINT), said) from stop
    if processes.first and not about["complete"]:
        print(f"nothing is missing any more; another process, which was here first, looks all files over and completes {folder}")
    elif processes.first:
        say_notices(about["skipped"]["count"], about["enlarged"], about["rows"])
        size = sum(known["bytes"] for known in about["files"].values()) / 2**20
        made = f"{about['rows']} rows, {about['captions']} captions, {size:.1f} MiB, {time.monotonic() - begun:.0f} s"
        print(f"{made}: {folder}; train on it by data.cache={folder}")
    return 0
