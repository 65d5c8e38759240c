"""A frozen network in fewer bits than its weights are stored in, by the quantisation of diffusers: its linear layers, most of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import nn

Quantize = Literal["int8", "nf4"]
"""8 bits with a scale for every row (torchao), or the 4 bits of QLoRA (bitsandbytes; Dettmers et al. 2023), which need a GPU."""
LIBRARY = {"int8": "torchao", "nf4": "bitsandbytes"}
BLOCK = 64
"""Weights that have a scale in common in nf4."""


def check(kind: str) -> None:
    """Raises ValueError, in one line, where the library or the device for a quantisation is not there."""
    if kind not in get_args(Quantize):
        raise ValueError(f"memory.quantize is {kind!r}: give one of {', '.join(get_args(Quantize))}, or null")
    if find_spec(LIBRARY[kind]) is None:
        raise ValueError(f"memory.quantize={kind} needs {LIBRARY[kind]}, which is not installed: pip install 'ddil-lightning[quantize]'")
    if kind == "nf4" and not torch.cuda.is_available():
        raise ValueError("memory.quantize=nf4 needs a GPU, and there is none here: int8 works on a CPU as well")


def check_exact(config: Mapping[str, Any], where: Any, quantize: str | None = None) -> None:
    """Raises ValueError for a network that is stored in fewer bits, of which no student can be made. `quantize`: as it is held here."""
    if config.get("quantization_config") and not quantize:
        raise ValueError(
            f"the network of {where} is stored quantised, so that its weights cannot be had: give the pipeline that it was made of, and "
            "model.memory.quantize"
        )


def read(kind: type[Any], folder: Path, variant: str | None, dtype: torch.dtype, quantize: str) -> Any:
    """A network of diffusers, frozen, from its own folder, each of its layers quantised as soon as it is read."""
    check(quantize)
    check_exact(kind.load_config(str(folder)), folder)
    files = {"variant": variant, "use_safetensors": True}
    return kind.from_pretrained(str(folder), dtype=dtype, quantization_config=_config(quantize, dtype), **files)


def quantised(network: Any, dtype: torch.dtype, quantize: str) -> Any:
    """A network that is in memory already, quantised by way of a temporary folder: diffusers quantises what it reads."""
    with TemporaryDirectory(prefix="ddil-") as folder:
        network.save_pretrained(folder)
        return read(type(network), Path(folder), None, dtype, quantize)


def _config(quantize: str, dtype: torch.dtype) -> Any:
    """diffusers' configuration of it."""
    import diffusers

    if quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def saved(network: nn.Module, quantize: str) -> int:
    """How many bytes less the weights of a network take than their types say, or would take: of linear layers in floating point."""
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Linear) and m.weight.is_floating_point()]
    return sum(w.numel() * w.element_size() - _bytes(w, quantize) for w in weights)


def _bytes(w: torch.Tensor, quantize: str) -> int:
    if quantize == "int8":
        return w.numel() + w.shape[0] * 5  # a scale in float32 and a zero point
    return w.numel() // 2 + -(-w.numel() // BLOCK) * 4
