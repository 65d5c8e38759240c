"""What a frozen network has answered to states of the replay buffer, kept beside them: it is asked once, however often a state is drawn.

An answer is a function of the state alone, (x_t, t, s, c, w), as long as the network and the grid are: within a stage. So it goes with its
state, by age, by eviction and at the end of a stage (METHODS 1.6), and all of them go where a run goes on with another `Learner.question`.
A step that the teacher took in a roll-out is no answer: its x_t was not rounded yet as the state is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.feed import Answer, Ask, named
from ddil_lightning.imitation.states import Chunk, Kept
from ddil_lightning.records import LatentBatch, sent, take

Storage = Literal["float32", "float16", "none"]

Find = Callable[[Tensor], Iterable[tuple[Chunk, Tensor, Tensor]]]
"""Slots [n] -> of every roll-out that holds some: itself, which of the n [k], and their rows in it [k]."""


class Arriving(NamedTuple):
    """Answers on their way from the device."""

    kind: str
    slot: Tensor  # [n]
    fields: tuple[Tensor, ...]  # [n, ...] each
    there: Any  # a CUDA event


class Answers:
    """Answers to the states that `find` finds by their slots, in the chunks that hold these, `every` one of which there is.

    `storage`: "float32" keeps them as they came, "float16" in half precision, "none" keeps none. With the first, a batch is answered in the
    very bits that its states had at first. A network that is asked for the missing rows alone answers them as it would in a whole batch up
    to the rounding of its kernels, which may depend on how many rows there are.
    """

    def __init__(self, storage: Storage, find: Find, every: Callable[[], Iterable[Chunk]]) -> None:
        self.storage, self._find, self._every = storage, find, every
        self.question: str | None = None
        self._confirmed = False
        self._arriving: list[Arriving] = []
        self._asked: tuple[Ask | None, object] = (None, None)

    def of(
        self,
        batch: LatentBatch,
        slot: Tensor,
        ask: Ask,
        alone: bool = True,
        question: Callable[[], str] = str,
        drawn: object = None,
    ) -> Answer:
        """`ask(batch)`, which asks for the rows alone that are not known and keeps what is answered to states of the buffer.

        `slot` [B], on the CPU: which states the rows are, -1 for none. `question`: what is asked besides the state, read once in a run;
        what was kept of another is forgotten. Unless this process may be `alone` in asking, at least one row is asked for: a network that
        is split over all of them waits for every one. `drawn`: the draw that the batch belongs to, by identity. Raises ValueError for a
        second question in a stage, and for an answer that cannot be kept.
        """
        if self.storage == "none":
            return ask(batch)
        self._check_one(ask, drawn)
        if not self._confirmed and bool((slot >= 0).any()):  # else nothing is known or kept, and the weights need not be read for it
            self._confirm(question())
        self.settle()
        kind = "unguided" if batch.c.w is None else "guided"
        known, kept = self.recall(slot, kind)
        asked, place = missing(slot, known)
        if not len(asked):
            if not alone:
                ask(take(batch, slice(1)))
            fields = tuple(sent(x, batch.t.device) for x in kept)
            return fields if len(fields) > 1 else fields[0]
        found = ask(batch if len(asked) == len(slot) else take(batch, sent(asked, batch.t.device)))
        new = (found,) if isinstance(found, Tensor) else found
        if bool((slot >= 0).any()) and not (isinstance(new, list | tuple) and all(isinstance(x, Tensor) for x in new)):
            raise ValueError(
                f"{named(ask)} answers with a {type(found).__name__}, and what is kept is a tensor [B, ...] or a tuple of such"
            )
        self._keep(kind, slot[asked], new)
        if len(asked) == len(slot):
            return found
        order = sent(place, batch.t.device)
        fields = tuple(torch.cat([a, *(sent(b, a.device).to(a.dtype) for b in kept[i : i + 1])])[order] for i, a in enumerate(new))
        return fields[0] if isinstance(found, Tensor) else fields

    def restore(self, question: str | None) -> None:
        """The chunks have come from a checkpoint, with answers to this question."""
        self.question, self._confirmed = question, False
        self._asked = (None, None)

    def _check_one(self, ask: Ask, drawn: object) -> None:
        """Raises ValueError for another question than the last one: its answers are kept by the state alone.

        A function that a step makes anew, a lambda or a partial one, is told by its code, and may then be asked once in a draw.
        """
        (last, before), self._asked = self._asked, (ask, drawn)
        again = last is None or ask == last or (_code(ask) == _code(last) and (drawn is None or drawn is not before))
        if not again:
            raise ValueError(
                f"feed.answered asks {named(last)} and {named(ask)}, and answers are kept by the state that was asked at alone: ask both "
                "in one answer(b), which returns a tuple"
            )

    def _confirm(self, question: str) -> None:
        if self.question != question:
            for chunk in self._every():
                chunk.answers.clear()
        self.question, self._confirmed = question, True

    def recall(self, slot: Tensor, kind: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(known [n], fields [k, ...]): for which of the states `slot` [n] there is an answer of a `kind`, and the fields of these k."""
        known, places, parts = torch.zeros(len(slot), dtype=torch.bool), [], []
        for chunk, rows, local in self._find(slot):
            kept = chunk.answers.get(kind)
            if kept is None:
                continue
            mine = kept.known[local]
            known[rows[mine]] = True
            places.append(rows[mine])
            parts.append([x[local[mine]] for x in kept.fields])
        if not parts:
            return known, ()
        order = torch.cat(places).argsort()
        columns = (torch.cat(column)[order] for column in zip(*parts, strict=True))
        return known, tuple(x.float() if x.dtype == torch.float16 else x for x in columns)

    def settle(self) -> None:
        """Put away what has arrived since."""
        arrived, self._arriving = self._arriving, []
        for one in arrived:
            one.there.synchronize()
            self._put(one.kind, one.slot, one.fields)

    def _keep(self, kind: str, slot: Tensor, fields: tuple[Tensor, ...]) -> None:
        mine = slot >= 0
        if not mine.any():
            return
        rows = sent(mine.nonzero()[:, 0], fields[0].device)
        kept = tuple(x.detach()[rows].to("cpu", non_blocking=True) for x in fields)
        if fields[0].is_cuda:
            # Put away by the next batch: waiting here would have the device wait for the step's next kernels.
            self._arriving.append(Arriving(kind, slot[mine], kept, torch.cuda.current_stream().record_event()))
        else:
            self._put(kind, slot[mine], kept)

    def _put(self, kind: str, slot: Tensor, fields: tuple[Tensor, ...]) -> None:
        for chunk, rows, local in self._find(slot):  # a state that has gone since is not found
            if kind not in chunk.answers:
                m, half = len(chunk.states.t), self.storage == "float16"
                dtypes = (torch.float16 if half and x.is_floating_point() else x.dtype for x in fields)
                empty = tuple(torch.zeros(m, *x.shape[1:], dtype=dtype) for x, dtype in zip(fields, dtypes, strict=True))
                chunk.answers[kind] = Kept(torch.zeros(m, dtype=torch.bool), empty)
            kept = chunk.answers[kind]
            kept.known[local] = True
            for mine, x in zip(kept.fields, fields, strict=True):
                mine[local] = x[rows].to(mine.dtype)


