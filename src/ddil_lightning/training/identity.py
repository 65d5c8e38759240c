"""A network whose answer is discarded in some rows of a batch, where a function of it is the identity: it is asked for the others alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddil_lightning.records import LatentBatch, sent, take


def identity_but(rows: Sequence[int], x: Tensor, b: LatentBatch, f: Callable[[Tensor, LatentBatch], Tensor], split: bool = False) -> Tensor:
    """f(x, b) [B, ...] of a function of every row by itself that is x in all but `rows`, which the host knows: f is called for these alone.

    `split`: the network behind f is split over the processes and waits for every one of them, so at least one row is asked for. Rows are
    answered as in a whole batch up to the rounding of kernels, which may depend on how many rows there are.
    """
    if split and not rows:
        rows = [0]
    if len(rows) == len(x):
        return f(x, b)
    if not rows:
        return x
    index = sent(torch.tensor(rows), x.device)
    found = f(x[index], take(b, index))
    return x.to(found.dtype).index_copy(0, index, found)
