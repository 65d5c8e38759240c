"""The benchmark: every sampler gets the same prompts and seeds, and its images are scored against held-out real ones.

A *sampler* is any function (prompts, seed) -> images [N, 3, H, W] in [-1, 1], one per prompt, that draws its noise from the seed
alone. Images are scored as an 8-bit file would hold them.

    suite, timed = Suite.builtin("shapes"), Timed(sample)
    metrics = suite.score(timed)
    rows = [make_row("lcm", 4, 3.0, len(suite.prompts), 4, timed.seconds_per_image, metrics)]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddil_lightning.evaluation.metrics.alignment import attribute_accuracy
from ddil_lightning.evaluation.metrics.base import Features, as_saved, chunked
from ddil_lightning.evaluation.metrics.clip import cosine, open_clip_net
from ddil_lightning.evaluation.metrics.diversity import Distance, MapDistance, lpips_distance, seed_diversity
from ddil_lightning.evaluation.metrics.frechet import frechet_distance, inception_features
from ddil_lightning.evaluation.metrics.pairs import choose, image_batches, read_pairs, resize
from ddil_lightning.evaluation.metrics.prdc import density_coverage

if TYPE_CHECKING:
    from ddil_lightning.backbones.interface import Backbone

Sampler = Callable[[list[str], int], Tensor]
Scorer = Callable[[Tensor, Sequence[str]], Tensor]
KEYS = ("frechet", "clip", "density", "coverage", "lpips_diversity", "attribute_accuracy", "all_right", "mode_coverage", "blur")


class Timed:
    """A sampler that measures itself: `seconds_per_image` over all calls."""

    def __init__(self, sample: Sampler) -> None:
        self.sample, self.seconds, self.images = sample, 0.0, 0

    def __call__(self, prompts: list[str], seed: int) -> Tensor:
        """The sampler's images."""
        start = time.perf_counter()
        images = self.sample(prompts, seed)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        self.seconds += time.perf_counter() - start
        self.images += len(images)
        return images

    @property
    def seconds_per_image(self) -> float | None:
        """None before the first call."""
        return self.seconds / self.images if self.images else None


