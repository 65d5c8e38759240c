"""Built-in text-to-image data: coloured shapes on 32x32 pixels, drawn with torch, with captions of 29 words.

Nothing is downloaded, and the law of the data is known in closed form: every attribute of a scene is uniform over its
values (see the tables below), so that prompt alignment can be checked exactly (`judge`) and the modes which a partial
prompt leaves open are uniform (`mode_coverage`); both are in judge.py.

Coordinates are pixels, x to the right and y downwards, pixel centres at .5; the canvas is [0, 32] x [0, 32].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "grey", "white")
RELATIONS = ("left of", "above")
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
WORDS = tuple(
    dict.fromkeys(
        " ".join(("a", *SIZES, *COLOURS, *SHAPES, "shape", *RELATIONS, "and at the", *POSITIONS, "on", *BACKGROUNDS)).split()
        + ["background"]
    )
)

TWO_OBJECTS = 0.35
RADII = ((3.9, 4.8), (6.1, 7.0))
SIZE_SPLIT = 5.45
THIRDS = (13.0, 19.0)
# the values in [0, 1]: no colour lies on a mixing line of another colour with a background
PALETTE = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.65, 0.15], [0.1, 0.2, 0.95], [0.95, 0.85, 0.1], [0.7, 0.1, 0.75], [0.1, 0.8, 0.9]])
BACKDROPS = torch.tensor([[0.03, 0.03, 0.03], [0.5, 0.5, 0.5], [0.97, 0.97, 0.97]])
CHUNK = 64  # rendering is seven times slower in chunks of 1024, which leave the cache


class Scenes(NamedTuple):
    """N scenes, or what a judge read or a caption says of them; in integer fields -1 means "not there" or "not said"."""

    count: Tensor  # type: ignore[assignment]  # [N] int64, objects: 1 or 2; hides tuple.count, which nobody needs here
    shape: Tensor  # [N, 2] int64, index into SHAPES
    colour: Tensor  # [N, 2] int64, index into COLOURS; the two objects never share one
    size: Tensor  # [N, 2] int64, index into SIZES
    radius: Tensor  # [N, 2] float32, pixels
    centre: Tensor  # [N, 2, 2] float32, pixels (x, y)
    relation: Tensor  # [N] int64, index into RELATIONS: where the first object stands; -1 for one object
    position: Tensor  # [N] int64, index into POSITIONS; -1 for two objects
    background: Tensor  # [N] int64, index into BACKGROUNDS


def _pick(u: Tensor, n: int) -> Tensor:
    """Integers that are uniform over 0..n-1, from numbers `u` that are uniform in [0, 1)."""
    return (u * n).long().clamp(max=n - 1)


def draw_scenes(n: int, seed: int) -> Scenes:
    """Draw `n` scenes from the law of the data.

    Scene i of a seed is the same whatever `n` is, since every scene uses its own row of one stream of numbers.
    """
    u = torch.rand(n, 17, generator=torch.Generator().manual_seed(seed))
    two = u[:, 0] < TWO_OBJECTS
    first = _pick(u[:, 3], len(COLOURS))
    colour = torch.stack([first, (first + 1 + _pick(u[:, 4], len(COLOURS) - 1)) % len(COLOURS)], 1)
    size = _pick(u[:, 5:7], 2)
    low, high = torch.tensor(RADII).unbind(1)
    radius = low[size] + u[:, 7:9] * (high - low)[size]
    relation, position = _pick(u[:, 9], 2), _pick(u[:, 10], 9)
    centre = torch.where(two[:, None, None], _pair(radius, relation, u[:, 11:15]), _single(radius, position, u[:, 11:13]))
    shape, absent = _pick(u[:, 1:3], len(SHAPES)), torch.tensor(-1)
    there = torch.stack([torch.ones_like(two), two], 1)
    return Scenes(
        count=two.long() + 1,
        shape=torch.where(there, shape, absent),
        colour=torch.where(there, colour, absent),
        size=torch.where(there, size, absent),
        radius=radius * there,
        centre=centre * there[..., None],
        relation=torch.where(two, relation, absent),
        position=torch.where(two, absent, position),
        background=_pick(u[:, 15], 3),
    )


def _single(radius: Tensor, position: Tensor, u: Tensor) -> Tensor:
    """The centre of one object, [N, 2, 2], at least half a pixel away from every line that divides two position words."""
    r = radius[:, :1]
    lows = torch.cat([r + 0.5, torch.full_like(r, THIRDS[0] + 0.5), torch.full_like(r, THIRDS[1] + 0.5)], 1)
    highs = torch.cat([torch.full_like(r, THIRDS[0] - 0.5), torch.full_like(r, THIRDS[1] - 0.5), SIZE - 0.5 - r], 1)
    cell = torch.stack([position % 3, position // 3], 1)
    low, high = lows.gather(1, cell), highs.gather(1, cell)
    return (low + u * (high - low))[:, None].expand(-1, 2, -1)


def _pair(radius: Tensor, relation: Tensor, u: Tensor) -> Tensor:
    """The centres [N, 2, 2] of two objects along x (left of) or y (above), which are at least one pixel apart."""
    first, reach = 0.5 + radius[:, 0], radius.sum(1) + 1.0
    slack = SIZE - 0.5 - radius[:, 1] - first - reach
    gap = u[:, 0] * slack
    first = first + u[:, 1] * (slack - gap)
    along = torch.stack([first, first + reach + gap], 1)
    across = SIZE / 2 + (u[:, 2:4] - 0.5) * 7.0  # less than the smallest distance along, so the relation is never in doubt
    left = (relation == 0)[:, None]
    return torch.stack([torch.where(left, along, across), torch.where(left, across, along)], 2)


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - r  # at .86 r, nearly the circle's area, a teacher of this size learns neither


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(y - 0.75 * r, (1.75 * x.abs() - y - r) / 2.01556)


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    a, b = x.abs(), y.abs()
    return torch.maximum(torch.maximum(a, b) - r, torch.minimum(a, b) - 0.3 * r)


DISTANCES: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (_circle, _square, _triangle, _cross)


def coverage(shape: int, centre: Tensor, radius: Tensor) -> Tensor:
    """The share [..., 32, 32] of every pixel that one kind of shape covers, with centre [..., 2] and radius [...] in pixels."""
    grid = torch.arange(SIZE, dtype=centre.dtype, device=centre.device) + 0.5
    x, y = grid - centre[..., 0, None, None], grid[:, None] - centre[..., 1, None, None]
    return (0.5 - DISTANCES[shape](x, y, radius[..., None, None])).clamp(0, 1)


def render(scenes: Scenes) -> Tensor:
    """Images [N, 3, 32, 32] float32 in [-1, 1] of scenes, anti-aliased by their signed distance."""
    n = len(scenes.count)
    out = torch.empty(n, 3, SIZE, SIZE)
    for i in range(0, n, CHUNK):
        out[i : i + CHUNK] = _render_chunk(Scenes(*(field[i : i + CHUNK] for field in scenes)))
    return out


def _render_chunk(scenes: Scenes) -> Tensor:
    image = BACKDROPS[scenes.background][..., None, None].expand(-1, -1, SIZE, SIZE).clone()
    for k in range(2):
        for s in range(len(SHAPES)):
            rows = (scenes.shape[:, k] == s).nonzero()[:, 0]
            if len(rows):
                alpha = coverage(s, scenes.centre[rows, k], scenes.radius[rows, k])[:, None]
                image[rows] = torch.lerp(image[rows], PALETTE[scenes.colour[rows, k]][..., None, None], alpha)
    return image * 2 - 1


def captions(scenes: Scenes, seed: int, full: bool = False) -> list[str]:
    """One caption per scene, each attribute left out with probability .1 to .15 (never with `full=True`).

    A left-out shape is called "shape", a left-out relation "and". Caption i of a seed does not depend on N.
    """
    n = len(scenes.count)
    u = torch.rand(n, 9, generator=torch.Generator().manual_seed(seed ^ 0x5EED))
    p = torch.tensor([0.12, 0.12, 0.1, 0.12, 0.12, 0.1, 0.1, 0.15, 0.15])
    keep = torch.ones(n, 9, dtype=torch.bool) if full else u >= p
    columns = torch.cat([scenes.size, scenes.colour, scenes.shape, scenes.relation[:, None], scenes.position[:, None],
                         scenes.background[:, None], scenes.count[:, None]], 1)  # fmt: skip
    return [_caption(row, kept) for row, kept in zip(columns.tolist(), keep.tolist(), strict=True)]


def _caption(row: list[int], keep: list[bool]) -> str:
    size, colour, shape, (relation, position, background, count) = row[0:2], row[2:4], row[4:6], row[6:]
    things = []
    for k in range(count):
        words = ["a", SIZES[size[k]] if keep[3 * k] else "", COLOURS[colour[k]] if keep[3 * k + 1] else ""]
        things.append(" ".join(w for w in (*words, SHAPES[shape[k]] if keep[3 * k + 2] else "shape") if w))
    text = things[0]
    if count == 2:
        text += f" {RELATIONS[relation] if keep[6] else 'and'} {things[1]}"
    elif keep[7]:
        text += f" at the {POSITIONS[position]}"
    return text + (f" on a {BACKGROUNDS[background]} background" if keep[8] else "")


def _either(values: Sequence[str]) -> str:
    return "(" + "|".join(sorted(values, key=len, reverse=True)) + ")"


_THING = f"a(?: {_either(SIZES)})?(?: {_either(COLOURS)})? {_either((*SHAPES, 'shape'))}"
_GRAMMAR = re.compile(
    f"{_THING}(?: {_either((*RELATIONS, 'and'))} {_THING}| at the {_either(POSITIONS)})?(?: on a {_either(BACKGROUNDS)} background)?"
)


def parse(caption: str) -> dict[str, Any]:
    """What a caption says: {"count": 2, "shape": ("circle", None), "colour": ..., "size": ..., "relation": "above", ...}.

    Only attributes that the caption mentions have a key; in the per-object tuples None stands for "left open".

    Raises ValueError for a caption that is not of this data set's grammar.
    """
    match = _GRAMMAR.fullmatch(" ".join(caption.lower().split()).rstrip(" ."))
    if match is None:
        unknown = [w for w in caption.lower().split() if w.rstrip(".") not in WORDS]
        why = f"unknown word {unknown[0]!r}" if unknown else "not of the form 'a [small] [red] circle [left of a ...]'"
        raise ValueError(f"not a caption of the shapes data: {caption!r}: {why}")
    size1, colour1, shape1, relation, size2, colour2, shape2, position, background = match.groups()
    count = 2 if shape2 else 1
    said: dict[str, Any] = {"count": count}
    shapes = (None if shape1 == "shape" else shape1, None if shape2 == "shape" else shape2)
    for name, pair in (("shape", shapes), ("colour", (colour1, colour2)), ("size", (size1, size2))):
        if any(pair[:count]):
            said[name] = pair[:count]
    rest = {"relation": None if relation == "and" else relation, "position": position, "background": background}
    return said | {name: value for name, value in rest.items() if value}


@lru_cache(maxsize=1 << 16)
def _encode(caption: str) -> tuple[int, ...]:
    said = parse(caption)

    def number(name: str, table: Sequence[str], k: int | None = None) -> int:
        value = said.get(name)
        value = value[k] if value is not None and k is not None and k < len(value) else None if k is not None else value
        return -1 if value is None else table.index(value)

    tables = (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES))
    pairs = [number(name, table, k) for name, table in tables for k in range(2)]
    tail = (number("relation", RELATIONS), number("position", POSITIONS), number("background", BACKGROUNDS))
    return (said["count"], *pairs, *tail)


def encode(texts: Sequence[str]) -> Scenes:
    """What captions say, as tensors: -1 where an attribute is left open; radius and centre are zero."""
    t = torch.tensor([_encode(text) for text in texts], dtype=torch.int64).reshape(-1, 10)
    n = len(t)
    return Scenes(t[:, 0], t[:, 1:3], t[:, 3:5], t[:, 5:7], torch.zeros(n, 2), torch.zeros(n, 2, 2), t[:, 7], t[:, 8], t[:, 9])
