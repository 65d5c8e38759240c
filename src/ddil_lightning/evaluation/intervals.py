"""How far a number would move with other images: a bootstrap interval, for the numbers that are means over images or prompts.

FID-like numbers have none. Their bias falls with the number of images, and a resample holds fewer different images than the sample: its
distances are those of a smaller sample, all to one side of the number. A kernel's distance and the share of real images that is reached are
no means over generated images either. Compare such numbers between seeds. The Fréchet distances of two rows of paired images can be
compared to first order (`Metric.linear`), by an interval without their bias: the two rows' differ, so there is none for few images.
"""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor, cat, ones_like, randint, zeros

LEAST = 10
"""Fewer values give no interval: their own spread says too little of that of others."""
DRAWS, BLOCK = 1000, 1 << 22


def interval(values: Tensor, groups: Tensor | None = None, draws: int = DRAWS, seed: int = 0) -> list[float] | None:
    """The ends of the central 95 % of the means of resamples of `values` [N], each an image's or a prompt's.

    `groups` [N]: the number of the prompt, or of the picture whose captions the prompts are, of each value; None where each has its own.
    Groups are drawn whole, for what one prompt gives is more alike than what several do: as independent values they would seem to tell
    more than they do. None for fewer than LEAST groups, and where all are equal: resamples of 0 of 100 say 0, and 100 more images need not.
    The groups are sorted by their means first, so that processes that hold them in another order find the same. Raises ValueError for
    another number of groups than of values.
    """
    sums, sizes = _summed(values.double().flatten(), groups)
    x, order = (sums / sizes).sort(stable=True)
    if len(x) < LEAST or x[0] == x[-1]:
        return None
    rng, rows = Generator().manual_seed(seed), max(1, BLOCK // len(x))
    parts = (randint(len(x), (min(rows, draws - i), len(x)), generator=rng) for i in range(0, draws, rows))
    sums, sizes = sums[order], sizes[order]
    even = bool((sizes == sizes[0]).all())
    found = cat([x[part].mean(1) if even else sums[part].sum(1) / sizes[part].sum(1) for part in parts])
    ends: list[float] = found.quantile(found.new_tensor([0.025, 0.975])).tolist()
    return ends


def _summed(x: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum and the number of the values of each group."""
    if groups is None:
        return x, ones_like(x)
    if len(groups) != len(x):
        raise ValueError(f"interval: {len(x)} values and the groups of {len(groups)}; give the group of each")
    numbers = groups.unique(return_inverse=True)[1]
    none = zeros(int(numbers.max()) + 1 if len(numbers) else 0, dtype=x.dtype)
    return none.index_add(0, numbers, x), none.index_add(0, numbers, ones_like(x))


def intervals(groups: Tensor | None = None, /, **values: Tensor) -> dict[str, list[float]]:
    """{key: [low, high]} of values [N] by key, for the `intervals` of what a metric computes; without those that have none.

    `groups`: as for `interval`; a metric has them as `self.groups`. Values of images that do not count are left out before. Raises
    ValueError for one that is no finite number, for the mean of all would be none either and be read as not measured.
    """
    for key, x in values.items():
        wrong = (~x.flatten().isfinite()).nonzero().flatten()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"{key}: value {i} (from 0) of {x.numel()}, an image's or a prompt's, is {float(x.flatten()[i])}: "
                "mend what measures it, or leave out those that do not count"
            )
    found = {key: interval(x, groups) for key, x in values.items()}
    return {key: ends for key, ends in found.items() if ends is not None}


def means(groups: Tensor | None = None, /, **values: Tensor) -> dict[str, Any]:
    """What a metric of plain means computes: {key: mean} of values [N] by key, and their `intervals`. Raises ValueError as that does."""
    ends = intervals(groups, **values)
    return {key: float(x.mean()) for key, x in values.items()} | {"intervals": ends}
