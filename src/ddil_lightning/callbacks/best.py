"""The best student so far, by a number that callbacks publish."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any


class Best:
    """Hears a published number, `name`, and knows its best `value` so far and the `clock` of student updates that had it.

    What is better is said by the metric of that key (`validation/all_right_4` is of all_right, `shift/coverage` of coverage); of a number
    that is none's, such as a loss, less is better. `due`: there is a better one since `due` was last set to False. `fresh`: the number was
    published since `agree` was last called. `of`: what it was measured on, in words; a value of something else is no rival.
    Raises ValueError for a metric of which neither more nor less is better.
    """

    def __init__(self, name: str) -> None:
        self.name, self.of, self.fresh = name, "", False
        self.value: float | None = None
        self.clock: int | None = None
        self.due = self.heard = False
        self._sign: int | None = None

    def hear(self, clock: int, values: Mapping[str, float]) -> None:
        """Judge what is published at `clock`; what is not finite is never better."""
        value = values.get(self.name)
        if value is None:
            return
        self.heard = self.fresh = True
        if math.isfinite(value) and (self.value is None or self.sign * value > self.sign * self.value):
            self.value, self.clock, self.due = float(value), clock, True

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        if self._sign is None:
            self._sign = _sign(self.name)
        return self._sign

    def agree(self, broadcast: Callable[[Any], Any]) -> None:
        """Have all processes go by what the first has heard: many numbers are of the batches of their own process."""
        if self.fresh:
            self.value, self.clock, self.due = broadcast((self.value, self.clock, self.due))
            self.fresh = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers; a run that goes on holds new values against it."""
        return {"name": self.name, "of": self.of, "value": self.value, "clock": self.clock}

    def remember(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint, unless that is of another number."""
        if state.get("name") == self.name:
            self.value, self.clock, self.of = state["value"], state["clock"], state.get("of", "")

    def measured_on(self, what: str) -> None:
        """From now on the number is measured on this; the best of something else is forgotten."""
        if self.value is not None and self.of != what:
            self.value = self.clock = None
        self.of = what


def _sign(name: str) -> int:
    from ddil_lightning.evaluation.columns import POINTS
    from ddil_lightning.evaluation.registry import columns

    key = name.rpartition("/")[2]
    known = {column.key: column for column in (*POINTS, *columns())}
    found = known.get(re.sub(r"_\d+$", "", key))
    if found is not None and not found.better:
        raise ValueError(f"checkpoints.best {name}: of {found.key} neither more nor less is better; name another number")
    return 1 if found is not None and found.better == "higher" else -1
