"""HPSv2 (Wu et al. 2023): what people prefer, a cosine of image and prompt in a CLIP that was trained on their choices.

The number is the cosine, as in the DDIL paper; the authors' own benchmark prints 100 times it, over four styles of prompts of its own.
The network is `networks.preference.hps_scores`, version 2.1 unless another is asked for; numbers of two versions are not comparable.
"""

from __future__ import annotations

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Scored


class Hps(Scored):
    """The mean over all images of the score of an image and its prompt."""

    columns = (Column("hps", "HPSv2", "higher", "how far people prefer images like these for their prompts", shown=False),)
    needs = ("hps",)
