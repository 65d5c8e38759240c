"""Protocols: every choice that a number depends on, in a record that a YAML file holds. `Suite.of` makes a suite of one.

What a protocol leaves open, where the data lie, is said where it is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ddil_lightning.bounds import at_least, seeds, within
from ddil_lightning.evaluation.views import Crops
from ddil_lightning.messages import explain, plain

BUILTIN = ("shapes", "digits")
"""Prompts that need no files: the built-in data, whose references, networks and judge are their own."""
CHOSEN = ("prompts", "seed", "batch", "metrics", "obtain", "name", "prompts.source", "prompts.n")
"""What a protocol of the built-in data can say; everything else is theirs."""
OWN, ALL = "prompts", "all"
"""References that are no place: the images of the chosen prompts, and all images of the set that they are chosen from."""
STATISTICS = (".safetensors", ".npz")
"""Files of statistics in the place of images, by the ends of their names."""
RESIZED = {("inception", "torch-fidelity"): "inception", ("inception", "clean-fid"): "inception_clean_fid"}
"""The network that reads by a resize convention, of networks that know several."""


@dataclass(frozen=True)
class PromptSource:
    """Prompts, one image each: where they are from, and which of them.

    Args:
        source: shapes or digits; COCO's captions json; a folder of captioned images; a jsonl or csv; a data set of Hugging Face (hub id,
            parquet, save_to_disk); or prompts alone: a txt with one a line, a json list of texts, several such files.
        images: the folder of the images that a file of captions names.
        captions: of several captions of an image the one with the lowest annotation id (elsewhere the first), the first as they stand, or
            all, a prompt each.
        n: so many images with their captions; null for all.
        choice: seed of the choice of n among more, which keeps their order.
        only: a file with the names or ids of the images that are taken, one a line; with n so many of these are chosen.
        image: the column of images; null where a data set has captions alone.
        caption: the column of captions; null for text, caption or prompt.
        split: of a data set of Hugging Face.
    """

    source: str | list[str]
    images: str | None = None
    captions: Literal["lowest_id", "first", "all"] = "lowest_id"
    n: int | None = None
    choice: int = 0
    only: str | None = None
    image: str | None = "image"
    caption: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        at_least(2, n=self.n)
        seeds(choice=self.choice)


@dataclass(frozen=True)
class ReferenceSource:
    """The real images that generated ones are compared with.

    Args:
        source: prompts for the images of the chosen prompts; all for all images of their set; a folder of images or a data set; a file of
            statistics (.safetensors of ddil-test --save_reference, .npz with mu and sigma); null for none, and no metric that needs them.
        skip_unreadable: leave out images that cannot be read, and count them in the stamp; otherwise the first of them ends it.
        image: the column of images of a data set or a list; null for that of the prompts, else image. It needs no captions.
        split: of a data set of Hugging Face; null for that of the prompts.
    """

    source: str | None = OWN
    skip_unreadable: bool = False
    image: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class ProbePlan:
    """Some of the prompts that are drawn with several seeds each, for diversity.

    Args:
        prompts: how many; 0 for none.
        seeds: images of each.
    """

    prompts: int = 50
    seeds: int = 10

    def __post_init__(self) -> None:
        at_least(0, prompts=self.prompts)
        within(2 if self.prompts else 0, 10**6, seeds=self.seeds)


@dataclass(frozen=True)
class Protocol:
    """How a sampler is measured.

    Args:
        prompts: what is asked for.
        references: what the images are compared with.
        size: edge in pixels of real images, cut to their central square, and of generated ones beside them; null for as they are.
        resize: the convention by which Inception's input is made of them: clean-fid or torch-fidelity; null where another network looks.
        crops: parts at full resolution, for a patch FID; null for none.
        networks: what is looked through, by name or NAME:PATH: features, clip, distance, embed, hps, pickscore, image_reward.
        probes: prompts with several seeds.
        seed: of the noise of all images; those of 0 have the seeds 0, 1 and so on, and no other seed shares any of them.
        batch: images asked of the sampler at a time; null for 16, or 128 of the small built-in ones. No number depends on it.
        metrics: keys of the metrics that are asked for; null for all that can be had.
        obtain: where the data can be had, for who has not got them.
        name: what tables call it; null for the name of its file.
    """

    prompts: PromptSource
    references: ReferenceSource = ReferenceSource()
    size: int | None = 256
    resize: Literal["clean-fid", "torch-fidelity"] | None = None
    crops: Crops | None = None
    networks: dict[str, Any] = field(default_factory=dict)
    probes: ProbePlan = ProbePlan()
    seed: int = 0
    batch: int | None = None
    metrics: list[str] | None = None
    obtain: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        seeds(seed=self.seed)
        at_least(1, batch=self.batch, size=self.size)
        if self.prompts.source in BUILTIN:
            _check_builtin(str(self.prompts.source), _said(self) + [f"prompts.{key}" for key in _said(self.prompts)])
        features = self.networks.get("features")
        if self.resize is not None and self.features_name not in {network for network, _ in RESIZED}:
            raise ValueError(f"resize {self.resize} is a convention of inception, and features are {features}: leave resize out")

    @property
    def features_name(self) -> str:
        """What the features' network is called, without its place and options."""
        features = self.networks.get("features")
        return str(features.get("name")) if isinstance(features, Mapping) else str(features).partition(":")[0]

    def differing(self, n: int | None = None, seed: int | None = None) -> tuple[Protocol, dict[str, Any]]:
        """The protocol with another number of prompts or another seed, and what of it is not its own, for the stamp.

        The choice of prompts keeps its own seed: it is the same set under other noise. The built-in data draw their prompts by the seed.
        """
        other, changed = self, {}
        if n is not None and n != self.prompts.n:
            other, changed["n"] = replace(other, prompts=replace(self.prompts, n=n)), n
        if seed is not None and seed != self.seed:
            other, changed["seed"] = replace(other, seed=seed), seed
        return other, changed


