"""What ddil-probe measures on: prompts of a protocol, of built-in data or of captions, their pictures, and the suite that scores."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands.protocols import BUILTIN, LEAST, Plan, planned, suite_of
from ddil_lightning.data.captions import Prompts
from ddil_lightning.errors import Refusal
from ddil_lightning.evaluation.captioned import Chosen, choice, read_set
from ddil_lightning.evaluation.galleries import Gallery
from ddil_lightning.evaluation.given import Given
from ddil_lightning.evaluation.material import ABOUT, named
from ddil_lightning.evaluation.networks import read_networks
from ddil_lightning.evaluation.presence import needing, present
from ddil_lightning.evaluation.protocols import ProbePlan, PromptSource, Protocol
from ddil_lightning.evaluation.registry import wanted
from ddil_lightning.evaluation.suite import Probes, Suite
from ddil_lightning.packaged import config_names
from ddil_lightning.processes import Processes
from ddil_lightning.streams import apart

COLUMNS = ("text", "caption", "prompt")
MOST = 256
"""Prompts of the built-in data and of captions, where nothing is said of how many."""

Pictures = Callable[[int], Iterator[Tensor]]
"""Of a number B, pictures in the order of their prompts, [B, 3, H, W] in [-1, 1] at a time."""


@dataclass(frozen=True, eq=False)
class Lines:
    """The first captions of a set without images, and `why` it has none, in words."""

    source: str
    prompts: list[str]
    seed: int
    why: str


@dataclass(frozen=True, eq=False)
class Material:
    """Prompts, the seed of their noise, their pictures where they have some (else `without` says why), and the suite that scores both.

    `unread`: after the pictures have been gone through, why not all of them could be read; empty where they could.
    """

    prompts: list[str]
    seed: int
    pictures: Pictures | None
    without: str
    suite: Callable[[], Suite]
    unread: Callable[[], str] = str


def asked(args: argparse.Namespace) -> Plan | Lines:
    """What --protocol names: built-in data, a packaged protocol or a YAML file as ddil-test reads them, or captions of one's own.

    A name of a packaged protocol is that one, and a name that ends in .yaml or .yml is never captions. Raises Refusal, or as what reads
    captions does, for what is none of these, for files that are not there and for fewer than 16 prompts.
    """
    name = args.protocol
    args = argparse.Namespace(**vars(args) | {"layout": "folder"})
    if is_protocol(name):
        return planned(args, MOST)  # type: ignore[return-value]  # it is None where nothing is named
    if args.data is not None:
        raise Refusal(f"--data {args.data} holds the files of a protocol, and {name} is none: leave it out, or name one by --protocol")
    args = argparse.Namespace(**vars(args) | {"data": name, "protocol": None})
    if name in BUILTIN:
        return planned(args, MOST)  # type: ignore[return-value]
    return _own(args)


def is_protocol(name: str) -> bool:
    """Whether --protocol NAME is a protocol of ddil-test's, packaged or in a file, and neither built-in data nor captions."""
    return name.lower().endswith((".yaml", ".yml")) or (name not in BUILTIN and f"protocols/{name}.yaml" in config_names())


def _own(args: argparse.Namespace) -> Plan | Lines:
    """Captions of one's own, with their images where these can be read."""
    read_networks(args.network)  # first: a name that says nothing is no matter of the captions
    columns = any((args.image_column, args.caption_column, args.split, args.reference, args.skip_unreadable))
    plan: Plan | None = None
    first: Exception | None = None
    for caption in (None, *COLUMNS[1:]) if args.caption_column is None else (args.caption_column,):  # None is text, to a data set
        try:
            plan = planned(argparse.Namespace(**vars(args) | {"caption_column": caption}), MOST)
        except (FileNotFoundError, ValueError) as error:
            first = first or error
            if "no column" in str(error):
                continue
        break
    if plan is None and first is not None:
        if columns:  # what is named is meant
            raise first
        return _lines(args, first)
    if plan is None or (plan.protocol.references.source is None and not columns):
        return _lines(args, None)
    return plan


def _lines(args: argparse.Namespace, why: Exception | None) -> Lines:
    """Captions alone. Raises `why`, the reason for which they were not read with images, where they cannot be read either."""
    every = _texts(args.data, why) if why else [texts[0] for texts in read_set(PromptSource(args.data)).captions]
    n = min(MOST, len(every)) if args.n is None else min(args.n, len(every))
    _enough(n, f"{args.data} holds {len(every)} captions")
    return Lines(args.data, every[:n], args.seed or 0, f"{args.data} has captions without images{f' ({why})' if why else ''}")


def _texts(source: str, why: Exception) -> list[str]:
    for column in COLUMNS if Path(source).exists() else ():  # of what is not here the Hub was asked before
        try:
            lines = Prompts(source, column)
            return lines.prompts(range(len(lines)))
        except (OSError, ValueError, KeyError):
            continue
    if Path(source).exists():
        raise why
    known = ", ".join(Path(name).stem for name in config_names() if name.startswith("protocols/"))
    raise ValueError(f"{why}; protocols are {known}, or a YAML file") from why


# One image a prompt ----------------------------------------------------------------------------------------------------------------


