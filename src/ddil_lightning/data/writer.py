"""A cache folder in the making: rows in files of their own, then the captions that they have in common, then the text states of these.

Whatever a process has finished stays when it is killed; what was half written is gone. Every file is a function of its rows alone, so that
it is the same whoever writes it, and when.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.backbones.sizes import whole
from ddil_lightning.bounds import within
from ddil_lightning.counting import counted
from ddil_lightning.data import manifest
from ddil_lightning.data.base import Captions
from ddil_lightning.data.encoded import CHUNK, check_lengths, chunk_rows, readers
from ddil_lightning.data.notices import Notices
from ddil_lightning.data.numbering import number_captions
from ddil_lightning.data.raw import RawBatch
from ddil_lightning.data.shards import about_shard, checksum, packed, read_shard, too_many, unpacked, write_shard
from ddil_lightning.data.sharing import Missing
from ddil_lightning.data.sorting import sort_by_size
from ddil_lightning.data.visits import Visit
from ddil_lightning.files import holding, read_table, sweep
from ddil_lightning.processes import Processes

NAMED = 100  # skipped rows that a manifest names
LOCK = ".lock"  # of who completes the folder


@dataclass(frozen=True)
class Keeping:
    """How a cache folder keeps what is encoded.

    Args:
        dtype: of latents and text states.
        text: keep text states, each caption's once; without them training encodes the captions of each batch.
        shard_rows: rows, and captions, in a file.
    """

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    text: bool = True
    shard_rows: int = 2048

    def __post_init__(self) -> None:
        within(1, 10**7, **{"--shard_rows": self.shard_rows})


class Shard(NamedTuple):
    """Rows of one shape that are kept in one file."""

    file: str
    group: int
    rows: Tensor


class Writer:
    """Makes the cache folder `folder` of `captions`, or goes on with it; `processes` share the files. `write` does all of it.

    Others may write into the folder at the same time that know nothing of these, such as the tasks of an array job.
    """

    def __init__(
        self, folder: Path, captions: Captions, backbone: Backbone, keeping: Keeping, truncate: bool, workers: int, processes: Processes
    ) -> None:
        self.folder, self.captions, self.backbone, self.keeping = folder, captions, backbone, keeping
        self.truncate, self.workers, self.processes = truncate, workers, processes
        self.notices = Notices()
        self._dtype = getattr(torch, keeping.dtype)

    def write(self) -> dict[str, Any]:
        """Everything that is not there yet -> the manifest, which is complete unless another process is just completing it.

        Raises ValueError for a folder of another cache, or what cannot be kept.
        """
        about = self.processes.by_first(self._about)
        found = self.processes.by_first(lambda: self._known(about))
        if found["complete"]:
            return found
        self.captions.check_files(self.processes)
        sort_by_size(self.captions, self.processes)
        found = self.processes.by_first(lambda: self._begin(about))  # not before: data that were mended would be other data
        if found["complete"]:
            return found
        groups = self.captions.groups()
        shards: list[Shard] = []
        for group, (rows, _) in enumerate(groups):
            for part in rows.split(self.keeping.shard_rows):
                shards.append(Shard(f"rows-{len(shards):05d}.safetensors", group, part))
        self.processes.by_first(lambda: self._say_maps(len(shards)))
        mine = self._mine(len(shards), lambda i: self._has_rows(shards[i]))
        self.processes.by_all(lambda: self._check_captions(shards, mine))
        self.processes.by_all(lambda: self._rows(shards, mine, [rows for rows, _ in groups]))
        self.processes.wait()
        files = [shard.file for shard in shards]
        unique, texts = self.processes.by_first(lambda: number_captions(self.folder, files, self.keeping.shard_rows))
        self.processes.by_first(lambda: self._drop_others(len(shards), texts))
        if self.keeping.text:
            self.processes.by_all(lambda: self._texts(texts, unique))
            self.processes.wait()
        names = [*files, "index.safetensors"]
        names += [f"{kind}-{i:05d}.safetensors" for kind in ("captions", *(["text"] if self.keeping.text else [])) for i in range(texts)]
        with ExitStack() as held:  # by the first, to the end of this
            alone = self.processes.by_first(lambda: held.enter_context(holding(self.folder / LOCK)))
            found = self.processes.by_first(lambda: manifest.read(self.folder))
            if not alone or (found["complete"] and found["files"].keys() == set(names)):
                return found  # of another process, which reads all files for their checksums, or has read them
            sums = self._checksums(names)
            return self.processes.by_first(lambda: self._end(about, shards, [group.name for group in groups], unique, sums))

    def _about(self) -> dict[str, Any]:
        """The manifest of a cache that is begun."""
        kept = {"dtype": self.keeping.dtype, "shard_rows": self.keeping.shard_rows}
        images = self.captions.sizes is not None or self.captions[[0]].pixels is not None
        if not self.keeping.text and not images:
            raise ValueError("captions without images, and no text states of them: there is nothing to keep; leave --text at true")
        about = manifest.origin(self.captions, self.backbone, self.truncate, images)
        return {**about, **kept, "text": self.keeping.text, "complete": False}

    def _known(self, about: dict[str, Any]) -> dict[str, Any]:
        """The manifest of a cache that is not complete, for whoever goes on with it; of one that is, its own."""
        known = manifest.check_same(self.folder, about)
        cut = known.get("text") and known["truncate"] != self.truncate
        if known.get("complete") and known["text"] >= about["text"] and not cut and not manifest.drop_damaged(self.folder, known):
            return known
        return about

    def _begin(self, about: dict[str, Any]) -> dict[str, Any]:
        """Begin the folder, or go on with it, unless another process has completed it while this one looked at the data."""
        if (known := self._known(about))["complete"]:
            return known
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder, inside=False)
        written = read_table(self.folder / manifest.NAME)
        if not written:
            manifest.write(self.folder, about)
        if not written or written == json.loads(json.dumps(about)):
            return about
        with holding(self.folder / LOCK) as alone:  # as who completes it does: nobody can between this look and the writing
            if not (known := self._known(about))["complete"] and alone:
                manifest.write(self.folder, about)
            return known

    # Rows ----------------------------------------------------------------------------------------------------------------------------

    def _mine(self, files: int, is_made: Callable[[int], bool]) -> list[int]:
        """Which of so many files this process has to write: those of its share that are not made of what they would be made of now.

        Of a stream a share is one after the other: who reads in order reads what lies in between, too.
        """
        rank, world = self.processes.rank, self.processes.world
        share = range(files * rank // world, files * (rank + 1) // world) if self.captions.stream else range(rank, files, world)
        return [i for i in share if not is_made(i)]

    def _has_rows(self, shard: Shard) -> bool:
        """Whether the file of a shard holds its rows: a picture that can be read only now may belong to another size."""
        try:
            about = about_shard(self.folder / shard.file)
            return about["group"] == shard.group and torch.equal(read_shard(self.folder / shard.file)["rows"], shard.rows)
        except (KeyError, ValueError):  # not there, cut short, or of something else
            return False

    def _say_maps(self, shards: int) -> None:
        """Warn, before all is encoded, where there will be more files than a process can map."""
        told = [] if self.captions.stream else self._readable(list(range(min(64, len(self.captions)))))
        each = sum(map(len, told)) / max(1, len(told))  # captions of a picture, which are mostly different ones
        files = round(shards * (1 + each * (2 if self.keeping.text else 1)))
        if said := too_many(files):
            logging.getLogger(__name__).warning(f"{self.folder} will have some {files} files, which training maps, and {said}")

    def _check_captions(self, shards: list[Shard], mine: list[int]) -> None:
        """Raises ValueError for a row whose caption is too long, before any picture is encoded. Not again of files that were checked for it
        when they were made, and no stream is read twice for it."""
        if self.truncate or self.captions.stream:
            return
        share = range(self.processes.rank, len(shards), self.processes.world)
        new = set(mine)
        unchecked = [i for i in share if i in new or not about_shard(self.folder / shards[i].file).get("checked")]
        rows = [row for i in unchecked for row in shards[i].rows.tolist()]
        parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
        for part in self.processes.watching(counted(parts, len(parts), "checking the captions", self.processes.first, rows=len)):
            check_lengths(part, self._readable(part), self.backbone)

    def _readable(self, rows: list[int]) -> list[list[str]]:
        """The captions of `rows`, none of one that cannot be read and may be skipped."""
        try:
            return self.captions.texts(rows)
        except (OSError, ValueError):
            if self.captions.on_error == "stop":
                raise
            return [[]] if len(rows) == 1 else [several for row in rows for several in self._readable([row])]

    def _rows(self, shards: list[Shard], mine: list[int], groups: list[Tensor]) -> None:
        """Latents, sizes and captions of the rows of each file that is `mine`."""
        chunks = {g: chunk_rows(self.captions, groups[g].tolist()) for g in {shards[i].group for i in mine}}
        missing = Missing(mine, lambda i: self._has_rows(shards[i]), self.folder, self.captions.stream)
        ahead: deque[tuple[int, Visit, bool]] = deque()  # what the loader was asked for: a file, some of its rows, whether the last

        def asked() -> Iterator[Visit]:
            for i in missing:
                parts = shards[i].rows.split(chunks[shards[i].group])
                for number, part in enumerate(parts, 1):
                    ahead.append((i, Visit(part.tolist(), every=True), number == len(parts)))
                    yield ahead[-1][1]

        total = sum(math.ceil(len(shards[i].rows) / chunks[shards[i].group]) for i in mine)
        workers = readers(self.captions, self.workers, self.processes.first)
        loader = DataLoader(self.captions, batch_size=None, sampler=asked(), num_workers=workers)
        told = counted(loader, total, "encoding the data", self.processes.first, rows=lambda raw: len(raw.rows))
        made: list[dict[str, Any]] = []
        for raw in self.processes.watching(told):
            i, rows, last = ahead.popleft()
            self.notices.hear(raw, len(self.captions))
            made.append(self._encoded(raw, rows))
            if last:
                if not missing.is_made(i):
                    self._write_rows(shards[i], made)
                made = []

    @torch.no_grad()
    def _encoded(self, raw: RawBatch, rows: Visit) -> dict[str, Any]:
        if not self.truncate and self.captions.stream:
            told = iter(raw.prompts)
            counts = torch.ones(len(raw.rows)).long() if raw.counts is None else raw.counts
            check_lengths(raw.rows.tolist(), [list(islice(told, n)) for n in counts.tolist()], self.backbone)
        found: dict[str, Any] = {"prompts": raw.prompts, "counts": raw.counts, "skipped": raw.skipped, "enlarged": raw.enlarged}
        images = raw.images(self.backbone.device)
        if images is not None:
            latents = self._held(self.backbone.encode_images(images).cpu(), f"the latents of rows {rows[0]} to {rows[-1]}")
            own = whole((images.shape[2], images.shape[3]), len(rows)) if images.ndim == 4 else None
            found |= {"latents": latents, "sizes": own if raw.sizes is None else raw.sizes}
        return found

    def _held(self, values: Tensor, what: str) -> Tensor:
        held = values.to(self._dtype) if values.is_floating_point() else values
        if held.is_floating_point() and not bool(held.isfinite().all()):
            raise ValueError(f"{what} are too large for {self.keeping.dtype}, or not finite: give --dtype bfloat16 or float32")
        return held

    def _write_rows(self, shard: Shard, made: list[dict[str, Any]]) -> None:
        columns = {"rows": shard.rows, "counts": torch.cat([part["counts"] for part in made]).to(torch.int32)}
        columns |= packed([text for part in made for text in part["prompts"]])
        if "latents" in made[0]:
            columns["latents"] = torch.cat([part["latents"] for part in made])
        if made[0].get("sizes") is not None:
            columns["sizes"] = torch.cat([part["sizes"] for part in made]).to(torch.int32)
            ids = self._ids(columns["sizes"], made[0]["prompts"][:1])
            columns |= {} if ids is None else {"ids": ids}
        skipped = list(dict.fromkeys(why for part in made for why in part["skipped"]))
        about = {"group": shard.group, "skipped": skipped, "enlarged": sum(part["enlarged"] for part in made), "checked": not self.truncate}
        write_shard(self.folder / shard.file, columns, about)

    @torch.no_grad()
    def _ids(self, sizes: Tensor, prompt: list[str]) -> Tensor | None:
        """[n, ...] what the network is told of images of these `sizes` with any caption; None for a network that is told nothing."""
        unique, number = sizes.unique(dim=0, return_inverse=True)
        few = self.backbone.encode_text(prompt * len(unique[:4]), True, sizes=unique[:4]).ids
        if few is None or torch.equal(few.cpu(), unique[:4].float()):
            return None if few is None else sizes.float()
        parts = [self.backbone.encode_text(prompt * len(part), True, sizes=part).ids for part in unique.split(CHUNK)]
        return torch.cat([part.cpu() for part in parts if part is not None])[number]

    # Captions ------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _texts(self, files: int, unique: int) -> None:
        """The text states of the captions in each file. A file says of which captions: these are numbered anew in every go."""
        names = [f"text-{i:05d}.safetensors" for i in range(files)]
        has = lambda i: self._has_texts(names[i], self._origin_of_texts(i))  # noqa: E731
        missing = Missing(mine := self._mine(files, has), has, self.folder)
        alone = "latents" not in read_shard(self.folder / "rows-00000.safetensors")
        every = self.keeping.shard_rows

        def parts() -> Iterator[tuple[int, list[str], bool]]:
            for i in missing:
                texts = unpacked(read_shard(self.folder / f"captions-{i:05d}.safetensors"))
                for start in range(0, len(texts), CHUNK):
                    yield i, texts[start : start + CHUNK], start + CHUNK >= len(texts)

        total = sum(math.ceil(min(every, unique - i * every) / CHUNK) for i in mine)
        made: list[dict[str, Tensor]] = []
        told = counted(parts(), total, "encoding the captions", self.processes.first, rows=lambda part: len(part[1]))
        for i, texts, last in self.processes.watching(told):
            c = self.backbone.encode_text(texts, self.truncate)
            held = {name: value.cpu() for name, value in c._asdict().items() if value is not None and (alone or name != "ids")}
            what = f"of captions {i * every} and on"
            made.append({name: value if name == "ids" else self._held(value, f"{name} {what}") for name, value in held.items()})
            if last:
                if not missing.is_made(i):
                    columns = {name: torch.cat([part[name] for part in made]) for name in made[0]}
                    write_shard(self.folder / names[i], columns, self._origin_of_texts(i))
                made = []

    def _origin_of_texts(self, i: int) -> dict[str, Any]:
        """What the text states of the captions in a file depend on besides the encoders."""
        return {"captions": checksum(self.folder / f"captions-{i:05d}.safetensors")["sha256"], "truncate": self.truncate}

    def _has_texts(self, name: str, about: dict[str, Any]) -> bool:
        try:
            return about_shard(self.folder / name) == about
        except ValueError:  # not there, or cut short
            return False

    def _drop_others(self, rows: int, texts: int) -> None:
        """Remove what an earlier go has left behind the last file of each kind."""
        for file in self.folder.glob("*-*.safetensors"):
            kind, _, number = file.stem.partition("-")
            if number.isdigit() and int(number) >= {"rows": rows, "captions": texts, "text": texts}.get(kind, int(number) + 1):
                file.unlink(missing_ok=True)

    # The end -------------------------------------------------------------------------------------------------------------------------

    def _checksums(self, names: list[str]) -> dict[str, Any]:
        """Length and checksum of every file, of which each process reads its share."""
        share = self.processes.watching(names[self.processes.rank :: self.processes.world])
        every = self.processes.gathered(self.processes.by_all(lambda: {name: checksum(self.folder / name) for name in share}))
        found = {name: known for part in every for name, known in part.items()}
        return {name: found[name] for name in names}

    def _end(self, about: dict[str, Any], shards: list[Shard], groups: list[str], unique: int, files: dict[str, Any]) -> dict[str, Any]:
        told = [about_shard(self.folder / shard.file) for shard in shards]
        skipped = list(dict.fromkeys(why for one in told for why in one["skipped"]))
        made = {
            **about,
            "text": self.keeping.text,
            "complete": True,
            "groups": [{"name": name, "files": [s.file for s in shards if s.group == g]} for g, name in enumerate(groups)],
            "captions": unique,
            "skipped": {"count": len(skipped), "first": skipped[:NAMED]},
            "enlarged": sum(one["enlarged"] for one in told),
            "files": files,
        }
        manifest.write(self.folder, made)
        return made
