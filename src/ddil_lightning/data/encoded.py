"""Captions and images after the frozen encoders: what training reads, in memory or mapped from a cache file."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.backbones.sizes import whole
from ddil_lightning.counting import counted
from ddil_lightning.data.buckets import Group
from ddil_lightning.data.captions import Captions, RawBatch
from ddil_lightning.data.notices import Notices
from ddil_lightning.data.visits import Visit, Wording, spread
from ddil_lightning.records import CaptionBatch, Context, cat, sent, take, to
from ddil_lightning.texts import by

CHUNK, LOADED = 256, 2**24
"""Rows that are encoded at a time, and how many pixels of theirs may be in memory: 64 images of 512 x 512."""
DAMAGED = "delete it, or give another data.cache"


class Table(NamedTuple):
    """The columns of the rows of one shape: place i holds row `rows[i]` of the data set."""

    latents: Tensor | None  # [n, C, h, w], None without images
    c: Context  # [n], or as many as `wording` says
    rows: Tensor  # [n] ascending
    wording: Wording | None = None  # which captions of `c` are those of a place; None: the one of its number
    ids: Tensor | None = None  # [n, 6] `c.ids`, where images have captions of `c` in common

    def context(self, places: Tensor, visit: Visit) -> Context:
        """[B] what stands at `places`, which hold the rows of `visit`."""
        c = take(self.c, places if self.wording is None else self.wording.chosen(places, visit))
        return c if self.ids is None else c._replace(ids=self.ids[places].float())


class Encoded(Captions):
    """Latents [N, C, h, w] (None without images) and the context of their captions, those that are equal once. Rows are float32 when they
    are taken, by `[rows]`: places of `c` are no rows.

    Pictures of several shapes are a table a shape (`of`), whose rows are numbered over all. In a file the columns of a table are called
    `latents`, `text`, `mask`, `pooled`, `ids`; of several tables `0/latents`, `0/text`, `0/rows`, `1/latents` and so on.
    """

    file: Path | None = None
    """The cache that the rows are mapped from."""
    whole: bool = True
    """Whether its batches need no encoder any more."""

    def __init__(self, latents: Tensor | None, c: Context) -> None:
        self.tables = [Table(latents, c, torch.arange(len(c.text)))]
        self._places: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, tables: Sequence[Table]) -> Encoded:
        """The rows of several tables, which name each row once."""
        made = cls(tables[0].latents, tables[0].c)
        made.tables = list(tables)
        return made

    @property
    def latents(self) -> Tensor | None:
        """Of the first table, which is the only one of pictures of one shape."""
        return self.tables[0].latents

    @latents.setter
    def latents(self, latents: Tensor | None) -> None:
        self.tables[0] = self.tables[0]._replace(latents=latents)

    @property
    def c(self) -> Context:
        """The captions of the first table, each once, in the order in which they came up first."""
        return self.tables[0].c

    def some_latents(self, n: int) -> list[Tensor]:
        """Some `n` latents, spread over every table in proportion to its rows (`visits.spread`); empty without images."""
        tables = [(t.latents, len(t.rows)) for t in self.tables]
        return [x[spread(rows, math.ceil(n * rows / len(self)))].float() for x, rows in tables if x is not None]

    def groups(self) -> list[Group]:
        """The rows of every table."""
        return [Group(t.rows, "captions" if t.latents is None else f"latents of {by(t.latents.shape[2:])}") for t in self.tables]

    def __len__(self) -> int:
        return sum(len(table.rows) for table in self.tables)

    def __getitem__(self, index: Sequence[int]) -> CaptionBatch:  # type: ignore[override]
        visit = Visit.of(index)
        rows = torch.tensor(visit, dtype=torch.int64)
        table, places = self._find(rows)
        latents = None if table.latents is None else table.latents[places]
        return to(CaptionBatch(latents, table.context(places, visit), rows), torch.float32)

    def _find(self, rows: Tensor) -> tuple[Table, Tensor]:
        """The table of `rows` and their places in it. Raises ValueError for rows of several tables."""
        if len(self.tables) == 1:
            return self.tables[0], rows
        if self._places is None:
            number, place = (torch.empty(len(self), dtype=torch.long) for _ in range(2))
            for i, table in enumerate(self.tables):
                number[table.rows], place[table.rows] = i, torch.arange(len(table.rows))
            self._places = number, place
        number, place = (x[rows] for x in self._places)
        if len(number.unique()) > 1:
            raise ValueError(f"rows of {len(number.unique())} shapes in one batch: take rows of one of `groups`")
        return self.tables[int(number[0]) if len(number) else 0], place

    @classmethod
    def load(cls, path: Path) -> Encoded:
        """Map what `write` wrote: rows come from the disk when they are taken. Raises ValueError for a damaged file or none of ours."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tables: dict[str, dict[str, Tensor]] = {}
            for name, value in load_file(path).items():
                table, _, column = name.rpartition("/")
                tables.setdefault(table, {})[column] = value
            made = cls.of([_table_of(tables[name]) for name in sorted(tables, key=lambda name: int(name or 0))])
        except (SafetensorError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"the cache {path} is damaged or none of ours ({error}): {DAMAGED}") from error
        made.file = path.resolve()
        return made


def _table_of(columns: dict[str, Tensor]) -> Table:
    latents, rows = columns.pop("latents", None), columns.pop("rows", None)
    c = Context(**columns)
    return Table(latents, c, torch.arange(len(c.text)) if rows is None else rows)


def check_lengths(rows: Sequence[int], texts: Sequence[Sequence[str]], backbone: Backbone) -> None:
    """Raises ValueError, naming row and remedy, for the first of the captions of `rows` that the text encoder would cut."""
    try:
        backbone.check_length([text for several in texts for text in several])
    except ValueError:
        for row, several in zip(rows, texts, strict=True):
            try:
                backbone.check_length(several)
            except ValueError as error:
                raise ValueError(f"row {row} (from 0) of the data: {error} (data.truncate=true)") from error
        raise


