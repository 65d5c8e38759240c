"""What a suite has for its metrics: networks, a judge, the images that generated ones are compared with, and how all are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ddil_lightning.diffusion.gaussians import moments
from ddil_lightning.evaluation.metrics.pairs import middle, resize
from ddil_lightning.evaluation.networks import Features, Named, Networks, said
from ddil_lightning.evaluation.views import Crops, tones
from ddil_lightning.heap import give_back

SPACES = ("features", "embeddings", "patches", "tones")
"""Where images are points: rows of numbers that generated and real ones alike are turned into, by `Given.rows`."""
TAUGHT = ("features", "patches")
"""Those in which generated images are compared with a teacher's."""
REFERRED = {
    "real": ("reference", "features"),
    "real_embeddings": ("reference", "embeddings"),
    "real_patches": ("reference", "patches"),
    "real_tones": ("reference", "tones"),
    "teacher": ("teacher", "features"),
    "teacher_patches": ("teacher", "patches"),
}
"""The needs that are rows of images which a suite holds: of which of its two references, and in which space."""
MOMENTS = {
    "real_moments": ("reference", "features"),
    "real_patch_moments": ("reference", "patches"),
    "teacher_patch_moments": ("teacher", "patches"),
}
"""The needs that are mean and covariance of such rows: all that a Fréchet distance asks of them, and all that some files hold."""
PREFERRED = ("hps", "pickscore", "image_reward")
"""The needs that are numbers by which people would prefer an image for its prompt, each of the network of its name."""
NEEDS = (*SPACES, *REFERRED, *MOMENTS, "cosine", "distance", "verdict", "modes", *PREFERRED)
"""What a metric can ask of a suite, beyond images and prompts; the members of `Batch` of these names."""


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
    """Images that generated ones are compared with, as `rows` by space ([N, D] for each of SPACES that it has), and in words, `about`.

    `gaussians`: mean [D] and covariance [D, D] by space, where the rows are not known. `count`: of how many images these are, if anyone
    knows. `digest`: of the images' contents. `unreadable`: how many images were left out. `unverified`: a
    file of statistics does not say which network, size and resizing they are by. Raises ValueError for rows of no space.
    """

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    about: str | None = None
    gaussians: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    count: int | None = None
    digest: str | None = None
    unreadable: int = 0
    unverified: bool = False
    _moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Mapping) or set(self.rows) - set(SPACES):
            found = sorted(self.rows) if isinstance(self.rows, Mapping) else type(self.rows).__name__
            raise ValueError(f"Reference: {found}; give rows by space, {{'features': [N, D]}}, of {', '.join(SPACES)}")

    @property
    def images(self) -> int | None:
        """How many images it is of, None for none and where nobody knows."""
        return next((len(rows) for space, rows in self.rows.items() if space != "patches"), self.count)

    def knows(self, space: str) -> bool:
        """Whether it has mean and covariance in a space."""
        return space in self.gaussians or space in self.rows

    def moments(self, space: str) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] in a space, float64; of rows they are computed once. Raises ValueError for fewer than two rows."""
        if space not in self._moments:
            self._moments[space] = self.gaussians[space] if space in self.gaussians else moments(self.rows[space])
        return self._moments[space]


@dataclass(frozen=True)
class View:
    """How images are looked at; `distance` and the judge see them as they are.

    `size`: the edge in pixels to which real images were resized, and to which generated ones are before they are compared with them; None
    for as they are. Embeddings are of all images as they are (`Given.whole`). `crops`: the parts for `patches`, None for none.
    """

    size: int | None = None
    crops: Crops | None = None


@dataclass(frozen=True, eq=False)
class Given:
    """All that a suite has for its metrics; what is None leaves the metrics that need it unmeasured.

    `reference`: the real images; `teacher`: the teacher's own of the same prompts, a second reference. Raises ValueError for a network that
    is still a name: `Networks.load` makes networks of names.
    """

    networks: Networks = field(default_factory=Networks)
    reference: Reference = field(default_factory=Reference)
    judge: Judge = field(default_factory=Judge)
    view: View = field(default_factory=View)
    teacher: Reference = field(default_factory=Reference)

    def __post_init__(self) -> None:
        for spec in self.networks.named.values():
            raise ValueError(f"Given: the network {spec.name!r} is named and not made; give Networks(...).load(device)")

    def has(self) -> set[str]:
        """The members of NEEDS that this suite can meet."""
        nets = self.networks
        parts = {
            "features": nets.features,
            "embeddings": nets.embed,
            "patches": nets.features and self.view.crops,
            "tones": tones,
            **{need: getattr(self, whose).rows.get(space) for need, (whose, space) in REFERRED.items()},
            "cosine": nets.clip if nets.text is None else nets.text,
            "distance": nets.distance,
            "verdict": self.judge.verdict,
            "modes": self.judge.modes,
            **{need: getattr(self, whose).knows(space) or None for need, (whose, space) in MOMENTS.items()},
            **{need: getattr(nets, need) for need in PREFERRED},
        }
        return {name for name in NEEDS if parts[name] is not None}

    @property
    def whole(self) -> bool:
        """Whether embeddings are of the central squares of images as large as these are, which their network brings to its own size.

        Published numbers are: another size in between would take details away. A function without a name is given `view.size`, for
        nobody knows what it takes.
        """
        return isinstance(self.networks.embed, Named)

    @property
    def shares(self) -> bool:
        """Whether one network makes both features and embeddings of the same pixels, so that it need be called once only."""
        same = self.networks.embed is not None and self.networks.embed == self.networks.features
        return same and not (self.whole and self.view.size)

    def rows(self, space: str, images: Tensor, features: Tensor | None = None) -> Tensor:
        """The rows [B, D] on the CPU of images [B, 3, H, W], as `as_saved` answers them, in one of the SPACES that this suite has.

        Of `patches` an image has several, one after the other; `embeddings` have unit length. `features`: those of the images, if they
        are known already.
        """
        nets: Any = self.networks
        if space == "patches":
            crops: Any = self.view.crops
            return chunked(nets.features, crops(middle(images, crops.side) if crops.at is None else resize(images, crops.at)))
        if space == "embeddings" and self.shares and features is not None:
            return normalize(features, dim=1)
        if space == "embeddings":
            seen = middle(images, min(images.shape[-2:])) if self.whole else resize(images, self.view.size)
            return normalize(chunked(nets.embed, seen), dim=1)
        seen = resize(images, self.view.size)
        return tones(seen) if space == "tones" else chunked(nets.features, seen)

    def rows_of(self, batches: Iterable[Tensor], spaces: Sequence[str] = SPACES) -> dict[str, Tensor]:
        """The rows [N, D] of all images of `batches` in those of `spaces` that this suite has, for a `Reference`; none of no batch."""
        met = self.has()
        found: dict[str, list[Tensor]] = {space: [] for space in spaces if space in met}
        for images in batches:
            for space, rows in found.items():
                rows.append(self.rows(space, images, found["features"][-1] if space == "embeddings" and "features" in found else None))
            del images  # before its memory is given back
            give_back()
        return {space: torch.cat(rows) for space, rows in found.items() if rows}
