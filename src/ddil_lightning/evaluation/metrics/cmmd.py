"""CMMD: the squared distance of generated and real CLIP embeddings in the space of a Gaussian kernel (Jayasumana et al. 2024).

Embeddings have unit length, sigma is 10, and the number is times 1000, as in the authors' code. As there a point is paired with itself too,
which adds about 1000 (1 - mean kernel) (1/N + 1/M): compare at equal counts where that is no small part. Published numbers are of CLIP
ViT-L/14 at 336 pixels (the network `clip_l14_336`), to which the central square of every image is brought from the size that it has.
"""

from __future__ import annotations

from torch import Tensor

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.kernels import Gaussian, squared_mmd
from ddil_lightning.evaluation.metrics.base import Compared


def cmmd(real: Tensor, fake: Tensor) -> float:
    """1000 times the squared distance of unit vectors [N, D] and [M, D]. Raises ValueError as `squared_mmd` does."""
    return 1000 * squared_mmd(Gaussian(10.0), real, fake, unbiased=False)


class Cmmd(Compared):
    """The distance of the embeddings of all images. Raises ValueError with fewer than two images on either side."""

    columns = (Column("cmmd", "CMMD", "lower", "kernel distance of generated and real images' embeddings, times 1000", shown=False),)
    needs = ("embeddings", "real_embeddings")
    least = 2
    least_real = 2

    def compute(self) -> dict[str, float]:
        """The distance between all generated images and the real ones."""
        return {"cmmd": cmmd(*self.pair)}
