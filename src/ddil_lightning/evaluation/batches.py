"""What a metric is given of a sampler's images: a batch as an 8-bit file would hold it, and what the suite's networks make of it, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.evaluation.given import MOMENTS, NEEDS, PREFERRED, REFERRED, SPACES, Given, Verdict
from ddil_lightning.evaluation.networks import Distance, cosine


def as_saved(images: Tensor, where: Callable[[int], str] | None = None) -> Tensor:
    """Images [B, 3, H, W] as an 8-bit file would hold them: clamped to [-1, 1], rounded to 256 levels, on the CPU, float32.

    Public FID numbers are of saved files, and a sampler without a threshold overshoots [-1, 1] a little; both ends are settled here.
    Raises ValueError for integers, another shape, or values that are not finite; `where` says in words which an image is.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)}; pass floats [N, 3, H, W] in [-1, 1]")
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
        named = f", the first that of {where(bad[0])}" if where else ""
        raise ValueError(f"images: {len(bad)} of {len(images)} hold NaN or infinity{named}; the sampler diverged, nothing can be scored")
    return to_uint8(images).float() / 127.5 - 1


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

    def has(self, need: str) -> bool:
        """Whether this suite has one of NEEDS, for a metric that can do without it."""
        return need in self._given.has()

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
    def real_moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the real images' features, float64: there also where the features themselves are not."""
        return self._read("real_moments")

    @property
    def real_patch_moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the features of the real images' crops, float64."""
        return self._read("real_patch_moments")

    @property
    def teacher_patch_moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the features of the teacher's crops, float64."""
        return self._read("teacher_patch_moments")

    @property
    def teacher(self) -> Tensor:
        """The features [N, D] of the teacher's own images of all prompts."""
        return self._read("teacher")

    @property
    def embeddings(self) -> Tensor:
        """The embeddings [B, E] of the images by a second network, of unit length; the images are as the reference's (`Given.whole`)."""
        return self._read("embeddings")

    @property
    def real_embeddings(self) -> Tensor:
        """The embeddings [N, E] of the real images."""
        return self._read("real_embeddings")

    @property
    def patches(self) -> Tensor:
        """The features [B * P, D] of P crops at full resolution of each image, those of an image one after the other."""
        return self._read("patches")

    @property
    def real_patches(self) -> Tensor:
        """The features [N * P, D] of the real images' crops."""
        return self._read("real_patches")

    @property
    def teacher_patches(self) -> Tensor:
        """The features [N * P, D] of the crops of the teacher's images."""
        return self._read("teacher_patches")

    @property
    def tones(self) -> Tensor:
        """Saturation and contrast [B, 2] of the images (`views.tones`); the images are resized as the reference is."""
        return self._read("tones")

    @property
    def real_tones(self) -> Tensor:
        """Saturation and contrast [N, 2] of the real images."""
        return self._read("real_tones")

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

    @property
    def hps(self) -> Tensor:
        """HPSv2 of each image and its prompt, [B] float64, a cosine."""
        return self._read("hps")

    @property
    def pickscore(self) -> Tensor:
        """PickScore of each image and its prompt, [B] float64, 100 times a cosine."""
        return self._read("pickscore")

    @property
    def image_reward(self) -> Tensor:
        """ImageReward of each image and its prompt, [B] float64, in standard deviations."""
        return self._read("image_reward")

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
        if need in REFERRED:
            whose, space = REFERRED[need]
            return getattr(self._given, whose).rows[space]
        if need in MOMENTS:
            whose, space = MOMENTS[need]
            return getattr(self._given, whose).moments(space)
        if need in SPACES:
            known = self._made_once("features") if need == "embeddings" and self._given.shares else None
            return self._given.rows(need, self.images, known)
        if need == "cosine" and nets.text is not None:
            return cosine(self._made_once("features"), nets.text(self.prompts).cpu())
        if need == "cosine":
            return nets.clip(self.images, self.prompts).cpu().double()
        if need in PREFERRED:
            return getattr(nets, need)(self.images, self.prompts).cpu().double()
        if need == "verdict":
            return judge.verdict(self.images, self.prompts)
        return {"distance": nets.distance, "modes": judge.modes}[need]
