"""The benchmark: every sampler gets the same prompts and seeds, and its images are scored against held-out real ones.

A *sampler* is any function (prompts, seed) -> images [N, 3, H, W] in [-1, 1], one per prompt, that draws its noise from the seed
alone. Images are scored as an 8-bit file would hold them, by every metric of the registry whose needs the suite can meet.

    suite, timed = Suite.builtin("shapes"), Timed(sample)
    metrics = suite.score(timed)
    rows = [make_row("lcm", 4, 3.0, 4, timed.seconds_per_image, metrics, suite.protocol)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.evaluation.batches import Batch, as_saved
from ddil_lightning.evaluation.drawing import Pass, Sampler
from ddil_lightning.evaluation.given import TAUGHT, Given, Reference
from ddil_lightning.evaluation.material import held_out, material
from ddil_lightning.evaluation.networks import PAPER, Networks
from ddil_lightning.evaluation.presence import unmet
from ddil_lightning.evaluation.protocols import BUILTIN, ProbePlan, PromptSource, Protocol
from ddil_lightning.evaluation.references import recalled
from ddil_lightning.evaluation.registry import PASSES, computed, wanted
from ddil_lightning.evaluation.stamps import short, stamped
from ddil_lightning.evaluation.views import Crops
from ddil_lightning.heap import give_back
from ddil_lightning.processes import Processes
from ddil_lightning.streams import apart
from ddil_lightning.texts import by

if TYPE_CHECKING:
    from ddil_lightning.backbones.interface import Backbone
    from ddil_lightning.evaluation.metrics.base import Metric


class Probes(NamedTuple):
    """Prompts that are drawn with `seeds` seeds each: for diversity and mode coverage."""

    prompts: Sequence[str] = ()
    seeds: int = 12


@dataclass(frozen=True, eq=False)
class Suite:
    """A data set's benchmark: its prompts, and what its images are measured with. What is None in `given` leaves its metrics None.

    `prompts`: held-out captions, `samples` images each. `seed`: of the first image's noise. `batch`: images asked of the sampler at a time,
    which are the same whatever it is, as long as the sampler draws the noise of image i from seed + i alone. `source`: where the prompts
    come from, for the protocol. `asked`: the keys of the metrics that are asked for, None for all. `changed`: what of the named protocol is
    not its own. `notes`: what the file of the prompts says of each besides, for layouts of kept images. `groups`: the number of
    the picture of which each prompt is a caption, where several have one.
    """

    name: str
    prompts: Sequence[str]
    given: Given = field(default_factory=Given)
    probes: Probes = field(default_factory=Probes)
    seed: int = 0
    batch: int = 128
    source: str = "given"
    samples: int = 1
    asked: Sequence[str] | None = None
    changed: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[Mapping[str, Any]] = ()
    groups: Sequence[int] = ()

    @classmethod
    def builtin(cls, data: str = "shapes", n: int = 512, seed: int = 0, extra: int | None = None, batch: int = 128) -> Suite:
        """The suite of the built-in data "shapes" or "digits": `n` held-out prompts against held-out images.

        `extra` (default 3n/8): images of prompts that leave something open, for diversity and mode coverage. Raises ValueError for
        another name or n < 16.
        """
        if n < 16:
            raise ValueError(f"n={n}: at least 16 prompts, and some hundreds for numbers that mean something")
        made = held_out(data, n, seed)
        seeds = max(2, round((3 * n / 8 if extra is None else extra) / len(made.probes)))
        return cls(data, made.prompts, made.given, Probes(made.probes, seeds), apart(seed), batch, made.source)

    @classmethod
    def from_folder(
        cls,
        source: str | Path,
        images: str | Path | None = None,
        n: int | None = None,
        seed: int = 0,
        size: int = 256,
        probes: tuple[int, int] = (50, 10),
        networks: Networks = PAPER,
        batch: int = 16,
        device: str | torch.device = "cpu",
        crops: Crops | None = None,
    ) -> Suite:
        """A suite of the user's own images and captions: `source` and `images` as in `protocols.PromptSource`.

        COCO-2017 5k is `from_folder("annotations/captions_val2017.json", "val2017")`. `probes`: so many of the prompts, with so many seeds
        each. `networks`: of those that are named the weights may be downloaded once; what cannot be had is told (`presence`). `crops`: for
        a patch FID, which reads every image once more. More can be said in a Protocol (`Suite.of`). Raises as that does.
        """
        prompts = PromptSource(str(source), None if images is None else str(images), n=n, choice=seed)
        plan = ProbePlan(probes[0], probes[1] if probes[0] else 0)
        name = Path(source).stem
        protocol = Protocol(prompts, size=size, crops=crops, probes=plan, seed=seed, batch=batch, name=name)
        return cls.of(protocol, networks, device)

    @classmethod
    def of(
        cls,
        protocol: Protocol,
        networks: Networks | None = None,
        device: str | torch.device = "cpu",
        changed: Mapping[str, Any] | None = None,
    ) -> Suite:
        """The suite of a protocol. `networks`: in the place of those that it names. `changed`: what of it is not its own, for the stamp.

        Raises ValueError, or FileNotFoundError, for data that are missing or cannot be understood, and as `presence.present` does.
        """
        source = protocol.prompts.source
        kept: dict[str, Any] = {"asked": protocol.metrics, "changed": dict(changed or {})}
        if source in BUILTIN:
            n = 512 if protocol.prompts.n is None else protocol.prompts.n
            suite = cls.builtin(str(source), n, protocol.seed)
            return replace(suite, name=protocol.name or suite.name, batch=protocol.batch or suite.batch, **kept)
        made = material(protocol, networks, device)
        kept |= {"notes": made.notes, "groups": made.groups}
        probes = Probes(made.probes, protocol.probes.seeds)
        name = protocol.name or Path(str(source)).stem
        return cls(name, made.prompts, made.given, probes, apart(protocol.seed), protocol.batch or 16, made.source, **kept)

    @property
    def side(self) -> int | None:
        """The edge in pixels of the only pictures that the judge can read, None for any."""
        return self.given.judge.side

    @property
    def protocol(self) -> dict[str, Any]:
        """What a number must be quoted with; two numbers can be compared where their stamps are equal (`stamps`).

        `metrics`: the keys that were asked for, None for all that can be had.
        """
        given, probes, reference = self.given, self.probes, self.given.reference
        several = {"per_prompt": self.samples} if self.samples > 1 else {}
        digests = {"prompts": short(self.prompts), "probes": short(probes.prompts), "reference": (reference.digest or "")[:12] or None}
        taught = {"teacher": given.teacher.digest[:12]} if given.teacher.digest else {}
        view, resizing = given.view, getattr(given.networks.features, "resizing", None)
        resized = None if view.size is None else f"centre crop, Lanczos {view.size}"
        referred = {"source": reference.about, "images": reference.images, "teacher": given.teacher.about}
        told = {
            "name": self.name,
            "n": len(self.prompts) * self.samples,
            "prompts": self.source,
            "reference": referred | {key: value for key in ("unreadable", "unverified") if (value := getattr(reference, key))},
            "resize": ", then ".join(filter(None, [resized, resizing])) or None,
            "crops": view.crops and view.crops.about,
            "networks": given.networks.about() | given.judge.about(),
            "seeds": {"first": self.seed, **several, "probes": len(probes.prompts), "per_probe": probes.seeds},
            "digests": digests | taught,
        }
        if given.whole and view.size is not None:
            told["embedded"] = "centre crop, as large as they are"
        told["metrics"] = None if self.asked is None else list(self.asked)
        return stamped(told | ({"changed": dict(self.changed)} if self.changed else {}))

    def for_pipeline(self, backbone: Backbone) -> Suite:
        """The suite itself. Raises ValueError for a pipeline whose pictures are of another size than the judge can read."""
        size = backbone.size
        if self.side is not None and size != (self.side, self.side):
            made = "none" if size is None else by(size)
            raise ValueError(
                f"{self.name} are pictures of {self.side} pixels and the pipeline {backbone.path} makes {made}, which their judge cannot "
                "read: test it on your own captions, by ddil-test --data CAPTIONS --images DIR (and test.n=0 in training)"
            )
        return self

    def measured(self) -> list[type[Metric]]:
        """The metrics that are asked for and that this suite can meet.

        Raises ValueError for one that it has too few images for, for the key of none, and where none of the keys that are asked for can be
        met, or with strict networks not all.
        """
        lost, real = unmet(self.asked, self.given), self.given.reference.images
        found = [metric for metric in wanted(self.asked) if not any(metric in metrics for metrics in lost.values())]
        if self.asked is not None and lost and (self.given.networks.strict or not found):
            said = "; ".join(f"{', '.join(metric.named() for metric in metrics)}, for {why}" for why, metrics in lost.items())
            raise ValueError(f"{self.name} asks for what cannot be measured: {said}: give what is missing, or name fewer `metrics`")
        for metric in found:
            have = self.probes.seeds if metric.over == "probes" and self.probes.prompts else len(self.prompts) * self.samples
            of = "images of a prompt" if metric.over == "probes" else "images"
            if have < metric.least:
                raise ValueError(f"{metric.named()}: needs at least {metric.least} {of}, and {self.name} asks for {have}: ask for more")
            if real is not None and real < metric.least_real:
                raise ValueError(f"{metric.named()}: needs at least {metric.least_real} real images, and {self.name} has {real}: give more")
        return found

    def score(
        self, sample: Sampler, processes: Processes | None = None, look: Callable[[Sequence[Metric]], None] | None = None
    ) -> dict[str, Any]:
        """All metrics of a sampler that are asked for: numbers under `registry.keys()` (None where undefined), and their details.

        Two samplers get the same calls, so their noise is paired if it depends on the seed only. Several `processes` each draw their share,
        the first computes, and all answer what it has found; `look`, there, is given the metrics that have measured anything.
        Raises ValueError where the sampler returns another number of images or values that are not finite, for a metric that reads what it
        has not declared or gives what it has not, and as `measured` does.
        """
        return self.score_all([sample], processes, look)[0]

    @torch.no_grad()
    def score_all(
        self, samplers: Sequence[Sampler], processes: Processes | None = None, look: Callable[[Sequence[Metric]], None] | None = None
    ) -> list[dict[str, Any]]:
        """What `score` has of each, and `look` sees of each in turn; all are asked for the same images before any is for the next."""
        together = processes or Processes()
        made = [self._metrics() for _ in samplers]

        def draw() -> None:
            for part in self.passes():
                for call in part.calls(together.rank, together.world):
                    for sample, metrics in zip(samplers, made, strict=True):
                        batch = self._batch(sample, part, call)
                        for metric in (metric for metric in metrics if metric.over == part.name):
                            metric.update(batch.read_by(type(metric).__name__, (*metric.needs, *metric.wants)))
                        del batch  # before its memory is given back
                        give_back()

        together.alike(draw)
        for metric in (metric for metrics in made for metric in metrics) if together.world > 1 else ():
            metric.collect(together)
        for metrics in made if look is not None and together.first else ():
            look([metric for metric in metrics if metric.update_called])  # type: ignore[misc]
        return together.by_first(lambda: [computed(metrics) for metrics in made])

    def awaiting(self, about: str, digest: str) -> Suite:
        """The suite before its teacher's images are drawn: what it can measure, refuses and is stamped with is that of the one `taught`.

        Raises as that does.
        """
        spaces = [space for space in TAUGHT if space in self.given.has()]
        if not spaces:
            raise ValueError(f"suite {self.name}: a distance to the teacher is one of features, and there is no network for them")
        promised = Reference({space: torch.empty(0, 0) for space in spaces}, about, digest=digest)
        return replace(self, given=replace(self.given, teacher=promised))

    @torch.no_grad()
    def taught(self, sample: Sampler, about: str, digest: str | None = None, processes: Processes | None = None) -> Suite:
        """The suite with the teacher's images of its prompts as a second reference, for the distances to the teacher (FID-T).

        `sample`: the teacher in its own best step count. It is asked once for every prompt, with noise that no sampler is scored on: images
        from the same noise would be near each other for that alone. `digest`: of all that decides on them; under it their rows are kept for
        the next time, as those of real images are. Raises ValueError for a suite without a network for features.
        """
        together, part = processes or Processes(), self.part("teacher")

        def drawn(spaces: Sequence[str]) -> dict[str, Tensor]:
            mine = together.alike(lambda: self.given.rows_of((b.images for b in self.batches(sample, part, together)), spaces))
            every = together.gathered(mine)
            return {space: torch.cat([rows[space] for rows in every if space in rows]) for space in spaces}

        rows = recalled(self.given, list(self.awaiting(about, "").given.teacher.rows), digest, drawn, together)
        return replace(self, given=replace(self.given, teacher=Reference(rows, about, digest=digest)))

    def passes(self) -> list[Pass]:
        """What `score` asks for: the prompts in any case, for a row has the time of its images, and probes if a metric reads any."""
        read = {metric.over for metric in self._metrics()}
        return [self.part(over) for over in PASSES if over == "prompts" or over in read]

    def _metrics(self) -> list[Metric]:
        made = [metric() for metric in self.measured()]
        if self.samples > 1 or self.groups:
            groups = torch.tensor(self.groups or range(len(self.prompts))).repeat_interleave(self.samples)
            for metric in (m for m in made if m.over == "prompts"):
                metric.groups = groups
        return made

    def part(self, over: str) -> Pass:
        """The images over "prompts", or over "probes", which follow them; of "teacher", a reference, the prompts once more, one each."""
        first, second = len(self.prompts) * self.samples, len(self.probes.prompts) * self.probes.seeds
        asked, seeds, seed = {
            "prompts": (self.prompts, self.samples, self.seed),
            "probes": (self.probes.prompts, self.probes.seeds, self.seed + first),
            "teacher": (self.prompts, 1, self.seed + first + second),
        }[over]
        return Pass(over, [prompt for prompt in asked for _ in range(seeds)], seeds, seed, self.batch)

    def batches(self, sample: Sampler, part: Pass, processes: Processes | None = None) -> Iterator[Batch]:
        """Batches of checked images, a process's share; the seed of a batch is that of the pass plus the number of its first image."""
        together = processes or Processes()
        for call in part.calls(together.rank, together.world):
            yield self._batch(sample, part, call)

    def _batch(self, sample: Sampler, part: Pass, call: range) -> Batch:
        prompts = list(part.asked[call.start : call.stop])
        images = sample(prompts, part.seed + call.start)
        if len(images) != len(prompts):
            raise ValueError(f"sampler: {len(images)} images for {len(prompts)} prompts")
        saved = as_saved(images, partial(part.named, call.start))
        return Batch(saved, torch.tensor(call), part.asked, self.given, part.seeds)


def make_row(
    name: str,
    steps: int | None,
    guidance: float | None,
    nfe: int | None,
    seconds_per_image: float | None,
    metrics: Mapping[str, Any],
    protocol: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One line of a results table. `nfe`: network evaluations per image, two per guided step. `protocol`: `Suite.protocol`, or what
    else its numbers were measured by; its `n` is the row's. `generation`: how its images came about, where that is known."""
    row = {"name": name, "steps": steps, "guidance": guidance, "n": protocol["n"], "nfe": nfe, "seconds_per_image": seconds_per_image}
    return row | {"metrics": dict(metrics), "protocol": dict(protocol), "generation": dict(generation or {})}
