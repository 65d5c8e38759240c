"""The exact judge of the shapes data: reads a scene out of an image without anything learned, and compares it with a caption.

Method: pixels near a palette colour are an object's core, their neighbourhood is unmixed into colour and background, which
gives a soft mask; its area and centroid fix radius and centre under each of the four shapes, and the best template wins.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddil_lightning.miniature import shapes as S

ATTRIBUTES = ("count", "shape", "colour", "size", "relation", "position", "background")
_CORE = 0.3  # RGB distance (of [0, 1] values) within which a pixel counts as a palette colour
_LEAST_CORE = 6  # pixels: the smallest object has 13
_LOOSEST_FIT = 0.5  # RMS of mask minus template over the object's area, above which it is none of the four shapes
_AREA = torch.tensor([math.pi, 4.0, 1.75, 4 * 0.6 - 0.36])  # of each shape at radius 1
_SINK = torch.tensor([0.0, 0.0, 1 / 6, 0.0])  # centroid below the centre at radius 1: triangles


class Judgement(NamedTuple):
    """How well N images show N captions."""

    correct: dict[str, Tensor]  # name in ATTRIBUTES -> [N] float32 in [0, 1], nan where the caption does not mention it;
    #                             for two objects the share of the mentioned ones that is right
    attribute_accuracy: Tensor  # [N] mean over the mentioned attributes
    all_right: Tensor  # [N] 1.0 where every mentioned attribute is right, of every object
    residual: Tensor  # [N] RMS of image minus the ideal drawing of what was read, pixels in [0, 1]: 0 is perfectly sharp


def read_scene(images: Tensor) -> S.Scenes:
    """What the judge sees in images [N, 3, 32, 32] in [-1, 1].

    The first object is the one to the left or above. count is 0, 1, 2 or 3 (three and more colours); -1 in the fields of an
    object that is not there, and in the shape of one that is none of the four.
    """
    _check(images)
    parts = [_read(chunk.detach().float().cpu()) for chunk in images.split(S.CHUNK)]
    return S.Scenes(*(torch.cat(fields) for fields in zip(*parts, strict=True))) if parts else S.draw_scenes(0, 0)


def _check(images: Tensor) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, S.SIZE, S.SIZE):
        raise ValueError(f"the shapes judge needs images [N, 3, {S.SIZE}, {S.SIZE}] in [-1, 1], got {list(images.shape)}")


def _read(images: Tensor) -> S.Scenes:
    n = len(images)
    x = (images.clamp(-1, 1) + 1) / 2
    palette = torch.cat([S.PALETTE, S.BACKDROPS])
    distance = (x[:, None] - palette[:, :, None, None]).square().sum(2)  # [N, 9, 32, 32]
    nearest = distance.min(1)
    core = F.one_hot(nearest.indices, 9).permute(0, 3, 1, 2) * (nearest.values < _CORE**2)[:, None]  # [N, 9, 32, 32]
    cores = core.sum((2, 3))
    background = cores[:, 6:].argmax(1)
    area, colour = cores[:, :6].topk(2, dim=1)
    there = area >= _LEAST_CORE
    mask = _unmix(x, core[torch.arange(n)[:, None], colour].float(), S.PALETTE[colour], S.BACKDROPS[background])
    shape, centre, radius = _fit(mask * there[..., None, None])
    order = _order(centre, there)
    rows = torch.arange(n)[:, None]
    shape, centre, radius, colour, there = (f[rows, order] for f in (shape, centre, radius, colour, there))
    dx, dy = (centre[:, 1] - centre[:, 0]).unbind(1)
    both, absent = there.all(1), torch.tensor(-1)
    one = there[:, 0] & ~both
    column, row = ((centre[:, 0, i] > S.THIRDS[0]).long() + (centre[:, 0, i] > S.THIRDS[1]) for i in range(2))
    return S.Scenes(
        count=(cores[:, :6] >= _LEAST_CORE).sum(1).clamp(max=3),
        shape=torch.where(there, shape, absent),
        colour=torch.where(there, colour, absent),
        size=torch.where(there, (radius > S.SIZE_SPLIT).long(), absent),
        radius=radius * there,
        centre=centre * there[..., None],
        relation=torch.where(both, (dx.abs() <= dy.abs()).long(), absent),
        position=torch.where(one, row * 3 + column, absent),
        background=background,
    )


def _unmix(x: Tensor, core: Tensor, colour: Tensor, backdrop: Tensor) -> Tensor:
    """Soft masks [N, 2, 32, 32] of two objects: each pixel belongs to the object on whose mixing line it lies closest."""
    line = (colour - backdrop[:, None])[..., None, None]  # [N, 2, 3, 1, 1]
    offset = (x - backdrop[..., None, None])[:, None]  # [N, 1, 3, 32, 32]
    alpha = ((offset * line).sum(2) / line.square().sum(2)).clamp(0, 1)
    miss = (offset - alpha[:, :, None] * line).square().sum(2)
    near = F.max_pool2d(core, 3, 1, 1)  # beyond one pixel around the core there is only noise, which would add up
    own = torch.where(near > 0, miss, torch.inf)
    return alpha * near * F.one_hot(own.argmin(1), 2).permute(0, 3, 1, 2)


def _fit(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best of the four templates for each mask: shape [N, 2] (-1 where none fits), centre [N, 2, 2], radius [N, 2]."""
    grid = torch.arange(S.SIZE) + 0.5
    area = mask.sum((2, 3)).clamp(min=1e-6)
    x, y = (mask.sum(2) * grid).sum(2) / area, (mask.sum(3) * grid).sum(2) / area
    radius = (area[..., None] / _AREA).sqrt()  # [N, 2, 4]
    centre = torch.stack([x[..., None].expand_as(radius), y[..., None] - _SINK * radius], -1)
    drawn = [S.coverage(s, centre[..., s, :], radius[..., s]) for s in range(len(S.SHAPES))]
    miss = torch.stack([(mask - d).square().sum((2, 3)) for d in drawn], -1) / area[..., None]
    best = miss.min(-1)
    pick = best.indices[..., None]
    shape = torch.where(best.values < _LOOSEST_FIT**2, best.indices, torch.tensor(-1))
    return shape, centre.gather(2, pick[..., None].expand(-1, -1, 1, 2))[:, :, 0], radius.gather(2, pick)[..., 0]


