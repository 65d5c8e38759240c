"""Does a student's diversity matter? What a small network learns from its images alone, tested on real ones.

The classification accuracy score (Ravuri & Vinyals 2019) on the built-in data: a classifier is trained on generated images of the captions
of the training data, labelled with what these say, and tested on real held-out scenes. What a caption leaves open is masked in training
and asked in the test: a student whose pictures of "a circle" are all alike teaches nothing about the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_lightning.evaluation.batches import as_saved
from ddil_lightning.miniature import shapes
from ddil_lightning.miniature.sources import held_out

HEADS = {"shape": len(shapes.SHAPES), "colour": len(shapes.COLOURS), "size": len(shapes.SIZES), "position": 9, "background": 3}
"""What is asked of a scene of one object, and how many answers there are."""
CAPTIONS = 3 << 30
"""The seed of the scenes whose captions are drawn: of no training data and no suite."""


class Lesson(NamedTuple):
    """Captions of one object each, what they say of it by HEADS, -1 where they leave it open; and the pictures that they describe."""

    captions: list[str]
    labels: dict[str, Tensor]
    real: Tensor


def lesson(n: int, seed: int = 0) -> Lesson:
    """`n` captions as the training data have them, of scenes that nothing was trained on."""
    scenes = single(n, CAPTIONS + seed)
    captions = shapes.captions(scenes, seed)
    return Lesson(captions, labels(shapes.encode(captions)), shapes.render(scenes))


def single(n: int, seed: int) -> shapes.Scenes:
    """The first `n` scenes of one object of a seed."""
    drawn = shapes.draw_scenes(2 * n + 64, seed)
    rows = (drawn.count == 1).nonzero()[:n, 0]
    return shapes.Scenes(*(field[rows] for field in drawn))


def labels(scenes: shapes.Scenes) -> dict[str, Tensor]:
    """The number [N] of each answer of HEADS, -1 where there is none."""
    each = {"shape": scenes.shape[:, 0], "colour": scenes.colour[:, 0], "size": scenes.size[:, 0]}
    return {**each, "position": scenes.position, "background": scenes.background}


class Classifier(nn.Module):
    """Three convolutions and a layer for each of HEADS, for pictures of 32 pixels; those of other sizes are pooled to fit."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The logits [B, answers] of each of HEADS."""
        seen = self.trunk(images)
        return {name: head(seen) for name, head in self.heads.items()}


def taught(images: Tensor, told: dict[str, Tensor], seed: int = 0, updates: int = 300, batch: int = 64) -> Classifier:
    """A classifier that has seen these images [N, 3, 32, 32] alone, on their device; what a caption leaves open gives no loss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier().to(images.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates)
    told = {name: values.to(images.device) for name, values in told.items()}
    for _ in range(updates):
        rows = torch.randint(len(images), (batch,), generator=generator).to(images.device)
        found = net(images[rows])
        loss = torch.stack([_loss(logits, told[name][rows]) for name, logits in found.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def _loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of those that have an answer, per picture of the batch, so that a batch without any is no division by zero."""
    return F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum") / len(wanted)


@torch.no_grad()
def tested(net: Classifier, n: int = 2000, seed: int = 0) -> dict[str, float]:
    """Its accuracies on `n` real held-out scenes: `cas`, the share that has every answer right, and one for each of HEADS."""
    scenes = single(n, held_out(seed))
    device, wanted = next(net.parameters()).device, labels(scenes)
    logits = [net(part.to(device)) for part in shapes.render(scenes).split(256)]
    right = {name: torch.cat([found[name].argmax(1).cpu() for found in logits]) == wanted[name] for name in HEADS}
    whole = torch.stack(list(right.values())).all(0)
    return {"cas": float(whole.double().mean()), **{f"cas_{name}": float(x.double().mean()) for name, x in right.items()}}


def score(
    sample: Callable[[list[str], int], Tensor], n: int = 1000, updates: int = 300, seed: int = 0, batch: int = 128
) -> dict[str, float]:
    """The classification accuracy scores of a sampler (prompts, seed) -> images, from noise that no other measure asks it for."""
    told = lesson(n, seed)
    made = [as_saved(sample(told.captions[i : i + batch], CAPTIONS + i)) for i in range(0, n, batch)]
    return tested(taught(torch.cat(made), told.labels, seed, updates))


def real(n: int = 1000, updates: int = 300, seed: int = 0) -> dict[str, float]:
    """The same of the real pictures: what there is to reach."""
    told = lesson(n, seed)
    return tested(taught(told.real, told.labels, seed, updates))
