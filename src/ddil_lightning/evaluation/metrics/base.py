"""The contract of a metric: one file, one entry, and every table, chart and benchmark knows it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torchmetrics
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from ddil_lightning.evaluation.batches import Batch
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.intervals import means
from ddil_lightning.processes import Processes


class Metric(torchmetrics.Metric):
    """A measure of a sampler's images, which `Suite.score` makes, updates batch by batch and asks for its numbers.

    A metric of one's own, in any module; what imports the module can measure by it:

        @register                                    # ddil_lightning.evaluation.registry
        class Vividness(Metric):
            columns = (Column("vividness", "Vividness", "", "mean distance of the colours from grey"),)
            states = ("values",)

            def update(self, batch):
                self.values.append((batch.images - batch.images.mean(1, keepdim=True)).abs().mean((1, 2, 3)))

            def compute(self):
                return means(self.groups, vividness=self.all("values"))     # evaluation.intervals

    `columns` are the numbers that it gives; a table shows them in this order. `needs` are the members of the batch that not every suite has
    (`given.NEEDS`): where one is missing, the metric's numbers are None. `wants` are those that it can do without, and asks
    `batch.has(name)` for first. `over` says which images it is of: `prompts`, one of every held-out prompt, or `probes`, several of a few.
    `states` are lists of tensors, a row an image (or a prompt), to which `update` appends; over processes they are put together in the
    order of the ranks. `least` and `least_real` are the fewest images, generated (over probes: of one prompt) and real, for which its
    numbers are defined: a suite with fewer is refused before anything is drawn. `details` is what it gives beside its numbers, for the
    files alone, with its value where nothing is measured.

    The networks are in the batch, so no metric owns one. What `compute` needs of a batch beside the states is put into `held`, a dict: a
    network in it is in no state_dict, no optimiser and no checkpoint of what holds the metric.

    `groups` [N] numbers which of the images of all prompts are of one prompt, or of captions of one picture, for the intervals of means
    over images; None where none are. A suite says it; a metric over probes has a value a prompt, and no groups.

    It is a `torchmetrics.Metric`: it can be reset, moved and, with `sync_on_compute=True`, computed over processes. That is off by default:
    a suite is scored by one process, and the others would be waited for in vain.
    """

    columns: ClassVar[tuple[Column, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    wants: ClassVar[tuple[str, ...]] = ()
    over: ClassVar[str] = "prompts"
    states: ClassVar[tuple[str, ...]] = ()
    least: ClassVar[int] = 1
    least_real: ClassVar[int] = 0
    details: ClassVar[dict[str, Any]] = {}

    is_differentiable = False
    full_state_update = False

    def __init__(self, sync_on_compute: bool = False, **kwargs: Any) -> None:
        super().__init__(sync_on_compute=sync_on_compute, **kwargs)
        self.held: dict[str, Any] = {}
        self.groups: Tensor | None = None
        for name in self.states:
            self.add_state(name, [], dist_reduce_fx="cat")

    @classmethod
    def named(cls) -> str:
        """Its numbers by their keys, for a message."""
        return ", ".join(column.key for column in cls.columns)

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Append to `states` what this metric needs of a batch."""

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """{key: number} for every column, None where a number is not defined, never NaN, and every one of `details`.

        A number that is a mean over images or prompts has its 95 % interval under `intervals`, {key: [low, high]} (`evaluation.intervals`).
        """

    def each(self) -> dict[str, Tensor]:
        """{key: values [N]} of those numbers that are means over images, in the images' order; NaN for one that does not count.

        By them two samplers of the same prompts and noise are compared image by image (`evaluation.paired`), those of one of the `groups`
        together.
        """
        return {}

    def linear(self) -> dict[str, Tensor]:
        """{key: values [N]} of numbers that are no means over images: their mean is the number, and they move with the images as it does.

        By them two rows of paired images are compared to first order; no interval of one number alone is made of them, for its bias is not
        in them. Nothing where the images are so few that the bias of the two could outweigh their difference.
        """
        return {}

    def collect(self, processes: Processes) -> None:
        """Put the states of all `processes` together, in their order, in the first of them, which then computes alone.

        torchmetrics' own gathering gives them to every process, and fails where one has measured nothing.
        """
        for name in self.states:
            rows = getattr(self, name)
            every = processes.collected(dim_zero_cat(rows) if len(rows) else None)
            setattr(self, name, [mine for mine in every if mine is not None])

    def all(self, state: str) -> Tensor:
        """A state's rows [N, ...], of all updates. Raises ValueError before the first."""
        rows = getattr(self, state)
        if isinstance(rows, list) and not rows:
            raise ValueError(f"metric {type(self).__name__}: nothing was measured; update it first")
        return dim_zero_cat(rows)


class Scored(Metric):
    """The mean of a number that every image has with its prompt: the one of its `needs`, under the key of its one column."""

    states = ("scores",)
    scores: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the number [B] of each image and its prompt."""
        self.scores.append(getattr(batch, self.needs[0]))

    def each(self) -> dict[str, Tensor]:
        """The numbers [N] themselves."""
        return {self.columns[0].key: self.all("scores")}

    def compute(self) -> dict[str, Any]:
        """The mean over all images, with its interval."""
        return means(self.groups, **self.each())


class Compared(Metric):
    """A metric of how the images' rows in a space lie to a reference's: its `needs` are the two, such as `features` and `real`."""

    states = ("rows",)
    rows: list[Tensor]

    def update(self, batch: Batch) -> None:
        """Append the rows [B, D] of the images, and hold the reference's."""
        space, reference = self.needs
        self.rows.append(getattr(batch, space))
        self.held["reference"] = getattr(batch, reference)

    @property
    def pair(self) -> tuple[Any, Tensor]:
        """What the reference has, its rows [N, D] or its moments, and the rows [M, D] of all images."""
        return self.held["reference"], self.all("rows")
