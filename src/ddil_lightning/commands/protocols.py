"""The protocols of ddil-test: a packaged one or a file by name, or one of the user's own data, and what the command line changes of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddil_lightning.commands.arguments import advising, path, place
from ddil_lightning.commands.generating import several
from ddil_lightning.errors import Refusal
from ddil_lightning.packaged import config_names

if TYPE_CHECKING:
    from ddil_lightning.commands.teaching import Teacher
    from ddil_lightning.evaluation.networks import Networks
    from ddil_lightning.evaluation.protocols import PromptSource, Protocol
    from ddil_lightning.processes import Processes

BUILTIN = ("shapes", "digits")
OF_FILES = ("images", "reference", "skip_unreadable", "image_column", "caption_column", "split")
LEAST = "at least 16 prompts, and some hundreds for numbers that mean something"


class Plan(NamedTuple):
    """What is measured by, what of the named protocol the command line changes, and the networks, None for those of built-in data."""

    protocol: Protocol
    changed: dict[str, Any]
    networks: Networks | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ddil-test that say what is measured by, besides --data, --n and --seed."""
    known = ", ".join(Path(name).stem for name in config_names() if name.startswith("protocols/"))
    parser.add_argument("--protocol", type=place, help=f"{known}, or a YAML file of your own: every choice that numbers depend on")
    parser.add_argument("--save_reference", type=path, help="write the statistics of the real images (.safetensors, .npz), and no more")
    add_sources(parser, "--data")


def add_sources(parser: argparse.ArgumentParser, data: str) -> None:
    """The options that say how captions and real images are read, and the networks. `data`: the option that names the captions."""
    parser.add_argument("--images", type=place, help="the folder of the images that a caption file names")
    parser.add_argument("--reference", type=place, help="other real images: a folder, a data set, or statistics (.safetensors, .npz)")
    parser.add_argument("--image_column", help=f"the column of images of {data} (default: image); none for captions alone")
    parser.add_argument("--caption_column", help=f"the column of captions of {data} (default: text, caption or prompt)")
    parser.add_argument("--split", help="the split of a Hugging Face data set (default: train)")
    parser.add_argument("--skip_unreadable", action="store_true", help="leave out real images that cannot be read; the stamp counts them")
    parser.add_argument(
        "--network",
        nargs="+",
        action="extend",
        default=[],
        help="[FOR=]NAME[:PATH], for captions of your own or a protocol: hps, features=inception:FILE, clip=none",
    )
    parser.add_argument("--strict", action="store_true", help="refuse a network that cannot be had, instead of leaving its metrics out")


def planned(args: argparse.Namespace, most: int = 1000) -> Plan | None:
    """The protocol that the arguments ask for, with its files in their places; None for the data that a pipeline names itself.

    `most`: prompts of built-in data and of captions of one's own, where --n says nothing and there are so many.
    Raises Refusal for what does not go together, for files that are not there and for fewer than 16 prompts.
    """
    if args.protocol is None and args.data is None:
        if any((args.reference, args.image_column, args.caption_column, args.split, args.skip_unreadable)):
            raise Refusal(
                "--reference, --image_column, --caption_column, --split and --skip_unreadable are of --data or --protocol: give one"
            )
        return None
    plan = _named(args) if args.protocol is not None else Plan(_builtin(args, most) if args.data in BUILTIN else _own(args, most), {})
    given = [name for name in OF_FILES if getattr(args, name)] if plan.protocol.prompts.source in BUILTIN else []
    if given:
        raise Refusal(f"{plan.protocol.prompts.source} has its own real images: leave --{', --'.join(given)} out")
    made, changed, _ = plan
    if args.protocol is not None and made.prompts.source not in BUILTIN:
        changed.update(_other_networks(args, made))
    if args.reference is not None:
        from ddil_lightning.evaluation.placing import against

        made = against(made, args.reference)
    if args.skip_unreadable:
        made = replace(made, references=replace(made.references, skip_unreadable=True))
    return Plan(made, changed, _networks(args, made))


