"""How like its references a sampler's images of inverted prompts are, how they differ among themselves, and what of a scene comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ddil_lightning.evaluation.batches import as_saved
from ddil_lightning.evaluation.given import Verdict, chunked
from ddil_lightning.evaluation.intervals import means
from ddil_lightning.evaluation.metrics.diversity import seed_diversity
from ddil_lightning.evaluation.networks import Distance, Features
from ddil_lightning.records import wide

CHUNK = 32
SHIFTS = 8
"""Other scenes that a prompt is compared with for the rate of chance, at most."""


def likeness(images: Tensor, references: Tensor, features: Features, distance: Distance) -> dict[str, Any]:
    """Measures of images [P, S, 3, H, W], S of each of P prompts, against the references [P, 3, H, W], all in [-1, 1].

    `similarity`: mean cosine of an image's features and its reference's; `similarity_others`: with the other references (None for one);
    `lpips`: mean distance from the reference; `lpips_diversity`: mean distance of all pairs of images of a prompt (None for one seed).
    Means over prompts, with their `intervals`.
    """
    p, s = images.shape[:2]
    seen, real = as_saved(images.flatten(0, 1)), as_saved(references)
    a, b = (wide(normalize(chunked(features, x), dim=-1)) for x in (seen, real))
    cosines = (a @ b.T).view(p, s, p).mean(1)
    apart = [distance(x, y).flatten().cpu() for x, y in zip(seen.split(CHUNK), real.repeat_interleave(s, 0).split(CHUNK), strict=True)]
    values = {"similarity": cosines.diagonal(), "lpips": wide(torch.cat(apart)).view(p, s).mean(1)}
    if p > 1:
        values["similarity_others"] = (cosines.sum(1) - cosines.diagonal()) / (p - 1)
    if s > 1:
        values["lpips_diversity"] = seed_diversity(seen.unflatten(0, (p, s)), distance, CHUNK)
    return {"similarity_others": None, "lpips_diversity": None} | means(**values)


Judge = Callable[[Tensor, Sequence[str]], Verdict]


def judged(images: Tensor, captions: Sequence[str], judge: Judge) -> dict[str, Any]:
    """What a judge finds right of the captions in images [P, S, 3, H, W] of their inverted prompts, and what by chance.

    Chance is the same images beside the captions of other images: {"attributes", "all", "chance": {...}}.
    """
    s = images.shape[1]
    flat = as_saved(images.flatten(0, 1))

    def rates(said: Sequence[str]) -> dict[str, float]:
        right = judge(flat, [caption for caption in said for _ in range(s)]).correct
        return _rates(right)

    return _beside_chance(captions, rates)


def worded(
    prompts: Sequence[str], captions: Sequence[str], right: Callable[[Sequence[str], Sequence[str]], Mapping[str, Tensor]]
) -> dict[str, Any]:
    """What of the captions' own words stands in the inverted prompts, by `right`, and what by chance, as `judged` answers."""
    return _beside_chance(captions, lambda said: _rates(right(prompts, said)))


def _beside_chance(captions: Sequence[str], rates: Callable[[Sequence[str]], dict[str, Any]]) -> dict[str, Any]:
    n = len(captions)
    shifts = range(1, n)[:: max(1, -(-(n - 1) // SHIFTS))]
    others = [rates([*captions[k:], *captions[:k]]) for k in shifts]
    found = rates(captions)
    keys = ("attributes", "all")
    return found | {"chance": {key: sum(other[key] for other in others) / len(others) for key in keys} if others else None}


def _rates(right: Mapping[str, Tensor]) -> dict[str, Any]:
    """The share of what was asked that is right, the share of rows with all of it right, and both by attribute."""
    table = torch.stack([wide(values) for values in right.values()], 1)
    shares = {name: None if bool(v.isnan().all()) else float(v.nanmean()) for name, v in right.items()}
    return {
        "attributes": float(table.nanmean(1).nanmean()),
        "all": float(wide((table.nan_to_num(1.0) == 1).all(1)).mean()),
        "by": shares,
    }
