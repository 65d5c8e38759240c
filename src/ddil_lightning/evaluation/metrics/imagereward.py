"""ImageReward (Xu et al. 2023): what raters ranked higher, in standard deviations from the mean of the authors' data.

The network is `networks.imagereward.image_reward`. It is below 0 for an image that is worse than the average one of that data.
"""

from __future__ import annotations

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Scored


class ImageReward(Scored):
    """The mean over all images of the score of an image and its prompt."""

    columns = (Column("image_reward", "ImageReward", "higher", "how far people prefer images like these for their prompts", shown=False),)
    needs = ("image_reward",)