class Texts:
    """The text states of captions on `device`, the backbone's by default: those of equal captions of images of equal sizes are made once.

    A size is what a network may be told with a caption (SDXL), so it tells captions apart.
    """

    def __init__(self, backbone: Backbone, truncate: bool = False, device: torch.device | None = None) -> None:
        self.backbone, self.truncate, self.device = backbone, truncate, backbone.device if device is None else device
        self._known: dict[tuple[str, tuple[int, ...]], int] = {}
        self._parts: list[Context] = []

    def which(self, raw: RawBatch) -> Tensor:
        """[T] the rows of `every` that are the captions of `raw`. Raises ValueError for one that is too long without `truncate`."""
        sizes = raw.sizes
        if sizes is None and raw.pixels is not None and raw.pixels.ndim == 4:  # the toy's are points
            sizes = whole((raw.pixels.shape[2], raw.pixels.shape[3]), len(raw.rows))
        if sizes is not None and raw.counts is not None:
            sizes = sizes.repeat_interleave(raw.counts, 0)
        told: list[tuple[int, ...]] = [()] * len(raw.prompts) if sizes is None else [tuple(size) for size in sizes.tolist()]
        keys = list(zip(raw.prompts, told, strict=True))
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self._known}
        rows = sorted(first.values())
        if rows:
            some = None if sizes is None else sizes[rows]
            made = self.backbone.encode_text([raw.prompts[row] for row in rows], self.truncate, sizes=some)
            self._parts.append(to(made, self.device))
            self._known |= {keys[row]: len(self._known) + i for i, row in enumerate(rows)}
        return torch.tensor([self._known[key] for key in keys])

    @property
    def every(self) -> Context:
        """The states of all captions so far, each once."""
        return cat(self._parts)


def encode_batch(raw: RawBatch, backbone: Backbone, truncate: bool = False) -> CaptionBatch:
    """One raw batch on the backbone's device."""
    texts = Texts(backbone, truncate)
    which, every = texts.which(raw), texts.every
    c = every if len(every.text) == len(which) else take(every, sent(which, backbone.device))
    return CaptionBatch(latents_of(raw, backbone), c, sent(raw.rows, backbone.device))


def latents_of(raw: RawBatch, backbone: Backbone) -> Tensor | None:
    """[B, C, h, w] of the images of a raw batch, on the backbone's device; None without images."""
    images = raw.images(backbone.device)
    if images is not None:
        return backbone.encode_images(images)
    return None if raw.latent is None else sent(raw.latent, backbone.device).to(torch.float32)


@torch.no_grad()
def encode(
    captions: Captions, backbone: Backbone, truncate: bool = False, workers: int = 0, notices: Notices | None = None, show: bool = False
) -> Encoded:
    """Every image and every different caption through the frozen encoders once: an image's VAE costs more than a step's U-Net forward."""
    groups = [group.rows.tolist() for group in captions.groups()]
    texts = Texts(backbone, truncate, torch.device("cpu"))
    made: list[tuple[list[Any], ...]] = [([], [], []) for _ in groups]
    for i, _, raw in raw_batches(captions, groups, workers, notices or Notices(), show, every=True):
        latent = latents_of(raw, backbone)
        found = (latent, torch.ones(len(raw.rows)).long() if raw.counts is None else raw.counts, texts.which(raw))
        for column, value in zip(made[i], found, strict=True):
            column.append(None if value is None else value.cpu())
    c, tables = texts.every, []
    for rows, (latents, counts, which) in zip(groups, made, strict=True):
        wording = Wording.of(torch.cat(counts), torch.cat(which))
        tables.append(Table(None if latents[0] is None else torch.cat(latents), c, torch.tensor(rows), wording))
    return Encoded.of(tables)


def chunk_rows(captions: Captions, rows: Sequence[int]) -> int:
    """How many of `rows`, whose pictures are of one shape, are encoded at a time."""
    pixels = captions[rows[:1]].pixels if rows else None
    return CHUNK if pixels is None else max(1, min(CHUNK, LOADED // math.prod(pixels.shape[2:])))


def readers(captions: Captions, workers: int, tells: bool) -> int:
    """How many workers read `captions`: of a stream no more than one, since each would read all of it. The process that `tells` says so."""
    if workers > 1 and captions.stream and tells:
        logging.getLogger(__name__).warning(f"data.workers={workers}: a stream has one in each process, for every one would read all of it")
    return min(workers, 1) if captions.stream else workers


def raw_batches(
    captions: Captions,
    groups: Sequence[Sequence[int]],
    workers: int,
    notices: Notices,
    show: bool,
    every: bool = False,
) -> Iterator[tuple[int, int, RawBatch]]:
    """Batches of the groups in order, to be encoded: which group, how many of its rows are done before, the rows; with `every`, with all
    captions of each.

    Pictures are loaded by as many workers, a bounded number of pixels at a time.
    """
    parts: list[tuple[int, int, Visit]] = []
    for group, rows in enumerate(groups):
        chunk = chunk_rows(captions, rows)
        parts += [(group, i, Visit(rows[i : i + chunk], every=every)) for i in range(0, len(rows), chunk)]
    loader = DataLoader(captions, batch_size=None, sampler=[rows for *_, rows in parts], num_workers=readers(captions, workers, show))  # type: ignore[arg-type]
    for (group, done, _), raw in zip(parts, counted(loader, len(parts), "encoding the data", show), strict=True):
        notices.hear(raw, len(captions))
        yield group, done, raw
