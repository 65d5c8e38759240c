"""Training of the evaluator: contrastive, with hard negatives, on both built-in data sets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset

from ddil_lightning.miniature import shapes
from ddil_lightning.miniature.evaluator import Evaluator, load_evaluator, tokenise
from ddil_lightning.miniature.sources import held_out, load_source
from ddil_lightning.miniature.stages import Stage, loader, stream_seed

_SWAPS: tuple[tuple[str, ...], ...] = (shapes.COLOURS, shapes.SIZES, shapes.SHAPES, shapes.BACKGROUNDS)


def spoil(caption: str, rng: random.Random) -> str:
    """A caption that is nearly the same and wrong: the two objects swapped, or one word replaced by another of its kind."""
    for relation in shapes.RELATIONS:
        first, found, rest = caption.partition(f" {relation} ")
        second, _, ground = rest.partition(" on a ")
        if found and first != second and rng.random() < 0.5:
            return f"{second}{found}{first}" + (f" on a {ground}" if ground else "")
    words = caption.split()
    places = [(i, kind) for i, word in enumerate(words) for kind in _SWAPS if word in kind]
    if " at the " in caption and (not places or rng.random() < 0.25):
        head, _, rest = caption.partition(" at the ")
        place, _, ground = rest.partition(" on a ")
        other = rng.choice([p for p in shapes.POSITIONS if p != place])
        return f"{head} at the {other}" + (f" on a {ground}" if ground else "")
    if not places:
        return "a handwritten digit"  # nothing in the caption can be wrong of a shape, so it is contrasted with the other data
    i, kind = rng.choice(places)
    words[i] = rng.choice([w for w in kind if w != words[i]])
    return " ".join(words)


class Pairs(IterableDataset[tuple[Tensor, list[str], list[str]]]):
    """Batches (images, captions, spoiled captions): shapes, and every sixth batch digits (without spoiled captions)."""

    def __init__(self, *, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], list[str]]]:
        i, rng = 0, random.Random(self.seed)
        while True:
            name = "digits" if i % 6 == 5 else "shapes"
            images, captions = load_source(name).draw(self.batch_size, stream_seed(self.seed, 7, i))
            yield images, captions, [spoil(c, rng) for c in captions] if name == "shapes" else []
            i += 1


class EvaluatorStage(Stage):
    """CLIP's loss in both directions; equal captions in a batch share the target, spoiled ones join as negatives."""

    live: Evaluator

    def training_step(self, batch: tuple[Tensor, list[str], list[str]], batch_idx: int) -> Tensor:
        """The contrastive loss of one batch of images, captions and spoiled captions."""
        images, captions, spoiled = batch
        clip = self.live.clip
        a = F.normalize(self.live.image_features(images), dim=1)
        b = F.normalize(clip.encode_text(tokenise([*captions, *spoiled])), dim=1)
        logits = clip.logit_scale.clamp(max=4.0).exp() * a @ b.T
        number = {c: k for k, c in enumerate(dict.fromkeys(captions))}
        ids = torch.tensor([number[c] for c in captions])
        every = torch.tensor([number.get(c, -1) for c in [*captions, *spoiled]])
        target = (ids[:, None] == every).float()
        n = len(images)
        by_image = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
        by_text = F.cross_entropy(logits[:, :n].T, (target[:, :n] / target[:, :n].sum(0)).T)
        loss = (by_image + by_text) / 2
        if batch_idx % 20 == 0:
            self.log("loss", loss.detach(), prog_bar=True)
        return loss


@torch.no_grad()
def scores(evaluator: Evaluator, n: int = 512) -> dict[str, float]:
    """Held-out figures: top-1 retrieval both ways, share of spoiled and of object-swapped captions scored below the true one."""
    scenes = shapes.draw_scenes(n, held_out(0))
    images, captions = shapes.render(scenes), shapes.captions(scenes, 0, full=True)
    a, b = (F.normalize(f, dim=1) for f in (evaluator.image_features(images), evaluator.text_features(captions)))
    rng, own, right = random.Random(0), (a * b).sum(1), torch.arange(n)
    wrong = evaluator.clip_score(images, [spoil(c, rng) for c in captions])
    pairs = [i for i, c in enumerate(captions) if any(f" {r} " in c for r in shapes.RELATIONS)]
    flipped = evaluator.clip_score(images[pairs], [_flip(captions[i]) for i in pairs])
    return {
        "image to text": float(((a @ b.T).argmax(1) == right).float().mean()),
        "text to image": float(((b @ a.T).argmax(1) == right).float().mean()),
        "spoiled below true": float((wrong < own).float().mean()),
        "swapped below true": float((flipped < own[pairs]).float().mean()),
        "digits": _digits(evaluator),
    }


def _flip(caption: str) -> str:
    class First(random.Random):
        def random(self) -> float:
            return 0.0

    return spoil(caption, First())


def _digits(evaluator: Evaluator) -> float:
    """Share of held-out digits whose best caption of the ten is the right one."""
    from ddil_lightning.miniature.digits import caption, split

    images, labels = split("held_out")
    a = F.normalize(evaluator.image_features(images), dim=1)
    b = F.normalize(evaluator.text_features([caption(k) for k in range(10)]), dim=1)
    return float(((a @ b.T).argmax(1) == labels).float().mean())


def train_evaluator(
    *, out: str = "runs/pretrain/evaluator", steps: int = 700, batch_size: int = 128, lr: float = 1.5e-3, seed: int = 0,
    start: str | None = None, progress: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Train the evaluator on CPU (on from the one in folder `start`), write it to `out` with its figures, and answer these."""
    from lightning.pytorch import seed_everything

    from ddil_lightning.miniature.pretrain import fit

    seed_everything(seed, verbose=False)
    live = Evaluator() if start is None else load_evaluator(start).requires_grad_(True).train()
    stage = EvaluatorStage(live=live, steps=steps, lr=lr, hold=0.2, ema=0.98, seed=seed, weight_decay=0.05)
    fit(stage, loader(Pairs(batch_size=batch_size, seed=seed)), devices=1, progress=progress)
    evaluator: Evaluator = stage.average.eval()
    found = {name: round(value, 4) for name, value in scores(evaluator).items()}
    folder = evaluator.save(Path(out))
    lines = [f"| {name} | {value:.3f} |" for name, value in found.items()]
    (folder / "README.md").write_text(_card(lines, steps=steps, batch_size=batch_size, lr=lr, seed=seed))
    return found


def _card(lines: Sequence[str], **settings: Any) -> str:
    command = " ".join(f"--{name} {value}" for name, value in settings.items())
    return "\n".join(
        ["# The built-in evaluator", "", "A CLIP of 32x32 pixels for the built-in shapes and digits, trained from nothing:",
         f"`python -m ddil_lightning.miniature.contrast {command}`.", "", "| held out | |", "|---|---|", *lines, ""]
    )  # fmt: skip


if __name__ == "__main__":
    from jsonargparse import CLI

    print(CLI(train_evaluator, as_positional=False))