def _single(plan: Plan, own: bool) -> Plan:
    """The plan with one image a prompt, as the paper's tables have it: without the probes, what is measured of them, and its networks.

    `own`: captions without a protocol, of which the stamp has no other one to tell. Raises Refusal where nothing is left to measure.
    """
    made, changed = plan.protocol, dict(plan.changed)
    lost = [key for key in made.metrics or () if all(metric.over == "probes" for metric in wanted([key]))]
    if lost:
        said = f"{', '.join(lost)}, for ddil-probe draws one image of a prompt"
        if lost == made.metrics:
            raise Refusal(f"protocol {made.name} asks for nothing but {said}: leave the sweeps out, by --only nodes")
        print(f"left out: {said}", flush=True)
        made = replace(made, metrics=[key for key in made.metrics or () if key not in lost])
    if plan.networks is None:
        return plan._replace(protocol=made)
    if made.probes.prompts:
        changed |= {} if own else {"probes": 0}
        made = replace(made, probes=ProbePlan(0, 0))
    numbers = {column.key for metric in wanted(made.metrics) if metric.over == "prompts" for column in metric.columns}
    idle: dict[str, Any] = {member: None for member in plan.networks.named if not numbers & set(needing(member))}
    return Plan(made, changed, replace(plan.networks, **idle))


# Prompts, pictures, suite ----------------------------------------------------------------------------------------------------------


def material(args: argparse.Namespace, found: Plan | Lines, backbone: Pipeline) -> Material:
    """The prompts of what was `asked` for, their pictures in the pipeline's size, read when they are asked for, and the suite.

    Raises ValueError for fewer than 16 prompts, and as what reads them does.
    """
    if isinstance(found, Lines):
        return Material(found.prompts, found.seed, None, found.why, lambda: _texts_suite(args, found, backbone))
    args = argparse.Namespace(**vars(args) | {"samples": 1})
    protocol = found.protocol

    def suite() -> Suite:
        made: Suite = suite_of(args, _single(found, not is_protocol(str(args.protocol))), backbone, Processes())
        return made

    seed, source = protocol.seed, protocol.prompts.source
    if source in BUILTIN:
        n = 512 if protocol.prompts.n is None else protocol.prompts.n  # as `Suite.of` has it
        images, prompts = drawn(str(source), _enough(n, f"{protocol.name} asks for {n} prompts"), seed)
        return Material(prompts, seed, lambda size: iter(images.split(size)), "", suite)
    chosen, why = _chosen(protocol)
    _enough(len(chosen.prompts), f"{protocol.name} asks for {len(chosen.prompts)} prompts")
    height, width = backbone.size
    if chosen.pictures is None:
        return Material(chosen.prompts, seed, None, why, suite)
    if height != width:
        why = f"{backbone.path} samples no squares, as which the images of {_said(protocol)} are read"
        return Material(chosen.prompts, seed, None, why, suite)
    gallery = _each(chosen, chosen.pictures, protocol.references.skip_unreadable)

    def unread() -> str:
        first = next(iter(gallery.unreadable.values()), "")
        return f"{len(gallery.unreadable)} of {len(gallery)} pictures cannot be read, first {first}" if first else ""

    return Material(chosen.prompts, seed, lambda size: gallery.squares(height, size), "", suite, unread)


def _chosen(protocol: Protocol) -> tuple[Chosen, str]:
    """The prompts with their pictures; where the protocol needs none of these and they are not there, without, and why, in words."""
    try:
        chosen = choice(read_set(protocol.prompts), protocol.prompts)
    except FileNotFoundError as error:
        if protocol.references.source in ABOUT:
            raise
        chosen = choice(read_set(protocol.prompts, there=False), protocol.prompts)
        return chosen._replace(pictures=None), str(error)
    return chosen, "" if chosen.pictures is not None else f"{_said(protocol)} has captions without images"


def _each(chosen: Chosen, pictures: Gallery, skip: bool) -> Gallery:
    """The picture of every prompt, in their order: one again where it has several prompts."""
    if not chosen.groups:
        return pictures.take(range(len(pictures)), skip)
    order = {group: k for k, group in enumerate(dict.fromkeys(chosen.groups))}
    return Gallery(pictures.sources, [pictures.rows[order[group]] for group in chosen.groups], skip)


def _said(protocol: Protocol) -> str:
    source = protocol.prompts.source
    return source if isinstance(source, str) else ", ".join(source)


def _texts_suite(args: argparse.Namespace, found: Lines, backbone: Pipeline) -> Suite:
    """The suite of captions alone: what a network reads of an image and its caption."""
    networks = named(Protocol(PromptSource(found.source), networks={"clip": "open_clip"}), args.network)
    given = Given(present(replace(networks, strict=args.strict), backbone.device))
    source = f"the first {len(found.prompts)} of {found.source}"
    return Suite(Path(found.source).stem, found.prompts, given, Probes(), apart(found.seed), source=source)


def drawn(data: str, n: int, seed: int) -> tuple[Tensor, list[str]]:
    """Held-out images of the built-in data, and prompts that say of each what is on it: those of `Suite.builtin`."""
    from ddil_lightning.miniature import digits, shapes
    from ddil_lightning.miniature.sources import held_out, load_source

    prompts: Sequence[str] = load_source(data).prompts(n, seed)
    if data == "shapes":
        return shapes.render(shapes.draw_scenes(n, held_out(seed))), list(prompts)
    images, labels = digits.split("held_out")
    of = {k: (labels == k).nonzero().flatten().tolist() for k in range(10)}
    rows = [of[k][i // 10 % len(of[k])] for i, k in enumerate(digits.parse(prompt)["digit"] for prompt in prompts)]
    return images[rows], list(prompts)


def _enough(n: int, what: str) -> int:
    if n < 16:
        raise ValueError(f"{what}: {LEAST}")
    return n
