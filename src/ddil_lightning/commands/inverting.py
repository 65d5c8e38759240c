"""What ddil-invert works on and measures: images, their prompts by a teacher, and what every sampler makes of these."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.vocabulary import Vocabulary
from ddil_lightning.counting import counted
from ddil_lightning.data.folders import IMAGES, walk
from ddil_lightning.data.raw import digest
from ddil_lightning.evaluation.findings import Findings
from ddil_lightning.evaluation.inversion import Denoising, Search, held_noise, invert
from ddil_lightning.evaluation.likeness import Judge, judged, likeness, worded
from ddil_lightning.evaluation.metrics.pairs import load_images
from ddil_lightning.evaluation.networks import MapDistance, Networks, read_networks

BUILTIN = ("shapes", "digits")
LOOKS = Networks("clip_l14_336", distance="lpips")
"""What pictures of one's own are compared through: CLIP's image encoder and LPIPS, whose weights are downloaded once."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """A pipeline with the steps and the guidance_scale that it is called with."""

    name: str
    backbone: Pipeline
    steps: int
    scale: float

    def images(self, prompts: Sequence[str], seeds: int, seed: int) -> tuple[Tensor, int]:
        """Images [P, S, 3, H, W], and network evaluations of each; image s of prompt p begins with the noise of seed + p S + s."""
        asked = [prompt for prompt in prompts for _ in range(seeds)]
        with self.backbone.counting() as calls:
            made = sampling.pipeline_latents(self.backbone, asked, self.steps, self.scale, seed)
        made = sampling.decoded(self.backbone, sampling.check_finite(self.backbone, made, self.steps))
        return made.unflatten(0, (len(prompts), seeds)), round(calls[0] / len(asked))


@dataclass(frozen=True, eq=False)
class Measures:
    """What images are compared through. `judge` and the captions' own words where the data have them."""

    networks: Networks
    judge: Judge | None = None


@dataclass(frozen=True, eq=False)
class Material:
    """Images [N, 3, H, W] in [-1, 1] and their names, their captions where they have some, and what they are measured by."""

    images: Tensor
    names: list[str]
    captions: list[str] | None
    about: str
    measures: Callable[[], Measures]


def material(source: str, n: int | None, seed: int, backbone: Pipeline, networks: Sequence[str] = ()) -> Material:
    """Held-out images of the built-in data that the pipeline was made for (`builtin`), or the pictures of a folder in its size.

    `networks`: by name, in the place of LOOKS. Raises ValueError for a pipeline of no built-in data or of no squares, for fewer pictures
    than asked for, and for `networks` where the built-in data have their own.
    """
    data, (height, width) = backbone.about.get("dataset"), backbone.size
    if data in BUILTIN and networks:
        raise ValueError(f"--network {' '.join(networks)}: {data} has networks of its own, others are for other pipelines")
    measures = partial(_builtin, data) if data in BUILTIN else partial(_looked, networks, backbone.device)
    if source == "builtin":
        if data not in BUILTIN:
            raise ValueError(f"{backbone.path} was not made for the built-in data: give a folder of pictures, by --images DIR")
        from ddil_lightning.commands.gathering import drawn

        images, captions = drawn(data, 16 if n is None else n, seed)
        return Material(images, [f"{data} {i}" for i in range(len(images))], captions, f"held-out images of {data}", measures)
    if height != width:
        raise ValueError(f"{backbone.path} samples no squares, as which the pictures of {source} are read")
    files = _pictures(Path(source))
    count = min(16, len(files)) if n is None else n
    if count > len(files):
        raise ValueError(f"--n {count}: {source} holds {len(files)} pictures")
    chosen = [files[i] for i in sorted(random.Random(seed).sample(range(len(files)), count))]
    return Material(load_images(chosen, height), [str(file) for file in chosen], None, source, measures)


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a folder of pictures, or builtin")
    files = [place / name for place, names in walk(folder) for name in names if Path(name).suffix.lower() in IMAGES]
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(IMAGES))})")
    return files


def _builtin(data: str) -> Measures:
    from ddil_lightning.miniature.evaluator import load_evaluator
    from ddil_lightning.miniature.sources import load_source

    net = load_evaluator()
    return Measures(Networks(net.image_features, distance=MapDistance(net.image_feature_maps)), load_source(data).judge)


def _looked(words: Sequence[str], device: torch.device) -> Measures:
    """The networks of LOOKS, or those that `words` name in their place. Raises ValueError where one cannot be had."""
    networks = read_networks(words, LOOKS)
    if networks.features is None or networks.distance is None:
        raise ValueError("images are compared by features and by a distance: name a network for each, as features=NAME and distance=NAME")
    return Measures(networks.load(device))


def inverted(given: Material, vocabulary: Vocabulary, search: Search, seed: int, findings: Findings) -> list[dict[str, Any]]:
    """Of every image, each searched by itself: its prompt, the loss of this and, on the same noise, of the caption where it has one.

    Each is kept in `findings` when it is found, by the pixels of its image: a latent may hang on the batch that it was encoded in.
    """
    backbone = vocabulary.backbone
    latents = torch.cat([backbone.encode_images(part).float() for part in given.images.split(sampling.batch(backbone.latent_shape))])
    captions: Sequence[str | None] = given.captions or [None] * len(latents)
    same = {
        "teacher": [backbone.content(), str(backbone.predicts), backbone.schedule.sigmas.tolist(), str(backbone.dtype)],
        **asdict(search),
    }

    def searched(i: int, z: Tensor) -> dict[str, Any]:
        objective, caption, loss = Denoising(vocabulary, z), captions[i], None
        prompt, _, own, trace = invert(objective, vocabulary, search, seed + i)
        if caption is not None:
            with torch.no_grad():
                loss = float(objective.told(backbone.encode_text([caption]), held_noise(objective, search, seed + i)))
        return {"prompt": prompt, "loss": own, "caption_loss": loss, "trace": trace}

    found = []
    for i, z in enumerate(counted(latents, len(latents), "prompts")):
        question = {**same, "image": digest([given.images[i].numpy().tobytes()]), "caption": captions[i], "seed": seed + i}
        of = {"image": given.names[i], "caption": captions[i]}
        one = of | findings.answer(question, partial(searched, i, z))
        found.append({key: one[key] for key in ("image", "prompt", "loss", "caption", "caption_loss", "trace")})
    return found


def compared(
    samplers: Sequence[Sampler], given: Material, prompts: Sequence[str], measures: Measures, seeds: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """A row of every sampler on the prompts, all from the same noise, and what of the captions is recovered where there are some.

    Where there are captions the teacher, the first of the samplers, draws these as well: what a perfect prompt would reach.
    """
    asked = [(sampler, list(prompts), sampler.name) for sampler in samplers]
    if given.captions is not None:
        asked.insert(1, (samplers[0], given.captions, f"{samplers[0].name}, true captions"))
    rows: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    for sampler, texts, name in asked:
        images, nfe = sampler.images(texts, seeds, seed)
        metrics = likeness(images, given.images, measures.networks.features, measures.networks.distance)  # type: ignore[arg-type]
        if given.captions is not None and measures.judge is not None:
            seen.append({"name": name, **judged(images, given.captions, measures.judge)})
            metrics |= {"attribute_accuracy": seen[-1]["attributes"], "all_right": seen[-1]["all"]}
        rows.append({"name": name, "steps": sampler.steps, "guidance_scale": sampler.scale, "nfe": nfe, "metrics": metrics})
    if given.captions is None:
        return rows, None
    from ddil_lightning.miniature.wording import words_right

    return rows, {"images": seen, "words": worded(prompts, given.captions, words_right)}
