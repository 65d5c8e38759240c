"""What would make the memory of a run smaller: options, from those that leave its result as it is to those that change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.quantising import saved
from ddil_lightning.training.footprint import EIGHT, FULL, Footprint, Part, Setting, away, beside, bytes_of, encoders, placed

OFFLOADED = {
    "average": "every update sends the student's weights to the CPU, which averages them",
    "target": "as for the average, and every step fetches its weights",
    "former": "every step fetches its weights",
}
"""Roles that `memory.offload` may name, and what that costs."""
RANK = 64
"""LCM-LoRA's."""


def smaller(method: Any, setting: Setting, made: Footprint, other: Footprint) -> Iterator[tuple[str, Footprint]]:
    """Options of a command line and the footprint with each, alone. `other`: `made` with gradient checkpointing the other way.

    Half of a batch, and half precision, are taken to halve activations; adapters to leave them as they are.
    """
    if not method.gradient_checkpointing:
        yield "model.memory.gradient_checkpointing=true", other
    if not setting.encoded:
        yield f"data.cache=DIR, made by ddil-cache (the encoders leave the {'GPU' if setting.cuda else 'memory'})", away(made, ["encoders"])
    if setting.cuda:
        for name, price in OFFLOADED.items():
            yield f"model.memory.offload=[{name}] ({price})", away(made, [name])
    if setting.batch > 1:
        accumulate = method.descent.accumulate
        half = _of_half_activations(made)._replace(encoding=made.encoding // 2)
        more = beside(2 * accumulate, made) - beside(accumulate, made) if setting.strategy == "ddp" else 0
        twice = f"data.batch_size={setting.batch // 2} model.optimizer.accumulate={2 * accumulate}"
        yield twice, half._replace(at_once=half.at_once + more)
    if setting.cuda and setting.precision in ("32-true", "32", "None"):
        yield "trainer.precision=bf16-mixed", _of_half_activations(made)
    yield from _of_half_frozen(method, made)
    yield from _of_fewer_bits(method, made, setting)
    if method.descent.settings.kind == "AdamW":
        eighth = _changed(made, lambda p: p._replace(optimizer=p.optimizer * EIGHT // FULL))
        yield "model.optimizer.kind=bitsandbytes.optim.AdamW8bit", eighth
    if method.average is not None:
        yield "model.ema=0 (no average of the student)", _changed(made, lambda p: p._replace(weights=0) if p.name == "average" else p)
    if not method.adapter.is_on:
        yield from _of_adapters(method, made, setting)
        if setting.strategy != "fsdp2" and setting.cuda:
            n = 2 * setting.devices if setting.devices == 1 else setting.devices
            whole = made._replace(buckets=0)
            yield f"trainer.strategy=fsdp2 trainer.devices={n}", placed(whole, method, setting._replace(strategy="fsdp2", devices=n))


def _changed(made: Footprint, change: Callable[[Part], Part]) -> Footprint:
    """With every part changed; what is gone of gradients and states is gone at any time."""
    kept = made._replace(parts=tuple(map(change, made.parts)))
    gone = sum(made.of(kind) - kept.of(kind) for kind in ("gradients", "optimizer"))
    least = kept.of("gradients") + kept.of("optimizer")
    buckets = kept.of("gradients") if made.buckets else 0
    return kept._replace(at_once=max(made.at_once - gone, least), buckets=buckets)


def _of_half_activations(made: Footprint) -> Footprint:
    half, least = made.activations // 2, made.of("gradients") + made.of("optimizer")
    return made._replace(activations=half, at_once=max(made.at_once - half, least))


def _of_half_frozen(method: Any, made: Footprint) -> Iterator[tuple[str, Footprint]]:
    """With the frozen parts that are in float32 in half precision: the network and the text encoders, and the autoencoder."""
    backbone = method.backbone
    vae = getattr(getattr(backbone, "pipe", None), "vae", None)
    texts = [part for part in encoders(backbone) if part is not vae]
    network, text, pictures = _half([backbone.network()]), _half(texts), _half([] if vae is None else [vae])
    yield "model.memory.teacher_dtype=bfloat16", _less_weight(made, teacher=network, encoders=text)
    yield "model.memory.vae_dtype=bfloat16", _less_weight(made, encoders=pictures)


def _of_fewer_bits(method: Any, made: Footprint, setting: Setting) -> Iterator[tuple[str, Footprint]]:
    """With the linear layers of a frozen network that is in half precision in 8 bits, and, on a GPU, in 4."""
    dtype, network = method.backbone.dtype, method.backbone.network()
    if dtype == torch.float32 or getattr(method.backbone, "quantize", "no pipeline") is not None:
        return
    for kind in ("int8", "nf4") if setting.cuda else ("int8",):
        yield f"model.memory.quantize={kind}", _less_weight(made, teacher=saved(network, kind))


def _half(modules: Sequence[nn.Module]) -> int:
    """Half of the bytes that are in float32."""
    return sum(bytes_of(p) for module in modules for p in module.parameters() if p.dtype == torch.float32) // 2


def _less_weight(made: Footprint, **saved: int) -> Footprint:
    return _changed(made, lambda part: part._replace(weights=part.weights - saved.get(part.name, 0)))


def _of_adapters(method: Any, made: Footprint, setting: Setting) -> Iterator[tuple[str, Footprint]]:
    """With adapters on the frozen network in the place of every copy."""
    try:
        network = method.backbone.adapted(Adapter(RANK), bool(getattr(method.student.network, "w_conditioned", False)))
    except ValueError:  # a backbone without a network for them
        return
    base = {id(p) for p in method.backbone.network().parameters()}
    size = sum(bytes_of(p) for p in network.parameters() if id(p) not in base)

    def adapted(part: Part) -> Part:
        whole = part.own and part.weights > size and part.name in (*method.roles, "average")
        share = part.optimizer / part.gradients if part.gradients else 0
        return Part(part.name, size, size if part.gradients else 0, int(size * share), True) if whole else part

    yield f"model.adapter.rank={RANK}", _changed(made, adapted)
