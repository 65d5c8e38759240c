"""What of a data set was not as it should be: rows that were skipped, pictures that were enlarged."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ddil_lightning.data.raw import RawBatch
from ddil_lightning.processes import Processes


class Notices:
    """Rows of a data set that were skipped and pictures that were enlarged: the first of each is told at once, and how many at the end."""

    def __init__(self) -> None:
        self.skipped: set[int] = set()
        self.enlarged, self._read = 0, 0
        self._before, self._told = 0, False
        self._fresh: set[int] = set()  # of `skipped`: those that the other processes have not been told

    @property
    def count(self) -> int:
        """How many rows were skipped, and before: when the cache was made that stands in their place, or of data that were others."""
        return self._before + len(self.skipped)

    def hear(self, raw: RawBatch, rows: int) -> None:
        """Note a batch of a set of `rows` rows. Pictures are counted in the first pass alone."""
        log = logging.getLogger(__name__)
        if raw.skipped and not self._told:
            log.warning(f"{raw.skipped[0]}; it is skipped, the next row takes its place, and data/skipped counts such rows")
            self._told = True
        fresh = set(raw.gone) - self.skipped
        self.skipped |= fresh
        self._fresh |= fresh
        if self._read < rows:
            if raw.enlarged and not self.enlarged:
                log.warning("some pictures are smaller than data.captions.size and are enlarged, which blurs them")
            self.enlarged += raw.enlarged
            self._read += len(raw.rows)

    def join(self, processes: Processes) -> None:
        """Have the rows in every one of `processes` that any of them has skipped since they last asked. All ask together."""
        self.skipped.update(*processes.gathered(self._fresh))
        self._fresh = set()

    def state(self) -> dict[str, Any]:
        """What a run that goes on takes over by `restore`, after `join`."""
        return {"skipped": torch.tensor(sorted(self.skipped), dtype=torch.int64), "skipped_before": self._before}

    def restore(self, state: Mapping[str, Any], same: bool) -> None:
        """Go on with what was skipped before: every process with the same. Of data that are not the `same` any more a number names another
        row, and how many they were is all that is left of them."""
        known = torch.as_tensor(state.get("skipped", []), dtype=torch.int64).tolist()  # checkpoints of before have none
        self._before = state.get("skipped_before", 0) + (0 if same else len(known))
        if same:
            self.skipped |= set(known)
            self._fresh -= set(known)

    def recall(self, count: int) -> None:
        """Note how many rows were skipped when a cache was made: whoever trains on it reads no row that says so."""
        self._before = count

    def close(self) -> None:
        """Say, at the end of a run, how many rows were skipped and pictures enlarged."""
        say_notices(self.count, self.enlarged, self._read)


def say_notices(skipped: int, enlarged: int, read: int) -> None:
    """Say how many rows were skipped, and how many of the pictures that were read are enlarged; nothing of none."""
    log = logging.getLogger(__name__)
    if skipped:
        log.warning(f"{skipped} rows of the data could not be read and were skipped")
    if enlarged:
        log.warning(f"{enlarged} of {read} pictures were smaller than data.captions.size and were enlarged")
