"""The benchmark: every sampler gets the same prompts and seeds, and its images are scored against held-out real ones.

A *sampler* is any function (prompts, seed) -> images [N, 3, H, W] in [-1, 1], one per prompt, that draws its noise from the seed
alone. Images are scored as an 8-bit file would hold them, by every metric of the registry whose needs the suite can meet.

    suite, timed = Suite.builtin("shapes"), Timed(sample)
    metrics = suite.score(timed)
    rows = [make_row("lcm", 4, 3.0, 4, timed.seconds_per_image, metrics, suite.protocol)]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.evaluation.batches import Batch, as_saved
from ddil_lightning.evaluation.drawing import Pass, Sampler
from ddil_lightning.evaluation.given import SPACES, Given, Judge, Reference, View
from ddil_lightning.evaluation.metrics.pairs import choose, image_batches, read_pairs
from ddil_lightning.evaluation.networks import PAPER, MapDistance, Networks
from ddil_lightning.evaluation.presence import present
from ddil_lightning.evaluation.registry import PASSES, metrics, unmeasured
from ddil_lightning.evaluation.views import Crops
from ddil_lightning.processes import Processes
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
    come from, for the protocol.
    """

    name: str
    prompts: Sequence[str]
    given: Given = field(default_factory=Given)
    probes: Probes = field(default_factory=Probes)
    seed: int = 0
    batch: int = 128
    source: str = "given"
    samples: int = 1

    @classmethod
    def builtin(cls, data: str = "shapes", n: int = 512, seed: int = 0, extra: int | None = None, batch: int = 128) -> Suite:
        """The suite of the built-in data "shapes" or "digits": `n` held-out prompts against held-out images.

        `extra` (default 3n/8): images of prompts that leave something open, for diversity and mode coverage. Raises ValueError for
        another name or n < 16.
        """
        from ddil_lightning.miniature.evaluator import load_evaluator

        if n < 16:
            raise ValueError(f"n={n}: at least 16 prompts, and some hundreds for numbers that mean something")
        prompts, real, probes, module = _held_out(data, n, seed)
        net = load_evaluator()
        seeds = max(2, round((3 * n / 8 if extra is None else extra) / len(probes)))
        look, side = net.image_features, real.shape[-1]
        networks = Networks(look, distance=MapDistance(net.image_feature_maps), text=net.text_features, embed=look)
        judge, view = Judge(module.judge, module.mode_coverage, side), View(crops=Crops(side // 2, side))
        given = Given(networks, judge=judge, view=view)
        reference = Reference(given.rows_of(as_saved(real).split(128)), f"held-out images of {data}")
        probed = Probes(probes, seeds)
        return cls(data, prompts, replace(given, reference=reference), probed, seed, batch, f"held-out prompts of {data}")

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
        """A suite of the user's own images and captions: `source` and `images` as in `metrics.pairs.read_pairs`.

        COCO-2017 5k is `from_folder("annotations/captions_val2017.json", "val2017")`. `probes`: so many of the prompts, with so many seeds
        each. `networks`: of those that are named the weights may be downloaded once; what cannot be had is told (`presence`). `crops`: for
        a patch FID, which reads every image once more. Raises as `read_pairs`, `choose` and `present`.
        """
        pairs = read_pairs(source, images)
        chosen, loaded = choose(pairs, n, seed), present(networks, device)
        paths = [p.image for p in chosen]
        given = Given(loaded, view=View(size, crops))
        whole = given.rows_of(image_batches(paths, size), [space for space in SPACES if space != "patches"])
        parts = given.rows_of(image_batches(paths, crops.at), ["patches"]) if crops else {}
        given = replace(given, reference=Reference(whole | parts, "the images of these prompts"))
        probed = [p.caption for p in choose(chosen, min(probes[0], len(chosen)), seed)] if probes[0] else []
        where = f"{source}, {'all' if len(chosen) == len(pairs) else f'{len(chosen)} of {len(pairs)} chosen by seed {seed}'}"
        return cls(Path(source).stem, [p.caption for p in chosen], given, Probes(probed, probes[1]), seed, batch, where)

    @property
    def side(self) -> int | None:
        """The edge in pixels of the only pictures that the judge can read, None for any."""
        return self.given.judge.side

    @property
    def protocol(self) -> dict[str, Any]:
        """What a number must be quoted with; two numbers can be compared where theirs are equal."""
        given, probes = self.given, self.probes
        several = {"per_prompt": self.samples} if self.samples > 1 else {}
        view, resizing = given.view, getattr(given.networks.features, "resizing", None)
        resized = None if view.size is None else f"centre crop, Lanczos {view.size}"
        return {
            "n": len(self.prompts) * self.samples,
            "prompts": self.source,
            "reference": {"source": given.reference.about, "images": given.reference.images, "teacher": given.teacher.about},
            "resize": ", then ".join(filter(None, [resized, resizing])) or None,
            "crops": view.crops and view.crops.about,
            "networks": given.networks.about() | given.judge.about(),
            "seeds": {"first": self.seed, **several, "probes": len(probes.prompts), "per_probe": probes.seeds},
        }

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

    @torch.no_grad()
    def score(self, sample: Sampler, processes: Processes | None = None) -> dict[str, Any]:
        """All metrics of a sampler: numbers under `registry.keys()` (None where undefined), and their details.

        Two samplers get the same calls, so their noise is paired if it depends on the seed only. Several `processes` each draw their share,
        the first computes, and all answer what it has found. Raises ValueError where the sampler returns another number of images or
        values that are not finite, and for a metric that reads what it has not declared or gives what it has not.
        """
        together = processes or Processes()
        made = self._metrics()

        def draw() -> None:
            for part in self.passes():
                readers = [metric for metric in made if metric.over == part.name]
                for batch in self.batches(sample, part, together):
                    for metric in readers:
                        metric.update(batch.read_by(type(metric).__name__, (*metric.needs, *metric.wants)))

        together.alike(draw)
        for metric in made if together.world > 1 else ():
            metric.collect(together)
        return together.by_first(lambda: _computed(made))

    @torch.no_grad()
    def taught(self, sample: Sampler, about: str) -> Suite:
        """The suite with the teacher's images of its prompts as a second reference, for the distances to the teacher (FID-T).

        `sample`: the teacher in its own best step count. It is asked once for every prompt, with noise that no sampler is scored on: images
        from the same noise would be near each other for that alone. Raises ValueError for a suite without a network for features.
        """
        rows = self.given.rows_of((batch.images for batch in self.batches(sample, self._pass("teacher"))), ("features", "patches"))
        if not rows:
            raise ValueError(f"suite {self.name}: a distance to the teacher is one of features, and there is no network for them")
        return replace(self, given=replace(self.given, teacher=Reference(rows, about)))

    def passes(self) -> list[Pass]:
        """What `score` asks for: the prompts in any case, for a row has the time of its images, and probes if a metric reads any."""
        read = {metric.over for metric in self._metrics()}
        return [self._pass(over) for over in PASSES if over == "prompts" or over in read]

    def _metrics(self) -> list[Metric]:
        met = self.given.has()
        return [metric() for metric in metrics() if met.issuperset(metric.needs)]

    def _pass(self, over: str) -> Pass:
        """The probes follow the prompts. After them comes the teacher, as a reference, with the prompts once more, one image each."""
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
            prompts = list(part.asked[call.start : call.stop])
            images = sample(prompts, part.seed + call.start)
            if len(images) != len(prompts):
                raise ValueError(f"sampler: {len(images)} images for {len(prompts)} prompts")
            saved = as_saved(images, partial(part.named, call.start))
            yield Batch(saved, torch.tensor(call), part.asked, self.given, part.seeds)


def _computed(made: Sequence[Metric]) -> dict[str, Any]:
    """The numbers of all metrics that have measured anything, and those of the others."""
    out = unmeasured()
    for metric in (m for m in made if m.update_called):
        found = _declared(metric, metric.compute())
        out |= found | {"intervals": out["intervals"] | found.get("intervals", {})}
    return out


def _declared(metric: Metric, found: dict[str, Any]) -> dict[str, Any]:
    """What a metric computed. Raises ValueError where that is not what it has declared."""
    declared = {c.key for c in metric.columns} | set(metric.details)
    given = {*found, *found.get("intervals", {})} - {"intervals"}
    if given != declared:
        raise ValueError(f"metric {type(metric).__name__}: it computes {sorted(given)} and declares {sorted(declared)}")
    return found


def _held_out(data: str, n: int, seed: int) -> tuple[list[str], Tensor, list[str], Any]:
    """Prompts, real images of the held-out law, prompts that leave something open, and the module with judge and mode coverage."""
    from ddil_lightning.miniature import digits, judge, shapes
    from ddil_lightning.miniature.sources import HELD_OUT, load_source

    prompts = load_source(data).prompts(n, seed)
    if data == "shapes":
        return prompts, shapes.render(shapes.draw_scenes(n, HELD_OUT + seed)), judge.partial_prompts(), judge
    # one open prompt only: five times, so that the ten digits can show; and the ten digits, whose diversity is the writers'
    return prompts, digits.split("held_out")[0], digits.partial_prompts() * 5 + digits.prompts(10, 0), digits


def paired_distance(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of images [N, 3, H, W] that two samplers made from the same noise. Raises ValueError for unequal shapes."""
    if a.shape != b.shape or not len(a):
        raise ValueError(f"paired_distance: {tuple(a.shape)} and {tuple(b.shape)}; the images must be paired")
    return float((a.double().cpu() - b.double().cpu()).square().mean())


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
