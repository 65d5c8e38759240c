"""What a metric is given of a sampler's images: a batch as an 8-bit file would hold it, and what the suite's networks make of it, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.evaluation.metrics.pairs import resize
from ddil_lightning.evaluation.networks import Distance, Features, Networks, cosine, said

NEEDS = ("features", "real", "cosine", "distance", "verdict", "modes")
"""What a metric can ask of a suite, beyond images and prompts; the members of `Batch` of these names."""


def as_saved(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] as an 8-bit file would hold them: clamped to [-1, 1], rounded to 256 levels, on the CPU, float32.

    Public FID numbers are of saved files, and a sampler without a threshold overshoots [-1, 1] a little; both ends are settled here.
    Raises ValueError for integers, another shape, or values that are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)}; pass floats [N, 3, H, W] in [-1, 1]")
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images).flatten(1).all(1)).sum()
        raise ValueError(f"images: {bad} of {len(images)} hold NaN or infinity; the sampler diverged, nothing can be scored")
    return to_uint8(images).float() / 127.5 - 1


@torch.no_grad()
def chunked(net: Features, images: Tensor, chunk: int = 128) -> Tensor:
    """`net` over images [B, ...] at most `chunk` at a time, as float32 [B, D] on the CPU. Raises ValueError for other shapes."""
    out = torch.cat([net(x).float().cpu() for x in images.split(chunk)]) if len(images) else torch.empty(0, 0)
    if out.ndim != 2 or len(out) != len(images):
        raise ValueError(f"feature network: {tuple(out.shape)} for {len(images)} images; it must return [B, D]")
    return out


class Verdict(Protocol):
    """What a judge finds in B images."""

    @property
    def correct(self) -> dict[str, Tensor]:
        """For each attribute the share of it that is right, [B] in [0, 1], NaN where the prompt says nothing of it."""
        ...

    @property
    def residual(self) -> Tensor:
        """The distance of each image to the ideal drawing of what was read in it, [B]."""
        ...


@dataclass(frozen=True)
class Judge:
    """What reads pictures exactly: `verdict` compares images with their prompts, `modes` gives the mode coverage of prompts that leave
    something open. `side`: the edge in pixels of the only pictures that they can read, None for any."""

    verdict: Callable[[Tensor, Sequence[str]], Verdict] | None = None
    modes: Callable[[Tensor, Sequence[str]], float] | None = None
    side: int | None = None

    def about(self) -> dict[str, str | None]:
        """Where its two functions come from, in words, as a protocol names them."""
        return {"judge": said(self.verdict), "modes": said(self.modes)}


@dataclass(frozen=True, eq=False)
class Reference:
    """`real`: features [N, D] of the real images that generated ones are compared with, None where there are none. `about`: which they are.

    `size`: the edge to which the real images were resized, in pixels, and to which generated ones are before `features`; None for as they
    are. What compares generated images with each other alone sees them as they are.
    """

    real: Tensor | None = None
    about: str | None = None
    size: int | None = None


@dataclass(frozen=True, eq=False)
class Given:
    """All that a suite has for its metrics; what is None leaves the metrics that need it unmeasured.

    Raises ValueError for a network that is still a name: `Networks.load` makes networks of names.
    """

    networks: Networks = field(default_factory=Networks)
    reference: Reference = field(default_factory=Reference)
    judge: Judge = field(default_factory=Judge)

    def __post_init__(self) -> None:
        nets = self.networks
        for given in (nets.features, nets.clip, nets.distance):
            if isinstance(given, str):
                raise ValueError(f"Given: the network {given!r} is named and not made; give Networks(...).load(device)")

    def has(self) -> set[str]:
        """The members of NEEDS that this suite can meet."""
        nets = self.networks
        parts = {
            "features": nets.features,
            "real": self.reference.real,
            "cosine": nets.clip if nets.text is None else nets.text,
            "distance": nets.distance,
            "verdict": self.judge.verdict,
            "modes": self.judge.modes,
        }
        return {name for name in NEEDS if parts[name] is not None}


class Batch:
    """Generated images, their prompts, and what the suite's networks make of them: computed once, when the first metric asks.

    A metric reads `images` [B, 3, H, W] float32 in [-1, 1] on the CPU, `index` [B], their numbers in `asked`, the prompts of all batches,
    and `prompts`, those of its own images. In a pass over probes, `seeds` images in a row are of one prompt. Of NEEDS it reads what it has
    declared; anything else is refused with a line, for the next suite may not have it.
    """

    def __init__(self, images: Tensor, index: Tensor, asked: Sequence[str], given: Given, seeds: int = 1) -> None:
        self.images, self.index, self.asked, self.seeds = images, index, asked, seeds
        self._given = given
        self._made: dict[str, Any] = {}
        self._reader, self._needs = "a metric", frozenset(NEEDS)

    def read_by(self, name: str, needs: Sequence[str]) -> Batch:
        """The same batch, as the metric `name` may read it; what is computed is shared."""
        mine = Batch(self.images, self.index, self.asked, self._given, self.seeds)
        mine._made, mine._reader, mine._needs = self._made, name, frozenset(needs)
        return mine

    @property
    def prompts(self) -> list[str]:
        """The prompt of each of the B images."""
        return [self.asked[i] for i in self.index.tolist()]

    @property
    def features(self) -> Tensor:
        """The features [B, D] of the images, float32 on the CPU; the images are resized as the reference is."""
        return self._read("features")

    @property
    def real(self) -> Tensor:
        """The features [N, D] of the real images."""
        return self._read("real")

    @property
    def cosine(self) -> Tensor:
        """The cosine of each image and its prompt, [B] float64 in [-1, 1]."""
        return self._read("cosine")

    @property
    def distance(self) -> Distance:
        """The function that measures the distance of paired images."""
        return self._read("distance")

    @property
    def verdict(self) -> Verdict:
        """What the judge finds in the images, compared with their prompts."""
        return self._read("verdict")

    @property
    def modes(self) -> Callable[[Tensor, Sequence[str]], float]:
        """The function that gives the mode coverage, in [0, 1], of images [M, 3, H, W] and their M prompts."""
        return self._read("modes")

    def _read(self, need: str) -> Any:
        if need not in self._needs:
            raise ValueError(f"metric {self._reader}: it reads batch.{need} and does not declare it; write {need!r} into its `needs`")
        return self._made_once(need)

    def _made_once(self, need: str) -> Any:
        if need not in self._made:
            self._made[need] = self._make(need)
        return self._made[need]

    def _make(self, need: str) -> Any:
        nets: Any = self._given.networks
        judge: Any = self._given.judge
        if need == "features":
            return chunked(nets.features, resize(self.images, self._given.reference.size))
        if need == "cosine" and nets.text is not None:
            return cosine(self._made_once("features"), nets.text(self.prompts).cpu())
        if need == "cosine":
            return nets.clip(self.images, self.prompts).double().cpu()
        if need == "verdict":
            return judge.verdict(self.images, self.prompts)
        return {"real": self._given.reference.real, "distance": nets.distance, "modes": judge.modes}[need]
