"""Networks for roles: the teacher's architecture or another one, and the weights that they start from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.loading import without_weights
from ddil_lightning.backbones.repositories import part_folder, read_json
from ddil_lightning.backbones.weights import Weights, chosen_variant, stored_weights, variants, weight_files
from ddil_lightning.texts import reason

SMALL = 2**24
"""Weights of a network that is drawn in full before it is filled, as every network once was: what is drawn after it, such as the weights of
a discriminator, then starts from the numbers that it always started from. A larger one gets memory for its weights once."""


class Architecture(NamedTuple):
    """The configuration of a role's network, and the weights that it starts from.

    `partial`: weights that do not fit are left out, and those that are lacking are new.
    """

    config: dict[str, Any]
    weights: Callable[[], Weights]
    partial: bool = False


def own_config(model: Any) -> dict[str, Any]:
    """A network's configuration, to make another one of it.

    Where it lay on this machine is nobody else's business, and of the names that its file leaves out, as Stable Diffusion's does with the
    embedding of the guidance, diffusers would take no other value than the default.
    """
    return {key: value for key, value in model.config.items() if key not in ("_name_or_path", "_use_default_values", "quantization_config")}


def described(said: str | Mapping[str, Any], teacher: Family, copied: Callable[[], Weights], role: str) -> Architecture:
    """The architecture that `model.pipeline.networks` says for a role; `copied`: the teacher's weights.

    Raises ValueError for one that is none of the teacher's family, or works in other spaces than the teacher.
    """
    option = f"model.pipeline.networks.{role}"
    folder = None
    if isinstance(said, str):
        try:
            folder = part_folder(said, teacher.component)
            config = read_json(folder / "config.json")
        except ValueError as error:
            raise ValueError(f"{option}: {said} could not be loaded: {error}") from error
    else:
        config = dict(said) if "_class_name" in said else {**own_config(teacher.model), **said}
    config = _checked(config, teacher, option, strict=folder is None)
    names = [] if folder is None else [file.name for file in folder.iterdir()]
    if folder is None or not (variants(names) or variants(names, "bin")):
        own = set(bare(type(teacher.model), config).state_dict())
        return Architecture(config, lambda: teacher.handed(copied(), own), partial=True)
    files = weight_files(folder, chosen_variant(f"{option}: {said}", {role: names}))
    return Architecture(config, lambda: stored_weights(files))


def _checked(config: Mapping[str, Any], teacher: Family, option: str, strict: bool) -> dict[str, Any]:
    """A configuration for samples of the teacher's size. `strict`: without settings that its class does not have. Raises ValueError."""
    model = type(teacher.model)
    kind = config.get("_class_name", model.__name__)
    if kind != model.__name__:
        raise ValueError(f"{option} is a {kind} and the teacher's network a {model.__name__}: give one of the teacher's kind")
    unknown = sorted(set(config) - set(model._get_init_keys(model)) - {key for key in config if key.startswith("_")})
    if unknown and strict:
        raise ValueError(f"{option} has {unknown[0]!r}, which no {model.__name__} has: see the config.json of its folder")
    config = {key: value for key, value in config.items() if key not in (*unknown, "_name_or_path")}
    config |= {key: teacher.model.config[key] for key in teacher.sized if key in teacher.model.config}
    try:
        made = type(teacher)(bare(model, config))
    except Exception as error:  # whatever diffusers makes of a configuration
        raise ValueError(f"{option}: no {kind} could be made of it: {reason(error)}") from error
    for what, value in teacher.spaces().items():
        if made.spaces().get(what) != value:
            raise ValueError(
                f"{option}: its {what} is {made.spaces().get(what)} and the teacher's {value}: it cannot take the teacher's place"
            )
    return config


def bare(model: Any, config: Mapping[str, Any]) -> Any:
    """A network of a configuration, without memory for its weights."""
    with without_weights():
        return model.from_config(dict(config))


@torch.no_grad()
def made(model: Any, architecture: Architecture, extra: Mapping[str, Any], name: str) -> nn.Module:
    """A network in float32 of its architecture and the `extra` settings, whose new weights are zero, with memory for its weights once.

    Raises ValueError, calling it by `name`, for weights that do not fit.
    """
    config = {**architecture.config, **extra}
    network = bare(model, config)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    told = set(shapes) - set(bare(model, architecture.config).state_dict()) if extra else set()
    drawn = architecture.partial or sum(shape.numel() for shape in shapes.values()) < SMALL
    if drawn:
        network = model.from_config(config)
    own, state, unexpected = network.state_dict(), {}, []
    for key, value in chain(((key, torch.zeros(shapes[key])) for key in told), architecture.weights()):
        if shapes.get(key) != value.shape:
            unexpected.append(key)
        elif drawn:
            state[key] = own[key].copy_(value)
        else:
            state[key] = value.detach().to("cpu", torch.float32, copy=True)
    missing = [key for key in shapes if key not in state]
    if not architecture.partial and (missing or unexpected):
        raise ValueError(f"the network of {name} could not be copied: missing {missing}, unexpected {unexpected}")
    if architecture.partial:
        said = f"{name}: {len(state) - len(told)} of {len(shapes) - len(told)} tensors are the teacher's, the rest are new"
        logging.getLogger(__name__).info(said)
    if not drawn:
        network.load_state_dict(state, assign=True)
    return network  # type: ignore[no-any-return]