def suite_of(args: argparse.Namespace, plan: Plan | None, backbone: Any, processes: Processes, teacher: Teacher | None = None) -> Any:
    """The suite of a plan, or of the data that the pipeline names; says once what it leaves out. It awaits the images of a `teacher`."""
    if plan is None:
        data = backbone.about.get("dataset")
        if data is None:
            said = "say --data shapes, --data digits, --data CAPTIONS --images DIR or --protocol NAME"
            raise Refusal(f"the pipeline {backbone.path} names no data set: {said}")
        made_of = _builtin(argparse.Namespace(**vars(args) | {"data": data}))
        plan = Plan(made_of, {}, _networks(args, made_of))
    return _shared(args, plan, backbone, processes, teacher)


def _shared(args: argparse.Namespace, plan: Plan, backbone: Any, processes: Processes, teacher: Teacher | None) -> Any:
    """The suite of a plan in every process: the first looks at the real images, and the others find its statistics in the cache."""
    from ddil_lightning.evaluation.captioned import choice, read_set
    from ddil_lightning.evaluation.suite import Suite

    def made() -> Any:
        if not args.truncate and plan.protocol.prompts.source not in BUILTIN:  # before an hour of real images is read
            with advising("--truncate"):
                backbone.check_length(choice(read_set(plan.protocol.prompts, there=False), plan.protocol.prompts).prompts)
        suite = several(args, Suite.of(plan.protocol, plan.networks, backbone.device, plan.changed).for_pipeline(backbone))
        if len(suite.prompts) < 16:
            raise Refusal(f"{suite.name} asks for {len(suite.prompts)} prompts: {LEAST}")
        suite = teacher.awaited(suite) if teacher else suite
        suite.measured()  # before anything is drawn
        return suite

    first: list[Any] = []
    processes.by_first(lambda: first.append(made()))
    suite = first[0] if first else made()
    for line in notes(suite) if processes.first else ():
        print(line, flush=True)
    return suite


def save_reference(args: argparse.Namespace, plan: Plan | None, device: Any) -> int:
    """Write the statistics of the real images of a plan. Raises Refusal for a plan without, and where a pipeline is to be tested, too."""
    from ddil_lightning.evaluation.networks import Networks
    from ddil_lightning.evaluation.references import check_name, save
    from ddil_lightning.evaluation.suite import Suite

    if args.run or args.ckpt_path or args.pipeline or args.teacher:
        raise Refusal(
            "--save_reference makes statistics of real images alone: leave the pipeline out, and test it by --reference FILE then"
        )
    if plan is None or plan.networks is None:
        raise Refusal("--save_reference is for images of your own: say which, by --protocol NAME or --data CAPTIONS --images DIR")
    check_name(args.save_reference)
    # A file without what a missing network would have seen is a trap, and the others see no real images.
    networks = Networks(plan.networks.features, embed=plan.networks.embed, strict=True)
    suite = Suite.of(plan.protocol, networks, device, plan.changed)
    save(args.save_reference, suite.given.reference, suite.given)
    print(f"statistics of {suite.given.reference.images} images: {args.save_reference}")
    return 0


def notes(suite: Any) -> Iterator[str]:
    """What a suite leaves out of what is asked for, or of all for want of real images, a line a reason; and where few images make a number
    incomparable."""
    from ddil_lightning.evaluation.presence import unmet

    given, reference = suite.given, suite.given.reference
    if reference.unverified:
        yield f"left unchecked: {reference.about} does not say which network, size and resizing"
    for why, lost in unmet(suite.asked, given).items():
        if suite.asked is not None or not why.startswith(("there is no ", "there are no crops", "there are no images")):
            yield f"left out: {', '.join(metric.named() for metric in lost)}, for {why}"
    if {"features", "real_moments"} <= given.has() and (suite.asked is None or "frechet" in suite.asked):
        drawn = len(suite.prompts) * suite.samples
        few, width = min(drawn, reference.images or drawn), len(reference.moments("features")[0])
        if few <= width:
            yield (
                f"{few} images for {width} features: the covariance of a Fréchet distance has not full rank, and the distance is biased "
                f"upwards; compare it at n = {drawn} alone"
            )


def _networks(args: argparse.Namespace, made: Protocol) -> Networks | None:
    """The networks of a protocol with those that --network names, before anything is loaded; None for the built-in data's own."""
    from ddil_lightning.evaluation.material import named

    if made.prompts.source not in BUILTIN:
        return replace(named(made, args.network), strict=args.strict)
    if args.network:
        said = f"{made.prompts.source} has networks of its own, others are for captions of your own or a protocol of files"
        raise Refusal(f"--network {' '.join(args.network)}: {said}")
    return None


