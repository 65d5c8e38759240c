"""What a config says of any method beside its optimiser: what memory is saved by, the range of guidance, the box of the latents."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback

from ddil_lightning.backbones.network import Network
from ddil_lightning.backbones.quantising import Quantize
from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import lengths, within
from ddil_lightning.diffusion.reflection import BOX, Reflection
from ddil_lightning.feed import Feed

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Memory:
    """What memory and time are saved by. Trained weights are float32 in any case; `trainer.precision` says what they compute in.

    Args:
        teacher_dtype: of the weights of the frozen network and of the text encoders.
        vae_dtype: of the autoencoder that makes the latents of the training.
        quantize: the linear layers of the frozen network in 8 bits (`int8`, by torchao) or in 4 (`nf4`, by bitsandbytes, on a GPU). They
            compute in teacher_dtype, which is bfloat16 or float16 then. Copies, and adapters that are merged, are of the weights as stored.
        offload: roles that lie on the CPU and come to the device for their calls: `average`, and frozen ones such as `target` or `teacher`.
            The encoders do so by themselves once all data are encoded.
        compile: compile the repeated blocks of all networks by torch.compile, which takes minutes at the start of a run.
        gradient_checkpointing: compute activations of the networks in training, and of the frozen ones that gradients pass through, a
            second time for the backward pass, rather than keep them.
        tf32: what trains in float32 multiplies in TensorFloat-32 on a GPU that has it, with 10 bits after the point in place of 23. Under
            bf16-mixed it concerns the little that stays in float32.
    """

    teacher_dtype: Dtype = "float32"
    vae_dtype: Dtype = "float32"
    gradient_checkpointing: bool = False
    offload: tuple[str, ...] = ()
    compile: bool = False
    quantize: Quantize | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.quantize and self.teacher_dtype == "float32":
            raise ValueError(f"memory.quantize={self.quantize} computes in half precision: set memory.teacher_dtype=bfloat16 with it")

    @property
    def stored(self) -> dict[str, Any]:
        """How a Pipeline holds its frozen parts: its arguments of that."""
        return {"dtype": getattr(torch, self.teacher_dtype), "vae_dtype": getattr(torch, self.vae_dtype), "quantize": self.quantize}


def guidance_range(g: float | Sequence[float]) -> tuple[float, float]:
    """(g_min, g_max) of one guidance g or of a range. Raises ValueError for what is neither, or falls."""
    ends = list(g) if isinstance(g, Sequence) else [g]
    if len(ends) not in (1, 2):
        raise ValueError(f"guidance is {g!r}: give one number, or a range [g_min, g_max]")
    within(0, 1000, guidance=g)
    low, high = ends[0], ends[-1]
    if low > high:
        raise ValueError(f"the range of guidance falls, from {low:g} to {high:g}: give the smaller one first")
    return float(low), float(high)


def checked_box(box: list[list[float]] | None, channels: int) -> tuple[list[float], list[float]]:
    """(lo, hi) per channel, BOX where none is given. Raises ValueError for another shape than two lists with a number per channel."""
    if box is None:
        return [-BOX] * channels, [BOX] * channels
    if len(box) != 2:
        raise ValueError(f"box is {box!r}: give [[lo, ...], [hi, ...]], {channels} numbers each, one per channel of the latents")
    for side in box:
        lengths(channels, box=side)
        within(-1e6, 1e6, box=side)
    return box[0], box[1]


def fit_box(reflection: Reflection, feed: Feed, tells: bool) -> None:
    """The box of a reflection from the images of `feed`, where it has any; else it stays as it is, which the process that `tells` says."""
    found = feed.box()
    if found is not None:
        reflection.move(*found)
    elif tells:
        said = f"reflect: {reflection.mode} without images to take the box from: it is {-BOX} to {BOX} in every channel"
        logging.getLogger(__name__).warning(f"{said}; give another by model.box: [[lo, ...], [hi, ...]], a number per channel")


def check_precision(precision: str, apart: bool = False) -> None:
    """Raises ValueError for a Trainer that would turn the student itself to half precision, and for a gradient scaler where the gradients
    of one update are made at times `apart`, between which an update of another network may have changed the scale."""
    if apart and precision == "16-mixed":
        raise ValueError(
            "trainer.precision 16-mixed scales the gradients of a critic's micro-batches differently: take bf16-mixed, or leave "
            "model.optimizer.accumulate at 1"
        )
    if precision in ("bf16-true", "16-true"):
        mixed = precision.replace("true", "mixed")
        raise ValueError(
            f"trainer.precision {precision} would round most updates of the student to nothing: take {mixed}, which keeps its weights "
            "in float32, and model.memory.teacher_dtype for the frozen networks"
        )


class TensorFloat32(Callback):
    """While a method trains, matrices of float32 are multiplied in TensorFloat-32 where a GPU can; afterwards as before."""

    def __init__(self) -> None:
        self._before: str | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Training begins."""
        self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """It is over."""
        if self._before is not None:
            torch.set_float32_matmul_precision(self._before)
        self._before = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """It was broken off."""
        self.on_fit_end(trainer, pl_module)


VARIANTS = 64
"""How many variants of a block may be compiled: widths, batch sizes, with gradients and without. torch's own limit is 8."""


def compile_roles(roles: Iterable[Role]) -> None:
    """Compile the networks of `roles` in place, the frozen ones too. Twice is as good as once."""
    dynamo: Any = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VARIANTS)
    for role in roles:
        cast(Network, role.network).compile_blocks()
