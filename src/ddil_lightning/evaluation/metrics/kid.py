"""KID: the squared distance of generated and real features in the space of a cubic kernel (Binkowski et al. 2018).

It is unbiased, so that numbers of different N can be compared, and needs no covariance, so that some hundred images do. Published code
averages it over random subsets of 1000, which have the same mean and spread more; here all pairs are taken once, nothing is drawn, and the
two sides may differ in number, which torchmetrics' formula does not allow for. Unbiased it is for independent samples: an image of a real
one's own caption is nearer to it than to others, and that pulls the number down by 2/N of the difference, below 0 for a good sampler.
"""

from __future__ import annotations

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.kernels import cubic, squared_mmd
from ddil_lightning.evaluation.metrics.base import Compared


class Kid(Compared):
    """The unbiased kernel distance, not times 1000. Raises ValueError with fewer than two images on either side."""

    columns = (
        Column("kid", "KID", "lower", "kernel distance of generated and real features; unbiased, so 0 or less where equal", shown=False),
    )
    needs = ("features", "real")
    least = 2
    least_real = 2

    def compute(self) -> dict[str, float]:
        """The kernel distance between all generated images and the real ones."""
        return {"kid": squared_mmd(cubic, *self.pair)}
