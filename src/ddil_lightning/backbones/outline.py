"""Pipelines by their configurations alone: every network is there, none has memory for its weights, and no file of weights is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddil_lightning.backbones import autoencoder
from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.loading import without_weights
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.repositories import SPARED, pipeline_folder, read_json, single_file
from ddil_lightning.backbones.source import Source
from ddil_lightning.records import Context
from ddil_lightning.servers import no_hub
from ddil_lightning.texts import reason

CONFIGS = ("model_index.json", "*/config.json", "*/scheduler_config.json", "*/tokenizer_config.json")
"""What is read of a pipeline; of a hub id nothing else is downloaded."""
TOKENS = 77
"""Tokens of a text where no tokenizer says it: CLIP's."""


class Outline(Pipeline):
    """A pipeline of diffusers for a plan: what a method makes of it has shapes and types, and no values. Its texts are blank."""

    def load(self, source: Source, dtype: torch.dtype, vae_dtype: torch.dtype, bare: bool) -> Any:
        """The components, made of their configurations. Raises ValueError, with the reason, where that cannot be."""
        self.source = source
        path = source.path
        if single_file(path) is not None:
            path = source.config or ""
            if not path:
                raise ValueError(f"{source.path} is a single file, whose configurations lie elsewhere: give model.pipeline.config")
        folder = pipeline_folder(path) or _configs(path)
        try:
            return Parts(folder, dtype, vae_dtype)
        except ValueError:
            raise
        except Exception as error:  # whatever a library makes of a configuration
            raise ValueError(f"the pipeline {path} could not be made of its configurations: {reason(error)}") from error

    def adapted(self, *args: Any, **kwargs: Any) -> Family:
        """Without memory for the adapters either."""
        with torch.device("meta"):
            return super().adapted(*args, **kwargs)

    def encode_text(self, prompts: Sequence[str], truncate: bool = False, sizes: Any = None) -> Context:
        """Blank texts, as large as those of so many `prompts`."""
        return self.network().blank(len(prompts), self.pipe.tokens)

    def null(self) -> Context:
        """One blank text."""
        return self.encode_text([""])

    def check_length(self, prompts: Sequence[str]) -> None:
        """No tokenizer is read, so that every prompt fits."""


class Parts:
    """What is asked of a pipeline of diffusers, of components that have no weights."""

    def __init__(self, folder: Path, dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
        index = read_json(folder / "model_index.json")
        self.config = index
        self.components: dict[str, Any] = {}
        self.tokens = _tokens(folder)
        for name, entry in index.items():
            if not isinstance(entry, list) or entry[0] is None or name in SPARED:
                continue
            made = _component(folder / name, *entry)
            if isinstance(made, nn.Module):
                nn.Module.to(made, vae_dtype if name == "vae" else dtype)  # its own `to` warns of layers that there are not
            if made is not None:
                self.components[name] = made
                setattr(self, name, made)
        for name in ("vae", "scheduler"):
            if name not in self.components:
                raise ValueError(f"the pipeline {folder} has no {name}: only text-to-image pipelines in latents are distilled")
        self.vae_scale_factor = autoencoder.factor(self.components["vae"])

    def to(self, device: Any) -> Parts:
        """The same: what has no memory is nowhere."""
        return self


def _component(folder: Path, library: str, name: str) -> Any:
    """A component without weights; None for one that is no network and no scheduler."""
    import diffusers
    import transformers

    kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if kind is None or not isinstance(kind, type):
        return None
    if hasattr(kind, "load_config") and "Scheduler" in name:
        return kind.from_config(kind.load_config(folder))  # type: ignore[attr-defined]
    if not issubclass(kind, nn.Module):
        return None
    if hasattr(kind, "load_config"):
        config = kind.load_config(folder)
        with without_weights():
            return kind.from_config(config)  # type: ignore[attr-defined]
    config = kind.config_class.from_pretrained(folder)  # type: ignore[attr-defined]
    with without_weights():
        return kind(config)


def _tokens(folder: Path) -> int:
    """How many tokens a text has, all encoders together where they read one after the other."""
    for file in sorted(folder.glob("tokenizer*/tokenizer_config.json")):
        length = read_json(file).get("model_max_length")
        if isinstance(length, int) and 0 < length < 10**5:
            return length
    return TOKENS


def _configs(path: str) -> Path:
    """The folder of a hub id's configurations. Raises ValueError where they can neither be fetched nor have been."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, allow_patterns=list(CONFIGS), local_files_only=no_hub() is not None))
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError("it has no model_index.json")
    except Exception as error:  # whatever a network or a hub makes of it
        raise ValueError(
            f"the configurations of {path} could not be fetched, and are not in the cache of the hub: {reason(error)}; "
            "a plan needs its JSON files alone: give a folder that holds them"
        ) from error
    return folder
