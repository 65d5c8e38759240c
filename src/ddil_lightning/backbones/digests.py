"""Digests of the parts of a pipeline that make latents and text states, so that what they have made is known as theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ddil_lightning.backbones.autoencoder import scale
from ddil_lightning.texts import json_digest


def fingerprints(pipe: Any, network: str) -> dict[str, str]:
    """A digest of every encoder and vocabulary of a diffusers pipeline by its name; `network` is the component that denoises.

    Weights count in the precision that they have, the autoencoder with the scale of its latents.
    """
    found = {}
    for name, part in sorted(pipe.components.items()):
        digest = hashlib.sha256()
        if isinstance(part, nn.Module) and name != network:
            _read(digest, part)
        elif hasattr(part, "get_vocab"):
            digest.update(json.dumps([part.model_max_length, sorted(part.get_vocab().items())]).encode())
        else:
            continue
        if name == "vae":
            digest.update(" ".join(map(str, scale(part))).encode())
        found[name] = digest.hexdigest()
    return found


def digest(pipe: Any, network: str) -> str:
    """One digest of all `fingerprints`."""
    return json_digest(fingerprints(pipe, network))


def weights(module: nn.Module) -> str:
    """A digest of a module's weights in the precision that they have."""
    digest = hashlib.sha256()
    _read(digest, module)
    return digest.hexdigest()


def settings(part: Any) -> str:
    """A digest of the configuration of a part of diffusers, such as a scheduler, but for where it was read from."""
    said = {key: value for key, value in part.config.items() if not key.startswith("_")}
    return json_digest(said)


def _read(digest: Any, module: nn.Module) -> None:
    for key, value in sorted(module.state_dict().items()):
        for part in _held(value.detach()):
            data = part.cpu().flatten().contiguous().view(torch.uint8)
            digest.update(f"{key} {part.dtype} {tuple(part.shape)}".encode() + memoryview(data.numpy()))


def _held(x: Any) -> Iterator[Any]:
    """The tensors that hold the numbers of one: itself or, of a quantised one, its codes and their scales."""
    if not hasattr(x, "__tensor_flatten__"):
        yield x
        return
    for name in x.__tensor_flatten__()[0]:
        yield from _held(getattr(x, name))
