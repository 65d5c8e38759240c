"""Two samplers on one network: what it answered to the one it answers to the other, so that no rounding grows on the way.

This is how a large student is compared, of which the device holds one copy in half precision, the one in training: schedulers, nodes,
guidance and texts are held against each other to float32's precision, whatever the network computes in, and it is asked once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ddil_lightning.backbones import sampling

if TYPE_CHECKING:
    from ddil_lightning.backbones.family import Family
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.training.deployment import Deployment

CLOSE = 2**-6
"""How far what a network is told may be from what it was told, relative to its size: it is rounded to half precision at other places."""


ROUNDED = 1e-6
"""How far a time may be from the other, as a share of the whole range of times: a few roundings of float32, of sigma as of 1 - sigma.

A time that is told in half precision may be off by that rounding besides, relative to itself.
"""


def replayed(deployment: Deployment, made: Pipeline, prompts: Sequence[str], steps: int, seed: int = 0) -> tuple[Tensor, Tensor] | str:
    """The latents of the trainer's sampler, and those of the pipeline `made`, called as its users call it, whose network does not answer.

    In words where the two do not ask the same of the network: another time, text, guidance or number of evaluations.
    """
    (policy, grid), asked, model = deployment.exported.sampler(steps), cast("Family", deployment.network), made.network().model
    calls: list[tuple[dict[str, Any], Tensor]] = []
    rounded = model.dtype  # a pipeline may round the noise to the type of its texts, as Stable Diffusion 3's does, whatever it is given
    with _recording(asked, calls):
        mine = sampling.latents(made, policy, grid, prompts, deployment.guidance, seed, rounded=rounded).cpu()
    try:
        with _replaying(model, calls):
            begun = {"dtype": torch.float32, "rounded": rounded}
            theirs = sampling.pipeline_latents(made, prompts, steps, deployment.guidance_scale, seed, **begun).cpu()
    except _Otherwise as why:
        return str(why)
    return f"it asks its network {len(calls)} times less" if calls else (mine, theirs)


class _Otherwise(Exception):
    """Ends a replay at the first question that was not asked before."""


@contextmanager
def _recording(network: Family, calls: list[Any]) -> Iterator[None]:
    model, forward = network.model, network.model.forward
    signature = inspect.signature(forward)

    def record(*args: Any, **kwargs: Any) -> Any:
        (answer,) = forward(*args, **kwargs)
        answer = [x.float() for x in answer] if isinstance(answer, list) else answer.float()  # Z-Image's, a sample each
        calls.append((network.in_full(dict(signature.bind(*args, **kwargs).arguments)), answer))
        return (answer,)

    with _in_place_of(model, record):
        yield


@contextmanager
def _replaying(model: nn.Module, calls: list[Any]) -> Iterator[None]:
    signature = inspect.signature(model.forward)
    times = [value for told, _ in calls for name, value in told.items() if _is_time(name) and isinstance(value, Tensor)]
    alike = partial(_alike, span=max([1.0, *(float(x.max()) for x in times)]))

    def replay(*args: Any, **kwargs: Any) -> Any:
        told = dict(signature.bind(*args, **kwargs).arguments)
        if not calls:
            raise _Otherwise("it asks its network more often")
        before, answer = calls.pop(0)
        first, *others = signature.parameters
        if [x.shape for x in before[first]] != [x.shape for x in told[first]]:
            raise _Otherwise("its network is asked of latents of another shape")
        for name in others:
            if not alike(before.get(name), told.get(name), name):
                raise _Otherwise(f"its network is told another {name}")
        return (answer,)

    with _in_place_of(model, replay):
        yield


@contextmanager
def _in_place_of(model: Any, forward: Any) -> Iterator[None]:
    own = vars(model).get("forward")  # what somebody else has put in the place of the class's
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _is_time(name: str) -> bool:
    """Whether an argument of a network is the time of its latents."""
    return name == "t" or ("time" in name and "cond" not in name and "ids" not in name)


def _alike(a: Any, b: Any, name: str, span: float) -> bool:
    """Whether two arguments say the same; one that a sampler leaves out says nothing. `span`: what the whole range of times is told as."""
    if isinstance(a, Mapping) or isinstance(b, Mapping):
        a, b = a or {}, b or {}
        return all(_alike(a.get(key), b.get(key), key, span) for key in {**a, **b})
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_alike(x, y, name, span) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return True
    if a is None or b is None:
        return False
    a, b = (torch.as_tensor(x).detach().cpu() for x in (a, b))
    half = max([0.0, *(torch.finfo(x.dtype).eps for x in (a, b) if x.dtype in (torch.float16, torch.bfloat16))])
    a, b = a.double(), b.double()
    if _is_time(name):
        return bool(((a - b).abs() <= half * a.abs() + ROUNDED * span).all())  # one for all samples, or one for each
    return a.shape == b.shape and bool((a - b).abs().max() <= CLOSE * a.abs().max())