def protocol(table: Mapping[str, Any], where: str) -> Protocol:
    """The protocol of a table as YAML holds it. Raises ValueError of one line, `where` first, for what none holds."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Protocol, "protocol")
    prompts = table.get("prompts")
    if isinstance(prompts, Mapping) and prompts.get("source") in BUILTIN:
        known = [key for key in _keys() if key.count(".") == 1 or key.startswith("protocol.prompts.")]
        said_of = [*table, *(f"prompts.{key}" for key in prompts)]
        _check_builtin(prompts["source"], [key for key in said_of if f"protocol.{key}" in known], f"{where}: ")
    try:
        made = parser.instantiate_classes(parser.parse_object({"protocol": dict(table)})).protocol
    except (argparse.ArgumentError, ValueError) as error:
        said = explain(plain(str(error)), _keys()).replace("protocol.", "").replace("the command needs", "it needs")
        raise ValueError(f"{where}: {said}") from error
    return replace(made, name=made.name or Path(where).stem)


def _check_builtin(source: str, said: Sequence[str], where: str = "") -> None:
    """Raises ValueError for keys that a protocol of the built-in data does not heed."""
    other = [key for key in said if key not in CHOSEN]
    if other:
        raise ValueError(
            f"{where}{source} brings real images, networks, size, crops and probes of its own: leave {', '.join(other)} out, of a protocol "
            f"of it are {', '.join(CHOSEN[-2:] + CHOSEN[1:-2])}"
        )


def _said(part: Protocol | PromptSource) -> list[str]:
    """The names of the options that are not as by default."""
    found = []
    for option in fields(part):
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        if getattr(part, option.name) != default:
            found.append(option.name)
    return found


def _keys() -> list[str]:
    """All dotted keys that a protocol has."""
    parts = {"prompts": PromptSource, "references": ReferenceSource, "probes": ProbePlan, "crops": Crops}
    inner = [f"protocol.{name}.{option.name}" for name, part in parts.items() for option in fields(part)]  # type: ignore[arg-type]
    return [*(f"protocol.{option.name}" for option in fields(Protocol)), *inner]
