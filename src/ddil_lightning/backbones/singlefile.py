"""Checkpoints of a single .safetensors file, as they are shared for other programs, read by diffusers' converters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from ddil_lightning.backbones.repositories import Stored, cached, listing, pipeline_folder
from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.weights import keys_of
from ddil_lightning.texts import reason

NETWORK = "model.diffusion_model."
"""What the names of the network's weights begin with."""
SETTINGS = ("*.json", "*/*.json", "*.txt", "*/*.txt")
"""The files of a repository that are no weights."""


def settings(source: Source, file: Path) -> Path:
    """The folder with the settings of a single file's components: `source.config`, or that of the model which diffusers takes it for.

    Raises ValueError for a file that is no whole checkpoint, and where the settings cannot be had.
    """
    keys = keys_of(file)
    if not any(key.startswith(NETWORK) for key in keys):
        lora = any("lora" in key for key in keys)
        what = "a LoRA: give the pipeline that it belongs to, and it by model.pipeline.lora" if lora else "no whole checkpoint"
        raise ValueError(f"{file} is {what} (it has {min(keys, default='nothing')}, and no weights called {NETWORK}...)")
    if source.config is not None:
        folder = pipeline_folder(source.config)
        return folder or _fetched(source.config, f"model.pipeline.config of {file}")
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors.torch import load_file

    repository = fetch_diffusers_config(load_file(file))["pretrained_model_name_or_path"]
    try:
        return _fetched(repository, str(file))
    except ValueError as error:
        raise ValueError(
            f"{file} holds weights alone, and the settings of {repository}, which it looks like, cannot be had ({error}): "
            "give a pipeline folder of its architecture by model.pipeline.config"
        ) from error


def _fetched(repository: str, what: str) -> Path:
    """The folder in the hub's cache with a repository's settings."""
    from huggingface_hub import snapshot_download

    names, why = listing(repository)
    if names is None:
        return cached(repository, "model_index.json", why)
    try:
        return Path(snapshot_download(repository, allow_patterns=list(SETTINGS)))
    except Exception as error:  # whatever the hub's client raises
        raise ValueError(f"{what}: {repository} could not be fetched: {reason(error)}") from error


def load(place: Stored, dtypes: Mapping[str, torch.dtype], **given: Any) -> Any:
    """The pipeline of a single file. `dtypes`: by component, with a `default`. `given`: components that are not read from it."""
    import diffusers

    name = str(place.listed.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not hasattr(kind, "from_single_file"):
        raise ValueError(f"the settings {place.folder} are those of a {name}, of which diffusers reads no single file")
    default = dtypes["default"]
    for part, dtype in dtypes.items():
        if part not in ("default", *given) and dtype != default:  # it takes one for all, and half a precision is not given back
            given[part] = component(place, part, dtype)
    return cast(Any, kind).from_single_file(str(place.file), config=str(place.folder), dtype=default, local_files_only=True, **given)


def component(place: Stored, name: str, dtype: torch.dtype) -> Any:
    """One network of a single file."""
    import diffusers

    kind = getattr(diffusers, place.listed[name][1])
    return kind.from_single_file(str(place.file), config=str(place.folder), subfolder=name, dtype=dtype, local_files_only=True)
