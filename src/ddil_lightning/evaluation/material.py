"""What a protocol's suite is made of: its prompts, read and chosen, its networks, loaded, and the real images as a reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.data import tables
from ddil_lightning.data.captions import sources
from ddil_lightning.data.folders import LISTS, Listing, columns_of
from ddil_lightning.evaluation import references
from ddil_lightning.evaluation.batches import as_saved
from ddil_lightning.evaluation.captioned import WHERE, Chosen, Notes, choice, read_set
from ddil_lightning.evaluation.galleries import Gallery
from ddil_lightning.evaluation.given import Given, Judge, Reference, View
from ddil_lightning.evaluation.metrics.pairs import COLUMNS, check_there, choose
from ddil_lightning.evaluation.networks import MEMBERS, MapDistance, Networks, read_networks
from ddil_lightning.evaluation.presence import present
from ddil_lightning.evaluation.protocols import ALL, OWN, RESIZED, STATISTICS, PromptSource, Protocol
from ddil_lightning.evaluation.registry import wanted
from ddil_lightning.evaluation.stamps import content
from ddil_lightning.evaluation.views import Crops
from ddil_lightning.texts import place, read_text

ABOUT = {OWN: "the images of these prompts", ALL: "all images of the prompts' set"}


class Material(NamedTuple):
    """The prompts and those of them that are probed, what their images are measured with, and where they come from, in words.

    `notes`: the row of each prompt, of those whose file has rows. `groups`: the picture of each, of which several have one.
    """

    prompts: list[str]
    probes: list[str]
    given: Given
    source: str
    notes: Notes = ()
    groups: Sequence[int] = ()


def material(protocol: Protocol, networks: Networks | None = None, device: str | torch.device = "cpu") -> Material:
    """Everything that a protocol names, but for the built-in data. `networks`: in the place of those that it names.

    Raises ValueError or FileNotFoundError, of one line, for what is missing or cannot be understood: first for the prompts and the real
    images, before a network is loaded.
    """
    wanted(protocol.metrics)
    asked = named(protocol) if networks is None else networks
    source, against = protocol.prompts, protocol.references.source
    chosen = choice(read_set(source, there=against in ABOUT), source)
    gallery = _gallery(protocol, chosen)
    if against is not None and place(against).suffix == ".npz" and asked.features is None:
        raise ValueError(f"{against} holds mean and covariance of features, and protocol {protocol.name} names no network for features")
    given = Given(present(asked, device), view=View(protocol.size, protocol.crops))
    if gallery is not None:
        about = ABOUT.get(str(against), str(against))
        reference = references.gathered(given, gallery, about)
    else:
        reference = Reference() if against is None else references.load(place(against), given)
    count = min(protocol.probes.prompts, len(chosen.prompts))
    probes = choose(chosen.prompts, count, source.choice) if count else []
    where = source.source if isinstance(source.source, str) else ", ".join(source.source)
    given = Given(given.networks, reference, view=given.view)
    return Material(chosen.prompts, probes, given, f"{where}, {chosen.about}", chosen.notes, chosen.groups)


def named(protocol: Protocol, words: Sequence[str] = ()) -> Networks:
    """The networks that a protocol names, or `words` in their place (`read_networks`), in its resize convention.

    Raises ValueError, of one line, for names that say nothing.
    """
    other = sorted(set(protocol.networks) - set(MEMBERS))
    if other:
        raise ValueError(f"protocol {protocol.name}: networks has no {', '.join(other)}: known are {', '.join(MEMBERS)}")
    mine: dict[str, Any] = dict(protocol.networks)
    found = read_networks(words, Networks(**mine))
    features = found.named.get("features")
    if features is None or protocol.resize is None or (features.name, protocol.resize) not in RESIZED:
        return found
    return replace(found, features=features._replace(name=RESIZED[features.name, protocol.resize]))


def _gallery(protocol: Protocol, chosen: Chosen) -> Gallery | None:
    """The real images that a protocol compares with, None for none and for statistics of them."""
    said = protocol.references
    against, skip = said.source, said.skip_unreadable
    statistics = against is None or place(against).suffix in STATISTICS
    if (said.image or said.split) and (statistics or against in ABOUT):
        raise ValueError(f"protocol {protocol.name}: references.image and references.split are of a data set, and source is {against}")
    if against is None or statistics:
        return None
    if protocol.size is None:
        raise ValueError(f"protocol {protocol.name}: real images are brought to one size: give `size`, or references from no images")
    if against in ABOUT:
        gallery = chosen.pictures if against == OWN else chosen.every
        if gallery is None:
            raise ValueError(
                f"{protocol.prompts.source} has captions without images, and protocol {protocol.name} compares with images: give them, a "
                "file of statistics by references.source (--reference), or references {source: null} for the metrics that need none"
            )
        return gallery.take(range(len(gallery)), skip)
    try:
        gallery = _pictures(against, said.image or protocol.prompts.image or "image", said.split or protocol.prompts.split)
    except ValueError as error:
        advised = re.sub("name (them|another) with image=( and caption=)?", "name the column of images by references.image", str(error))
        raise ValueError(f"references.source: {advised}") from error
    except FileNotFoundError as error:  # the pictures of a reference lie where its file says
        raise FileNotFoundError(f"references.source: {str(error).removesuffix(WHERE)}") from error
    return gallery.take(range(len(gallery)), skip)


def _pictures(path: str, image: str, split: str) -> Gallery:
    """All pictures of a folder, of COCO's captions, of a list of files, or of a data set, whether it has captions or none.

    Raises ValueError for what holds no pictures.
    """
    file = place(path)
    if file.is_dir() and tables.kind_of(file, path)[0] == "list":
        return Gallery.of_folder(file)
    if file.is_file() and file.suffix.lower() == ".json" and not read_text(file).lstrip().startswith("["):
        found = read_set(PromptSource(path)).pictures
        if found is None:
            raise ValueError(f"{path} holds captions without images: give a folder, a data set or a file of statistics")
        return found
    if file.is_file() and file.suffix.lower() in LISTS and image == "image":
        columns = columns_of(file)
        image = next((name for name in COLUMNS[0] if name in columns), image)
    rows = tables.load(path, image, None, split, None)
    if not isinstance(rows, Listing):
        return Gallery(lambda index: sources(rows.pictures(index), path, image, index), range(len(rows)))
    files = [Path(str(name)) for name in dict.fromkeys(name for _, name in rows.pictures(range(len(rows))))]  # of several captions once
    check_there(file, files)
    return Gallery.of_files(files)


def held_out(data: str, n: int, seed: int) -> Material:
    """What a suite of the built-in data is made of: `n` held-out prompts, held-out images, the evaluator and the judge.

    Raises ValueError for another name than shapes and digits.
    """
    from ddil_lightning.miniature.evaluator import load_evaluator

    prompts, real, probes, module = _held_out(data, n, seed)
    net = load_evaluator()
    look, side = net.image_features, real.shape[-1]
    networks = Networks(look, distance=MapDistance(net.image_feature_maps), text=net.text_features, embed=look)
    judge, view = Judge(module.judge, module.mode_coverage, side), View(crops=Crops(side // 2, side))
    given, saved = Given(networks, judge=judge, view=view), as_saved(real)
    reference = Reference(given.rows_of(saved.split(128)), f"held-out images of {data}", digest=content(saved))
    return Material(prompts, probes, Given(networks, reference, judge, view), f"held-out prompts of {data}")


def _held_out(data: str, n: int, seed: int) -> tuple[list[str], Tensor, list[str], Any]:
    """Prompts, real images of the held-out law, prompts that leave something open, and the module with judge and mode coverage."""
    from ddil_lightning.miniature import digits, judge, shapes
    from ddil_lightning.miniature.sources import held_out as scenes_of
    from ddil_lightning.miniature.sources import load_source

    prompts = load_source(data).prompts(n, seed)
    if data == "shapes":
        return prompts, shapes.render(shapes.draw_scenes(n, scenes_of(seed))), judge.partial_prompts(), judge
    # one open prompt only: five times, so that the ten digits can show; and the ten digits, whose diversity is the writers'
    return prompts, digits.split("held_out")[0], digits.partial_prompts() * 5 + digits.prompts(10, 0), digits
