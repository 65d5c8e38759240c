"""Mode coverage: do the images of one caption show everything that it leaves open? For data whose judge can tell."""

from __future__ import annotations

from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Metric


class ModeCoverage(Metric):
    """The judge's own number, of all images of the probes together: their bytes are kept, which is meant for the miniature's small ones."""

    columns = (
        Column(
            "mode_coverage",
            "Mode coverage",
            "higher",
            "how evenly the values that a partial prompt leaves open are produced; of a uniform sampler a little below 1, by the number of "
            "images a prompt: compare at equal numbers alone",
        ),
    )
    needs = ("modes",)
    over = "probes"
    states = ("images", "index")
    images: list[Tensor]
    index: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the images themselves and the numbers of their prompts, for the judge reads all of a prompt's together."""
        self.images.append(to_uint8(batch.images))
        self.index.append(batch.index)
        self.held |= {"modes": batch.modes, "asked": batch.asked}

    def compute(self) -> dict[str, float]:
        """The mode coverage of all images of the probes, in [0, 1]."""
        prompts = [self.held["asked"][i] for i in self.all("index").tolist()]
        return {"mode_coverage": float(self.held["modes"](self.all("images").float() / 127.5 - 1, prompts))}
