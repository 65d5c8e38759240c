"""The memory of a run in advance: what every role holds, what a step needs besides, and what of it a strategy adds or takes away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ddil_lightning.backbones.network import Network
from ddil_lightning.backbones.quantising import saved
from ddil_lightning.training.ledger import Planned, Step

FULL, EIGHT = 8, 2
"""Bytes that AdamW keeps for every weight: two moments in float32, or in 8 bits each."""


class Setting(NamedTuple):
    """Where a run takes place: `batch` per device, `precision` as the Trainer calls it, `strategy` one of "", "ddp" and "fsdp2".

    `devices` are those of all machines together, `nodes` how many machines these are.
    `encoded`: whether all data are encoded before the training, so that encoders leave the device (of a CPU, for a file).
    """

    batch: int
    precision: str = "32-true"
    devices: int = 1
    strategy: str = ""
    cuda: bool = False
    encoded: bool = False
    nodes: int = 1

    @property
    def here(self) -> int:
        """How many devices, with a process each, one machine has."""
        return self.devices // self.nodes


class Part(NamedTuple):
    """What a role, or other modules, hold in bytes on one device; `own`: it is a part of the method, which a strategy may split."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    own: bool


class Footprint(NamedTuple):
    """The memory of a run in bytes on one device.

    `at_once`: the most that gradients, optimisers' states and activations take together; less than their sum, because activations have
    partly gone when the gradients are complete. `encoding`: what passes while images are encoded. `buckets`: the gradients under DDP, which
    lie in its buckets and are there all the time, between two steps and at the run's two ends too.
    `gathered`: what fsdp2 gathers of weights, and of gradients before they are split. `offloaded`: weights that are elsewhere in the
    training, and there before and after it, when the end is rehearsed and made; `whole`: the student under fsdp2, gathered for both.
    """

    parts: tuple[Part, ...]
    activations: int
    at_once: int
    encoding: int
    buckets: int = 0
    gathered: int = 0
    offloaded: int = 0
    whole: int = 0

    def of(self, kind: str) -> int:
        """The bytes of one kind of all parts: weights, gradients or optimizer."""
        return sum(getattr(part, kind) for part in self.parts)

    @property
    def total(self) -> int:
        """The most that there is at any time: in a step, while images are encoded between two of them, or at the run's two ends.

        There the student is exported, read again and compared, one network after the other in the place of the frozen one.
        """
        between = self.buckets + max(self.of("optimizer") + self.encoding, self.offloaded + self.whole)
        return self.of("weights") + max(self.at_once + self.gathered, between)


def footprint(method: Any, setting: Setting) -> Footprint:
    """That of `method`, which need not have weights, by one training step on tensors without memory."""
    planned = Planned(method, setting.precision, setting.batch, setting.cuda)
    encoding, step = planned.encode(), planned.step()
    whole = placed(Footprint(tuple(parts(method, step)), step.activations, step.peak, encoding), method, setting)
    return away(whole, (*(method.offload.names if setting.cuda else ()), *(["encoders"] if setting.encoded else ())))


def away(made: Footprint, names: Sequence[str]) -> Footprint:
    """With the parts `names` elsewhere while they are not called (training.offload); what has no encoders encodes nothing."""
    kept = tuple(part._replace(weights=0) if part.name in names else part for part in made.parts)
    offloaded = made.offloaded + sum(part.weights for part in made.parts if part.name in names and part.name != "encoders")
    return made._replace(parts=kept, encoding=0 if "encoders" in names else made.encoding, offloaded=offloaded)


def placed(whole: Footprint, method: Any, setting: Setting) -> Footprint:
    """What one of several devices has of the `whole` footprint under a strategy."""
    if setting.strategy == "ddp":
        # All gradients, the states and all of a step's activations: no gradient comes into being on the way.
        at_once = whole.of("gradients") + whole.of("optimizer") + whole.activations
        return whole._replace(buckets=whole.of("gradients"), at_once=at_once + beside(method.descent.accumulate, whole))
    if setting.strategy != "fsdp2":
        return whole
    n = setting.devices
    split = tuple(Part(p.name, -(-p.weights // n), -(-p.gradients // n), -(-p.optimizer // n), True) if p.own else p for p in whole.parts)
    gathered = 2 * max((_gathered(child) for child in _networks(method)), default=0)
    kept = whole._replace(parts=split, gathered=gathered, whole=sum(map(bytes_of, method.outgoing.network.parameters())))
    # All of a step's activations, beside the shares of gradients and states.
    return kept._replace(at_once=min(whole.at_once, whole.activations + kept.of("gradients") + kept.of("optimizer")))


def beside(accumulate: int, made: Footprint) -> int:
    """The bytes of gradients beside DDP's buckets: all of them in micro-batches that send none, in which they come into being anew."""
    return made.of("gradients") if accumulate > 1 else 0


def parts(method: Any, step: Step | None = None) -> Iterator[Part]:
    """What each role holds, tensors that several share counted at the first of them: the frozen network, the encoders, the roles."""
    seen: set[int] = set()
    states = {} if step is None else {id(p): size for p, size in step.optimizer.items()}
    teacher, quantize = _part("teacher", [method.backbone.network()], seen, states, own=False), getattr(method.backbone, "quantize", None)
    yield teacher._replace(weights=teacher.weights - (saved(method.backbone.network(), quantize) if quantize else 0))
    yield _part("encoders", encoders(method.backbone), seen, states, own=False)
    for name, child in method.named_children():
        yield _part(name, [child], seen, states, own=True)


def encoders(backbone: Any) -> list[nn.Module]:
    """The frozen parts that have nothing of the network."""
    network = {id(p) for p in backbone.network().parameters()}
    return [part for part in backbone.parts() if not any(id(p) in network for p in part.parameters())]


def _part(name: str, modules: Iterable[nn.Module], seen: set[int], states: dict[int, int], own: bool) -> Part:
    weights = gradients = optimizer = 0
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            size = bytes_of(tensor)
            weights += size
            gradients += size if tensor.requires_grad else 0
            optimizer += states.get(id(tensor), 0)
    return Part(name, weights, gradients, optimizer, own)


def bytes_of(tensor: Tensor) -> int:
    """The memory of a tensor's values, wherever they are."""
    return tensor.numel() * tensor.element_size()


def _networks(method: Any) -> Iterator[nn.Module]:
    return (getattr(child, "network", child) for child in method.children())


def _gathered(network: nn.Module) -> int:
    """What is whole of a sharded network at a time: all that is in no block, the block at work and the one that is fetched ahead."""
    blocks = list(network.blocks()) if isinstance(network, Network) else []
    sizes = sorted((sum(map(bytes_of, block.parameters())) for block in blocks), reverse=True)
    inside = {id(p): bytes_of(p) for block in blocks for p in block.parameters()}
    return sum(map(bytes_of, network.parameters())) - sum(inside.values()) + sum(sizes[:2])
