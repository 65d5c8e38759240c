"""How the images of a row come about: in what batches, by which processes, whether they are kept, and what is told meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ddil_lightning.counting import counted
from ddil_lightning.errors import one_line
from ddil_lightning.evaluation.drawing import Cost, Pass, Sampler, Timed
from ddil_lightning.evaluation.kept import Keep, Kept
from ddil_lightning.evaluation.presence import as_made
from ddil_lightning.processes import Processes

if TYPE_CHECKING:
    from ddil_lightning.evaluation.metrics.base import Metric
    from ddil_lightning.evaluation.suite import Suite


class Source(NamedTuple):
    """A row's sampler. `evaluations`: counts those of its network so far. `about`: all that decides on its images, for their folder.
    `chunk`: as many at a time as it is asked for by itself."""

    name: str
    sample: Sampler
    evaluations: Callable[[], int]
    about: Callable[[], Mapping[str, Any]]
    chunk: int


@dataclass(frozen=True)
class Generation:
    """What a row's images do not depend on, up to rounding.

    `batch`: images that the sampler makes at a time, by default fewer the larger its latents are; the suite looks at its own number of
    them at a time, unless that is less. `keep`: the folder of images. `processes`: which share the images. `told`: with a bar on a
    terminal, elsewhere with a line for every tenth of what takes long and one a row. `look`: see `Suite.score`.
    """

    batch: int | None = None
    keep: Keep | None = None
    processes: Processes = field(default_factory=Processes)
    told: bool = False
    look: Callable[[Sequence[Metric]], None] | None = None

    def measured(self, suite: Suite, source: Source) -> tuple[dict[str, Any], Cost]:
        """All metrics of a sampler's images, in every process, and what the images took.

        Raises ValueError that begins with the sampler's name.
        """
        suite = replace(suite, batch=max(suite.batch, self.batch or 0))
        timed = Timed(source.sample, source.evaluations, self.batch or source.chunk)
        try:
            kept = Kept(self.keep, source.name, suite, source.about(), timed, self.processes) if self.keep else None
            with self._telling(suite.passes(), source.name, kept or timed) as sample:
                metrics = suite.score(sample, self.processes, self.look)
            now, before = self._spent(timed), kept.before if kept else Cost()
            if not (before + now).warm_images:
                self.processes.alike(timed.repeat)
                now = self._spent(timed)
        except ValueError as error:
            raise ValueError(f"{source.name}: {one_line(error)}") from error
        cost = kept.close(now) if kept else now
        if self.told and self.processes.first:
            self._tell(suite.passes(), source.name, now)
        return metrics, cost

    def taught(self, suite: Suite, source: Source, about: str, digest: str) -> Suite:
        """The suite with a teacher's images as its second reference, drawn as a row's are (`Suite.taught`).

        Raises ValueError that begins with the teacher's name.
        """
        timed, parts = Timed(source.sample, source.evaluations, self.batch or source.chunk), [suite.part("teacher")]
        try:
            with self._telling(parts, source.name, timed) as sample:
                found = suite.taught(sample, about, digest, self.processes)
        except ValueError as error:
            raise ValueError(f"{source.name}: {one_line(error)}") from error
        now = self._spent(timed)
        if self.told and self.processes.first:
            self._tell(parts, source.name, now)
        return found

    def _spent(self, timed: Timed) -> Cost:
        """Of all processes, in each of them."""
        return sum(self.processes.gathered(timed.cost), Cost())

    def said(self, suite: Suite, source: Source, network: nn.Module, size: Sequence[int] | None) -> dict[str, Any]:
        """For a row: the precision of its network, how many images at a time, by how many processes, and the images' `size`, height and
        width, with the numbers that see them in it where a suite takes others (`presence.as_made`)."""
        batch = self.batch or min(suite.batch, source.chunk)
        dtype = next((str(p.dtype).removeprefix("torch.") for p in network.parameters()), None)
        made: dict[str, Any] = {"dtype": dtype, "batch": batch, "processes": self.processes.world}
        if size is None:
            return made
        return made | {"size": list(size), "as_made": [] if suite.side else as_made(suite.asked, suite.given)}

    @contextmanager
    def _telling(self, parts: Sequence[Pass], name: str, sample: Sampler) -> Iterator[Sampler]:
        """Yields the sampler, whose calls are `counted` in the first process: those of its own share."""
        if not (self.told and self.processes.first):
            yield sample
            return
        calls = [call for part in parts for call in part.calls(self.processes.rank, self.processes.world)]
        told = counted(calls, len(calls), f"{name}, in batches")
        next(told)  # its clock goes from here

        def shown(prompts: list[str], seed: int) -> Tensor:
            images = sample(prompts, seed)
            next(told, None)
            return images

        with closing(told):
            yield shown

    def _tell(self, parts: Sequence[Pass], name: str, now: Cost) -> None:
        """The line of a row, where there was no bar."""
        from rich.console import Console

        if Console().is_terminal:
            return
        images = sum(len(part.asked) for part in parts)
        drawn = "" if now.images == images else f", {now.images} of them drawn now"
        print(f"{name}: {images} images{drawn}, {now.seconds:.0f} s", flush=True)
