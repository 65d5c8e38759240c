"""Roles: a network in its part of a method, and how one follows another. Methods ask for roles and never copy a network themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.adapters import sharing
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.reflection import Reflection
from ddil_lightning.diffusion.schedule import NoiseSchedule, Predicts
from ddil_lightning.records import Context

PORTION = 2**28
"""Bytes of weights that are on their way to an average on the CPU at a time, in pinned memory."""


class Role(Denoiser):
    """A denoiser with a name, which knows what of it is trained, saved, sharded and copied.

    `own`: whether it has weights of its own. The frozen teacher has not: it shares the pipeline's, and stays out of parameters,
    checkpoints, DDP and shards. `shared`: parameters that a role of its own reads and the pipeline has (those below its adapters); they are
    in no checkpoint either. `follows`: whether it moves with the updates of what it follows, as an average, or as a copy that a step has
    made while states that the former weights may have answered were kept. `moved`: whether it was made to follow something in the
    present step. Everything else of a role is its denoiser's.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        schedule: NoiseSchedule,
        predicts: Predicts = "eps",
        null: Context | None = None,
        reflection: Reflection | None = None,
        own: bool = True,
        shared: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__(network, schedule, predicts, null=null, reflection=reflection)
        self.name, self.own, self.shared = name, own, tuple(shared)
        self.follows = self.moved = False

    def weights(self) -> list[nn.Parameter]:
        """The parameters that training moves."""
        return [p for p in self.parameters() if p.requires_grad]

    def copied(self, name: str, reflection: Reflection | None = None) -> Role:
        """A frozen copy with weights of its own, in eval mode: a target, an average, a former student. It is guided as this one is."""
        network = sharing(self.network, self.shared).requires_grad_(False).eval()
        return Role(name, network, self.schedule, self.predicts, null=self.null, reflection=reflection, shared=self.shared).eval()

    def follow(self, other: Denoiser, decay: float = 0.0) -> None:
        """self <- decay self + (1 - decay) other, in place: weights alone, whatever the reflection and the null context of either."""
        self.moved = True
        self.follows |= decay > 0
        lerp_(self.network, other.network, decay)

    def apart(self, network: nn.Module | None = None) -> Denoiser:
        """The same network (or the whole of it, `network`) as it is used at inference: not reflected, counting for itself."""
        made = Denoiser(self.network if network is None else network, self.schedule, self.predicts, null=self.null)
        made.unguided = self.unguided
        return made


@torch.no_grad()
def lerp_(average: nn.Module, online: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) online, all parameters in one fused call; buffers are copied.

    Parameters that both share are equal already. To an average on another device, the CPU, the weights go in portions.
    """
    (mine, copies), (theirs, values) = _tensors(average), _tensors(online)
    for some in _portions([(a, b) for a, b in zip(mine, theirs, strict=True) if a is not b]):
        torch._foreach_lerp_([a for a, _ in some], _beside(some), 1 - decay)
    for a, b in zip(copies, values, strict=True):
        if a is not b:
            a.copy_(b)


def _portions(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Pairs of one device all together, the others by as many as PORTION holds."""
    near, size = [(a, b) for a, b in pairs if a.device == b.device], 0
    some: list[tuple[Tensor, Tensor]] = []
    for a, b in pairs:
        if a.device != b.device:
            if some and size + b.nbytes > PORTION:
                yield some
                some, size = [], 0
            some.append((a, b))
            size += b.nbytes
    yield from (portion for portion in (some, near) if portion)


def _beside(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The second of each pair on the device of the first. A GPU's go home in pinned memory, and are waited for once."""
    found = [b.to(a.device, non_blocking=b.is_cuda) for a, b in pairs]
    for device in {b.device for a, b in pairs if b.is_cuda and a.device != b.device}:
        torch.cuda.current_stream(device).synchronize()
    return found


def _tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers, each once, in one order for equal architectures: a walk of its own, because `parameters()` and
    `buffers()` take longer than the averaging itself, at every update."""
    parameters: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    left, seen = [module], set()
    while left:
        m = left.pop()
        if id(m) in seen:
            continue
        seen.add(id(m))
        for p in m._parameters.values():
            if p is not None:
                parameters[id(p)] = p
        for b in m._buffers.values():
            if b is not None:
                buffers[id(b)] = b
        left += [child for child in m._modules.values() if child is not None]
    return list(parameters.values()), list(buffers.values())