@dataclass(frozen=True, eq=False)
class Suite:
    """A data set's benchmark. Everything that is None leaves its metrics None."""

    name: str
    prompts: Sequence[str]  # N held-out captions, one image each
    real: Tensor | None = None  # [N, D] features of real images
    features: Features | None = None
    clip: Scorer | None = None  # (images, prompts) -> cosine [B]
    text: Callable[[Sequence[str]], Tensor] | None = None  # instead of `clip`: prompts -> [B, D] to compare with `features`
    distance: Distance | None = None
    probes: Sequence[str] = ()  # prompts drawn with `seeds` seeds each: diversity and mode coverage
    seeds: int = 12
    judge: Callable[[Tensor, Sequence[str]], Any] | None = None  # -> .correct {attribute: [B]}, .residual [B]
    modes: Callable[[Tensor, Sequence[str]], float] | None = None
    size: int | None = None  # edge to which images are resized before `features`; CLIP and LPIPS see them as they are
    seed: int = 0
    batch: int = 128  # images asked of the sampler at a time
    side: int | None = None  # of the pictures that `judge` and `modes` can read
    protocol: Mapping[str, Any] = field(default_factory=dict)  # what a number must be quoted with

    def __post_init__(self) -> None:
        if self.text is not None and self.features is None:
            raise ValueError("Suite: `text` is compared with `features`, which is None; give both, or `clip`")

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
        evaluator = load_evaluator()
        seeds = max(2, round((3 * n / 8 if extra is None else extra) / len(probes)))
        return cls(
            name=data,
            prompts=prompts,
            real=chunked(evaluator.image_features, as_saved(real)),
            features=evaluator.image_features,
            text=evaluator.text_features,
            distance=MapDistance(evaluator.image_feature_maps),
            probes=probes,
            seeds=seeds,
            judge=module.judge,
            modes=module.mode_coverage,
            seed=seed,
            batch=batch,
            side=real.shape[-1],
            protocol={"data": data, "n": n, "real": len(real), "probes": len(probes), "seeds": seeds, "batch": batch},
        )

    @classmethod
    def from_folder(
        cls,
        source: str | Path,
        images: str | Path | None = None,
        n: int | None = None,
        seed: int = 0,
        size: int = 256,
        probes: int = 50,
        seeds: int = 10,
        features: Features | str | None = "inception",
        clip: Scorer | str | None = "open_clip",
        distance: Distance | str | None = "lpips",
        batch: int = 16,
        device: str | torch.device = "cpu",
    ) -> Suite:
        """A suite of the user's own images and captions: `source` and `images` as in `metrics.pairs.read_pairs`.

        COCO-2017 5k is `from_folder("annotations/captions_val2017.json", "val2017")`. A network is a callable, None to skip its
        metrics, or the name of a default, whose weights may be downloaded once. Raises as `read_pairs` and `choose`, and ValueError
        where the package of a default is not installed.
        """
        chosen = choose(read_pairs(source, images), n, seed)
        nets = {"features": features, "clip": clip, "distance": distance}
        loaded = {k: _network(v, device) for k, v in nets.items()}
        protocol = {"source": str(source), "n": len(chosen), "resize": f"centre crop, Lanczos {size}", "seeds": seeds, "batch": batch}
        return cls(
            name=Path(source).stem,
            prompts=[p.caption for p in chosen],
            real=_features_of(loaded["features"], [p.image for p in chosen], size),
            probes=[p.caption for p in choose(chosen, min(probes, len(chosen)), seed)] if probes else [],
            **dict(seeds=seeds, size=size, seed=seed, batch=batch, **loaded),
            protocol=protocol | {k: v if isinstance(v, str | None) else "given" for k, v in nets.items()},
        )

    def for_pipeline(self, backbone: Backbone) -> Suite:
        """The suite itself. Raises ValueError for a pipeline whose pictures are of another size than the judge can read."""
        side = backbone.side
        if self.side not in (None, side):
            raise ValueError(
                f"{self.name} are pictures of {self.side} pixels and the pipeline {backbone.path} makes {side}, which their judge cannot "
                "read: test it on your own captions, by ddil-test --data CAPTIONS --images DIR (and test.n=0 in training)"
            )
        return self

    @torch.no_grad()
    def score(self, sample: Sampler) -> dict[str, Any]:
        """All metrics of a sampler: floats under `KEYS` (None where undefined) and the dict `per_attribute`.

        Two samplers get the same calls, so their noise is paired if it depends on the seed only. Raises ValueError where the
        sampler returns another number of images or values that are not finite.
        """
        features, cosines, verdicts, residuals = [], [], [], []
        for x, prompts in self._draw(sample, list(self.prompts), self.batch, self.seed):
            if self.features is not None:
                features.append(chunked(self.features, resize(x, self.size)))
            if self.text is not None:
                cosines.append(cosine(features[-1], self.text(prompts).cpu()))
            elif self.clip is not None:
                cosines.append(self.clip(x, prompts).double().cpu())
            if self.judge is not None:
                seen = self.judge(x, prompts)
                verdicts.append(seen.correct)
                residuals.append(seen.residual.double().cpu())
        out: dict[str, Any] = dict.fromkeys(KEYS)
        if features and self.real is not None:
            fake = torch.cat(features)
            out["frechet"] = frechet_distance(self.real, fake)
            out["density"], out["coverage"] = density_coverage(self.real, fake)
        if cosines:
            out["clip"] = float(torch.cat(cosines).mean())
        out["per_attribute"] = {}
        if verdicts:
            out |= attribute_accuracy({k: torch.cat([v[k] for v in verdicts]) for k in verdicts[0]})
            out["blur"] = float(torch.cat(residuals).mean())
        return out | self._probe(sample)

    def _probe(self, sample: Sampler) -> dict[str, float]:
        """Diversity and mode coverage of the same extra images, `seeds` of each probe."""
        if not self.probes or (self.distance is None and self.modes is None):
            return {}
        asked = [p for p in self.probes for _ in range(self.seeds)]
        group = self.seeds * max(1, self.batch // self.seeds)  # whole prompts, so that pairs stay within a batch
        diversity, kept = [], []
        for x, _ in self._draw(sample, asked, group, self.seed + len(self.prompts)):
            if self.distance is not None:
                diversity.append(seed_diversity(x.unflatten(0, (-1, self.seeds)), self.distance))
            if self.modes is not None:
                kept.append(x)
        out = {"lpips_diversity": float(torch.cat(diversity).mean())} if diversity else {}
        return out | ({"mode_coverage": float(self.modes(torch.cat(kept), asked))} if self.modes is not None else {})

    def _draw(self, sample: Sampler, prompts: list[str], batch: int, seed: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Batches of checked images with their prompts; the seed of a batch is `seed` plus the number of its first prompt."""
        for i in range(0, len(prompts), batch):
            part = prompts[i : i + batch]
            images = sample(part, seed + i)
            if len(images) != len(part):
                raise ValueError(f"sampler: {len(images)} images for {len(part)} prompts")
            yield as_saved(images), part


def _held_out(data: str, n: int, seed: int) -> tuple[list[str], Tensor, list[str], Any]:
    """Prompts, real images of the held-out law, prompts that leave something open, and the module with judge and mode coverage."""
    from ddil_lightning.miniature import digits, judge, shapes
    from ddil_lightning.miniature.sources import HELD_OUT, load_source

    prompts = load_source(data).prompts(n, seed)
    if data == "shapes":
        return prompts, shapes.render(shapes.draw_scenes(n, HELD_OUT + seed)), judge.partial_prompts(), judge
    # one open prompt only: five times, so that the ten digits can show; and the ten digits, whose diversity is the writers'
    return prompts, digits.split("held_out")[0], digits.partial_prompts() * 5 + digits.prompts(10, 0), digits


def _network(given: Any, device: str | torch.device) -> Any:
    """What was given, or the network that a name stands for. Raises ValueError for another name."""
    if not isinstance(given, str):
        return given
    known: dict[str, Callable[..., Any]] = {
        "inception": inception_features,
        "open_clip": lambda device: open_clip_net(device=device).score,
        "lpips": lpips_distance,
    }
    if given in known:
        return known[given](device=device)
    raise ValueError(f"no network {given!r}: choose inception, open_clip or lpips, pass a callable, or None to skip its metrics")


def _features_of(net: Features | None, paths: Sequence[Path], size: int) -> Tensor | None:
    """Features [N, D] of image files, 64 images in memory at a time; None without a network."""
    return None if net is None else torch.cat([chunked(net, images) for images in image_batches(paths, size)])


def paired_distance(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of images [N, 3, H, W] that two samplers made from the same noise. Raises ValueError if unpaired."""
    if a.shape != b.shape or not len(a):
        raise ValueError(f"paired_distance: {tuple(a.shape)} and {tuple(b.shape)}; the images must be paired")
    return float((a.double().cpu() - b.double().cpu()).square().mean())


def make_row(
    name: str,
    steps: int | None,
    guidance: float | None,
    n: int,
    nfe: int | None,
    seconds_per_image: float | None,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """One line of a results table. `nfe`: network evaluations per image, two per guided step."""
    row = {"name": name, "steps": steps, "guidance": guidance, "n": n, "nfe": nfe, "seconds_per_image": seconds_per_image}
    return row | {"metrics": dict(metrics)}