def _code(ask: Ask) -> tuple[Any, Any]:
    """(who asks, by which code) of a function, a method, what `partial` makes of one, or of something that can be called."""
    function = getattr(ask, "func", ask)
    code = getattr(getattr(function, "__func__", function), "__code__", function)
    return getattr(function, "__self__", None), code


def missing(slot: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(asked [m], place [B]): the rows of a batch to ask for, a state that was drawn twice once, and where every row's answer is among
    theirs, followed by those of the `known` [B] rows in order."""
    asked: list[int] = []
    place, of_slot, before = [], {}, 0
    for row, (s, is_known) in enumerate(zip(slot.tolist(), known.tolist(), strict=True)):
        if is_known:
            place.append(-1)
            continue
        if s < 0 or s not in of_slot:
            of_slot[s] = len(asked)
            asked.append(row)
        place.append(of_slot[s])
    for row, at in enumerate(place):
        if at < 0:
            place[row], before = len(asked) + before, before + 1
    return torch.tensor(asked, dtype=torch.long), torch.tensor(place, dtype=torch.long)


def saved(answers: Mapping[str, Kept]) -> dict[str, Any]:
    """A roll-out's answers for a checkpoint: copies, for they are written in place."""
    return {kind: {"known": kept.known.clone(), "fields": [x.clone() for x in kept.fields]} for kind, kept in answers.items()}


def restored(state: Mapping[str, Any]) -> dict[str, Kept]:
    """What `saved` has made."""
    return {kind: Kept(one["known"].clone(), tuple(x.clone() for x in one["fields"])) for kind, one in state.items()}
