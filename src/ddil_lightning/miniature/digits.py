"""Real data without a download: scikit-learn's handwritten digits (8x8, 1797 images), enlarged to 16x16, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddil_lightning.miniature.judge import Judgement, evenness

SIZE = 16
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("a", "handwritten", "digit", *NUMBERS)
TRAIN = 1400  # the last 397 images are held out; the data set is in the order of its writers, so they are other people's


@lru_cache(maxsize=1)
def load() -> tuple[Tensor, Tensor]:
    """All images [1797, 3, 16, 16] float32 in [-1, 1] and their labels [1797]; 0.4 s for the first call, then cached."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    large = F.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)
    return large.expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


def split(name: str = "train") -> tuple[Tensor, Tensor]:
    """Images and labels of the "train" (1400) or the "held_out" (397) part. Raises ValueError for another name."""
    if name not in ("train", "held_out"):
        raise ValueError(f"unknown split {name!r}; choose train or held_out")
    images, labels = load()
    return (images[:TRAIN], labels[:TRAIN]) if name == "train" else (images[TRAIN:], labels[TRAIN:])


def caption(label: int, bare: bool = False) -> str:
    """The caption of a digit, "a handwritten seven"; `bare` leaves the number open: "a handwritten digit"."""
    return f"a handwritten {'digit' if bare else NUMBERS[label]}"


def draw(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """`n` training images, drawn with replacement, and captions, of which one in twelve leaves the number open.

    Item i of a seed does not depend on `n`.
    """
    images, labels = split("train")
    u = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))
    rows = (u[:, 0] * len(images)).long().clamp(max=len(images) - 1)
    return images[rows], [caption(int(k), bare=bool(b)) for k, b in zip(labels[rows], u[:, 1] < 1 / 12, strict=True)]


def prompts(n: int, seed: int) -> list[str]:
    """`n` prompts, the numbers in turn, starting at `seed`; there are ten different ones only."""
    return [caption((seed + i) % 10) for i in range(n)]


def parse(text: str) -> dict[str, Any]:
    """What a caption says: {"digit": 7}, or {} for "a handwritten digit". Raises ValueError for a caption of another form."""
    words = text.lower().rstrip(" .").split()
    if len(words) == 3 and words[:2] == ["a", "handwritten"] and words[2] in (*NUMBERS, "digit"):
        return {} if words[2] == "digit" else {"digit": NUMBERS.index(words[2])}
    raise ValueError(f"not a caption of the digits data: {text!r}: expected 'a handwritten zero' to 'a handwritten nine'")


@lru_cache(maxsize=1)
def _classifier() -> Any:
    from sklearn.svm import SVC

    images, labels = split("train")
    return SVC(gamma=0.001, C=10).fit(_features(images), labels.numpy())


def _features(images: Tensor) -> Any:
    """Images [N, 3, 16, 16] as the 8x8 pixels in 0..16 for which the classifier's gamma is meant, [N, 64]."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(f"the digits judge needs images [N, 3, {SIZE}, {SIZE}] in [-1, 1], got {list(images.shape)}")
    grey = images.detach().float().cpu().clamp(-1, 1).mean(1, keepdim=True)
    return ((F.avg_pool2d(grey, 2) + 1) * 8).flatten(1).numpy()


def read_digits(images: Tensor) -> Tensor:
    """The digit [N] int64 that a support vector machine sees in each image [N, 3, 16, 16] in [-1, 1]."""
    return torch.as_tensor(_classifier().predict(_features(images))) if len(images) else torch.zeros(0, dtype=torch.int64)


def judge(images: Tensor, captions: Sequence[str]) -> Judgement:
    """Compare images [N, 3, 16, 16] in [-1, 1] with N captions; the one attribute is "digit".

    The residual is the RMS distance of each image to the nearest training image of the digit that was read, pixels in [0, 1]:
    unlike the one of the shapes it is not zero for real images.

    Raises ValueError for images of another size, another number of captions, or a caption of another form.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    said = torch.tensor([parse(text).get("digit", -1) for text in captions], dtype=torch.int64)
    seen = read_digits(images)
    right = torch.where(said < 0, torch.nan, (seen == said).float())
    train, labels = split("train")
    distance = torch.cdist(images.detach().float().cpu().clamp(-1, 1).mean(1).flatten(1), train[:, 0].flatten(1))
    nearest = distance.masked_fill(seen[:, None] != labels, torch.inf).min(1).values
    return Judgement({"digit": right}, right, right.nan_to_num(1.0), nearest / (2 * SIZE))


def partial_prompts() -> list[str]:
    """A list of the one prompt that leaves the digit open, for `mode_coverage`."""
    return [caption(0, bare=True)]


def mode_coverage(images: Tensor, captions: Sequence[str]) -> float:
    """How evenly images whose caption leaves the digit open cover the ten digits, in [0, 1]; see `judge.mode_coverage`.

    Even draws are below 1, as there.

    Raises ValueError where no caption leaves the digit open.
    """
    rows = [i for i, text in enumerate(captions) if not parse(text)]
    if not rows:
        raise ValueError("mode_coverage needs captions that leave the digit open; see partial_prompts()")
    return evenness(read_digits(images[rows]), 10)