def _order(centre: Tensor, there: Tensor) -> Tensor:
    """Indices [N, 2] that put the object to the left (or above, if they differ more in height) first."""
    step = centre[:, 1] - centre[:, 0]
    along = torch.where(step[:, 0].abs() > step[:, 1].abs(), step[:, 0], step[:, 1])
    swap = (along < 0) & there.all(1)
    return torch.stack([swap.long(), 1 - swap.long()], 1)


def judge(images: Tensor, captions: Sequence[str]) -> Judgement:
    """Compare images [N, 3, 32, 32] in [-1, 1] with N captions of the shapes grammar, attribute by attribute.

    Raises ValueError for images of another size, another number of captions, or a caption outside the grammar.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    seen, said = read_scene(images), S.encode(captions)
    right = _matched(seen, said)[1]
    correct = {name: _share(value) for name, value in right.items()}
    table = torch.stack([correct[name] for name in ATTRIBUTES], 1)
    everything = torch.stack([(v.nan_to_num(1.0).reshape(len(v), -1) == 1).all(1) for v in right.values()], 1).all(1)
    ideal = S.render(seen)
    residual = (images.detach().float().cpu().clamp(-1, 1) - ideal).div(2).square().mean((1, 2, 3)).sqrt()
    return Judgement(correct, table.nanmean(1), everything.float(), residual)


def _share(value: Tensor) -> Tensor:
    """What is right of an attribute, [N]: as it is, or of one that every object has, [N, 2], the mean over what the caption mentions."""
    return value.nanmean(1) if value.ndim == 2 else value


def _compare(seen: Tensor, said: Tensor) -> Tensor:
    """1.0 where equal, 0.0 where not, nan where the caption says nothing."""
    return torch.where(said < 0, torch.nan, (seen == said).float())


def _matched(seen: S.Scenes, said: S.Scenes) -> tuple[S.Scenes, dict[str, Tensor]]:
    """Assign the seen objects to the caption's, whichever way makes more of it right: what was seen in that order, and what is right."""
    flipped = S.Scenes(*(f.flip(1) if f.ndim > 1 else f for f in seen))._replace(
        relation=torch.full_like(seen.relation, -1)  # the caption's first object is then not the one to the left or above
    )
    tables = [_table(option, said) for option in (seen, flipped)]
    score = [torch.stack([_share(v).nan_to_num(0.0) for v in t.values()], 1).sum(1) for t in tables]
    flip = score[1] > score[0]

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(flip.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return S.Scenes(*map(choose, seen, flipped)), {k: choose(tables[0][k], tables[1][k]) for k in tables[0]}


def _table(seen: S.Scenes, said: S.Scenes) -> dict[str, Tensor]:
    one = said.count == 1  # then the other object, if there is one, is not the caption's business beyond the count
    position = torch.where((seen.position < 0) & one, -2, seen.position)
    return {name: _compare(getattr(seen._replace(position=position), name), getattr(said, name)) for name in ATTRIBUTES}


def partial_prompts() -> list[str]:
    """Prompts that leave attributes open while their objects cannot be mistaken for each other, for `mode_coverage`."""
    return [
        "a circle",
        "a red shape",
        "a large cross",
        "a small blue square",
        "a green shape on a white background",
        "a yellow triangle at the centre",
        "a purple shape at the top left on a black background",
        "a cyan square on a grey background",
        "a red circle left of a blue square",
        "a yellow shape above a purple shape",
        "a small green triangle and a large red cross",
        "a cyan shape left of a green circle on a grey background",
    ]


_VALUES = {"shape": 4, "colour": 6, "size": 2, "relation": 2, "position": 9, "background": 3}


def mode_coverage(images: Tensor, captions: Sequence[str]) -> float:
    """How evenly images [N, 3, 32, 32] cover the modes that their captions leave open, in [0, 1]; 1 is as even as can be.

    For each caption and each attribute that it leaves open (of each object), the law of the data is uniform over V values.
    With TV the total variation distance of the histogram of what the judge reads, the score is
    1 - (TV - e) / (1 - 1/V - e), clamped to [0, 1]: e is what n perfect samples are expected to show (exact, from the
    binomial), 1 - 1/V what a sampler shows that knows one value only. The answer is the mean over captions and attributes.
    As each score is clamped before, what chance puts above 1 is cut: the data's own law has some 0.92 on average with 8 images a
    caption, and 0.98 with 64. Compare at equal numbers of images per caption alone, and use some 50 of each. Images whose attribute
    cannot be read count as lost mass.

    Raises ValueError where no caption leaves anything open, and for a caption outside the grammar.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    said = S.encode(captions)
    seen = _matched(read_scene(images), said)[0]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, caption in enumerate(captions):
        groups[caption].append(i)
    scores = []
    for rows in groups.values():
        for values, v in _open(seen, said, torch.tensor(rows)):
            scores.append(evenness(values, v))
    if not scores:
        raise ValueError("mode_coverage needs captions that leave an attribute open; see partial_prompts()")
    return sum(scores) / len(scores)


def _open(seen: S.Scenes, said: S.Scenes, rows: Tensor) -> list[tuple[Tensor, int]]:
    """(values read [n], number of values) of every attribute that the caption of these rows leaves open."""
    count = int(said.count[rows[0]])
    found = []
    for name, values in _VALUES.items():
        if name == ("relation" if count == 1 else "position"):
            continue
        read, asked = getattr(seen, name)[rows], getattr(said, name)[rows[0]]
        columns = range(count) if read.ndim == 2 else (None,)
        for k in columns:
            if int(asked if k is None else asked[k]) < 0:
                known = name == "colour" and count == 2 and k is not None and int(asked[1 - k]) >= 0
                # two objects never share a colour, so beside a known one five are left
                found.append((read if k is None else read[:, k], values - known))
    return found


def evenness(values: Tensor, v: int) -> float:
    """Score of one histogram against the uniform law over `v` values; see `mode_coverage`. Negative values are lost mass.

    Below 1 on average for draws of that law itself, for it is clamped: by less the more draws there are.
    """
    n = len(values)
    share = torch.bincount(values[values >= 0], minlength=v).double() / n
    distance = float((share - 1 / v).clamp(min=0).sum() + (1 - share.sum()) + (1 / v - share).clamp(min=0).sum()) / 2
    m = n // v + 1  # de Moivre: the mean absolute deviation of a binomial, in closed form
    log_term = math.lgamma(n + 1) - math.lgamma(m + 1) - math.lgamma(n - m + 1) if m <= n else -math.inf
    deviation = 2 * m * math.exp(log_term - m * math.log(v) + (n - m + 1) * math.log1p(-1 / v)) if m <= n else 0.0
    expected = v * deviation / n / 2
    return min(1.0, max(0.0, 1 - (distance - expected) / (1 - 1 / v - expected))) if n > 1 else 0.0
