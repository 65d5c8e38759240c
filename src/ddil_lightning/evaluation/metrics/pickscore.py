"""PickScore (Kirstain et al. 2023): what users of a drawing service preferred, 100 times a cosine of image and prompt.

The network is `networks.preference.pick_scores`. Only differences mean something: 0.5 more is a preference of e^0.5 to 1.
"""

from __future__ import annotations

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Scored


class PickScore(Scored):
    """The mean over all images of the score of an image and its prompt."""

    columns = (Column("pickscore", "PickScore", "higher", "how far people prefer images like these for their prompts", shown=False),)
    needs = ("pickscore",)