def _other_networks(args: argparse.Namespace, made: Protocol) -> dict[str, Any]:
    """What --network changes of a protocol, for its name. Raises Refusal for a network of whose numbers it asks for none."""
    from ddil_lightning.evaluation.material import named
    from ddil_lightning.evaluation.presence import needing

    own, other = named(made).named, named(made, args.network).named
    differing = [member for member in {**own, **other} if own.get(member) != other.get(member)]
    for member in (m for m in differing if m in other and made.metrics is not None):
        numbers = needing(member)
        if not set(numbers) & set(made.metrics or ()):
            raise Refusal(
                f"--network {member}={other[member].name}: protocol {made.name} asks for none of its numbers ({', '.join(numbers)}): "
                "leave it out, or name them under metrics in a file of your own"
            )
    said = [f"{member}={other[member].name if member in other else 'none'}" for member in differing]
    return {"network": " ".join(said)} if said else {}


def _named(args: argparse.Namespace) -> Plan:
    """A packaged protocol or a file, with what the command line says of its places, its n and its seed."""
    from ddil_lightning.evaluation.placing import against, named_protocol, placed

    made, changed = named_protocol(args.protocol).differing(args.n, args.seed)
    made = replace(made, prompts=_columns(args, made.prompts))
    if made.prompts.source in BUILTIN:
        if args.data not in (None, made.prompts.source):
            raise Refusal(f"protocol {made.name} is of {made.prompts.source}, not of {args.data}: leave --data out")
        return Plan(made, changed)
    if args.reference is not None:  # first: then the images need not be there
        changed["reference"] = Path(args.reference).name
        made = against(made, os.path.abspath(args.reference))
    there = placed(made, args.data, args.images, ("--data", "--images"))
    if args.data is not None and not Path(args.data).is_dir() and Path(args.data).name != Path(str(made.prompts.source)).name:
        changed["data"] = Path(args.data).name
    return Plan(there, changed)


def _builtin(args: argparse.Namespace, most: int = 1000) -> Protocol:
    """The protocol of the built-in data with so many prompts and this seed: that of its name, if nothing differs."""
    from ddil_lightning.evaluation.protocols import PromptSource, Protocol

    if args.images:
        raise Refusal(f"--images {args.images} is the folder of a caption file's images: give that file too, by --data FILE")
    n, seed = most if args.n is None else args.n, args.seed or 0
    return Protocol(PromptSource(args.data, n=n), seed=seed, name=args.data)


def _own(args: argparse.Namespace, most: int) -> Protocol:
    """The protocol of the user's own captions: all of them, or `most`, through the paper's networks. Raises Refusal for under 16."""
    from ddil_lightning.evaluation.captioned import read_set
    from ddil_lightning.evaluation.protocols import OWN, PromptSource, Protocol, ReferenceSource

    prompts = _columns(args, PromptSource(args.data, args.images, choice=args.seed or 0))
    found = read_set(prompts, there=args.reference is None)
    total, alone = len(found.captions), found.pictures is None
    benchmark = args.layout != "folder"  # which is of all its prompts
    n = (total if benchmark else min(most, total)) if args.n is None else args.n
    if n < 16:
        raise Refusal(f"{args.data} holds {total} {'captions' if alone else 'images with captions'}: {LEAST}")
    if alone and args.images:
        raise Refusal(f"--images {args.images}: {args.data} names no images: leave one of them out, or name the column by --image_column")
    networks = {"features": "inception", "clip": "open_clip", "distance": "lpips"}
    if alone and args.reference is None:
        networks.pop("features")
    against = ReferenceSource(None if alone else OWN)
    return Protocol(replace(prompts, n=n), against, networks=networks, seed=args.seed or 0, name=Path(args.data).stem)


def _columns(args: argparse.Namespace, prompts: PromptSource) -> PromptSource:
    """The prompts with the columns and the split that the command line names."""
    named = {"image": args.image_column, "caption": args.caption_column, "split": args.split}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return replace(prompts, **given | ({"image": None} if args.image_column == "none" else {}))
