"""Stored pairs: noise and what the guided teacher's deterministic sampler makes of it, solved once and not at every step.

DMD regresses on them (Yin et al. 2024, Section 4.2), reflow straightens them (Liu et al. 2023). A pair belongs to a row of the data set and
to its first caption. Its noise and guidance follow from the seed, the row and its number alone, whatever the batch and the processes.
Ends are stored as the solver makes them, and held in the box of the run that reads them, as the ends of its teacher's roll-outs are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.counting import counted
from ddil_lightning.data.buckets import Group
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.encoded import Encoded, Table
from ddil_lightning.data.raw import digest
from ddil_lightning.data.shards import about_shard, read_shard, write_shard
from ddil_lightning.data.sharing import Missing
from ddil_lightning.data.visits import Visit
from ddil_lightning.diffusion.denoiser import Denoiser, to_w
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.reflection import Reflection
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.feed import Pairs
from ddil_lightning.files import holds_anything, read_table, sweep, write_text
from ddil_lightning.imitation.learner import Learner
from ddil_lightning.processes import Processes
from ddil_lightning.records import CaptionBatch, Pair, sent
from ddil_lightning.streams import Streams

PART = 256
"""Pairs in a file: what a run that is killed loses at most, in every process."""
NAME = "pairs.json"
OTHER = {
    "teacher": "by another teacher, or in another precision of its weights",
    "encoders": "by other text encoders",
    "captions": "of other captions",
    "rows": "of other captions",
    "guidance": "at guidance {theirs}, not {mine}",
    "steps": "in {theirs} steps, not {mine}",
    "each": "with {theirs} of each caption, not {mine}",
    "seed": "from the seed {theirs}, not {mine}",
}
"""What is said of a folder whose pairs differ in one of these."""


class Stored:
    """Pairs by the row that they belong to. `parts`: their columns `rows`, `number`, `noise`, `end` and `w`; `rows`: of the data set."""

    reflection: Reflection | None = None
    """Of the ends, when they are joined with a batch."""

    def __init__(self, parts: Sequence[Mapping[str, Tensor]], rows: int, each: int) -> None:
        self._parts, self.each = list(parts), each
        self._where = torch.full((each, rows, 2), -1)
        for i, part in enumerate(self._parts):
            places = torch.arange(len(part["rows"]))
            self._where[part["number"], part["rows"]] = torch.stack([torch.full_like(places, i), places], 1)

    def of(self, rows: Tensor, number: Tensor) -> Pair:
        """[B] the pairs `number` [B] of `rows` [B], in float32 on the CPU. Raises ValueError for a row that has none."""
        where = self._where[number, rows]
        if bool((where < 0).any()):
            raise ValueError(f"row {int(rows[(where < 0).any(1)][0])} (from 0) of the data has no pair")
        made: dict[str, Tensor] = {}
        for i in where[:, 0].unique().tolist():  # mostly one: a read each, and not one of every row
            mine = where[:, 0] == i
            for name in Pair._fields:
                found = self._parts[i][name][where[mine, 1]].float()
                made.setdefault(name, found.new_empty(len(where), *found.shape[1:]))[mine] = found
        return Pair(**made)

    def joined(self, batch: CaptionBatch, streams: Streams | None = None, rows: Tensor | None = None) -> CaptionBatch:
        """The batch with a pair of each of its rows: one by chance of several, the first without `streams`.

        `rows` [B]: its rows on the CPU, for a batch that is on its way to a device already, which would have to be waited for.
        """
        rows = batch.rows.cpu() if rows is None else rows
        number = torch.zeros_like(rows)
        if streams is not None and self.each > 1:
            number = torch.randint(self.each, (len(rows),), generator=streams.local("pair"))
        device = batch.c.text.device
        pair = Pair(*(sent(x, device) for x in self.of(rows, number)))
        return batch._replace(pair=pair if self.reflection is None else pair._replace(end=self.reflection(pair.end)))


class Part(NamedTuple):
    """What one file holds."""

    file: str
    rows: Tensor
    number: int  # which of the pairs of its rows


class Maker:
    """Makes the pairs of a data set by DDIM of the backbone's guided teacher, without reflection, as many parts as are not there yet.

    `guidance` (g_min, g_max); `taken`: rows -> their encoded batch; `batch`: rows at a time in training: without gradients there is room
    for four times as many. Every process makes a share of the parts.
    """

    def __init__(
        self,
        pairs: Pairs,
        backbone: Any,
        guidance: tuple[float, float],
        taken: Callable[[Tensor], CaptionBatch],
        batch: int,
        processes: Processes,
    ) -> None:
        self.pairs, self.backbone, self.guidance = pairs, backbone, guidance
        self.taken, self.batch, self.processes = taken, batch, processes
        teacher = backbone.role("teacher")
        teacher.unguided = guidance == (1, 1)
        self.policy = Policy(teacher, ddim)
        self.grid = Grid.named("trailing", pairs.steps, backbone.schedule.steps)

    def made(self, groups: Sequence[Tensor], captions: Captions) -> Stored:
        """The pairs of the rows of all groups, each of one shape. Raises ValueError for a folder of other pairs, or of something else."""
        parts, count = list(_parts(groups, self.pairs.each)), sum(len(rows) for rows in groups)
        folder = None if self.pairs.path is None else Path(self.pairs.path)
        here: list[int] = []
        if folder is not None:
            here = self.processes.by_first(lambda: self._open(folder, parts, captions, count))
        there = set(here)
        missing = [i for i in range(len(parts)) if i not in there]
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        mine = missing[self.processes.rank :: self.processes.world] if shared else missing

        def share() -> dict[int, dict[str, Tensor]]:
            found = {}
            meanwhile = Missing(mine, lambda i: folder is not None and _is_whole(folder / parts[i].file), folder or Path())
            told = counted(meanwhile, len(mine), "pairs by the teacher", self.processes.first, rows=lambda i: len(parts[i].rows))
            for i in self.processes.watching(told):
                found[i] = self._solved(parts[i])
                if folder is not None and (columns := found.pop(i)) and not meanwhile.is_made(i):
                    write_shard(folder / parts[i].file, columns, {"number": parts[i].number})
            return found

        solved = self.processes.by_all(share)
        if folder is not None:
            self.processes.wait()
            return Stored([read_shard(folder / part.file) for part in parts], count, self.pairs.each)
        gathered = self.processes.gathered(solved) if shared else [solved]
        every = {i: columns for one in gathered for i, columns in one.items()}
        return Stored([every[i] for i in range(len(parts))], count, self.pairs.each)

    @torch.no_grad()
    def _solved(self, part: Part) -> dict[str, Tensor]:
        """The columns of a part. Raises ValueError for an answer that is not finite in half precision."""
        low, high = self.guidance
        made: list[dict[str, Tensor]] = []
        for rows in part.rows.split(4 * self.batch):
            batch = self.taken(rows)
            shape = self.backbone.latent_shape if batch.latent is None else batch.latent.shape[1:]
            found = batch.rows.tolist()  # others, where rows cannot be read and are skipped
            streams = [Streams(self.pairs.seed, part.number, rank=row) for row in found]
            # Rounded first, so that what is stored is the very noise that the end belongs to.
            noise = torch.stack([torch.randn(tuple(shape), generator=s.local("pair-noise")) for s in streams]).half().float()
            u = torch.cat([torch.rand(1, generator=s.local("pair-guidance")) for s in streams])
            w = to_w(low) + (high - low) * u
            device = batch.c.text.device
            end = self.policy.sample(noise.to(device), self.grid, batch.c.guided(w.to(device))).float().cpu()
            if not bool(end.half().isfinite().all()):
                raise ValueError(f"the teacher's answer to one of the rows {found[0]} to {found[-1]} is not finite in half precision")
            made.append({"rows": torch.tensor(found), "number": torch.full((len(found),), part.number), "noise": noise, "end": end, "w": w})
        columns = {name: torch.cat([one[name] for one in made]) for name in made[0]}
        return {**columns, "noise": columns["noise"].half(), "end": columns["end"].half()}

    def _open(self, folder: Path, parts: Sequence[Part], captions: Captions, rows: int) -> list[int]:
        """Which of the parts lie in the folder already, which is begun where it is new. Raises ValueError for one of other pairs."""
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"model.pairs.path {folder} is a file: give a folder")
        mine = self._origin(captions, rows)
        filled = holds_anything(folder)  # before the look for the table, with which another process may just begin the folder
        theirs = read_table(folder / NAME)
        if not theirs:
            if filled:
                raise ValueError(f"model.pairs.path {folder} holds something else than pairs: give another folder, or an empty one")
            write_text(folder / NAME, json.dumps(mine, indent=1) + "\n")
        for name in mine:
            if theirs and theirs.get(name) != mine[name]:
                said = OTHER[name].format(theirs=theirs.get(name), mine=mine[name])
                raise ValueError(f"the pairs in {folder} were made {said}: remove the folder, or give another model.pairs.path")
        sweep(folder, inside=False)
        return [i for i, part in enumerate(parts) if _is_whole(folder / part.file)]

    def _origin(self, captions: Captions, rows: int) -> dict[str, Any]:
        """What the pairs depend on."""
        return {
            "teacher": self.backbone.fingerprint(),
            "encoders": self.backbone.encoders(),
            "captions": told(captions),
            "rows": rows,
            "guidance": list(self.guidance),
            "steps": self.pairs.steps,
            "each": self.pairs.each,
            "seed": self.pairs.seed,
        }


def stored(
    learner: Learner, captions: Captions, groups: Sequence[Group], taken: Callable[[Tensor], CaptionBatch], batch: int, trainer: Any
) -> Stored | None:
    """The pairs that a method asks for, of the rows of `captions` by their `groups`; None for a method that asks for none.

    They are found in their folder, or made in the precision of the `trainer` by all its processes.
    """
    pairs = learner.wants.pairs
    if pairs is None or not pairs.each:
        return None
    with trainer.precision_plugin.forward_context():
        made = Maker(pairs, learner.backbone, learner.guidance, taken, batch, Processes(trainer)).made([g.rows for g in groups], captions)
    # The teacher's own, in whose box the ends of its roll-outs lie.
    acts = () if learner.policies.teacher is None else learner.policies.teacher.modules()
    made.reflection = next((m.reflection for m in acts if isinstance(m, Denoiser)), None)
    return made


def told(captions: Captions) -> str:
    """A digest of the first caption of every row; of a set that was given encoded, of its text states."""
    try:
        return digest(text for start in range(0, len(captions), PART) for text in _texts(captions, start))
    except TypeError:
        tables = captions.tables if isinstance(captions, Encoded) else []
        parts = ((table, places) for table in tables for places in torch.arange(len(table.rows)).split(PART))
        return digest(_states(table, places) for table, places in parts)


def _states(table: Table, places: Tensor) -> bytes:
    """The text states of the first caption at each of `places`."""
    return table.context(places, Visit(table.rows[places].tolist())).text.float().contiguous().numpy().tobytes()


def _texts(captions: Captions, start: int) -> list[str]:
    rows = range(start, min(start + PART, len(captions)))
    try:
        return captions.prompts(rows)
    except (OSError, ValueError):
        if captions.on_error == "stop":
            raise
        return captions[rows].prompts


def _parts(groups: Sequence[Tensor], each: int) -> Iterator[Part]:
    chunks = [(rows, number) for group in groups for number in range(each) for rows in group.split(PART)]
    return (Part(f"pairs-{i:05d}.safetensors", rows, number) for i, (rows, number) in enumerate(chunks))


def _is_whole(file: Path) -> bool:
    try:
        about_shard(file)
    except ValueError:  # not there, or cut short
        return False
    return True
