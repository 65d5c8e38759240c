"""How far a number would move with other images: a bootstrap interval, for the numbers that are means over images or prompts.

FID-like numbers have none. Their bias falls with the number of images, and a resample holds fewer different images than the sample: its
distances are those of a smaller sample, all to one side of the number. A kernel's distance and the share of real images that is reached are
no means over generated images either. Compare such numbers between seeds.
"""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor, cat, randint

LEAST = 10
"""Fewer values give no interval: their own spread says too little of that of others."""
DRAWS, BLOCK = 1000, 1 << 22


def interval(values: Tensor, draws: int = DRAWS, seed: int = 0) -> list[float] | None:
    """The ends of the central 95 % of the means of resamples of `values` [N], each an image's or a prompt's.

    None for fewer than LEAST, and where all are equal: resamples of 0 of 100 say 0, and 100 more images need not. The values are sorted
    first, so that processes that hold them in another order find the same.
    """
    x = values.double().flatten().sort().values
    if len(x) < LEAST or x[0] == x[-1]:
        return None
    rng, rows = Generator().manual_seed(seed), max(1, BLOCK // len(x))
    parts = [min(rows, draws - i) for i in range(0, draws, rows)]
    found = cat([x[randint(len(x), (part, len(x)), generator=rng)].mean(1) for part in parts])
    ends: list[float] = found.quantile(found.new_tensor([0.025, 0.975])).tolist()
    return ends


def intervals(**values: Tensor) -> dict[str, list[float]]:
    """{key: [low, high]} of values [N] by key, for the `intervals` of what a metric computes; without those that have none."""
    found = {key: interval(x) for key, x in values.items()}
    return {key: ends for key, ends in found.items() if ends is not None}


def means(**values: Tensor) -> dict[str, Any]:
    """What a metric of plain means computes: {key: mean} of values [N] by key, and their `intervals`."""
    return {key: float(x.mean()) for key, x in values.items()} | {"intervals": intervals(**values)}
